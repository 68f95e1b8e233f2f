"""What `core.values` promises: exact types back, named refusals, and no harm from any bytes."""

import array
import collections
import dataclasses
import enum
import math
import os
import pathlib
import random
import struct
import subprocess
import sys
import threading
import types
import uuid
import zoneinfo
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal

import ormsgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gunicorn_dirty_gevent.core import values
from gunicorn_dirty_gevent.core.values import (
    MAX_DEPTH,
    UndecodableValue,
    UnencodableValue,
    dumps,
    dumps_call,
    loads,
    loads_call,
)

MODULE = __name__
quick = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def same(a, b):
    """Equal in value and in type, all the way down; NaN is like NaN, and 0.0 is unlike -0.0."""
    if type(a) is not type(b):
        return False
    if type(a) is float:
        return struct.pack(">d", a) == struct.pack(">d", b)
    if type(a) is complex:
        return same(a.real, b.real) and same(a.imag, b.imag)
    if type(a) is Decimal:
        return a.as_tuple() == b.as_tuple()
    if type(a) in (list, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if type(a) is dict:
        return same(list(a.items()), list(b.items()))
    if type(a) in (set, frozenset):
        left = list(b)
        for item in a:
            found = next((n for n, other in enumerate(left) if same(item, other)), None)
            if found is None:
                return False
            del left[found]
        return not left
    if type(a) in (datetime, time):
        zones = same_zone(a.tzinfo, b.tzinfo)
        return zones and a.fold == b.fold and a.replace(tzinfo=None) == b.replace(tzinfo=None)
    return a == b


def same_zone(a, b):
    if type(a) is not type(b):
        return False
    if type(a) is zoneinfo.ZoneInfo:
        return a.key == b.key
    return repr(a) == repr(b)


def test_the_comparison_itself_tells_types_apart():
    assert not same(1, True)
    assert not same([1], (1,))
    assert not same({1: 0}, {True: 0})
    assert not same({1}, {1.0})
    assert not same(0.0, -0.0)
    assert not same({"a": 1, "b": 2}, {"b": 2, "a": 1})
    assert not same(bytearray(b"x"), b"x")
    assert not same(time(1, tzinfo=NAMED), time(1, tzinfo=timezone(timedelta(hours=1))))
    assert not same(time(1), time(1, fold=1))
    assert same(math.nan, math.nan)


BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")
NAMED = timezone(timedelta(hours=1), "CET")
ODD = timezone(-timedelta(hours=3, minutes=25, seconds=45, microseconds=7))

EACH = [
    None,
    True,
    False,
    *(0, 1, -1, 127, 128, -32, -33, 2**63 - 1, -(2**63), 2**64 - 1),
    *(2**64, -(2**63) - 1, 2**127, -(2**127), 2**128 - 1, 10**6000, -(10**6000)),
    *(0.0, -0.0, 1.5, math.inf, -math.inf, math.nan, 5e-324),
    *("", "a", "é\u0100\u0140\u0180", "\U0001f600", "\x00", "\ud800", "a\udcffb" * 50, "x" * 70000),
    *(b"", b"\xc4\xc5\xc6", bytes(range(256)) * 300),
    *(bytearray(), bytearray(b"abc"), bytearray(b"\xc0" * 70000), bytearray(300)),
    *([], [1], [[]], [bytearray(b"x")], [[1, [bytearray(b"x"), b"y"]]], [1] * 60 + [bytearray()]),
    *((), (1,), ((), ((1,),)), (bytearray(b"x"),), ([1, (2, [3])],)),
    *(set(), {1}, {"a", 2, None, (1, 2), b"x", frozenset({1})}, frozenset(), frozenset({1, (2,)})),
    *({}, {"a": 1}, {"a": bytearray(b"x")}, {"z": 1, "a": 2}, {"": {"": []}}),
    *({1: 2}, {True: 1}, {None: 0}, {1.5: "x"}, {b"k": 1}, {(1, (2,)): [3]}, {"a": 1, 2: "b"}),
    *({"\udc80": 1, "ok": 2}, {frozenset({1}): 1}, {2**70: 1}, {uuid.UUID(int=7): 1}),
    *({datetime(2024, 1, 1): 1}, {Decimal("1.50"): 1}, {math.nan: 1}, {-0.0: [{1: {2: (3,)}}]}),
    *(datetime(2024, 2, 29, 1, 2, 3, 4), datetime.min, datetime.max),
    datetime(2024, 10, 27, 2, 30, fold=1),
    datetime(2024, 10, 27, 2, 30, tzinfo=timezone.utc),
    datetime(2024, 10, 27, 2, 30, tzinfo=timezone.utc, fold=1),
    datetime(2024, 10, 27, 2, 30, tzinfo=ODD),
    datetime(2024, 10, 27, 2, 30, tzinfo=NAMED),
    datetime(2024, 10, 27, 2, 30, tzinfo=BERLIN),
    datetime(2024, 10, 27, 2, 30, tzinfo=BERLIN, fold=1),
    datetime(1, 1, 1, tzinfo=BERLIN),
    *(date.min, date.max, date(2024, 2, 29)),
    *(time.min, time.max, time(1, 2, fold=1), time(1, tzinfo=timezone.utc), time(1, tzinfo=NAMED)),
    *(time(1, tzinfo=BERLIN), time(1, tzinfo=zoneinfo.ZoneInfo("UTC"))),
    *(timedelta.min, timedelta.max, timedelta(), timedelta(microseconds=-1)),
    *map(Decimal, ["0", "-0", "1.50", "1E+5", "1e-999", "NaN", "-NaN12", "sNaN", "sNaN9"]),
    *map(Decimal, ["Infinity", "-Infinity", "9" * 9000]),
    *(uuid.UUID(int=0), uuid.UUID(int=2**128 - 1)),
    *(0j, complex(-0.0, math.nan), complex(math.inf, -0.0)),
]


@pytest.mark.parametrize("value", EACH, ids=lambda v: type(v).__name__)
def test_each_type_comes_back_as_it_was(value):
    assert same(loads(dumps(value)), value)


def test_each_type_comes_back_from_inside_every_container():
    whole = [EACH, tuple(EACH), {"x": EACH, 5: EACH}, {"k": {"k": tuple(EACH)}}, (((([EACH],),),),)]
    assert same(loads(dumps(whole)), whole)


def test_the_packed_bytes_may_come_in_any_buffer():
    data = dumps([1, (2,)])
    assert loads(memoryview(b"." + data)[1:]) == [1, (2,)]
    assert loads(bytearray(data)) == [1, (2,)]


def test_utc_is_the_very_object():
    assert loads(dumps(datetime.now(timezone.utc))).tzinfo is timezone.utc


def test_a_zone_that_is_not_installed_becomes_its_offset(monkeypatch):
    value = datetime(2024, 7, 1, 12, tzinfo=BERLIN, fold=1)
    data, clock = dumps(value), dumps(time(1, tzinfo=BERLIN))

    def missing(key):
        raise zoneinfo.ZoneInfoNotFoundError(key)

    monkeypatch.setattr(zoneinfo, "ZoneInfo", missing)
    back = loads(data)
    assert type(back.tzinfo) is timezone
    assert back.utcoffset() == timedelta(hours=2)
    assert back.tzname() == "CEST"
    assert back.fold == 1
    assert back == datetime(2024, 7, 1, 10, tzinfo=timezone.utc)
    with pytest.raises(UndecodableValue, match="Europe/Berlin"):
        loads(clock)


# --- hypothesis ----------------------------------------------------------------------------------

zones = st.one_of(
    st.none(),
    st.just(timezone.utc),
    st.sampled_from([BERLIN, zoneinfo.ZoneInfo("America/New_York"), NAMED]),
    st.timedeltas(timedelta(hours=-23), timedelta(hours=23)).map(timezone),
)
hashable_leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**200), 2**200),
    st.floats(),
    st.text(),
    st.text(st.characters()),
    st.text(st.characters(categories=["Cs", "Lu"])),
    st.binary(),
    st.datetimes(timezones=zones, allow_imaginary=True),
    st.dates(),
    st.times(timezones=zones),
    st.timedeltas(),
    st.decimals().filter(lambda d: not d.is_snan()),
    st.uuids(),
    st.complex_numbers(),
)
keys = st.recursive(
    hashable_leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=4).map(tuple), st.frozensets(inner, max_size=4)),
    max_leaves=6,
)
leaves = hashable_leaves | st.binary().map(bytearray) | st.decimals()
anything = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.lists(inner, max_size=5).map(tuple),
        st.dictionaries(st.text(), inner, max_size=5),
        st.dictionaries(keys, inner, max_size=5),
        st.sets(keys, max_size=5),
        st.frozensets(keys, max_size=5),
    ),
    max_leaves=25,
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=25,
)


@quick
@given(anything)
def test_any_value_round_trips(value):
    assert same(loads(dumps(value)), value)


@quick
@given(anything)
def test_the_walk_gives_what_the_fast_way_gives(value):
    assert same(loads(values._seal(values._Walk("x").visit(value))), value)


@quick
@given(plain)
def test_plain_data_is_plain_messagepack(value):
    assert dumps(value) == ormsgpack.packb(value)


@quick
@given(st.lists(anything, max_size=4).map(tuple), st.dictionaries(st.text(), anything, max_size=4))
def test_any_call_round_trips(args, kwargs):
    back_args, back_kwargs = loads_call(dumps_call(args, kwargs))
    assert same(tuple(back_args), args)
    assert same(back_kwargs, kwargs)


# --- what does not travel ------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


class Name(str, enum.Enum):
    A = "a"


class Flag(enum.Flag):
    ON = 1


@dataclasses.dataclass(frozen=True)
class Point:
    x: int = 1


class Model:
    __pydantic_fields__ = {"a": 1}
    __pydantic_extra__ = None

    def __init__(self):
        self.a = 1

    def model_dump(self):
        return {"a": 1}


class Foo:
    pass


class Loud:
    def __repr__(self):
        raise RuntimeError("no repr")


class Zone(tzinfo):
    def utcoffset(self, when):
        return timedelta(0)

    def dst(self, when):
        return None

    def tzname(self, when):
        return "Z"


Pair = collections.namedtuple("Pair", "a b")
bases = (str, int, float, bytes, bytearray, list, tuple, set, frozenset, dict, complex)
subclasses = [type(f"My{base.__name__}", (base,), {"__module__": MODULE}) for base in bases]
Array = type("ndarray", (), {"__module__": "numpy", "tobytes": 1, "tolist": 1, "nbytes": 1})
Float64 = type("float64", (float,), {"__module__": "numpy", "tobytes": 1, "nbytes": 1})

REFUSED = [
    (Colour.RED, f"{MODULE}.Colour", "x.value"),
    (Level.LOW, f"{MODULE}.Level", "x.value"),
    (Name.A, f"{MODULE}.Name", "x.value"),
    (Flag.ON, f"{MODULE}.Flag", "x.value"),
    (Point(), f"{MODULE}.Point", "dataclasses.asdict(x)"),
    (Model(), f"{MODULE}.Model", "x.model_dump()"),
    (Pair(1, 2), f"{MODULE}.Pair", "tuple(x)"),
    (collections.OrderedDict(a=1), "collections.OrderedDict", "only dict itself"),
    (collections.defaultdict(int, a=1), "collections.defaultdict", "only dict itself"),
    (collections.Counter("a"), "collections.Counter", "only dict itself"),
    (collections.deque([1]), "collections.deque", "plain data"),
    *((sub(), f"{MODULE}.{sub.__name__}", "only ") for sub in subclasses),
    (type("D", (Decimal,), {"__module__": MODULE})(1), f"{MODULE}.D", "plain data|only"),
    (type("T", (datetime,), {"__module__": MODULE})(2024, 1, 1), f"{MODULE}.T", "only datetime"),
    (type("U", (uuid.UUID,), {"__module__": MODULE})(int=1), f"{MODULE}.U", "only uuid.UUID"),
    (memoryview(b"x"), "memoryview", "bytes(x)"),
    (array.array("i", [1]), "array.array", "x.tolist()"),
    (Array(), "numpy.ndarray", "x.tolist()"),
    (Float64(1.5), "numpy.float64", "x.tolist()"),
    (ValueError("x"), "ValueError", "repr(x)"),
    (pathlib.PurePosixPath("/"), "pathlib", "str(x)"),
    (iter([1]), "list_iterator", "list(x)"),
    ((n for n in ()), "generator", "list(x)"),
    (Foo(), f"{MODULE}.Foo", "plain data"),
    (object(), "object", "plain data"),
    (Foo, "type", "code does not travel"),
    (len, "builtin_function_or_method", "plain data|code"),
    (lambda: 0, "function", "code does not travel"),
    (range(3), "range", "plain data"),
    (types.SimpleNamespace(a=1), "types.SimpleNamespace", "plain data"),
    (datetime(2024, 1, 1, tzinfo=Zone()), f"{MODULE}.Zone", "zoneinfo.ZoneInfo"),
]


@pytest.mark.parametrize("case", REFUSED, ids=[name for _, name, _ in REFUSED])
def test_what_does_not_travel_is_named_with_its_place(case):
    value, type_name, hint = case
    tail = ".tzinfo" if type_name.endswith("Zone") else ""
    places = [
        (value, "result"),
        ([0, value], "result[1]"),
        ((0, value), "result[1]"),
        ({"a": value}, "result['a']"),
        ({1: value}, "result[1]"),
        ([{"users": [0, 0, 0, value]}], "result[0]['users'][3]"),
        ([b"\xc4", {"users": (0, [value])}], "result[1]['users'][1][0]"),
        (((((((value,),),),),),), "result" + "[0]" * 6),
    ]
    for whole, path in places:
        with pytest.raises(UnencodableValue) as caught:
            dumps(whole)
        error = caught.value
        assert error.type_name.startswith(type_name)
        assert error.path == path + tail
        assert str(error).startswith(f"cannot encode {error.type_name} at {path}{tail}: ")
        assert any(part in str(error) for part in hint.split("|"))


@pytest.mark.parametrize(
    ("value", "type_name", "path"),
    [
        ({"u": {Colour.RED: 1}}, "Colour", "key <Colour.RED: 1> of result['u']"),
        ({Level.LOW: 1}, "Level", "key <Level.LOW: 1> of result"),
        ({Name.A: 1}, "Name", "key <Name.A: 'a'> of result"),
        ({Pair(1, 2): 1}, "Pair", "key Pair(a=1, b=2) of result"),
        ({(1, Point()): 1}, "Point", "(key (1, Point(x=1)) of result)[1]"),
        ({"s": {1, Point()}}, "Point", "member Point(x=1) of result['s']"),
        ({"a" * 500: Foo()}, "Foo", None),
        ({10**9000: Foo()}, "Foo", None),
        ({Loud(): 1}, "Loud", None),
        ({(Loud(),) * 50: 1}, "Loud", None),
        ({Foo(): 1}, "Foo", None),
    ],
)
def test_a_bad_key_or_member_is_named(value, type_name, path):
    with pytest.raises(UnencodableValue) as caught:
        dumps(value)
    assert caught.value.type_name == f"{MODULE}.{type_name}"
    assert path is None or caught.value.path == path
    assert len(str(caught.value)) < 800


def test_a_call_names_its_arguments():
    for args, kwargs, path in [
        ((0, Foo()), {}, "args[1]"),
        ((), {"name": [Foo()]}, "kwargs['name'][0]"),
        ((1, bytearray(b"x")), {"m": memoryview(b"x")}, "kwargs['m']"),
        (({"users": [0, 0, 0, Foo()]},), {}, "args[0]['users'][3]"),
        ((), {subclasses[0]("k"): 1}, "key 'k' of kwargs"),
    ]:
        with pytest.raises(UnencodableValue) as caught:
            dumps_call(args, kwargs)
        assert caught.value.path == path
    with pytest.raises(UnencodableValue, match=r"at reply\[0\]"):
        dumps([Foo()], root="reply")


def test_an_exit_while_encoding_or_decoding_is_not_swallowed(monkeypatch):
    calls = []

    def stop(*_):
        if not calls:
            calls.append(1)
            raise SystemExit(3)
        return ormsgpack.Ext(values._UUID, b"1" * 16)

    with monkeypatch.context() as patch:
        patch.setitem(values._SCALARS, uuid.UUID, stop)
        with pytest.raises(SystemExit):
            dumps([(uuid.UUID(int=1),)])
    data = dumps([(uuid.UUID(int=1),)])
    calls.clear()
    monkeypatch.setitem(values._BUILDERS, values._UUID, stop)
    with pytest.raises(SystemExit):
        loads(data)


def test_common_data_needs_no_walk(monkeypatch):
    def walk(*_):
        raise AssertionError("walked")

    monkeypatch.setattr(values, "_Walk", walk)
    rows = [(n, f"name {n}", n / 7, 2**70, date.min, b"\xc4", {"a": {n}}) for n in range(300)]
    assert same(loads(dumps(rows)), rows)
    assert same(loads_call(dumps_call((rows,), {"k": rows})), ([rows], {"k": rows}))


# --- depth ---------------------------------------------------------------------------------------

WRAPS = {
    "list": lambda v: [v],
    "tuple": lambda v: (v,),
    "dict": lambda v: {"k": v},
    "int-keyed": lambda v: {1: v},
    "frozenset": lambda v: frozenset({v}),
    "list-tuple": lambda v: [v] if type(v) is tuple else (v,),
}


def nested(wrap, levels, value):
    for _ in range(levels):
        value = wrap(value)
    return value


def unwrap(value):
    levels = 0
    while isinstance(value, (list, tuple, dict, frozenset)):
        value = next(iter(value.values() if type(value) is dict else value))
        levels += 1
    return levels, value


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=list(WRAPS))
@pytest.mark.parametrize("core", [None, 2**80, "\ud800"])
def test_nesting_travels_up_to_the_bound(wrap, core):
    for levels in (MAX_DEPTH - 1, MAX_DEPTH):
        assert unwrap(loads(dumps(nested(wrap, levels, core)))) == (levels, core)


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=list(WRAPS))
def test_nesting_past_the_bound_is_refused(wrap):
    for levels in (300, 5000):
        if wrap is WRAPS["frozenset"] and levels > 300:
            continue  # hash() itself recurses
        with pytest.raises(UnencodableValue, match=f"nested deeper than {MAX_DEPTH} levels"):
            dumps(nested(wrap, levels, None))
    if wrap not in (WRAPS["list"], WRAPS["dict"]):
        with pytest.raises(UnencodableValue, match=r"\(or contains itself\)"):
            dumps(nested(wrap, MAX_DEPTH + 1, None))


def test_plain_lists_may_nest_further_and_come_back_at_any_free_place():
    value = 1
    for _ in range(values._FREE_DEPTH):
        value = (nested(WRAPS["list"], 200, value), [1] * 500)
    back = loads(dumps(value))
    for _ in range(values._FREE_DEPTH):
        assert same(back[1], [1] * 500)
        back = back[0]
        for _ in range(200):
            (back,) = back
    assert same(back, 1)


def test_wide_values_deep_down_are_not_taken_for_deep_ones():
    wide = [{"a": [i, "x" * 40, b"y" * 300, 1.5, {}, [], (i,)], "b": i * 1000} for i in range(300)]
    for wrap in (WRAPS["tuple"], WRAPS["int-keyed"]):
        value = nested(wrap, MAX_DEPTH - 4, wide)
        back = loads(dumps(value))
        for _ in range(MAX_DEPTH - 4):
            back = back[0] if type(back) is tuple else back[1]
        assert same(back, wide)


def test_what_contains_itself_is_refused():
    loop: list = []
    loop.append(loop)
    ring: dict = {}
    ring["x"] = (1, [ring])
    pair: list = [1]
    pair.append((pair, pair))
    for value in (loop, ring, pair, {5: loop}, [bytearray(b"x"), loop]):
        with pytest.raises(UnencodableValue, match="contains itself"):
            dumps(value)
        with pytest.raises(UnencodableValue, match="contains itself") as caught:
            dumps_call((value,), {})
        assert caught.value.path.startswith("args[0]")
        assert len(str(caught.value)) < 800


# --- bytes from anywhere -------------------------------------------------------------------------


def survives(data):
    """Only a value or UndecodableValue may come out; returns whether it was a value."""
    for read in (loads, loads_call):
        try:
            read(data)
        except UndecodableValue:
            if read is loads:
                return False
    return True


@settings(quick, max_examples=1000)
@given(st.binary(max_size=200))
def test_garbage_raises_nothing_else(data):
    survives(data)


@settings(quick, max_examples=250)
@given(anything, st.randoms(use_true_random=False))
def test_damaged_values_raise_nothing_else(value, rng):
    data = bytearray(dumps(value))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data))
        data[at : at + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
        data = data or bytearray(1)
    survives(bytes(data))


@quick
@given(anything)
def test_truncated_values_are_refused(value):
    data = dumps(value)
    for size in {*range(min(len(data), 40)), len(data) - 1}:
        with pytest.raises(UndecodableValue):
            loads(data[:size])


@settings(quick, max_examples=250)
@given(st.integers(0, 127), st.binary(max_size=40) | anything.map(dumps))
def test_every_extension_survives_any_payload(code, payload):
    read = survives(ormsgpack.packb([ormsgpack.Ext(code, payload)]))
    assert not read or values._INT <= code <= values._COMPLEX


def test_every_extension_survives_every_kind_of_payload():
    good = 0
    for code in range(128):
        for value in EACH:
            good += survives(ormsgpack.packb(ormsgpack.Ext(code, dumps(value))))
            if isinstance(value, (str, bytes)):
                raw = value.encode("utf-8", "replace") if isinstance(value, str) else value
                good += survives(ormsgpack.packb(ormsgpack.Ext(code, raw)))
    assert good > 100


def ext(code, *items):
    return ormsgpack.packb(ormsgpack.Ext(code, ormsgpack.packb(list(items))))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff\xa1a",
        bytes.fromhex("def279a0267ca6622b65cb9ac7fd0c317bff0c"),
        bytes.fromhex("df12824b4aa0619d75a389c57866c2645534f5c1261462bee98bba8a6785e4e3"),
        bytes.fromhex("ddbcecca2b1eb1c6a3e5b2b434ae33150f016d6eae265692661d3b5b"),
        b"\xc6\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",
        b"\xdd\x0f\xff\xff\xff" * 2000,
        b"\x91" * 100_000,
        b"\x81\xa1a" * 100_000,
        b"\x81\x01\x02",
        ext(values._SET, [1]),
        ext(values._SET, 1, 1),
        ext(values._DICT, 1),
        ext(values._DICT, [], 1),
        ext(values._DICT, 1, 2, 1, 3),
        ext(values._TIMEDELTA, 10**18),
        ext(values._TIMEDELTA, "x"),
        ext(values._TIMEDELTA, 1, 2, 3, 4, 5, 6, 7, 8, 9),
        ext(values._COMPLEX, "x"),
        ext(values._DATETIME, "2024-01-01", 9),
        ext(values._DATETIME, "2024-01-01", 0, [10**9], None, None),
        ext(values._DATETIME, "2024-01-01", 0, None, None, "../../etc/passwd"),
        ext(values._DATETIME, 5, 0),
        ormsgpack.packb(ormsgpack.Ext(values._DECIMAL, b"garbage")),
        ormsgpack.packb(ormsgpack.Ext(values._DECIMAL, b"1E" + b"9" * 5000)),
        ormsgpack.packb(ormsgpack.Ext(values._UUID, b"short")),
        ormsgpack.packb(ormsgpack.Ext(values._DATE, b"2024-99-99")),
        ormsgpack.packb(ormsgpack.Ext(values._TEXT, b"\xff\xff")),
        ormsgpack.packb(ormsgpack.Ext(values._TUPLE, b"\x05")),
        ormsgpack.packb(ormsgpack.Ext(values._TUPLE, b"")),
        ormsgpack.packb(ormsgpack.Ext(0, b"")),
        ormsgpack.packb(ormsgpack.Ext(99, b"")),
    ],
    ids=lambda data: data[:12].hex(),
)
def test_hostile_bytes_are_refused(data):
    with pytest.raises(UndecodableValue):
        loads(data)


def hostile_nesting(levels, lists, filler=b""):
    data = b"\xc0"
    for _ in range(levels):
        data = (b"\x92" + filler if filler else b"") + b"\x91" * lists + data
        data = b"\xc9" + len(data).to_bytes(4, "big") + bytes([values._TUPLE]) + data
    return data


def test_a_chain_of_extensions_alone_is_refused_by_its_depth():
    data = b"\x90"
    for _ in range(MAX_DEPTH + 10):
        data = ormsgpack.packb(ormsgpack.Ext(values._TUPLE, data))
    with pytest.raises(UndecodableValue, match="nested deeper"):
        loads(data)


@quick
@given(anything, st.binary(max_size=60))
def test_the_check_for_older_packers_refuses_only_what_cannot_be_read(value, garbage):
    data = dumps(value)
    assert not values._unsafe(data, 1023)
    assert same(values._checked(memoryview(data), ext_hook=values._Reader().hook), value)
    try:
        ormsgpack.unpackb(garbage if not values._OLD else b"", ext_hook=lambda code, data: code)
    except ValueError:
        return
    assert not values._unsafe(garbage, 1023)


@pytest.mark.parametrize("data", ["dd0000000401", "dc00ffc0", "92dd00000003c0c0", "9191dc000201", "de00010a"])
def test_the_check_for_older_packers_sees_what_is_missing(data):
    data = bytes.fromhex(data)
    assert values._unsafe(data, 1023)
    assert not values._unsafe(data + bytes(300), 1023)


@pytest.mark.parametrize("lists", [1, 30, 1000])
@pytest.mark.parametrize("filler", [b"", b"\xcb12345678", b"\xd9\x03\x91\x91\x91"])
def test_nested_extensions_do_not_exhaust_the_stack(lists, filler):
    # In a process of its own, as the failure this looks for is a crash; with a thread's stack
    # smaller than any default on Linux.
    code = f"""if True:
        import sys, threading
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from gunicorn_dirty_gevent.core.values import loads, UndecodableValue
        from test_values import hostile_nesting
        def attack():
            for levels in (5, 63, 64, 65, 2000):
                try:
                    loads(hostile_nesting(levels, {lists}, {filler!r}))
                except UndecodableValue:
                    print("refused")
        threading.stack_size(7 << 20)
        thread = threading.Thread(target=attack)
        thread.start()
        thread.join()
        print("alive")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split()[-1:] == ["alive"], (done.returncode, done.stderr[-500:])
    assert done.stdout.count("refused") >= 2


def test_values_survive_a_caller_deep_in_the_python_stack():
    data = dumps(nested(WRAPS["tuple"], MAX_DEPTH, 1))

    def down(levels):
        if levels:
            return down(levels - 1)
        return survives(data)

    here = len(list(iter_frames()))
    for room in (15, 40, 80, 400):
        down(sys.getrecursionlimit() - here - room)


def iter_frames():
    frame = sys._getframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


# --- calls ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [None, 5, [], [[]], [[], {}, 1], [{}, []], [(), {}], [[], []], {"a": 1}, ([], {}), "ab"],
)
def test_what_is_no_call_is_refused(value):
    with pytest.raises(UndecodableValue, match="not an encoded call"):
        loads_call(dumps(value))


def test_a_call_has_names_for_keys():
    with pytest.raises(UndecodableValue):
        loads_call(dumps([[], {1: 2}]))
    assert loads_call(dumps([[1], {"a": 2}])) == ([1], {"a": 2})
    assert loads_call(dumps_call((), {})) == ([], {})


# --- the module itself ---------------------------------------------------------------------------


def test_importing_adds_no_module_to_those_of_ormsgpack():
    code = """if True:
        import sys, ormsgpack
        had = set(sys.modules)
        import gunicorn_dirty_gevent.core  # what the packages import is not under test
        between = set(sys.modules) - had
        import gunicorn_dirty_gevent.core.values
        print(*(set(sys.modules) - had - between - {"gunicorn_dirty_gevent.core.values"}))
        banned = {"gevent", "socket", "signal", "decimal", "zoneinfo", "pickle"}
        print(*(banned & (set(sys.modules) - had - between)))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_threads_do_not_disturb_each_other():
    value = [EACH[n % len(EACH)] for n in range(len(EACH))]
    wrong = []

    def work(seed):
        rng = random.Random(seed)
        for _ in range(20):
            part = [tuple(rng.sample(value, 5)), nested(WRAPS["tuple"], rng.randrange(60), 1)]
            if not same(loads(dumps(part)), part):
                wrong.append(part)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
