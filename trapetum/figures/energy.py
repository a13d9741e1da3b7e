"""Energy of a token, gross and net of idle, and the carbon it means on different grids."""

from collections.abc import Iterable, Mapping, Sequence

import plotly.graph_objects as go

from trapetum.figures.style import (
    INK,
    LOG,
    add_key,
    colour,
    device_name,
    digits,
    label_of,
    method_of,
    new_figure,
    nothing,
    place_legend,
    points,
    provenance,
    rgba,
    spread,
)
from trapetum.records import Record

# Grams of CO2-equivalent a kWh in 2023, life cycle, rounded; they move by several per cent a year.
GRIDS_SOURCE = (
    "Ember, yearly electricity data for 2023, as shown by Our World in Data and Statista (published)"
)
GRIDS = {
    "Norway": 30,
    "France": 56,
    "Germany": 381,
    "world": 481,
    "China": 582,
    "Poland": 662,
    "India": 713,
}
JOULES_PER_KWH = 3.6e6


def energy_bars(records: Sequence[Record], title: str = "Energy of a generated token") -> go.Figure:
    """Joules a token by method and stage: gross beside net of idle; records that do not say count as gross.

    Args:
        records: `energy_per_token` records (J) with `config.accounting` `"gross"` or `"net"`.
        title: above the figure.
    """
    found = _distinct(r for r in records if r.quantity == "energy_per_token")
    if not found:
        return nothing(title, "No energy could be read here, and none is recorded.")
    many = len({device_name(r) for r in found}) > 1
    named = {r.id: f"{_name(r)}<br>{device_name(r)}" if many else _name(r) for r in found}
    names = list(dict.fromkeys(named.values()))
    figure = new_figure(title, provenance(found, "J a token, lower is better"), 170 + 52 * len(names))
    both = any(r.config.get("accounting") == "net" for r in found)
    for accounting, offset in (("gross", -0.2 if both else 0.0), ("net", 0.2)):
        rows = [r for r in found if r.config.get("accounting", "gross") == accounting]
        if rows:
            _draw_bars(figure, rows, [names.index(named[r.id]) + offset for r in rows], accounting)
    figure.update_xaxes(title="J a token", range=[0, 1.2 * max(r.value for r in found)])
    figure.update_yaxes(tickvals=list(range(len(names))), ticktext=names, autorange="reversed")
    return add_key(figure, found)


def _name(record: Record) -> str:
    more = [str(record.config[k]) for k in ("stage", "host", "format", "range") if record.config.get(k)]
    return f"{label_of(record)}{' · ' if more else ''}{', '.join(more)}"


def _distinct(records: Iterable[Record]) -> list[Record]:
    """The records without those that only repeat another's name, accounting and value (a figure published twice)."""
    kept: dict[tuple, Record] = {}
    for r in records:
        kept.setdefault((device_name(r), _name(r), r.config.get("accounting"), r.value), r)
    return list(kept.values())


def _draw_bars(figure: go.Figure, rows: Sequence[Record], y: Sequence[float], accounting: str) -> None:
    tints = [colour(method_of(r), r.config.get("bits")) for r in rows]
    strength = 0.55 if accounting == "gross" else 0.2
    figure.add_trace(
        go.Bar(
            y=list(y), x=[r.value for r in rows], orientation="h", width=0.36, showlegend=False, hoverinfo="skip",
            marker={"color": [rgba(t, strength) for t in tints], "line": {"color": tints, "width": 1.3}},
            text=[f"     {digits(r.value)} J {accounting}" for r in rows], textposition="outside", cliponaxis=False,
        )
    )  # fmt: skip
    marks = points(rows, [r.value for r in rows], y, accounting, INK, size=8, showlegend=False)
    figure.add_trace(marks.update(error_x=spread(rows), marker_color=tints))


def carbon(
    records: Sequence[Record],
    grids: Mapping[str, float] | None = None,
    source: str = GRIDS_SOURCE,
    title: str = "Projected carbon of 1000 tokens",
) -> go.Figure:
    """Grams of CO2 for 1000 tokens by grid: derived, energy a token times the grid's intensity.

    Args:
        records: gross `energy_per_token` records (J); net ones are left out.
        grids: g of CO2 a kWh by name; default `GRIDS`.
        source: of the intensities.
        title: above the figure.
    """
    found = [
        r
        for r in records
        if r.quantity == "energy_per_token" and r.config.get("accounting", "gross") == "gross"
    ]
    if not found:
        return nothing(title, "No energy could be read here, and none is recorded.")
    grids = dict(grids or GRIDS)
    subtitle = provenance(found, "g CO2 for 1000 tokens, derived: 1000 × J / 3.6e6 × g/kWh · from energy")
    figure = new_figure(title, f"{subtitle}<br>{source}", height=500)
    labels = [f"{name}<br>{intensity:g} g/kWh" for name, intensity in grids.items()]
    for r in found:
        grams = [carbon_g(r.value, intensity) for intensity in grids.values()]
        tint = colour(method_of(r), r.config.get("bits"))
        figure.add_trace(
            go.Scatter(
                x=labels, y=grams, mode="lines+markers", name=_name(r), line={"color": tint, "width": 1},
                marker={"symbol": "triangle-up-open" if r.suspect else "triangle-up", "size": 11, "color": tint},
                hovertemplate=f"{_name(r)}: %{{y:.3g}} g<br>from record {r.id}<extra></extra>",
            )
        )  # fmt: skip
    figure.update_yaxes(title="g CO2 for 1000 tokens", **LOG)
    figure.update_layout(margin_t=110)
    return place_legend(figure)


def carbon_g(joules_per_token: float, grams_per_kwh: float, tokens: int = 1000) -> float:
    """Grams of CO2 for `tokens` tokens. The device alone: no host, no cooling, no manufacture."""
    return tokens * joules_per_token / JOULES_PER_KWH * grams_per_kwh
