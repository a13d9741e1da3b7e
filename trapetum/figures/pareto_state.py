"""What one setting of the Pareto's controls shows: coordinates, markers, front and roof, and the traces of them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from trapetum.figures.style import INK, KIND_SYMBOLS, LOG, ROOF_COLOUR, colour, digits
from trapetum.figures.tradeoffs import Point
from trapetum.pareto import front
from trapetum.shapes import MODELS


class Axis(NamedTuple):
    """How an axis is written and read: title, name in a menu, scale, whether more is better."""

    title: str
    name: str
    scale: str
    more_is_better: bool


AXES = {
    "tok_s": Axis("decode speed, tok/s", "speed", "log", True),
    "memory_gb": Axis("memory, GB", "memory", "log", False),
    "loss_pct": Axis("perplexity above the unquantized model's, %", "accuracy", "linear", False),
    "j_per_token": Axis("energy, J a token, gross", "energy", "log", False),
}
# (x, y); x is always an axis where less is better, so that the front is a staircase.
VIEWS = (("memory_gb", "tok_s"), ("loss_pct", "tok_s"), ("memory_gb", "loss_pct"), ("j_per_token", "tok_s"))
CONTEXTS = (None, 512, 2048, 8192, 32768)
UNFIT = "#d3d8dc"
FRONT = "#1d2329"
_FINE = [float(f"{m}e{e}") for e in range(-4, 4) for m in (1, 1.5, 2, 3, 4, 5, 6, 8)]
_CARDS_GB = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 80, 141, 192)


class State(NamedTuple):
    """What one setting of the controls shows; lists are aligned with the points, None where one is not drawn."""

    x: list[float | None]
    y: list[float | None]
    symbols: list[str]
    colours: list[str]
    front: "Staircase"
    front_of_all: "Staircase"


class Staircase(NamedTuple):
    """A front as a line, from edge to edge of the points shown; labels are empty at the edges."""

    x: list[float]
    y: list[float]
    labels: list[str]


def state(points: Sequence[Point], x: str, y: str, context: float | None, limit_gb: float | None) -> State:
    """Coordinates, markers and front of `points` for a pair of axes, a context and a memory limit.

    Points above the limit are grey; they and suspect ones are on no front. `front` holds what was measured, and
    `front_of_all` published points too; where nothing was measured, `front` is the one of all.
    """
    values = [p.at(context) for p in points]
    known = [x in v and y in v for v in values]
    fits = [limit_gb is None or v.get("memory_gb", 0.0) <= limit_gb for v in values]
    allowed = [i for i, p in enumerate(points) if known[i] and fits[i] and not p.suspect]
    measured = [i for i in allowed if points[i].kinds["tok_s"] == "measured"]
    of_all = _staircase(points, values, allowed, x, y)
    return State(
        [v[x] if k else None for v, k in zip(values, known, strict=True)],
        [v[y] if k else None for v, k in zip(values, known, strict=True)],
        [_symbol(p, x, y, context) for p in points],
        [colour(p.method, p.bits) if f else UNFIT for p, f in zip(points, fits, strict=True)],
        _staircase(points, values, measured, x, y) if measured else of_all,
        of_all if measured else Staircase([], [], []),
    )


def on_front(
    points: Sequence[Point], x: str, y: str, context: float | None = None, limit_gb: float | None = None
) -> list[Point]:
    """The unsuspect points within the memory limit that nothing beats in both axes, by growing x.

    Args:
        points: of one device and model.
        x, y: axes, keys of `AXES`.
        context: cached tokens, or None for the values as recorded.
        limit_gb: memory limit, or None.
    """
    values = [p.at(context) for p in points]
    fits = [limit_gb is None or v.get("memory_gb", 0.0) <= limit_gb for v in values]
    allowed = [i for i, p in enumerate(points) if fits[i] and not p.suspect]
    return [points[i] for i in _best(values, allowed, x, y)]


def _best(values: Sequence[dict], chosen: Sequence[int], x: str, y: str) -> list[int]:
    minimize = [axis for axis in (x, y) if not AXES[axis].more_is_better]
    maximize = [axis for axis in (x, y) if AXES[axis].more_is_better]
    best = [chosen[i] for i in front([values[i] for i in chosen], minimize, maximize)]
    return sorted(best, key=lambda i: (values[i][x], values[i][y]))


def _staircase(
    points: Sequence[Point], values: Sequence[dict], chosen: Sequence[int], x: str, y: str
) -> Staircase:
    """The front of the chosen points as a line, prolonged to the worst y on its left and the worst x on its right."""
    best = _best(values, chosen, x, y)
    if not best:
        return Staircase([], [], [])
    shown = [v for v in values if x in v and y in v]
    worst_y = (min if AXES[y].more_is_better else max)(v[y] for v in shown)
    names = list(dict.fromkeys((values[i][x], values[i][y]) for i in best))
    labels = {place: _label(points, best, values, place, x, y) for place in names}
    return Staircase(
        [names[0][0], *(place[0] for place in names), max(v[x] for v in shown)],
        [worst_y, *(place[1] for place in names), names[-1][1]],
        ["", *(labels[place] for place in names), ""],
    )


def _label(points, best, values, place, x: str, y: str) -> str:
    """The name of the fastest point at a place; without its quantizer where accuracy is not shown."""
    here = [points[i] for i in best if (values[i][x], values[i][y]) == place]
    first = max(here, key=lambda p: p.values["tok_s"])
    return first.label if "loss_pct" in (x, y) else first.system


def _symbol(point: Point, x: str, y: str, context: float | None) -> str:
    known = point.kinds.keys() & {x, y}
    kind = point.kind(x, y, context) if known else "derived"
    return KIND_SYMBOLS[kind] + ("-open" if point.suspect else "") + ("-dot" if point.stale else "")


def hover(point: Point) -> str:
    """The hover text of a point: its name, device and model, and each record behind it."""
    context = "not said" if point.context is None else f"{point.context:.0f}"
    lines = [f"<b>{point.label}</b>", f"{point.device}, {point.model}, recorded at context {context}"]
    for axis, record in point.records.items():
        lines.append(f"{AXES[axis].name}: {digits(record.value)} {record.unit or 'perplexity'}, {record.kind}, "
                     f"record {record.id}")  # fmt: skip
        if axis == "tok_s" and record.suspect:
            lines.append(f"<b>suspect</b>: {record.why_suspect}")
    if point.kinds.get("memory_gb") == "derived":
        lines.append(f"memory: {digits(point.values['memory_gb'])} GB, derived: bytes read for a token")
    if point.stale:
        lines.append("<b>stale</b>: measured with an older kernel")
    return "<br>".join(lines)


def points_trace(points: Sequence[Point], shown: State) -> go.Scatter:
    """The markers of one state."""
    border = {"width": [2 if "open" in symbol else 0.5 for symbol in shown.symbols], "color": "white"}
    marker = {"symbol": shown.symbols, "color": shown.colours, "size": 12, "line": border}
    return go.Scatter(
        x=shown.x, y=shown.y, mode="markers", marker=marker, customdata=[hover(p) for p in points], showlegend=False,
        hovertemplate="%{customdata}<br>here: %{x:.4g}, %{y:.4g}<extra></extra>", name="points",
    )  # fmt: skip


def front_trace(stairs: Staircase, dash: str = "solid") -> go.Scatter:
    """The staircase through the points that nothing beats, with their names on the solid one."""
    mode = "lines+text" if dash == "solid" else "lines"
    return go.Scatter(
        x=stairs.x, y=stairs.y, mode=mode, text=stairs.labels, textposition="top right", name="front",
        textfont={"size": 11, "color": INK}, line={"shape": "hv", "color": FRONT, "width": 1.5, "dash": dash},
        showlegend=False, hoverinfo="skip", cliponaxis=False,
    )  # fmt: skip


def roof_trace(points: Sequence[Point], x: str, y: str, context: float | None) -> go.Scatter:
    """The ideal line of a speed plot: over memory, every byte read once a token; else the bound of 4-bit codes."""
    xs, ys = roof_line(points, x, y, context)
    line = {"color": ROOF_COLOUR, "dash": "dash", "width": 2}
    return go.Scatter(
        x=xs, y=ys, mode="lines", line=line, name="roof", showlegend=False,
        hovertemplate="roof: at most %{y:.4g} tok/s<extra></extra>",
    )  # fmt: skip


def roof_line(points: Sequence[Point], x: str, y: str, context: float | None) -> tuple[list, list]:
    """The ends (or points) of the ideal line; empty where the plot has no speed or no roof is known."""
    if not points:
        return [], []
    roof, shape = points[0].roof_gbps, MODELS.get(points[0].model)
    seen = [v[x] for p in points if x in (v := p.at(context)) and y in v]
    if y != "tok_s" or not roof or not seen or not (x == "memory_gb" or shape):
        return [], []
    if x == "memory_gb":
        xs = list(np.geomspace(0.9 * min(seen), 1.1 * max(seen), 25).round(6))
        return xs, [round(roof / gb, 4) for gb in xs]
    known = [p.context for p in points if p.context is not None]
    at = context if context is not None else (known[0] if known else 0)
    bound = roof * 1e9 / shape.bytes_per_token("codebook-4", int(at))
    return [min(seen), max(seen)], [bound, bound]


def limits_gb(points: Sequence[Point]) -> list[float | None]:
    """Memory limits worth a stop of the slider: sizes of cards (or 1, 2, 4... of a smaller unit) among the points."""
    memory = [v for p in points for c in CONTEXTS if (v := p.at(c).get("memory_gb"))]
    if not memory:
        return [None]
    small = [m * 10.0**e for e in range(-4, 0) for m in (1, 2, 4, 8)]
    between = [gb for gb in (*small, *_CARDS_GB) if min(memory) <= gb <= 1.2 * max(memory)]
    while len(between) > 5:
        between = between[::2]
    return [None, *between]


def axes_layout(x: str, y: str) -> dict:
    """Titles and scales of a pair of axes, as a change of the layout."""
    return {
        "xaxis.title.text": f"{AXES[x].title} ({_better(x)})",
        "xaxis.type": AXES[x].scale,
        "xaxis.tickvals": _FINE if AXES[x].scale == "log" else None,
        "xaxis.ticktext": [f"{t:g}" for t in _FINE] if AXES[x].scale == "log" else None,
        "yaxis.title.text": f"{AXES[y].title} ({_better(y)})",
        "yaxis.type": AXES[y].scale,
        "yaxis.tickvals": LOG["tickvals"] if AXES[y].scale == "log" else None,
        "yaxis.ticktext": LOG["ticktext"] if AXES[y].scale == "log" else None,
    }


def _better(axis: str) -> str:
    return "more is better" if AXES[axis].more_is_better else "less is better"
