"""Times of one matrix-vector product: the ladder of kernels, and dequantize-then-multiply against fused."""

import math
from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from trapetum.figures.style import (
    INK,
    LOG,
    ROOF_COLOUR,
    add_key,
    colour,
    digits,
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


def shape_of(record: Record) -> str:
    """`4096 x 11008`, in_features x out_features."""
    return f"{record.config['in_features']} x {record.config['out_features']}"


def ladder(
    records: Sequence[Record],
    errors: Sequence[Record] = (),
    roof_gbps: float | None = None,
    title: str = "The kernel ladder",
) -> go.Figure:
    """One bar a rung: time, with the ideal time of its bytes, and beside it the error against float64.

    Args:
        records: `gemv_time` records of one shape, in the order of the rungs.
        errors: `output_error` records; matched to rungs by their label.
        roof_gbps: read bandwidth: the ideal time is `bytes / roof_gbps`.
        title: above the figure.
    """
    if not records:
        return nothing(title, "No product has been timed yet.")
    names = [label_of(r) for r in records]
    matched = {label_of(e, chain=False): e for e in errors if e.value > 0}
    rows = [
        (n, e) for n, r in zip(names, records, strict=True) if (e := matched.get(label_of(r, chain=False)))
    ]
    widths = [0.64, 0.36] if rows else [0.995, 0.005]
    figure = make_subplots(1, 2, shared_yaxes=True, column_widths=widths, horizontal_spacing=0.04)
    new_figure(title, _shapes(records), 200 + 46 * len(records), figure)
    tints = [colour(method_of(r), r.config.get("bits")) for r in records]
    figure.add_trace(_bars(records, names, tints), 1, 1)
    for tint in dict.fromkeys(tints):
        group = [(r, n) for r, n, t in zip(records, names, tints, strict=True) if t == tint]
        rs, ns = zip(*group, strict=True)
        figure.add_trace(
            points(rs, [r.value for r in rs], ns, ns[0], tint, showlegend=False, error_x=spread(rs)), 1, 1
        )
    if roof_gbps:
        figure.add_trace(_ideal_ticks(records, names, roof_gbps), 1, 1)
    if rows:
        ns, es = zip(*rows, strict=True)
        figure.add_trace(points(es, [e.value for e in es], ns, "error", INK, showlegend=False), 1, 2)
        figure.update_xaxes(
            title="relative error against float64",
            type="log",
            **_error_ticks([e.value for e in es]),
            tickangle=0,
            col=2,
        )
    figure.update_xaxes(visible=bool(rows), col=2)
    figure.update_xaxes(title="time, us", range=[0, 1.25 * max(r.value for r in records)], col=1)
    figure.update_yaxes(autorange="reversed", categoryorder="array", categoryarray=list(dict.fromkeys(names)))
    return add_key(figure, [*records, *(e for _, e in rows)])


def _error_ticks(errors: Sequence[float]) -> dict:
    """Ticks of a logarithmic axis: decades, and 2 and 5 between them where the errors span fewer than two."""
    low, high = (math.floor(math.log10(pick(errors))) for pick in (min, max))
    steps = (1, 2, 5) if high - low < 2 else (1,)
    values = [m * 10.0**e for e in range(low, high + 2) for m in steps]
    return {"tickvals": values, "ticktext": [f"{v:.0e}".replace("e-0", "e-") for v in values]}


def _shapes(records: Sequence[Record]) -> str:
    shapes = list(dict.fromkeys(shape_of(r) for r in records if "in_features" in r.config))
    caches = list(dict.fromkeys(r.config["l2"] for r in records if r.config.get("l2")))
    unit = f"us, {', '.join(shapes)}" + (f", {' and '.join(caches)} cache" if caches else "")
    return provenance(records, unit)


def _bars(records: Sequence[Record], names: Sequence[str], tints: Sequence[str]) -> go.Bar:
    fills = [rgba(tint, 0.0 if r.suspect else 0.45) for r, tint in zip(records, tints, strict=True)]
    return go.Bar(
        y=list(names), x=[r.value for r in records], orientation="h", width=0.6, showlegend=False, hoverinfo="skip",
        marker={"color": fills, "line": {"color": list(tints), "width": 1.5}},
        text=[f"      {digits(r.value)} us" for r in records], textposition="outside", cliponaxis=False,
    )  # fmt: skip


def _ideal_ticks(records: Sequence[Record], names: Sequence[str], roof_gbps: float) -> go.Scatter:
    rows = [
        (r.config["bytes"] / roof_gbps / 1e3, n)
        for r, n in zip(records, names, strict=True)
        if "bytes" in r.config
    ]
    return go.Scatter(
        x=[x for x, _ in rows], y=[n for _, n in rows], mode="markers",
        name=f"ideal: bytes / {digits(roof_gbps)} GB/s",
        marker={"symbol": "line-ns-open", "size": 26, "color": ROOF_COLOUR, "line": {"width": 3}},
        hovertemplate="ideal %{x:.4g} us<extra></extra>",
    )  # fmt: skip


def dequantize_or_fuse(
    records: Sequence[Record],
    roof_gbps: float | None = None,
    title: str = "Dequantize then multiply, or fuse",
) -> go.Figure:
    """Times by shape of a dense product, dequantize-then-multiply, and the fused codebook product.

    Args:
        records: `gemv_time` records of methods such as `linear-fp16`, `dequantize-linear` and `codebook`.
        roof_gbps: read bandwidth: the ideal time of the bytes that each way must move.
        title: above the figure.
    """
    found = [r for r in records if r.quantity == "gemv_time" and "in_features" in r.config]
    if not found:
        return nothing(title, "Neither way has been timed yet.")
    figure = new_figure(title, _shapes(found), height=460)
    groups: dict[str, list[Record]] = {}
    for r in found:
        groups.setdefault(label_of(r), []).append(r)
    for number, (name, group) in enumerate(groups.items()):
        tint = colour(method_of(group[0]), group[0].config.get("bits"))
        _group_of_bars(figure, group, [shape_of(r) for r in group], name, tint, number, len(groups))
        if roof_gbps:
            _group_of_ideals(figure, group, number, len(groups), roof_gbps)
    shapes = list(dict.fromkeys(shape_of(r) for r in found))
    figure.update_xaxes(tickvals=list(range(len(shapes))), ticktext=shapes, title="in x out features")
    figure.update_yaxes(title="time, us", **LOG)
    _place_groups(figure, shapes)
    return add_key(figure, found)


def _offset(number: int, count: int) -> float:
    return (number - (count - 1) / 2) * 0.8 / count


def _group_of_bars(figure, group, shapes, name, tint, number, count) -> None:
    """One method's bars, at `shapes` (replaced by numbers in `_place_groups`) moved by its place in the group."""
    x = [(shape, _offset(number, count)) for shape in shapes]
    figure.add_trace(
        go.Bar(
            customdata=x, x=list(range(len(x))), y=[r.value for r in group], width=0.72 / count, name=name,
            marker={"color": rgba(tint, 0.45), "line": {"color": tint, "width": 1.2}}, hoverinfo="skip",
            text=[digits(r.value) for r in group], textposition="outside", textfont={"size": 10}, cliponaxis=False,
        )
    )  # fmt: skip
    marks = points(group, range(len(x)), [r.value for r in group], name, tint, size=8, showlegend=False)
    marks.update(customdata=x, error_y=spread(group))
    figure.add_trace(marks)


def _group_of_ideals(figure, group, number, count, roof_gbps) -> None:
    kept = [r for r in group if "bytes" in r.config]
    shown = not any(t.name == "ideal: bytes / roof" for t in figure.data)
    figure.add_trace(
        go.Scatter(
            customdata=[(shape_of(r), _offset(number, count)) for r in kept], x=list(range(len(kept))),
            y=[r.config["bytes"] / roof_gbps / 1e3 for r in kept], mode="markers", name="ideal: bytes / roof",
            showlegend=shown, hovertemplate="ideal %{y:.4g} us<extra></extra>",
            marker={"symbol": "line-ew-open", "size": 16, "color": ROOF_COLOUR, "line": {"width": 3}},
        )
    )  # fmt: skip


def _place_groups(figure: go.Figure, shapes: Sequence[str]) -> None:
    for trace in figure.data:
        if trace.customdata is not None:
            trace.x = [shapes.index(shape) + offset for shape, offset in trace.customdata]
            trace.customdata = None
