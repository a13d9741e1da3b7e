"""Whole decode steps: speed by stage against the byte bound, and the waterfall of a token's time."""

from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from trapetum.figures.style import (
    FAINT,
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
from trapetum.records import Record

PARTS = ("#1f6fb2", "#e08e0b", "#6a51a3", "#2a9d5c", "#d4508b", "#8f9aa3", "#8a5a2b", "#17a2a2")


def decode_stages(
    records: Sequence[Record], roof_gbps: float | None = None, title: str = "Decode, stage by stage"
) -> go.Figure:
    """Tokens a second by stage and method, with GB/s and the share of the byte bound on each bar.

    Args:
        records: `decode_speed` records with `config.stage` and `config.bytes` (of one token).
        roof_gbps: read bandwidth: the bound is `roof_gbps / bytes` tokens a second.
        title: above the figure.
    """
    found = [r for r in records if r.quantity == "decode_speed"]
    if not found:
        return nothing(title, "No decode has been measured yet.")
    figure = new_figure(title, provenance(found, _what(found)), height=480)
    stages = list(dict.fromkeys(_stage(r) for r in found))
    groups: dict[str, list[Record]] = {}
    for r in found:
        groups.setdefault(label_of(r), []).append(r)
    for number, (name, group) in enumerate(groups.items()):
        offset, width = (number - (len(groups) - 1) / 2) * 0.84 / len(groups), 0.76 / len(groups)
        x = [stages.index(_stage(r)) + offset for r in group]
        tint = colour(method_of(group[0]), group[0].config.get("bits"))
        figure.add_trace(_decode_bars(group, x, name, tint, width))
        marks = points(group, x, [r.value for r in group], name, tint, size=8, showlegend=False)
        figure.add_trace(marks.update(error_y=spread(group)))
        if roof_gbps:
            figure.add_trace(_bounds(group, x, width, roof_gbps, showlegend=number == 0))
        for place, r in zip(x, group, strict=True):
            _write(figure, place, r, roof_gbps)
    figure.update_xaxes(tickvals=list(range(len(stages))), ticktext=stages)
    figure.update_yaxes(title="tok/s", rangemode="tozero")
    return add_key(figure, found)


def _stage(record: Record) -> str:
    return str(record.config.get("stage") or record.config.get("host") or "stage not said")


def _what(records: Sequence[Record]) -> str:
    models = list(dict.fromkeys(str(r.config.get("model", "")) for r in records))
    contexts = {r.config["context"] for r in records if isinstance(r.config.get("context"), (int, float))}
    ends = (
        f"{min(contexts):.0f}" + (f" to {max(contexts):.0f}" if len(contexts) > 1 else "") if contexts else ""
    )
    where = f", mean context {ends}" if ends else ""
    return f"tok/s at batch 1, {', '.join(m for m in models if m)}{where}"


def _decode_bars(group, x, name, tint, width) -> go.Bar:
    fill = {"color": rgba(tint, 0.45), "line": {"color": tint, "width": 1.3}}
    return go.Bar(x=x, y=[r.value for r in group], width=width, name=name, hoverinfo="skip", marker=fill)


def _write(figure: go.Figure, x: float, record: Record, roof_gbps: float | None) -> None:
    """Speed, bandwidth and share of the bound above a bar, on white so that a bound behind it does not cross it out."""
    lines = [f"<b>{digits(record.value)}</b>"]
    moved = implied_gbps(record)
    if moved is not None:
        lines.append(f"{digits(moved)} GB/s")
        lines += [f"{moved / roof_gbps:.0%} of bound"] if roof_gbps else []
    figure.add_annotation(
        x=x, y=record.p80 or record.value, text="<br>".join(lines), showarrow=False, yshift=8, yanchor="bottom",
        font={"size": 11}, bgcolor="rgba(255,255,255,0.85)", borderpad=1,
    )  # fmt: skip


def _bounds(group, x, width, roof_gbps, showlegend) -> go.Scatter:
    xs, ys = [], []
    for place, r in zip(x, group, strict=True):
        if r.config.get("bytes"):
            bound = roof_gbps * 1e9 / r.config["bytes"]
            xs += [place - width / 2, place + width / 2, None]
            ys += [bound, bound, None]
    return go.Scatter(
        x=xs, y=ys, mode="lines", name=f"byte bound at {digits(roof_gbps)} GB/s", showlegend=showlegend,
        legendgroup="bound", line={"color": ROOF_COLOUR, "dash": "dash", "width": 2},
        hovertemplate="byte bound %{y:.4g} tok/s<extra></extra>",
    )  # fmt: skip


Parts = Sequence[tuple[str, float]]


def waterfall(
    left: Parts,
    right: Parts | None = None,
    names: tuple[str, str] = ("before", "after"),
    measured: tuple[float | None, float | None] = (None, None),
    ideal: float | None = None,
    unit: str = "us",
    title: str = "Where the time goes",
    subtitle: str = "",
) -> go.Figure:
    """Two times taken apart side by side, part on part, so that the bars of each add up to its measured time.

    Args:
        left, right: parts as (label, time); the same label has the same colour on both sides. `right` may be None.
        names: what the two sides are, e.g. `("fp16", "4-bit codebook")`.
        measured: the measured times; where the parts do not add up to one, a part `not explained` fills the gap.
        ideal: the time on the right if only bytes counted, drawn as the ideal line (default: none).
        unit: of all times.
        title, subtitle: above the figure; say device and kind in the subtitle.

    Raises:
        ValueError: a side has no parts.
    """
    sides = [_closed(left, measured[0])] + ([_closed(right, measured[1])] if right is not None else [])
    if not all(sides):
        raise ValueError("a waterfall needs at least one part on each side.")
    figure = make_subplots(
        1, len(sides), shared_yaxes=True, horizontal_spacing=0.05,
        subplot_titles=[_heading(n, s, sides[0], unit) for n, s in zip(names, sides, strict=False)],
    )  # fmt: skip
    figure = new_figure(title, subtitle or unit, height=500, figure=figure)
    labels = list(dict.fromkeys(label for side in sides for label, _ in side))
    for column, side in enumerate(sides, start=1):
        figure.add_trace(_rising(side, labels, unit), 1, column)
    if ideal is not None:
        line = {"color": ROOF_COLOUR, "dash": "dash", "width": 2}
        figure.add_hline(y=ideal, line=line, row=1, col=len(sides))
        heading = figure.layout.annotations[len(sides) - 1]
        heading.text += (
            f"<br><span style='color:{ROOF_COLOUR}'>ideal {digits(ideal)} {unit}: bytes alone</span>"
        )
    figure.update_yaxes(title=f"time, {unit}", rangemode="tozero", col=1)
    figure.update_xaxes(tickangle=-35)
    figure.update_annotations(font_size=14)
    figure.update_layout(margin_t=120, showlegend=False)
    return figure


def _closed(parts: Parts, measured: float | None) -> list[tuple[str, float]]:
    """The parts, and what is missing to (or too much of) the measured time if that is above half a per cent."""
    gap = 0.0 if measured is None else measured - sum(time for _, time in parts)
    closes = measured is None or abs(gap) <= 0.005 * measured
    return list(parts) if closes else [*parts, ("not explained", gap)]


def _heading(name: str, side: Parts, first: Parts, unit: str) -> str:
    total, base = sum(t for _, t in side), sum(t for _, t in first)
    ratio = "" if side is first else f", {base / total:.2f} times faster"
    return f"<b>{name}</b>: {digits(total)} {unit}{ratio}"


def _rising(side: Parts, labels: Sequence[str], unit: str) -> go.Bar:
    bases, height = [], 0.0
    for _, time in side:
        bases.append(height)
        height += time
    tints = [
        FAINT if label == "not explained" else PARTS[labels.index(label) % len(PARTS)] for label, _ in side
    ]
    return go.Bar(
        x=[*(label for label, _ in side), "<b>total</b>"], y=[*(time for _, time in side), height],
        base=[*bases, 0.0], marker={"color": [*tints, rgba(INK, 0.75)]},
        text=[*(digits(time) for _, time in side), f"<b>{digits(height)}</b>"], textposition="outside",
        cliponaxis=False, hovertemplate=f"%{{x}}: %{{y:.4g}} {unit}<extra></extra>",
    )  # fmt: skip
