"""`core.large`: the encoding of `core.values`, whichever way large bytes take."""

from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.beside import Beside

from gunicorn_dirty_gevent.core import large, values
from gunicorn_dirty_gevent.core.values import UndecodableValue, UnencodableValue

LARGE = bytes(range(256)) * 300

CALLS = [
    ((LARGE,), {}),
    ((LARGE, 1, (2, {3}), 2**70), {"b": date.min}),
    ((LARGE, 1, (2, {3}), 2**70, LARGE), {"a": LARGE, "b": date.min}),
    ((), {"\ud800": LARGE, "é": LARGE, "k": {1: LARGE}}),
    ((), {"image": LARGE, "width": 160}),
    ((LARGE, *range(14)), {f"k{n}": n for n in range(15)}),
    ((*range(14), LARGE), {f"k{n}": n for n in range(15)}),
    ((LARGE, *range(15)), {}),
    ((LARGE,), {f"k{n}": n for n in range(16)}),
    ((bytearray(LARGE), [LARGE, (LARGE,)]), {}),
    ((LARGE, "x" * 100_000), {}),
    ((LARGE[:65535],), {}),
    ((), {}),
]


def from_both(loads, body):
    """What is read of a body that came in its frame, and of one that came beside it."""
    inline = loads(large.joined(body))
    assert loads(memoryview(large.joined(body))) == inline
    beside = loads(Beside(body))
    assert beside == inline
    return beside


@pytest.mark.parametrize("value", [LARGE, LARGE[:65535], LARGE[:65536], LARGE[:65537]])
def test_large_bytes_are_written_as_ormsgpack_would(value):
    assert large.joined(large.dumps(value)) == values.packb(value)
    assert from_both(large.loads, large.dumps(value)) == value
    call = large.dumps_call((value, 1), {"k": value})
    assert large.joined(call) == values.packb([[value, 1], {"k": value}])


@pytest.mark.parametrize("value", [None, [LARGE], {"k": LARGE}, (LARGE,), "x" * 100_000, bytearray(LARGE)])
def test_other_values_are_what_they_are_elsewhere(value):
    assert large.joined(large.dumps(value)) == values.dumps(value)
    back = from_both(large.loads, large.dumps(value))
    assert (type(back), back) == (type(value), value)


@pytest.mark.parametrize(("args", "kwargs"), CALLS)
def test_calls(args, kwargs):
    body = large.dumps_call(args, kwargs)
    assert values.loads_call(large.joined(body)) == (list(args), kwargs)
    assert from_both(large.loads_call, body) == (list(args), kwargs)


def test_large_bytes_are_not_copied():
    assert large.dumps(LARGE).parts[1] is LARGE
    pieces = large.dumps_call((1, LARGE), {"k": LARGE})
    assert [part is LARGE for part in pieces.parts].count(True) == 2
    assert len(pieces) == len(large.joined(pieces))


def test_beside_large_bytes_an_error_names_the_same_place():
    for args, kwargs, path in [
        ((LARGE, [object()]), {}, "args[1][0]"),
        ((LARGE,), {"k": {"q": object()}}, "kwargs['k']['q']"),
    ]:
        with pytest.raises(UnencodableValue) as beside_large:
            large.dumps_call(args, kwargs)
        assert beside_large.value.path == path
        with pytest.raises(UnencodableValue) as small:
            values.dumps_call((b"", *args[1:]), kwargs)
        assert str(small.value) == str(beside_large.value)


def outcome(loads, data):
    try:
        return loads(data)
    except UndecodableValue:
        return UndecodableValue


good = st.sampled_from([large.joined(large.dumps_call(*call)) for call in CALLS[:8]])


@given(good, st.integers(0, 30), st.binary(max_size=3), st.integers(-30, 30))
def test_of_broken_bodies_both_ways_say_the_same(body, place, change, tail):
    """Hostile bytes: in the heads, where sizes and counts stand, and at the end."""
    body = body[:place] + change + body[place + len(change) :]
    body = body[:tail] if tail < 0 else body + b"\xc0" * tail
    for loads in (large.loads, large.loads_call):
        assert outcome(loads, Beside(body)) == outcome(loads, body)


@given(st.binary(max_size=20), st.integers(0, 70_000))
def test_of_any_bytes_both_ways_say_the_same(head, rest):
    body = head + b"\xc6" * rest
    for loads in (large.loads, large.loads_call):
        assert outcome(loads, Beside(body)) == outcome(loads, body)
