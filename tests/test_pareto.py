"""The Pareto front, against its definition."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trapetum.pareto import front

coordinates = st.integers(0, 5)  # few values, so that ties happen
points = st.lists(
    st.fixed_dictionaries({"speed": coordinates, "memory": coordinates, "error": coordinates}), max_size=25
)


def test_two_axes():
    found = [
        {"speed": 40, "memory": 13.5},  # smallest speed, most memory: beaten
        {"speed": 330, "memory": 4.0},
        {"speed": 250, "memory": 2.2},
        {"speed": 300, "memory": 4.5},
    ]
    assert front(found, minimize=["memory"], maximize=["speed"]) == [1, 2]
    assert front(found, minimize=[], maximize=["speed"]) == [1]


def test_ties_are_kept():
    assert front([{"a": 1}, {"a": 1}, {"a": 2}], ["a"], []) == [0, 1]


def test_points_that_lack_an_axis_are_out_and_beat_nobody():
    found = [
        {"a": 0, "b": None},
        {"a": 0},
        {"a": 0, "b": float("nan")},
        {"a": 1, "b": 1},
        {"a": 0, "b": "fast"},
    ]
    assert front(found, ["a", "b"], []) == [3]


def test_infinity_is_a_number():
    assert front([{"a": float("inf"), "b": 0}, {"a": 1, "b": 1}], ["a", "b"], []) == [0, 1]


def test_empty():
    assert front([], ["a"], []) == []


def dominates(one, other):
    no_worse = (
        one["speed"] >= other["speed"] and one["memory"] <= other["memory"] and one["error"] <= other["error"]
    )
    return no_worse and one != other


@settings(deadline=None)
@given(points)
def test_the_front_is_exactly_the_points_that_nobody_dominates(found):
    wanted = [i for i, point in enumerate(found) if not any(dominates(other, point) for other in found)]
    assert front(found, minimize=["memory", "error"], maximize=["speed"]) == wanted


@settings(deadline=None)
@given(points.filter(bool))
def test_everybody_else_is_dominated_by_somebody_on_the_front(found):
    on_front = front(found, minimize=["memory", "error"], maximize=["speed"])
    assert on_front
    for i in set(range(len(found))) - set(on_front):
        assert any(dominates(found[j], found[i]) for j in on_front)


def test_axes_are_checked():
    with pytest.raises(ValueError, match="at least one axis"):
        front([{"a": 1}], [], [])
    with pytest.raises(ValueError, match="'a' is named twice"):
        front([{"a": 1}], ["a"], ["a"])
