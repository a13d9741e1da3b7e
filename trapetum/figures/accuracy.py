"""What fewer bits cost: perplexity and weight error by bits and method."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from trapetum.figures.style import (
    FAINT,
    LOG,
    ROOF_COLOUR,
    add_key,
    colour,
    digits,
    new_figure,
    nothing,
    points,
    provenance,
    spread,
)
from trapetum.records import Record


def bits_of(record: Record) -> float | None:
    """Bits a weight: with the overhead if the record says so, else the bits of a code."""
    return record.config.get("bits_per_weight") or record.config.get("bits")


def protocol_of(record: Record) -> str:
    """What makes two perplexities comparable: model, text, window, stride and number of tokens."""
    config = record.config
    parts = [str(config[key]) for key in ("model", "dataset", "text") if config.get(key)]
    if config.get("protocol"):
        parts.append(f"{config['protocol']}")
    counted = [f"{key} {config[key]}" for key in ("window", "stride", "tokens") if config.get(key)]
    return ", ".join([*parts, *([] if config.get("protocol") else counted)])


def perplexity_by_bits(
    records: Sequence[Record],
    published: Sequence[Record] = (),
    title: str = "Perplexity against bits a weight",
) -> go.Figure:
    """Perplexity against bits by method with intervals; published figures in panels of their own, one a protocol.

    Args:
        records: measured `perplexity` records of one protocol; method `fp` is the model as it is: the ideal line.
        published: published ones; each protocol with at least two methods has its own panel; two are shown,
            those that state their window first.
        title: above the figure.
    """
    panels = ([("measured: " + protocol_of(records[0]), list(records))] if records else []) + _panels(
        published
    )
    if not panels:
        return nothing(title, "No perplexity has been measured yet.")
    figure = make_subplots(
        1, len(panels), subplot_titles=[_broken(name) for name, _ in panels], horizontal_spacing=0.1
    )
    figure = new_figure(title, provenance([*records, *published], "perplexity, lower is better"), 500, figure)
    seen: set[str] = set()
    for column, (_, group) in enumerate(panels, start=1):
        _draw_panel(figure, column, group, seen)
    figure.update_xaxes(title="bits a weight", dtick=1)
    figure.update_yaxes(title="perplexity")
    figure.update_annotations(font_size=12)
    figure.update_layout(margin_t=130)
    return add_key(figure, [r for _, group in panels for r in group])


def _panels(published: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    groups: dict[str, list[Record]] = {}
    for r in published:
        groups.setdefault(protocol_of(r), []).append(r)
    chosen = [(f"published: {name}", g) for name, g in groups.items() if len({r.method for r in g}) > 1]
    return sorted(chosen, key=lambda pair: (pair[1][0].config.get("window") is None, -len(pair[1])))[:2]


def _broken(text: str, width: int = 34) -> str:
    return "<br>".join(textwrap.wrap(text, width))


def _draw_panel(figure: go.Figure, column: int, group: Sequence[Record], seen: set[str]) -> None:
    for base in [r for r in group if r.method == "fp"][:1]:
        line = {"color": ROOF_COLOUR, "dash": "dash", "width": 2}
        note = {"text": f"unquantized {digits(base.value)}", "font": {"color": ROOF_COLOUR, "size": 11}}
        place = {"row": 1, "col": column, "exclude_empty_subplots": False}
        figure.add_hline(
            y=base.value, line=line, annotation=note, annotation_position="bottom right", **place
        )
    for method in dict.fromkeys(r.method for r in group if r.method != "fp"):
        rows = sorted((r for r in group if r.method == method and bits_of(r)), key=bits_of)
        if rows:
            more = {"legendgroup": method, "showlegend": method not in seen, "line": {"width": 1.3}}
            trace = points(
                rows, [bits_of(r) for r in rows], [r.value for r in rows], method, colour(method), **more
            )
            figure.add_trace(trace.update(mode="lines+markers", error_y=_interval(rows)), 1, column)
            seen.add(method)
    values = [r.value for r in group]
    if max(values) > 4 * min(values):
        figure.update_yaxes(row=1, col=column, **LOG)


def _interval(records: Sequence[Record]) -> dict | None:
    """Error bars from `config.interval`, the bootstrap's, where there is one."""
    if not all(_pair(r) for r in records):
        return None
    high = [max(0.0, r.config["interval"][1] - r.value) for r in records]
    low = [max(0.0, r.value - r.config["interval"][0]) for r in records]
    return {
        "type": "data",
        "symmetric": False,
        "array": high,
        "arrayminus": low,
        "thickness": 1.2,
        "width": 4,
    }


def _pair(record: Record) -> bool:
    return isinstance(record.config.get("interval"), (list, tuple)) and len(record.config["interval"]) == 2


def weight_error(records: Sequence[Record], title: str = "Weight error against bits a weight") -> go.Figure:
    """Relative squared weight error, log scale, against bits by method.

    Args:
        records: `weight_error` records, ||W - Q||^2 / ||W||^2.
        title: above the figure.
    """
    found = [r for r in records if r.quantity == "weight_error" and r.value > 0 and bits_of(r)]
    if not found:
        return nothing(title, "No weight error has been measured yet.")
    figure = new_figure(title, provenance(found, "||W - Q||² / ||W||², lower is better"))
    for method in dict.fromkeys(r.method for r in found):
        rows = sorted((r for r in found if r.method == method), key=bits_of)
        more = {"error_y": spread(rows), "line": {"width": 1.3}}
        trace = points(
            rows, [bits_of(r) for r in rows], [r.value for r in rows], method, colour(method), **more
        )
        figure.add_trace(trace.update(mode="lines+markers"))
    figure.update_xaxes(title="bits a weight", dtick=1)
    figure.update_yaxes(title="relative squared error", type="log", dtick=1, exponentformat="power")
    return add_key(figure, found)


@dataclass(frozen=True)
class Loss:
    """What quantizing cost in perplexity, against the same model on the same text.

    Attributes:
        record: the quantized model's `perplexity` record.
        nats: ln(perplexity / unquantized perplexity): the rise in nats a token.
        interval: 95 % paired bootstrap interval of `nats` over windows, or None where windows are not recorded.
        left: `nats` over that of round-to-nearest at the same bits: the share of its loss that is left, or None.
        left_interval: 95 % paired bootstrap interval of `left`, or None where the interval of round-to-nearest holds no loss.
    """

    record: Record
    nats: float
    interval: tuple[float, float] | None
    left: float | None
    left_interval: tuple[float, float] | None = None

    @property
    def percent(self) -> float:
        """The rise of the perplexity in per cent."""
        return 100 * math.expm1(self.nats)


def losses(records: Sequence[Record]) -> list[Loss]:
    """The loss of each quantized model against method `fp`, and what is left of round-to-nearest's.

    Both models score the same windows, so windows are drawn in pairs: a text that is hard for both cancels, and the
    interval is far narrower than that of either perplexity.

    Args:
        records: `perplexity` records, measured or published.

    Returns:
        a loss for each quantized record, in the order given; none without the `fp` record.

    Raises:
        ValueError: the records are of more than one protocol, whose perplexities do not compare.
    """
    protocols = sorted({protocol_of(r) for r in records})
    if len(protocols) > 1:
        raise ValueError(
            f"perplexities of {len(protocols)} protocols do not compare: {'; '.join(protocols)}."
        )
    base = next((r for r in records if r.method == "fp"), None)
    if base is None:
        return []
    nearest = {bits_of(r): r for r in records if r.method == "rtn"}
    return [_loss(r, base, nearest.get(bits_of(r))) for r in records if r.method != "fp"]


def _loss(record: Record, base: Record, nearest: Record | None) -> Loss:
    nats = math.log(record.value / base.value)
    worst = math.log(nearest.value / base.value) if nearest else 0.0
    rise, rises = _drawn_rises(record, base), nearest and _drawn_rises(nearest, base)
    shown = rises is not None and rise is not None and np.quantile(rises, 0.025) > 0
    return Loss(
        record,
        nats,
        _percentiles(rise) if rise is not None else None,
        nats / worst if worst > 0 else None,
        _percentiles(rise / rises) if shown else None,
    )


def _drawn_rises(record: Record, base: Record, n_boot: int = 2000) -> np.ndarray | None:
    """Mean rises over windows drawn with replacement, the same draws for every record; a window weighs what it scores."""
    if len(record.samples) != len(base.samples) or len(base.samples) < 2:
        return None
    rise = np.log(record.samples) - np.log(base.samples)
    scored = np.full(len(rise), float(record.config["stride"]))
    scored[0] = record.config["window"] - 1
    drawn = np.random.default_rng(0).integers(0, len(rise), size=(n_boot, len(rise)))
    return (rise * scored)[drawn].sum(1) / scored[drawn].sum(1)


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def codebooks_of_channel(
    weights: Sequence[float],
    codebooks: Mapping[str, Sequence[float]],
    where: str,
    title: str = "One output channel and its codebooks",
) -> go.Figure:
    """Histogram of one row of weights; below it, a tick for each value that a method's codebook gives the row.

    Args:
        weights: the row, [in_features].
        codebooks: by method, the values of this row's codebook, [n_codes].
        where: what the row is, e.g. "builtin, layers.0.q_proj, channel 7"; stands under the title.
        title: above the figure.

    Raises:
        ValueError: no weights.
    """
    row = np.asarray(weights, dtype=float)
    if not row.size:
        raise ValueError("the channel has no weights; give one row of a weight matrix.")
    figure = make_subplots(2, 1, shared_xaxes=True, row_heights=[0.68, 0.32], vertical_spacing=0.05)
    figure = new_figure(
        title, f"{where} · {row.size} weights, exact counts; a tick is a codebook value", 470, figure
    )
    counts, edges = np.histogram(row, bins=64)
    bar = {
        "marker_color": FAINT,
        "name": "weights",
        "hovertemplate": "%{y} weights near %{x:.3g}<extra></extra>",
    }
    figure.add_trace(go.Bar(x=(edges[1:] + edges[:-1]) / 2, y=counts, showlegend=False, **bar), 1, 1)
    for method, values in codebooks.items():
        figure.add_trace(_ticks(method, np.asarray(values, dtype=float), row), 2, 1)
    figure.update_xaxes(title="weight (no unit)", row=2, col=1)
    figure.update_yaxes(title="weights a bin", row=1, col=1)
    figure.update_yaxes(autorange="reversed", row=2, col=1)
    return figure.update_layout(bargap=0.05)


def _ticks(method: str, values: np.ndarray, row: np.ndarray) -> go.Scatter:
    """One tick a codebook value; the hover text counts the weights that are nearest to it."""
    nearest = np.abs(row[:, None] - values[None, :]).argmin(1)
    text = [
        f"{method}: {v:.4g}, for {n} weights"
        for v, n in zip(values, np.bincount(nearest, minlength=len(values)), strict=True)
    ]
    marker = {"symbol": "line-ns", "size": 20, "line": {"width": 2.5, "color": colour(method)}}
    hover = {"text": text, "hovertemplate": "%{text}<extra></extra>", "showlegend": False}
    return go.Scatter(x=values, y=[method] * len(values), mode="markers", name=method, marker=marker, **hover)
