"""The Pareto figure: choice of axes, context length and memory limit, all inside the figure, with no kernel behind it.

A dropdown and two sliders have to work together in a saved page, where each can only send fixed changes. So each
changes something of its own: the dropdown `visible`, the context slider the data, the memory slider `opacity`.
"""

from collections.abc import Sequence

import plotly.graph_objects as go

from trapetum.figures.pareto_state import (
    AXES,
    CONTEXTS,
    FRONT,
    UNFIT,
    VIEWS,
    axes_layout,
    front_trace,
    limits_gb,
    points_trace,
    roof_line,
    roof_trace,
    state,
)
from trapetum.figures.style import FAINT, INK, KIND_SYMBOLS, ROOF_COLOUR, colour, new_figure, nothing
from trapetum.figures.tradeoffs import Point

TRACES = 3  # of each view and limit: the points and two fronts


def pareto(points: Sequence[Point], title: str = "") -> go.Figure:
    """Speed, memory, accuracy and energy of the ways to decode one model on one device.

    Works in a saved page: the dropdown chooses the axes, one slider the context length, one the memory limit.

    Args:
        points: of one (device, model), from `tradeoffs`; see `groups`.
        title: above the figure; default names device and model.

    Raises:
        ValueError: points of several devices or models, which do not compare.
    """
    title = title or "Pareto: speed, memory, accuracy, energy"
    views = [view for view in VIEWS if any(view[0] in p.values and view[1] in p.values for p in points)]
    if not views:
        return nothing(title, "No decode is on record for this device and model yet.")
    if len({(p.device, p.model) for p in points}) > 1:
        raise ValueError(
            "points of several devices or models do not compare; take one of trapetum.figures.groups."
        )
    limits = limits_gb(points)
    figure = new_figure(title, what(points), height=760)
    plan = [(view, limit) for view in views for limit in limits]
    for (x, y), limit in plan:
        shown = state(points, x, y, None, limit)
        on = (x, y) == views[0]
        hidden = {} if limit is None else {"opacity": 0, "hoverinfo": "skip"}
        figure.add_trace(points_trace(points, shown).update(visible=on, **hidden))
        figure.add_trace(front_trace(shown.front).update(visible=on, **hidden))
        figure.add_trace(front_trace(shown.front_of_all, "dot").update(visible=on, **hidden))
    for view in views:
        figure.add_trace(roof_trace(points, *view, None).update(visible=view == views[0]))
    add_legend(figure, points)
    _add_controls(figure, points, views, limits, plan)
    figure.update_layout(axes_layout(*views[0]))
    return figure


def what(points: Sequence[Point]) -> str:
    """The line under the title: model, device, and how many decodes are measured and published."""
    speeds = {p.records["tok_s"].id: p.kinds["tok_s"] for p in points}
    counts = {kind: list(speeds.values()).count(kind) for kind in ("measured", "published")}
    made = ", ".join(f"{n} {kind}" for kind, n in counts.items() if n)
    return f"{points[0].model} on {points[0].device}, batch 1 · decodes: {made} · hover for the records"


def add_legend(figure: go.Figure, points: Sequence[Point]) -> None:
    """One entry a method (its colour) and one a kind (its shape), in every view."""
    for name, tint in methods(points).items():
        legend_entry(figure, name, {"color": tint, "symbol": "square"})
    add_key_of_shapes(figure, points)


def methods(points: Sequence[Point]) -> dict[str, str]:
    """Colour by method as the legend names it; ours with its bits, because they differ in shade."""
    named = {(p.method, _ours(p)): colour(p.method, p.bits) for p in points}
    return {f"{method} {bits:g}-bit" if bits else method: tint for (method, bits), tint in named.items()}


def add_key_of_shapes(figure: go.Figure, points: Sequence[Point]) -> None:
    """Legend entries for the kinds among the points, the limit, the fronts and the roof."""
    kinds = {kind for p in points for kind in p.kinds.values()} | {"derived"}
    for kind in (k for k in KIND_SYMBOLS if k in kinds):
        legend_entry(figure, kind, {"color": FAINT, "symbol": KIND_SYMBOLS[kind]})
    if any(p.suspect for p in points):
        legend_entry(figure, "suspect", {"color": FAINT, "symbol": "circle-open"})
    if any(p.stale for p in points):
        legend_entry(figure, "stale", {"color": FAINT, "symbol": "circle-open-dot"})
    legend_entry(figure, "above the limit", {"color": UNFIT, "symbol": "circle"})
    lines = {
        "front": (FRONT, "solid"),
        "front with published": (FRONT, "dot"),
        "roof: bytes": (ROOF_COLOUR, "dash"),
    }
    for name, (tint, dash) in lines.items():
        line = {"color": tint, "dash": dash, "width": 1.8}
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="lines", line=line, name=name))
    figure.update_layout(
        legend={
            "orientation": "v",
            "x": 1.02,
            "y": 1,
            "yanchor": "top",
            "itemclick": False,
            "itemdoubleclick": False,
        }
    )


def _ours(point: Point) -> float | None:
    return point.bits if point.method == "codebook" else None


def legend_entry(figure: go.Figure, name: str, marker: dict) -> None:
    """A legend entry that is drawn nowhere."""
    entry = {"size": 10, "line": {"width": 1.5 if "open" in marker["symbol"] else 0}, **marker}
    figure.add_trace(
        go.Scatter(x=[None], y=[None], mode="markers", marker=entry, name=name, hoverinfo="skip")
    )


def _add_controls(figure: go.Figure, points, views, limits, plan) -> None:
    count = len(figure.data)
    menu = [
        {"label": f"{AXES[y].name} against {AXES[x].name}", "method": "update",
         "args": [{"visible": _visible(plan, views, (x, y), count)}, axes_layout(x, y)]}
        for x, y in views
    ]  # fmt: skip
    place = {
        "x": 0,
        "y": 1.02,
        "xanchor": "left",
        "yanchor": "bottom",
        "bgcolor": "white",
        "bordercolor": "#aab2b9",
    }
    sliders = [_slider("context: ", [_context_step(points, views, plan, c) for c in CONTEXTS], -0.16)]
    if len(limits) > 1:
        sliders.append(_slider("memory limit: ", [_limit_step(plan, limit) for limit in limits], -0.36))
    figure.update_layout(
        updatemenus=[{"buttons": menu, "showactive": True, **place}],
        sliders=sliders, margin={"t": 118, "b": 230, "r": 20},
    )  # fmt: skip


def _visible(plan, views, view, count: int) -> list[bool]:
    shown = [v == view for v, _ in plan for _ in range(TRACES)] + [v == view for v in views]
    return shown + [True] * (count - len(shown))


def _slider(prefix: str, steps: list[dict], y: float) -> dict:
    return {
        "active": 0, "steps": steps, "x": 0, "y": y, "len": 1, "pad": {"t": 10, "b": 0}, "yanchor": "top",
        "currentvalue": {"prefix": prefix, "font": {"size": 13, "color": INK}, "xanchor": "left"},
        "font": {"size": 11, "color": FAINT},
    }  # fmt: skip


def _context_step(points, views, plan, context: float | None) -> dict:
    """One stop of the context slider: new data for every trace of every view and limit."""
    change: dict[str, list] = {"x": [], "y": [], "text": [], "marker.symbol": [], "marker.color": []}

    def add(x, y, text=None, symbols="circle", colours=FRONT) -> None:
        for key, value in zip(change, (_rounded(x), _rounded(y), text, symbols, colours), strict=True):
            change[key].append(value)

    for view, limit in plan:
        shown = state(points, *view, context, limit)
        add(shown.x, shown.y, symbols=shown.symbols, colours=shown.colours)
        add(*shown.front)
        add(*shown.front_of_all)
    for view in views:
        add(*roof_line(points, *view, context))
    label = "as recorded" if context is None else f"{context:,}"
    return {"label": label, "method": "restyle", "args": [change, list(range(len(change["x"])))]}


def _rounded(values: Sequence[float | None]) -> list[float | None]:
    return [None if v is None else float(f"{v:.5g}") for v in values]


def _limit_step(plan, limit: float | None) -> dict:
    """One stop of the memory slider: traces made for another limit become invisible and deaf to the mouse."""
    on = [here == limit for _, here in plan for _ in range(TRACES)]
    change = {
        "opacity": [int(shown) for shown in on],
        "hoverinfo": ["all" if shown else "skip" for shown in on],
    }
    label = "none" if limit is None else f"{limit:g} GB"
    return {"label": label, "method": "restyle", "args": [change, list(range(len(on)))]}
