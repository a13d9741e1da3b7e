"""The numbered GPU kernels: time, bandwidth and instructions per weight of every rung, beside each other."""

import math
from collections.abc import Iterable, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from trapetum import law
from trapetum.figures.style import (
    ROOF_COLOUR,
    add_key,
    colour,
    digits,
    new_figure,
    nothing,
    points,
    provenance,
    rgba,
    spread,
)
from trapetum.records import Record

_PREFIX = "ladder-"
_DECADES = (1, 3, 10, 30, 100, 300, 1000)  # us; a narrow panel has no room for more


def rung_label(record: Record) -> str:
    """`a scalar`, `f pdl, chained` or `dead: atomics`."""
    name = record.method.removeprefix(_PREFIX).replace("-", " ")
    name = f"dead: {name.removeprefix('dead ')}" if name.startswith("dead ") else name
    return name + (", chained" if record.config.get("chain") == "pdl" else "")


def _order(record: Record) -> tuple:
    return "dead" in record.method, record.method, record.config.get("chain") == "pdl"


def _tint(record: Record) -> str:
    return colour(record.method)


def _on_ladder(records: Iterable[Record]) -> list[Record]:
    return sorted((r for r in records if r.method.startswith(_PREFIX)), key=_order)


def _one_each(counts: Iterable[Record]) -> list[Record]:
    """One count a rung, the last: the last rung has one for each launch shape."""
    return _on_ladder({r.method: r for r in counts}.values())


def rungs(
    times: Sequence[Record],
    counts: Sequence[Record] = (),
    roof_gbps: float | None = None,
    title: str = "The ladder of GPU kernels",
) -> go.Figure:
    """Time, GB/s and instructions per weight of each rung, the dead ends last.

    Args:
        times: `gemv_time` records of `bench.ladder`, of one shape; may be empty.
        counts: `instructions_per_weight` records of one architecture; of several of a rung the last.
        roof_gbps: read bandwidth: the ideal time is `bytes / roof_gbps`.
        title: above the figure.
    """
    times, counts = _on_ladder(times), _one_each(counts)
    if not times and not counts:
        return nothing(title, "No rung has been timed or counted yet; on a GPU `trapetum bench ladder` does.")
    panels = [(times, "time, us", lambda r: r.value)] if times else []
    if any("bytes" in r.config for r in times):
        rates = [r for r in times if "bytes" in r.config]
        panels.append((rates, "GB/s", lambda r: law.gbps(r.config["bytes"], r.value)))
    if counts:
        panels.append((counts, "instructions per weight", lambda r: r.value))
    names = list(dict.fromkeys(rung_label(r) for r in _on_ladder([*times, *counts])))
    figure = make_subplots(1, len(panels), shared_yaxes=True, horizontal_spacing=0.03)
    new_figure(title, _subtitle(times, counts), 210 + 34 * len(names), figure)
    for column, (found, axis, scale) in enumerate(panels, start=1):
        _panel(figure, column, found, axis, scale)
    if times and roof_gbps:
        _ideal(figure, times, roof_gbps, len(panels) > 1 and panels[1][1] == "GB/s")
        figure.update_xaxes(range=[0, 1.25 * roof_gbps], selector={"title.text": "GB/s"})
    figure.update_yaxes(autorange="reversed", categoryorder="array", categoryarray=names)
    return add_key(figure, [*times, *counts])


def _subtitle(times: Sequence[Record], counts: Sequence[Record]) -> str:
    shapes = {(r.config["in_features"], r.config["out_features"]) for r in times}
    units = [*(f"{i} x {o}, cold cache" for i, o in sorted(shapes)), "4-bit codes"]
    return provenance([*times, *counts], ", ".join(units))


def _panel(figure: go.Figure, column: int, found: Sequence[Record], axis: str, scale) -> None:
    """Bars from zero with a mark for each record; a time axis is logarithmic, since the first rung is far off."""
    is_time = axis.startswith("time")
    for tint in dict.fromkeys(map(_tint, found)):
        group = [r for r in found if _tint(r) == tint]
        names, values = [rung_label(r) for r in group], [scale(r) for r in group]
        bar = go.Bar(
            y=names, x=values, orientation="h", width=0.6, showlegend=False, hoverinfo="skip",
            marker={"color": [rgba(tint, 0.0 if r.suspect else 0.4) for r in group], "line": {"color": tint, "width": 1.2}},
            text=[f"     {digits(v)}" for v in values], textposition="outside", cliponaxis=False, textfont={"size": 11},
        )  # fmt: skip
        figure.add_trace(bar, 1, column)
        marks = points(group, values, names, names[0], tint, size=8, showlegend=False)
        marks.update(error_x=spread(group) if is_time else None)
        figure.add_trace(marks, 1, column)
    largest = max(scale(r) for r in found)
    figure.update_xaxes(title=axis, col=column, range=[0, 1.3 * largest])
    if is_time:
        ends = [math.log10(0.6 * min(r.value for r in found)), math.log10(4.0 * largest)]
        ticks = {"tickvals": _DECADES, "ticktext": [str(t) for t in _DECADES]}
        figure.update_xaxes(type="log", **ticks, range=ends, col=column)


def _ideal(figure: go.Figure, times: Sequence[Record], roof_gbps: float, with_rates: bool) -> None:
    found = [r for r in times if "bytes" in r.config]
    names = [rung_label(r) for r in found]
    mark = {"symbol": "line-ns-open", "size": 20, "color": ROOF_COLOUR, "line": {"width": 3}}
    name = f"ideal: bytes / {digits(roof_gbps)} GB/s"
    for column, x in enumerate(
        ([r.config["bytes"] / roof_gbps / 1e3 for r in found], [roof_gbps] * len(found)), 1
    ):
        if column == 1 or with_rates:
            figure.add_trace(
                go.Scatter(
                    x=x, y=names, mode="markers", name=name, marker=mark, showlegend=column == 1,
                    hovertemplate="ideal %{x:.4g}<extra></extra>",
                ), 1, column,
            )  # fmt: skip


def rungs_in_words(times: Sequence[Record], counts: Sequence[Record]) -> str:
    """What the ladder shows, in a sentence or two: from the first rung to the last, and the costliest dead end.

    Args:
        times, counts: as for `rungs`; either may be empty.
    """
    said = []
    steps = [r for r in _on_ladder(times) if "dead" not in r.method and not r.suspect]
    if len(steps) > 1:
        first, last = steps[0], min(steps[1:], key=lambda r: r.value)
        said.append(
            f"The same bytes take {digits(first.value)} us on rung {rung_label(first)} and {digits(last.value)} us on "
            f"{rung_label(last)}: {first.value / last.value:.2g} times as fast, and no bit less was read."
        )
    found = [r for r in _one_each(counts) if "dead" not in r.method]
    if len(found) > 1:
        most, least = max(found, key=lambda r: r.value), min(found, key=lambda r: r.value)
        said.append(
            f"A weight costs {digits(most.value)} instructions on rung {rung_label(most)} and {digits(least.value)} on "
            f"{rung_label(least)}."
        )
    dead = [r for r in _one_each(counts) if "dead" in r.method]
    if dead and found:
        worst = max(dead, key=lambda r: r.value)
        said.append(
            f"The costliest dead end, {rung_label(worst).removeprefix('dead: ')}, takes {digits(worst.value)}."
        )
    return " ".join(said) or "No rung has been timed or counted here, so the sources are all there is to see."
