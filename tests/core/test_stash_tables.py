"""The stash's tables: operations, time, bound; and the records out of which it is made again."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gunicorn_dirty_gevent.core.stash import SWEEP, Record, Stash, StashFailure, Value
from gunicorn_dirty_gevent.journal import SLACK, Journal

A, B = Value(0, b"a"), Value(0, b"b")


@pytest.fixture
def stash() -> Stash:
    return Stash(10_000)


def test_a_value_comes_back_as_it_was_put(stash: Stash) -> None:
    stash.put("t", "k", A)
    assert stash.get("t", "k", 0) is A
    stash.put("t", "k", B)
    assert stash.get("t", "k", 0) is B


@pytest.mark.parametrize(("table", "key"), [("t", "other"), ("other", "k")])
def test_what_is_not_there_has_gunicorns_error(stash: Stash, table: str, key: str) -> None:
    stash.put("t", "k", A)
    with pytest.raises(StashFailure) as failure:
        stash.get(table, key, 0)
    assert failure.value.error_type == "StashKeyNotFoundError"
    assert stash.find(table, key, 0) is None


def test_a_table_that_is_not_there(stash: Stash) -> None:
    with pytest.raises(StashFailure) as failure:
        stash.info("t", 0)
    assert failure.value.error_type == "StashTableNotFoundError"
    assert not stash.exists("t", None, 0) and not stash.delete_table("t")
    assert stash.keys("t", None, 0) == []


def test_tables(stash: Stash) -> None:
    stash.ensure("empty")
    stash.put("t", "user:1", A)
    stash.put("t", "user:2", A)
    stash.put("t", 3, A)
    assert stash.tables() == ["empty", "t"]
    assert stash.info("t", 0) == {"size": 3, "table": "t"}
    assert stash.keys("t", "user:*", 0) == ["user:1", "user:2"]
    assert stash.keys("t", "3", 0) == [3]
    assert stash.exists("empty", None, 0) and stash.exists("t", 3, 0) and not stash.exists("t", "3", 0)
    assert stash.delete("t", 3, 0) and not stash.delete("t", 3, 0)
    stash.clear("t")
    assert stash.keys("t", None, 0) == [] and stash.exists("t", None, 0)
    assert stash.delete_table("t") and stash.tables() == ["empty"]


def test_an_entry_is_gone_when_its_time_is_over(stash: Stash) -> None:
    stash.put("t", "k", Value(0, b"x", expires=10.0))
    assert stash.get("t", "k", 9.99).data == b"x"
    assert stash.find("t", "k", 10.0) is None
    assert not stash.exists("t", "k", 10.0) and stash.keys("t", None, 10.0) == []
    assert stash.info("t", 10.0)["size"] == 0
    assert not stash.delete("t", "k", 10.0)


def test_a_new_value_has_its_own_time(stash: Stash) -> None:
    stash.put("t", "k", Value(0, b"x", expires=10.0))
    stash.put("t", "k", A)
    stash.sweep(100.0)
    assert stash.get("t", "k", 100.0) is A


def test_a_sweep_frees_what_is_over_and_not_more_than_its_bound() -> None:
    stash = Stash(10**9)
    for number in range(SWEEP + 10):
        stash.put("t", number, Value(0, b"x", expires=1.0))
    stash.put("t", "stays", A)
    empty = stash.size
    stash.sweep(2.0)
    assert stash.size < empty and stash.keys("t", None, 0.5) != ["stays"]
    stash.sweep(2.0)
    assert stash.keys("t", None, 0.5) == ["stays"]


def test_the_limit() -> None:
    stash = Stash(2 * Stash.ENTRY_COST + 4)
    stash.put("t", "k", Value(0, b"xx"))
    with pytest.raises(StashFailure, match="stash_size is 260"):
        stash.put("t", "k", Value(0, b"xxxx"))
    with pytest.raises(StashFailure):
        stash.put("u", "k", Value(0, b""))
    assert stash.get("t", "k", 0).data == b"xx" and stash.tables() == ["t"]
    stash.put("t", "k", Value(0, b"y"))
    stash.delete_table("t")
    assert stash.size == 0


# A model: a dict of dicts, with the time at which each entry ends.

TABLES, KEYS = st.sampled_from("tuv"), st.sampled_from([1, "1", (2, "x"), None])
TIMES = st.sampled_from([math.inf, 1.0, 5.0])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), TABLES, KEYS, st.binary(max_size=20), TIMES),
        st.tuples(st.just("delete"), TABLES, KEYS),
        st.tuples(st.just("clear"), TABLES),
        st.tuples(st.just("delete_table"), TABLES),
        st.tuples(st.just("ensure"), TABLES),
        st.tuples(st.just("wait"), st.sampled_from([0.5, 2.0])),
    ),
    max_size=40,
)


Model = dict[str, dict[Any, tuple[bytes, float]]]


def walk(stash: Stash, steps: list[Any], model: Model, now: float = 0.0) -> float:
    """Do the steps on both; the time at the end."""
    for step, *args in steps:
        if step == "put":
            table, key, data, ttl = args
            stash.put(table, key, Value(0, data, now + ttl))
            model.setdefault(table, {})[key] = (data, now + ttl)
        elif step == "delete":
            table, key = args
            there = model.get(table, {}).pop(key, (b"", 0.0))[1] > now
            assert stash.delete(table, key, now) == there
        elif step == "clear":
            stash.clear(args[0])
            model.get(args[0], {}).clear()
        elif step == "delete_table":
            assert stash.delete_table(args[0]) == (model.pop(args[0], None) is not None)
        elif step == "ensure":
            stash.ensure(args[0])
            model.setdefault(args[0], {})
        else:
            now += args[0]
            stash.sweep(now)
    return now


def contents(stash: Stash, now: float) -> dict[str, dict[Any, bytes]]:
    return {
        table: {key: stash.get(table, key, now).data for key in stash.keys(table, None, now)}
        for table in stash.tables()
    }


def alive(model: Model, now: float) -> dict[str, dict[Any, bytes]]:
    return {
        table: {key: data for key, (data, expires) in entries.items() if expires > now}
        for table, entries in model.items()
    }


@given(STEPS)
def test_like_a_dict_of_dicts(steps: list[Any]) -> None:
    stash, model = Stash(10**9), {}
    now = walk(stash, steps, model)
    assert contents(stash, now) == alive(model, now)
    for table in list(stash.tables()):
        stash.delete_table(table)
    assert stash.size == 0


@given(STEPS)
def test_its_records_make_it_again(steps: list[Any]) -> None:
    told: list[Record] = []
    stash, again, copy = Stash(10**9, told.append), Stash(0), Stash(0)
    now = walk(stash, steps, {})
    for record in told:
        again.apply(record)
    for record in stash.records():
        copy.apply(record)
    again.sweep(now)
    assert contents(again, now) == contents(copy, now) == contents(stash, now)
    assert again.size == copy.size == stash.size


# The journal: the same over the death of the arbiter that wrote it.


@pytest.fixture
def journal() -> Iterator[Journal]:
    made = Journal()
    yield made
    made.close()


def restored(journal: Journal) -> Stash:
    stash = Stash(10**9)
    journal.open(stash)
    return stash


@settings(max_examples=50)
@given(STEPS, STEPS)
def test_a_journal_gives_the_next_arbiter_what_the_last_one_had(first: list[Any], second: list[Any]) -> None:
    journal = Journal()
    try:
        model: Model = {}
        now = walk(restored(journal), first, model)
        stash = restored(journal)
        assert contents(stash, now) == alive(model, now)
        later = walk(stash, second, model, now)
        assert contents(restored(journal), later) == alive(model, later)
    finally:
        journal.close()


def test_every_cut_of_the_last_record_leaves_those_before_it(journal: Journal) -> None:
    stash = restored(journal)
    stash.put("t", "whole", A)
    active = max(journal.descriptors, key=lambda number: os.fstat(number).st_size)
    before = os.fstat(active).st_size
    stash.put("t", "torn", Value(0, b"x" * 50))
    whole = os.pread(active, 10**6, 0)
    for cut in range(before, len(whole)):
        for number in journal.descriptors:
            os.ftruncate(number, 0)
        os.pwrite(active, whole[:cut], 0)
        again = restored(journal)
        assert again.keys("t", None, 0) == ["whole"]
        again.put("t", "next", B)
        assert sorted(restored(journal).keys("t", None, 0)) == ["next", "whole"]
        # `restored` has written to the other file.
        active = max(journal.descriptors, key=lambda number: os.fstat(number).st_size)


def test_a_journal_does_not_grow_with_what_is_over(journal: Journal) -> None:
    stash = restored(journal)
    for number in range(200):
        stash.put("t", "k", Value(0, bytes([number]) * 50_000))
        assert sum(os.fstat(file).st_size for file in journal.descriptors) < 2 * SLACK
    assert restored(journal).get("t", "k", 0).data == b"\xc7" * 50_000


def test_a_rewriting_that_was_not_finished_does_not_count(journal: Journal) -> None:
    stash = restored(journal)
    stash.put("t", "k", A)
    idle = min(journal.descriptors, key=lambda number: os.fstat(number).st_size)
    os.pwrite(idle, b"\x00" * 8 + b"\x00\x00\x00\x05half", 0)  # killed before the generation was written
    assert contents(restored(journal), 0) == {"t": {"k": b"a"}}
