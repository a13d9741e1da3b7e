"""Speedups by shape, cold and warm, and the loser's map."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from trapetum.figures.speed import shape_of
from trapetum.figures.style import (
    FAINT,
    INK,
    ROOF_COLOUR,
    add_key,
    colour,
    describe,
    label_of,
    method_of,
    new_figure,
    nothing,
    points,
    provenance,
    rgba,
)
from trapetum.records import Record


class Pair(NamedTuple):
    """A product and its baseline on the same device, shape and cache state."""

    record: Record
    baseline: Record

    @property
    def speedup(self) -> float:
        """Baseline time over this one's: above 1 is faster."""
        return self.baseline.value / self.record.value

    @property
    def ideal(self) -> float | None:
        """The speedup if only bytes counted: the ratio of `config.bytes`."""
        own, base = self.record.config.get("bytes"), self.baseline.config.get("bytes")
        return base / own if own and base else None


def best_dense(records: Iterable[Record], prefer: str = "linear-fp16") -> str:
    """The dense method to divide by: `prefer`, unless another `linear-` method is over 10 % faster in the median shape.

    Raises:
        ValueError: no dense method has been timed.
    """
    us = {}
    for r in records:
        if r.quantity == "gemv_time" and r.method.startswith("linear-"):
            us.setdefault(r.method, {})[_place(r)] = r.value
    if not us:
        raise ValueError("no dense product has been timed; time linear-fp16 or linear-fp32 with the others.")
    prefer = prefer if prefer in us else next(iter(us))

    def gain(method: str) -> float:
        shared = [us[prefer][place] / us[method][place] for place in us[method] if place in us[prefer]]
        return statistics.median(shared) if shared else 0.0

    best = max(us, key=gain)
    return best if gain(best) > 1.1 else prefer


FASTEST = "fastest dense"


def is_dense(record: Record) -> bool:
    """Whether the product is PyTorch's own, of dense weights."""
    return record.method.startswith(("linear-", "mv-"))


def pairs(records: Iterable[Record], baseline: str = "linear-fp16") -> list[Pair]:
    """Every `gemv_time` record beside the `baseline` method's of the same device, shape and cache state.

    A record in a chain of launches is compared with a baseline in a chain if there is one, else with it alone. With
    `FASTEST` the baseline is the fastest dense product of each place, and dense products have no pair.
    """
    found = [r for r in records if r.quantity == "gemv_time" and "in_features" in r.config]
    bases: dict[tuple, Record] = {}
    for r in found:
        key = (*_place(r), r.config.get("chain", "alone"))
        if r.method == baseline or (
            baseline == FASTEST and is_dense(r) and (key not in bases or r.value < bases[key].value)
        ):
            bases[key] = r
    made = []
    for r in found:
        place = _place(r)
        base = bases.get((*place, r.config.get("chain", "alone"))) or bases.get((*place, "alone"))
        itself = r.method == baseline or (baseline == FASTEST and is_dense(r))
        if base is not None and not itself and r.method != "read":
            made.append(Pair(r, base))
    return made


def _place(record: Record) -> tuple:
    c = record.config
    return record.device.get("name"), c["in_features"], c["out_features"], c.get("l2", "cold")


def speedups(
    records: Sequence[Record], baseline: str = "linear-fp16", title: str = "Speedup by shape, cold and warm"
) -> go.Figure:
    """Speedup of each method over `baseline` by shape, one panel a cache state; losers lie below the line at 1.

    Args:
        records: `gemv_time` records, the baseline's among them.
        baseline: the dense method that every product of the same shape is divided by, or `FASTEST`.
        title: above the figure.
    """
    made = pairs(records, baseline)
    if not made:
        return nothing(title, f"No shape has been timed together with {baseline} yet.")
    states = [s for s in ("cold", "warm") if any(p.record.config.get("l2", "cold") == s for p in made)]
    names = [f"{state} cache" for state in states]
    figure = make_subplots(len(states), 1, shared_xaxes=True, subplot_titles=names, vertical_spacing=0.1)
    figure = new_figure(
        title, provenance([p.record for p in made], f"times faster than {baseline}"), figure=figure
    )
    shapes = sorted({shape_of(p.record) for p in made}, key=_weights)
    for row, state in enumerate(states, start=1):
        _speedup_panel(figure, row, [p for p in made if p.record.config.get("l2", "cold") == state], shapes)
    figure.update_yaxes(title="speedup", type="log", tickvals=[0.25, 0.5, 1, 2, 3, 4, 6, 8, 12, 16])
    figure.update_xaxes(categoryorder="array", categoryarray=shapes)
    figure.update_xaxes(title="in x out features, smallest first", row=len(states))
    figure.update_layout(height=160 + 300 * len(states), margin_t=100)
    crowded = len(shapes) > 8  # then the labels lean, and need room above the legend
    if crowded:
        figure.update_xaxes(tickangle=-35)
        figure.update_layout(height=220 + 300 * len(states), margin_b=170)
    return add_key(figure, [p.record for p in made], 120 if crowded else 60)


def _weights(shape: str) -> int:
    return math.prod(map(int, shape.split(" x ")))


def _speedup_panel(figure: go.Figure, row: int, made: Sequence[Pair], shapes: Sequence[str]) -> None:
    place = {"row": row, "col": 1, "exclude_empty_subplots": False}
    figure.add_hline(y=1, line={"color": INK, "width": 1.5}, **place)
    figure.add_hrect(y0=0.25, y1=1, fillcolor="#c8434f", opacity=0.08, line_width=0, **place)
    groups: dict[str, list[Pair]] = {}
    for pair in sorted(made, key=lambda p: shapes.index(shape_of(p.record))):
        groups.setdefault(label_of(pair.record), []).append(pair)
    for name, group in groups.items():
        rs = [p.record for p in group]
        tint = colour(method_of(rs[0]), rs[0].config.get("bits"))
        more = {"legendgroup": name, "showlegend": row == 1, "line": {"color": tint, "width": 1.5}}
        more["line"]["dash"] = "dot" if rs[0].config.get("chain") == "pdl" else "solid"
        x, y = [shape_of(r) for r in rs], [p.speedup for p in group]
        trace = points(rs, x, y, name, tint, size=9, **more)
        figure.add_trace(trace.update(mode="lines+markers", text=[_words(p) for p in group]), row, 1)
    fewest = [
        p for p in made if p.ideal and p.record.method == "codebook" and p.record.config.get("bits") == 4
    ]
    ideals = {shape_of(p.record): p.ideal for p in fewest}
    x = [s for s in shapes if s in ideals]
    line = {"color": ROOF_COLOUR, "dash": "dash", "width": 2}
    trace = go.Scatter(x=x, y=[ideals[s] for s in x], mode="lines", line=line, name="ideal at 4 bits: bytes alone",
                       legendgroup="ideal", showlegend=row == 1, hovertemplate="%{y:.2f}<extra></extra>")  # fmt: skip
    figure.add_trace(trace, row, 1)
    _name_losers(figure, row, made)


def _words(pair: Pair) -> str:
    ideal = f", {pair.ideal:.2f} if only bytes counted" if pair.ideal else ""
    return f"<b>{pair.speedup:.2f} times {pair.baseline.method}</b>{ideal}<br>{describe(pair.record)}"


def _name_losers(figure: go.Figure, row: int, made: Sequence[Pair]) -> None:
    ours = [
        p for p in made if p.speedup < 1 and p.record.method == "codebook" and p.record.config["bits"] == 4
    ]
    for pair in sorted(ours, key=lambda p: p.speedup)[:1]:
        figure.add_annotation(
            x=shape_of(pair.record), y=math.log10(pair.speedup), row=row, col=1, showarrow=True, ax=110, ay=18,
            text=f"4-bit loses: {pair.speedup:.2f}", font={"color": "#c8434f", "size": 11},
        )  # fmt: skip


def losers_map(
    records: Sequence[Record], baseline: str = "linear-fp16", title: str = "The loser's map"
) -> go.Figure:
    """Shapes by methods: the speedup over `baseline` in each cell, red and crossed where the method loses.

    Args:
        records: `gemv_time` records, the baseline's among them; every cache state makes its own rows.
        baseline: the dense method divided by, or `FASTEST`.
        title: above the figure.
    """
    made = pairs(records, baseline)
    if not made:
        return nothing(title, f"No shape has been timed together with {baseline} yet.")
    shapes = sorted({shape_of(p.record) for p in made}, key=_weights)
    rows = list(dict.fromkeys(_row_name(p.record) for p in made))
    grid = {(_row_name(p.record), shape_of(p.record)): p for p in made}
    cells = [[grid.get((row, shape)) for shape in shapes] for row in rows]
    z = [[math.log2(p.speedup) if p else None for p in line] for line in cells]
    text = [[_cell(p) for p in line] for line in cells]
    hover = [[_words(p) if p else "not measured" for p in line] for line in cells]
    figure = new_figure(
        title, provenance([p.record for p in made], f"times faster than {baseline}; ✗ loses, ? suspect")
    )
    figure.add_trace(
        go.Heatmap(
            x=shapes, y=rows, z=z, zmid=0, zmin=-2, zmax=2, text=text, texttemplate="%{text}", xgap=2, ygap=2,
            colorscale=[[0, "#d9606a"], [0.5, "#f7f4ef"], [1, "#5f9fd3"]], hovertext=hover, textfont={"color": INK},
            hovertemplate="%{hovertext}<extra></extra>", showscale=False,
        )
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(title="in x out features, smallest first", showgrid=False)
    figure.update_layout(height=190 + 34 * len(rows), plot_bgcolor=rgba(FAINT, 0.08))
    return figure


def _row_name(record: Record) -> str:
    return f"{label_of(record)}, {record.config.get('l2', 'cold')}"


def _cell(pair: Pair | None) -> str:
    if pair is None:
        return ""
    return f"{pair.speedup:.2f}{' ✗' if pair.speedup < 1 else ''}{' ?' if pair.record.suspect else ''}"
