"""Whole decode steps: speed by stage against the byte bound."""

from collections.abc import Iterable, Sequence

import plotly.graph_objects as go

from trapetum.figures.style import (
    ROOF_COLOUR,
    add_key,
    by_itself,
    colour,
    decode_label,
    digits,
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


def decode_stages(
    records: Sequence[Record], roof_gbps: float | None = None, title: str = "Decode, stage by stage"
) -> go.Figure:
    """Tokens a second by stage and method, with GB/s and the share of the byte bound on each bar.

    Args:
        records: `decode_speed` records with `config.stage` and `config.bytes` (of one token); those taken in turns with
            others are left out.
        roof_gbps: read bandwidth: the bound is `roof_gbps / bytes` tokens a second.
        title: above the figure.
    """
    found = [r for r in records if r.quantity == "decode_speed" and by_itself(r)]
    if not found:
        return nothing(title, "No decode has been measured yet.")
    figure = new_figure(title, provenance(found, _what(found)), height=480)
    stages = _in_order(dict.fromkeys(_stage(r) for r in found))
    groups: dict[str, list[Record]] = {}
    for r in found:
        groups.setdefault(decode_label(r), []).append(r)
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


def _in_order(stages: Iterable[str]) -> list[str]:
    """Stages as a model goes through them; names that are none of an engine's come last."""
    from trapetum.decode import stages as stages_of

    known = [*stages_of("cuda"), *stages_of("cpu")]
    return sorted(stages, key=lambda stage: known.index(stage) if stage in known else len(known))


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
