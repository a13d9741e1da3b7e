"""A few rows of x at once: times by number of rows, and from which number on dense weights win."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from trapetum.figures.speed import shape_of
from trapetum.figures.style import (
    FAINT,
    INK,
    LOG,
    ROOF_COLOUR,
    add_key,
    colour,
    describe,
    device_name,
    label_of,
    method_of,
    new_figure,
    nothing,
    points,
    provenance,
    rgba,
    spread,
)
from trapetum.records import Record

_NONE_YET = "No product of several rows has been timed yet."


class Crossover(NamedTuple):
    """From which number of rows on a product with dense weights is faster than the codebook kernel.

    Attributes:
        kernel, rival: records of both sides at the fewest rows that both were timed with.
        rows: the fewest rows at which the rival is faster and stays so up to `most`; None: at none.
        fewest, most: rows compared.
    """

    kernel: Record
    rival: Record
    rows: int | None
    fewest: int
    most: int


def in_batches(records: Iterable[Record]) -> list[Record]:
    """The records of `bench.small_batches` among `records`."""
    return [r for r in records if r.config.get("beside") == "batch" and "rows" in r.config]


def crossovers(records: Iterable[Record], chain: str = "alone") -> list[Crossover]:
    """Every codebook kernel against every way with dense weights of the same device and shape.

    Args:
        records: `gemv_time` and `gemm_time` of `bench.small_batches`.
        chain: the kernel's launches, "alone" or "pdl".
    """
    found = []
    for group in _by_place(in_batches(records)).values():
        lines = _lines(group)
        kernels = [line for line in lines.values() if _is_kernel(line) and _chain(line) == chain]
        for kernel in kernels:
            rivals = [line for line in lines.values() if _is_rival(line, kernel)]
            found += [made for rival in rivals if (made := _crossover(kernel, rival))]
    return found


Line = dict[int, Record]  # by rows


def _by_place(records: Iterable[Record]) -> dict[tuple, list[Record]]:
    groups: dict[tuple, list[Record]] = {}
    for r in records:
        groups.setdefault((device_name(r), shape_of(r)), []).append(r)
    return groups


def _lines(records: Iterable[Record]) -> dict[str, Line]:
    """By label and rows, the newest record of each."""
    lines: dict[str, Line] = {}
    for r in sorted(records, key=lambda r: r.utc or ""):
        lines.setdefault(_name(r), {})[r.config["rows"]] = r
    return {name: dict(sorted(line.items())) for name, line in lines.items()}


def _name(record: Record) -> str:
    """The label, with the bits of the codes that a 16-bit dense matrix was made from."""
    label, bits = label_of(record), record.config.get("bits")
    expanded = record.method.startswith("dequantize-linear") and "-bit" not in label
    return f"{label} from {bits}-bit" if expanded else label


def _first(line: Line) -> Record:
    return next(iter(line.values()))


def _is_kernel(line: Line) -> bool:
    return _first(line).method == "codebook"


def _chain(line: Line) -> str:
    return _first(line).config.get("chain", "alone")


def _is_rival(line: Line, kernel: Line) -> bool:
    one = _first(line)
    same_bits = one.config.get("bits") == _first(kernel).config.get("bits")
    return one.method.startswith("linear-") or (one.method.startswith("dequantize-linear") and same_bits)


def _crossover(kernel: Line, rival: Line) -> Crossover | None:
    shared = [rows for rows in kernel if rows in rival]
    if not shared:
        return None
    won = None
    for rows in reversed(shared):
        if rival[rows].value >= kernel[rows].value:
            break
        won = rows
    return Crossover(kernel[shared[0]], rival[shared[0]], won, shared[0], shared[-1])


def crossover_sentences(records: Iterable[Record]) -> list[str]:
    """One sentence for each shape and kernel: which dense product is faster from how many rows on."""
    told: dict[str, list[str]] = {}
    for c in crossovers(records):
        where = f"{shape_of(c.kernel)}, {label_of(c.kernel)} on {device_name(c.kernel)}"
        told.setdefault(where, []).append(f"{_name(c.rival)} {_when(c)}")
    return [f"{where}: {'; '.join(parts)}." for where, parts in told.items()]


def _when(c: Crossover) -> str:
    if c.rows is None:
        return f"is faster at no number of rows from {c.fewest} to {c.most}"
    return (
        f"is faster from {c.rows} rows on"
        if c.rows > c.fewest
        else f"is faster at all of {c.fewest} to {c.most} rows"
    )


def batch_times(
    records: Sequence[Record], roof_gbps: float | None = None, title: str = "A few rows at once"
) -> go.Figure:
    """Time by number of rows, one panel a shape, one line a method; dotted where dequantizing first starts to win.

    Args:
        records: `gemv_time` and `gemm_time` of `bench.small_batches`, of one device.
        roof_gbps: read bandwidth: the dashed line is the time of the codebook product's bytes.
        title: above the figure.
    """
    found = in_batches(records)
    if not found:
        return nothing(title, _NONE_YET)
    places = _by_place(found)
    names = [shape for _, shape in places]
    figure = make_subplots(1, len(places), subplot_titles=names, horizontal_spacing=0.06)
    figure = new_figure(title, provenance(found, "us, by rows of x, in x out features"), 460, figure)
    figure.update_layout(margin_t=100)
    for col, group in enumerate(places.values(), start=1):
        _panel(figure, col, group, roof_gbps)
    counts = sorted({r.config["rows"] for r in found})
    # all of 1 to 8 would lie on each other where panels are narrow
    doubled = [n for n in counts if n & (n - 1) == 0]
    ticks = {"tickvals": doubled, "ticktext": [str(n) for n in doubled], "tickangle": 0}
    figure.update_xaxes(title="rows of x", type="log", **ticks)
    figure.update_yaxes(**LOG)
    figure.update_yaxes(title="time, us", col=1)
    return add_key(figure, found, 80)


def _panel(figure: go.Figure, col: int, group: Sequence[Record], roof_gbps: float | None) -> None:
    for name, line in _lines(group).items():
        rs = list(line.values())
        tint = colour(method_of(rs[0]), rs[0].config.get("bits"))
        dress = {"color": tint, "width": 1.5, "dash": "dot" if _chain(line) == "pdl" else "solid"}
        more = {"legendgroup": name, "showlegend": col == 1, "line": dress, "error_y": spread(rs)}
        trace = points(rs, list(line), [r.value for r in rs], name, tint, size=8, **more)
        figure.add_trace(trace.update(mode="lines+markers"), 1, col)
        if roof_gbps and _is_kernel(line) and _chain(line) == "alone":
            _ideal(figure, col, line, roof_gbps)
    expanded = [c for c in crossovers(group) if c.rival.method.startswith("dequantize-linear")]
    won = min((c.rows for c in expanded if c.rows is not None), default=None)
    if won is not None:
        figure.add_vline(x=won, line={"color": INK, "width": 1, "dash": "dot"}, row=1, col=col)
        axis = str(col) if col > 1 else ""
        figure.add_annotation(
            x=math.log10(won), y=0.5, xref=f"x{axis}", yref=f"y{axis} domain", xanchor="right", showarrow=False,
            text=f"dequantize from {won}", font={"size": 11, "color": FAINT},
        )  # fmt: skip


def _ideal(figure: go.Figure, col: int, line: Line, roof_gbps: float) -> None:
    shown = {rows: r.config["bytes"] / roof_gbps / 1e3 for rows, r in line.items() if "bytes" in r.config}
    first = not any(trace.name == "ideal: codes at the roof" for trace in figure.data)
    figure.add_trace(
        go.Scatter(
            x=list(shown), y=list(shown.values()), mode="lines", name="ideal: codes at the roof", showlegend=first,
            line={"color": ROOF_COLOUR, "dash": "dash", "width": 2}, hovertemplate="ideal %{y:.4g} us<extra></extra>",
        ),
        1,
        col,
    )  # fmt: skip


def batch_map(records: Sequence[Record], title: str = "The loser's map of small batches") -> go.Figure:
    """Shapes by rows: how many times faster the codebook kernel is than the fastest way with dense weights.

    Args:
        records: `gemv_time` and `gemm_time` of `bench.small_batches`, of one device.
        title: above the figure.
    """
    cells = batch_cells(records)
    if not cells:
        return nothing(title, _NONE_YET)
    places = list(dict.fromkeys(where for where, _ in cells))
    counts = sorted({rows for _, rows in cells})
    grid = [[cells.get((where, rows)) for rows in counts] for where in places]
    shown = [r for pair in cells.values() for r in pair]
    unit = "times faster than the fastest of dense and dequantize-then-dense; ✗ loses"
    figure = new_figure(title, provenance(shown, unit), 210 + 34 * len(places))
    figure.add_trace(
        go.Heatmap(
            x=[str(n) for n in counts], y=places, z=[[_shade(p) for p in line] for line in grid], zmid=0, zmin=-2, zmax=2,
            text=[[_text(p) for p in line] for line in grid], texttemplate="%{text}", xgap=2, ygap=2, showscale=False,
            hovertext=[[_hover(p) for p in line] for line in grid], hovertemplate="%{hovertext}<extra></extra>",
            colorscale=[[0, "#d9606a"], [0.5, "#f7f4ef"], [1, "#5f9fd3"]], textfont={"color": INK},
        )
    )  # fmt: skip
    figure.update_xaxes(title="rows of x", type="category", showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_layout(plot_bgcolor=rgba(FAINT, 0.08))
    return figure


def batch_cells(records: Iterable[Record]) -> dict[tuple[str, int], tuple[Record, Record]]:
    """By (shape and kernel, rows): the kernel's record and that of the fastest way with dense weights."""
    cells = {}
    for (_, shape), group in _by_place(in_batches(records)).items():
        lines = _lines(group)
        for name, kernel in lines.items():
            if not _is_kernel(kernel):
                continue
            rivals = [line for line in lines.values() if _is_rival(line, kernel)]
            for rows, record in kernel.items():
                timed = [line[rows] for line in rivals if rows in line]
                if timed:
                    cells[f"{shape}, {name}", rows] = record, min(timed, key=lambda r: r.value)
    return cells


def _gain(pair: tuple[Record, Record] | None) -> float | None:
    return pair[1].value / pair[0].value if pair else None


def _shade(pair: tuple[Record, Record] | None) -> float | None:
    return math.log2(_gain(pair)) if pair else None


def _text(pair: tuple[Record, Record] | None) -> str:
    gain = _gain(pair)
    return "" if gain is None else f"{gain:.2f}{' ✗' if gain < 1 else ''}"


def _hover(pair: tuple[Record, Record] | None) -> str:
    if pair is None:
        return "not measured"
    return f"<b>{_gain(pair):.2f} times {label_of(pair[1])}</b><br>{describe(pair[0])}"
