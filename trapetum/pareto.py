"""The Pareto front: which points no other point beats in everything. No torch."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real


def _costs(point: Mapping, minimize: Sequence[str], maximize: Sequence[str]) -> tuple[float, ...] | None:
    """The point's coordinates with less being better, or None if one is missing."""
    values = [(point.get(name), sign) for names, sign in ((minimize, 1), (maximize, -1)) for name in names]
    if any(not isinstance(value, Real) or math.isnan(value) for value, _ in values):
        return None
    return tuple(sign * float(value) for value, sign in values)


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def front(points: Sequence[Mapping], minimize: Sequence[str], maximize: Sequence[str]) -> list[int]:
    """Indices of the points that no other point beats: at least as good in every axis, and better in one.

    Points that tie in every axis are all kept. A point that lacks an axis (absent, None or NaN) is neither on the front
    nor beats anybody. Compares all pairs: meant for thousands of points, not millions.

    Args:
        points: mappings from axis name to number, e.g. `{"decode_speed": 330, "perplexity": 5.6}`.
        minimize: axes where less is better.
        maximize: axes where more is better.

    Raises:
        ValueError: no axis at all, or one named twice.
    """
    axes = [*minimize, *maximize]
    if not axes:
        raise ValueError("a Pareto front needs at least one axis to minimise or maximise.")
    twice = sorted({name for name in axes if axes.count(name) > 1})
    if twice:
        raise ValueError(f"the axis {twice[0]!r} is named twice; an axis is minimised or maximised, once.")
    costs = {
        i: cost for i, point in enumerate(points) if (cost := _costs(point, minimize, maximize)) is not None
    }
    return [i for i, cost in costs.items() if not any(_beats(other, cost) for other in costs.values())]
