"""What `core.deadlines` promises: nothing early, nothing late by a slice, nothing kept."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gunicorn_dirty_gevent.core.deadlines import SLICE, Deadlines

times = st.floats(min_value=0, max_value=1e7, allow_nan=False)


def test_slices_are_exact():
    assert math.log2(SLICE).is_integer()  # else a deadline may fire early by a rounding error
    assert SLICE <= 0.1


@pytest.mark.parametrize(
    ("sets", "now", "expected"),
    [
        ({}, 10.0, []),
        ({"a": 1.0}, 0.99, []),
        ({"a": 1.0}, 1.0, ["a"]),
        ({"a": 1.01}, 1.01 + SLICE, ["a"]),
        ({"a": 1.0, "b": 2.0}, 1.5, ["a"]),
        ({"a": 2.0, "b": 1.0}, 3.0, ["b", "a"]),
        ({"a": math.inf}, 1e12, []),
        ({"a": 1e308}, 1e12, []),  # its slice has no number
        ({"a": -1.0}, 0.0, ["a"]),
        ({"a": -math.inf}, 0.0, ["a"]),
        ({"a": -1e308}, 0.0, ["a"]),
    ],
)
def test_due(sets, now, expected):
    deadlines = Deadlines()
    for item, when in sets.items():
        deadlines.set(item, when)
    assert deadlines.due(now) == expected
    assert deadlines.due(now) == []  # taken out
    assert len(deadlines) == len([w for w in sets.values() if now < w < 1e300])


def test_a_later_setting_takes_the_place_of_an_earlier_one():
    deadlines = Deadlines()
    deadlines.set("a", 1.0)
    deadlines.set("a", 3.0)
    assert len(deadlines) == 1
    assert deadlines.due(2.0) == []
    deadlines.set("a", 2.0)
    assert deadlines.due(2.0) == ["a"]
    deadlines.set("a", 5.0)
    deadlines.set("a", math.inf)
    assert (len(deadlines), deadlines.next()) == (0, None)


def test_dropped_and_unknown_items_are_not_due():
    deadlines = Deadlines()
    deadlines.drop("never set")
    deadlines.set("a", 1.0)
    deadlines.set("b", 1.0)
    deadlines.drop("a")
    deadlines.drop("a")
    assert deadlines.due(1.0) == ["b"]


def test_next_is_when_something_is_due():
    deadlines = Deadlines()
    assert deadlines.next() is None
    deadlines.set("a", 1.01)
    deadlines.set("b", 7.0)
    when = deadlines.next()
    assert 1.01 <= when < 1.01 + SLICE
    assert deadlines.due(math.nextafter(when, 0)) == []
    assert deadlines.due(when) == ["a"]
    assert deadlines.next() == 7.0
    deadlines.drop("b")
    assert deadlines.next() is None


@pytest.mark.parametrize("spread", [0.0, SLICE, 1.0])
def test_set_and_drop_leave_nothing(spread):
    """Calls that end in time, each with a deadline of its own: far-off slices too are forgotten."""
    deadlines = Deadlines()
    largest = 0
    for number in range(100_000):
        deadlines.set(number, 300.0 + number * spread)
        deadlines.drop(number)
        largest = max(largest, len(deadlines._slices), len(deadlines._buckets))
    assert largest <= 100
    assert (len(deadlines), deadlines._where, deadlines._buckets) == (0, {}, {})
    assert deadlines.next() is None


def test_a_few_live_deadlines_do_not_keep_the_dropped_ones():
    deadlines = Deadlines()
    for number in range(10):
        deadlines.set(number, 1000.0 + number)
    for number in range(10, 50_000):
        deadlines.set(number, number * 1.0)
        deadlines.drop(number)
        assert len(deadlines._slices) <= 100
    assert deadlines.due(2000.0) == list(range(10))


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("set"), st.integers(0, 15), times | st.just(math.inf)),
            st.tuples(st.just("drop"), st.integers(0, 15), st.none()),
            st.tuples(st.just("due"), st.none(), times),
            st.tuples(st.just("next"), st.none(), st.none()),
        ),
        max_size=200,
    )
)
def test_like_a_sorted_list(steps):
    deadlines, model = Deadlines(), {}
    for what, item, when in steps:
        if what == "set":
            deadlines.set(item, when)
            model[item] = when
        elif what == "drop":
            deadlines.drop(item)
            model.pop(item, None)
        elif what == "due":
            found = deadlines.due(when)
            assert len(found) == len(set(found))
            for taken in found:
                assert model.pop(taken) <= when, "early"
            assert all(due > when - SLICE for due in model.values()), "late"
        else:
            told = deadlines.next()
            soonest = min(model.values(), default=math.inf)
            if soonest == math.inf:
                assert told is None
            else:
                assert soonest <= told <= soonest + SLICE
        assert len(deadlines) == len([w for w in model.values() if w != math.inf])
