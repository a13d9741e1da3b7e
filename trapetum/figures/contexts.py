"""Speed and memory of a decode against the length of its context, by the format of the key and value cache."""

from collections.abc import Iterable, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from trapetum.figures.style import LOG, add_key, digits, new_figure, points, provenance, spread
from trapetum.memory import memory_estimate
from trapetum.records import Record, latest, select
from trapetum.shapes import KV_FORMATS, ModelShape

TINTS = {"fp16": "#5b6670", "int8": "#00838f", "int4": "#6a51a3"}
CONTEXTS = tuple(2**e for e in range(8, 18))
_TICKS = tuple(4**e for e in range(3, 9))


def cache_of(record: Record) -> str:
    """The cache of a record as a key of `KV_FORMATS`: one kept as the activations are counts as 16-bit."""
    kv = record.config.get("kv", "fp16")
    return kv if kv in KV_FORMATS else "fp16"


def bound_tok_s(
    shape: ModelShape, roof_gbps: float, context: int, kv: str, bits: int = 4, coded_head: bool = False
) -> float:
    """Tokens a second of a codebook model if a token at `context` took only the reading of its bytes."""
    codes = f"codebook-{bits}"
    nbytes = shape.bytes_per_token(codes, context, codes if coded_head else "fp16", kv)
    return roof_gbps * 1e9 / nbytes


def cache_gains(records: Iterable[Record]) -> dict[tuple[str, int], float]:
    """How many times faster a quantized cache is than the 16-bit one, by (format, context), where both were measured.

    Args:
        records: `context_speed` of one model and device.
    """
    at = {(cache_of(r), r.config["context"]): r.value for r in records if r.quantity == "context_speed"}
    quantized = [(kv, n) for kv, n in at if kv != "fp16" and ("fp16", n) in at]
    return {(kv, n): at[kv, n] / at["fp16", n] for kv, n in quantized}


def reach(records: Iterable[Record], model: str, coded_head: bool = False) -> list[Record]:
    """The newest `context_speed` records of a 4-bit codebook model, and its `decode_memory` at the same contexts."""
    own = [
        r
        for r in select(records, method="codebook", bits=4, model=model)
        if (r.config.get("lm_head") == "codebook") == coded_head
    ]
    speeds = latest(select(own, quantity="context_speed"))
    at = {(r.config["kv"], r.config["context"]) for r in speeds}
    memory = latest(select(own, quantity="decode_memory"))
    return [*speeds, *(r for r in memory if (r.config.get("kv"), r.config.get("context")) in at)]


def speed_by_context(
    records: Sequence[Record],
    shape: ModelShape,
    roof_gbps: float | None,
    title: str = "What a long context costs",
    bits: int = 4,
    coded_head: bool = False,
) -> go.Figure:
    """Tokens a second, and memory, by context and cache: dashed lines from bytes alone, points where measured.

    Args:
        records: `context_speed` and `decode_memory` of one codebook model on one device; none draws the lines alone.
        shape: of the model.
        roof_gbps: read bandwidth of the lines; None leaves them out.
        title: above the figure.
        bits, coded_head: of the model.
    """
    speeds = [r for r in records if r.quantity == "context_speed"]
    memory = [r for r in records if r.quantity == "decode_memory"]
    figure = make_subplots(
        1,
        2,
        subplot_titles=["speed", "memory: estimate as a line, peak as points"],
        horizontal_spacing=0.1,
    )
    figure.update_annotations(font_size=13)
    roof = f"dashed: bytes alone at {digits(roof_gbps)} GB/s" if roof_gbps else "no read bandwidth is known"
    made = provenance(speeds, "tok/s and GB") if speeds else "derived; not measured yet"
    figure = new_figure(title, f"{shape.name}, {bits}-bit codes, {roof}<br>{made}", 480, figure)
    for kv, tint in TINTS.items():
        _speed(figure, kv, tint, shape, roof_gbps, [r for r in speeds if cache_of(r) == kv], bits, coded_head)
        _memory(figure, kv, tint, shape, [r for r in memory if cache_of(r) == kv], bits, coded_head)
    ticks = {"tickvals": _TICKS, "ticktext": [f"{c // 1024} k" if c >= 1024 else str(c) for c in _TICKS]}
    figure.update_xaxes(title="tokens in the cache", tickangle=0, **{**LOG, **ticks})
    figure.update_yaxes(title="tok/s", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title="GB", rangemode="tozero", row=1, col=2)
    add_key(figure, [*speeds, *memory], gap_px=75)
    return figure.update_layout(margin_t=130)


def _line(figure, column: int, y: Sequence[float], kv: str, tint: str, unit: str, dash: str) -> None:
    figure.add_trace(
        go.Scatter(
            x=CONTEXTS, y=list(y), mode="lines", name=f"{kv} cache", legendgroup=kv, showlegend=column == 2,
            line={"color": tint, "dash": dash, "width": 1.8},
            hovertemplate=f"{kv} cache, derived from bytes: %{{y:.4g}} {unit} at %{{x}} tokens<extra></extra>",
        ), 1, column,
    )  # fmt: skip


def _speed(figure, kv, tint, shape, roof_gbps, rows: Sequence[Record], bits: int, coded_head: bool) -> None:
    if roof_gbps:
        y = [bound_tok_s(shape, roof_gbps, c, kv, bits, coded_head) for c in CONTEXTS]
        _line(figure, 1, y, kv, tint, "tok/s", "dash")
    _points(figure, 1, kv, tint, rows)


def _memory(figure, kv, tint, shape, rows: Sequence[Record], bits: int, coded_head: bool) -> None:
    y = [sum(memory_estimate(shape, bits, c, kv, coded_head).values()) / 1e9 for c in CONTEXTS]
    _line(figure, 2, y, kv, tint, "GB", "solid")
    _points(figure, 2, kv, tint, rows)


def _points(figure, column: int, kv: str, tint: str, rows: Sequence[Record]) -> None:
    rows = sorted(rows, key=lambda r: r.config["context"])
    if not rows:
        return
    x, y = [r.config["context"] for r in rows], [r.value for r in rows]
    marks = points(rows, x, y, f"{kv} cache, measured", tint, showlegend=False, legendgroup=kv)
    drawn = {"mode": "lines+markers", "line": {"color": tint, "width": 1}}
    figure.add_trace(marks.update(error_y=spread(rows), **drawn), 1, column)
