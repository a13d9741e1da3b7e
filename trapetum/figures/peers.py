"""Whole decodes of everybody beside each other: speed, bandwidth and memory of each program on one model and device."""

from collections.abc import Iterable, Sequence

import plotly.graph_objects as go

from trapetum.figures.style import (
    INK,
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
from trapetum.record_gate import implied_gbps
from trapetum.records import Record, latest


def fastest_each(records: Iterable[Record]) -> list[Record]:
    """The fastest plain decode of each method and bits, fastest first: one row at once, and a 16-bit cache.

    Args:
        records: `decode_speed` of one model on one device; what was never one program's decode (`byte-limit`) and steps
            without products are left out.
    """
    best: dict[tuple, Record] = {}
    for r in latest(r for r in records if r.quantity == "decode_speed"):
        config = r.config
        special = config.get("kv") in ("int8", "int4") or config.get("rows") not in (None, 1)
        if special or config.get("linears") == "none" or r.method == "byte-limit":
            continue
        key = r.method, config.get("bits"), _dtype(r), r.kind
        if key not in best or r.value > best[key].value:
            best[key] = r
    return sorted(best.values(), key=lambda r: -r.value)


def peers(
    records: Sequence[Record],
    roof_gbps: float | None = None,
    title: str = "Whole decodes by everybody",
    memory: Sequence[Record] = (),
) -> go.Figure:
    """Tokens a second by program, with the bandwidth that it implies and its memory.

    Args:
        records: `decode_speed` records of one model on one device, drawn in this order.
        roof_gbps: read bandwidth; each bar's byte bound is drawn where the bytes of its token are known.
        title: above the figure.
        memory: any records; the `decode_memory` that agrees in method, bits and stage is written beside the bar.
    """
    found = [r for r in records if r.quantity == "decode_speed"]
    if not found:
        return nothing(title, "No decode by anybody is on record for this model and device yet.")
    models = ", ".join(dict.fromkeys(str(r.config.get("model", "")) for r in found))
    names = [_name(r) for r in found]
    figure = new_figure(
        title, provenance(found, f"tok/s at batch 1, {models}"), max(260, 190 + 44 * len(found))
    )
    tints = [colour(method_of(r), r.config.get("bits")) for r in found]
    y = list(range(len(found)))
    figure.add_trace(
        go.Bar(
            y=y, x=[r.value for r in found], orientation="h", width=0.7, showlegend=False, hoverinfo="skip",
            marker={"color": [rgba(t, 0.5) for t in tints], "line": {"color": tints, "width": 1.3}},
        )
    )  # fmt: skip
    marks = points(found, [r.value for r in found], y, "", INK, size=8, showlegend=False)
    figure.add_trace(marks.update(error_x=spread(found), marker_color=tints))
    if roof_gbps:
        figure.add_trace(_bounds(found, y, roof_gbps))
    for place, r in zip(y, found, strict=True):
        figure.add_annotation(
            x=r.p80 or r.value, y=place, text=_says(r, roof_gbps, memory), showarrow=False, xanchor="left", xshift=9,
            bgcolor="rgba(255,255,255,0.9)", borderpad=1, font={"size": 12},
        )  # fmt: skip
    figure.update_yaxes(tickvals=y, ticktext=names, autorange="reversed")
    figure.update_xaxes(title="tok/s", rangemode="tozero", range=[0, 1.35 * _highest(found, roof_gbps)])
    return add_key(figure, found)


def _name(record: Record) -> str:
    config = record.config
    more = [str(config[k]) for k in ("stage", "host", "format", "quant", "range") if config.get(k)]
    if config.get("lm_head") == "codebook":
        more.append("codes in the head")
    dtype = _dtype(record)
    said = [dtype] if dtype and dtype not in label_of(record) else []
    return ", ".join([label_of(record), *said, *more])


def _dtype(record: Record) -> str | None:
    """The dtype of dense weights that were measured; what is quantized is told by its bits."""
    dense = record.kind == "measured" and (record.config.get("bits") or 16) >= 16
    return record.config.get("dtype") if dense else None


def _bound(record: Record, roof_gbps: float | None) -> float | None:
    nbytes = record.config.get("bytes")
    return roof_gbps * 1e9 / nbytes if roof_gbps and nbytes else None


def _highest(found: Sequence[Record], roof_gbps: float | None) -> float:
    return max([r.value for r in found] + [b for r in found if (b := _bound(r, roof_gbps))])


def _says(record: Record, roof_gbps: float | None, memory: Sequence[Record]) -> str:
    words, moved = [f"<b>{digits(record.value)}</b>"], implied_gbps(record)
    if moved is not None:
        share = f" ({moved / roof_gbps:.0%} of read)" if roof_gbps else ""
        words.append(f"{digits(moved)} GB/s{share}")
    peak = _partner(record, memory)
    return " · ".join([*words, *([f"{digits(peak.value)} GB"] if peak else [])])


def _partner(record: Record, memory: Sequence[Record]) -> Record | None:
    keys = ("model", "bits", "dtype", "stage", "lm_head", "context")
    same = [
        r
        for r in memory
        if r.quantity == "decode_memory"
        and r.method == record.method
        and all(r.config.get(k) == record.config.get(k) for k in keys)
    ]
    return same[-1] if same else None


def _bounds(found: Sequence[Record], y: Sequence[float], roof_gbps: float) -> go.Scatter:
    xs, ys = [], []
    for place, r in zip(y, found, strict=True):
        bound = _bound(r, roof_gbps)
        if bound:
            xs += [bound, bound, None]
            ys += [place - 0.42, place + 0.42, None]
    return go.Scatter(
        x=xs, y=ys, mode="lines", name=f"byte bound at {digits(roof_gbps)} GB/s",
        line={"color": ROOF_COLOUR, "dash": "dash", "width": 2},
        hovertemplate="byte bound %{x:.4g} tok/s<extra></extra>",
    )  # fmt: skip
