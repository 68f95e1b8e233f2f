"""The stash, from views and from dirty apps of a real gunicorn."""

from __future__ import annotations

import asyncio
import datetime
import json
import re
import signal
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from gunicorn.dirty.stash import StashClient as StockClient
from gunicorn.dirty.stash import StashError as StockError
from gunicorn.dirty.stash import StashKeyNotFoundError, StashTableNotFoundError
from support.gunicorn import BASE_APP, Gunicorn, app_with
from support.waiting import wait_until

from gunicorn_dirty_gevent.client.stash import StashClient

TASKS = """
import datetime
import os
import gevent
from gunicorn.dirty import DirtyApp, stash as stock
from gunicorn_dirty_gevent import stash

class Counter(DirtyApp):
    stashes = ["declared", "cache"]

    def init(self):
        stock.put("booted", os.getpid(), True)

    def count(self, n):
        for _ in range(n):
            stash.incr("counters", "hits")

    def many(self, n):
        def one(number):
            stock.put("many", f"app-{number}", number)
            return stock.get("many", f"app-{number}") == number
        jobs = [gevent.spawn(one, number) for number in range(n)]
        return [job.get() for job in jobs]

    def typed(self):
        return repr(stock.get("typed", "value"))
"""

VIEWS = """
    import datetime
    import gevent
    from gunicorn.dirty import get_dirty_client, stash as stock
    from gunicorn.dirty.stash import get as get_imported_early
    from gunicorn_dirty_gevent import stash

    @route("/app")
    def call(environ, query):
        args = json.loads(query.get("args", "[]"))
        return get_dirty_client().execute("tasks:Counter", query["action"], *args)

    @route("/count")
    def count(environ, query):
        for _ in range(int(query["n"])):
            stash.incr("counters", "hits")
        return "done"

    @route("/many")
    def many(environ, query):
        begun, at_first_end = [], []
        def one(number):
            begun.append(number)
            key = f"view-{number}"
            stock.put("many", key, [number] * 10)
            right = all(stock.get("many", key) == [number] * 10 for _ in range(20))
            at_first_end[:] = at_first_end or [len(begun)]
            return right
        jobs = [gevent.spawn(one, number) for number in range(int(query["n"]))]
        return {"right": [job.get() for job in jobs], "begun": at_first_end[0]}

    @route("/table")
    def table(environ, query):
        table = stock.table("dict-like")
        table["a"], table["none"] = 1, None
        told = {
            "a": table["a"], "none": table["none"], "in": "a" in table, "not in": "b" not in table,
            "len": len(table), "keys": sorted(table), "default": table.get("b", "default"),
            "items": sorted(table.items(), key=str), "values": sorted(table.values(), key=str),
            "pattern": table.keys(pattern="n*"), "name": table.name,
        }
        for missing in ("get", "del"):
            try:
                table["b"] if missing == "get" else table.__delitem__("b")
            except KeyError as error:
                told[missing] = str(error)
        del table["a"]
        told["after"] = sorted(table)
        table.clear()
        told["cleared"] = len(table)
        return told

    @route("/functions")
    def functions(environ, query):
        stock.put("f", "k", {"n": [1, None]})
        told = {
            "get": stock.get("f", "k"),
            "early": get_imported_early("f", "k"),
            "default": stock.get("f", "missing", "default"),
            "no table": stock.get("no-table", "k", "default"),
            "exists": [stock.exists("f"), stock.exists("f", "k"), stock.exists("f", "x"), stock.exists("g")],
            "keys": stock.keys("f", "k*"),
            "info": stock.info("f"),
            "deleted": [stock.delete("f", "k"), stock.delete("f", "k")],
        }
        stock.ensure("g")
        told["tables"] = sorted(t for t in stock.tables() if t in "fg")
        stock.clear("f")
        stock.delete_table("f")
        stock.delete_table("g")
        told["gone"] = [t for t in stock.tables() if t in "fg"]
        try:
            stock.info("f")
        except stock.StashTableNotFoundError as error:
            told["error"] = [str(error), error.table_name]
        try:
            stock.put("f", "k", object())
        except stock.StashError as error:
            told["unencodable"] = [str(error), error.may_have_run]
        return told

    @route("/typed")
    def typed(environ, query):
        stock.put("typed", "value", (1, {2}, datetime.date(2026, 1, 2), b"x"))
        return get_dirty_client().execute("tasks:Counter", "typed")
"""

SETTINGS = {
    "dirty_apps": ["tasks:Counter"],
    "dirty_workers": 2,
    "dirty_threads": 8,
    "workers": 2,
}


@pytest.fixture(scope="module")
def server() -> Iterator[Gunicorn]:
    with Gunicorn(app_with(VIEWS), TASKS, SETTINGS) as running:
        running.wait_dirty_workers(2)
        running.wait_log("Dirty worker ready")
        yield running


@pytest.fixture
def path(server: Gunicorn) -> str:
    return str(server.wait_log(r"Dirty arbiter listening on (\S+)")[1])


@pytest.fixture
def stash(path: str) -> Iterator[StashClient]:
    with StashClient(path, timeout=20) as client:
        yield client
        client.delete_table("t")


def url(path: str, **query: Any) -> str:
    return f"{path}?{urlencode(query)}"


def ask(server: Gunicorn, path: str, **query: Any) -> Any:
    response = server.get(url(path, **query), timeout=30)
    assert response.status == 200, response.text
    return response.json() if response.headers["content-type"] == "application/json" else response.text


# gunicorn's API


def test_gunicorns_functions(server: Gunicorn) -> None:
    told = ask(server, "/functions")
    unencodable, may_have_run = told.pop("unencodable")
    assert "object" in unencodable and may_have_run is False
    assert told.pop("error") == ["Stash table not found: f", "f"]
    assert told == {
        "get": {"n": [1, None]},
        "early": {"n": [1, None]},
        "default": "default",
        "no table": "default",
        "exists": [True, True, False, False],
        "keys": ["k"],
        "info": {"size": 1, "table": "f"},
        "deleted": [True, False],
        "tables": ["f", "g"],
        "gone": [],
    }


def test_gunicorns_table_is_like_a_dict(server: Gunicorn) -> None:
    assert ask(server, "/table") == {
        "a": 1,
        "none": None,
        "in": True,
        "not in": True,
        "len": 2,
        "keys": ["a", "none"],
        "default": "default",
        "items": [["a", 1], ["none", None]],
        "values": [1, None],
        "pattern": ["none"],
        "name": "dict-like",
        "get": "'b'",
        "del": "'b'",
        "after": ["none"],
        "cleared": 0,
    }


def test_tables_that_apps_declare_are_there(server: Gunicorn, stash: StashClient) -> None:
    assert {"declared", "cache"} <= set(stash.tables())


def test_apps_use_it_from_init_on(server: Gunicorn, stash: StashClient) -> None:
    def booted() -> bool:
        return set(stash.keys("booted")) == set(server.dirty_worker_pids())

    wait_until(booted, 10, "both workers to have put their pids")


def test_values_keep_their_types_between_views_and_apps(server: Gunicorn) -> None:
    assert ask(server, "/typed") == repr((1, {2}, datetime.date(2026, 1, 2), b"x"))


def test_greenlets_get_their_own_answers_and_the_hub_goes_on(server: Gunicorn) -> None:
    told = ask(server, "/many", n=50)
    assert told["right"] == [True] * 50
    assert told["begun"] == 50  # when the first had ended; they would be one after the other
    assert ask(server, "/app", action="many", args="[50]") == [True] * 50


# What gunicorn's has not


def test_no_increment_is_lost(server: Gunicorn, stash: StashClient) -> None:
    urls = [url("/count", n=100)] * 6 + [url("/app", action="count", args="[100]")] * 4
    assert [answer.status for answer in server.get_many(urls)] == [200] * 10
    assert stash.get("counters", "hits") == 1000


@pytest.mark.parametrize(
    ("before", "arguments", "after"),
    [
        (None, {}, 1),
        (None, {"amount": 5, "initial": 10}, 15),
        (3, {}, 4),
        (3, {"amount": -4}, -1),
        (1.5, {"amount": 0.25}, 1.75),
        (1 << 80, {}, (1 << 80) + 1),
    ],
)
def test_incr(stash: StashClient, before: Any, arguments: dict[str, Any], after: Any) -> None:
    if before is not None:
        stash.put("t", "n", before)
    assert stash.incr("t", "n", **arguments) == after
    assert stash.get("t", "n") == after


@pytest.mark.parametrize("value", ["1", None, True, [1]])
def test_incr_of_what_is_no_number(stash: StashClient, value: Any) -> None:
    stash.put("t", "n", value)
    with pytest.raises(StockError, match="not a number"):
        stash.incr("t", "n")
    assert stash.get("t", "n") == value


def test_compare_and_set(stash: StashClient) -> None:
    assert not stash.compare_and_set("t", "k", None, "new")
    stash.put("t", "k", {"version": 1})
    assert not stash.compare_and_set("t", "k", {"version": 2}, "new")
    assert stash.compare_and_set("t", "k", {"version": 1}, {"version": 2})
    assert stash.get("t", "k") == {"version": 2}


def test_one_of_many_wins(path: str, stash: StashClient) -> None:
    stash.put("t", "leader", "nobody")
    start, won = threading.Barrier(8), []

    def run(name: int) -> None:
        start.wait(10)
        if stash.compare_and_set("t", "leader", "nobody", name):
            won.append(name)
        if stash.add("t", "lock", name):
            won.append(f"lock {name}")

    threads = [threading.Thread(target=run, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(map(str, won)) == sorted([str(stash.get("t", "leader")), f"lock {stash.get('t', 'lock')}"])


def test_an_entry_goes_with_its_time(stash: StashClient) -> None:
    stash.put("t", "short", 1, ttl=0.2)
    stash.put("t", "long", 1, ttl=600)
    stash.incr("t", "n", ttl=0.2)
    assert not stash.add("t", "long", 2)
    wait_until(lambda: not stash.exists("t", "short"), 10, "the entry to go")
    wait_until(lambda: stash.get("t", "n", "gone") == "gone", 10, "the counter to go")
    assert stash.get("t", "short", "default") == "default"
    assert stash.keys("t") == ["long"] and stash.info("t")["size"] == 1
    assert stash.add("t", "short", 2) and stash.get("t", "short") == 2


@pytest.mark.parametrize("ttl", [0, -1, "1", True, float("nan")])
def test_a_ttl_that_is_none(stash: StashClient, ttl: Any) -> None:
    with pytest.raises(ValueError, match="ttl is a positive number of seconds"):
        stash.put("t", "k", 1, ttl=ttl)


def test_asyncio(path: str, stash: StashClient) -> None:
    async def use() -> list[Any]:
        client = StashClient(path, timeout=10)
        await asyncio.gather(*(client.aincr("t", "n") for _ in range(100)))
        await client.aput("t", "k", "v")
        told = [
            *(await client.aget("t", "n"), await client.aget("t", "k")),
            await client.aget("t", "x", "default"),
            *(await client.aadd("t", "k", 1), await client.acompare_and_set("t", "k", "v", "w")),
            *(await client.adelete("t", "k"), await client.adelete("t", "k")),
        ]
        from gunicorn_dirty_gevent.client import aio

        aio.release(path)
        return told

    assert asyncio.run(use()) == [100, "v", "default", False, True, True, False]


# Beside stock clients


def test_stock_clients_see_the_same_tables(path: str, stash: StashClient) -> None:
    with StockClient(path, timeout=10) as stock:
        stash.put("t", "ours", {"n": [1, 2.5, None, "é", b"x"]})
        stock.put("t", "theirs", {"n": [1]})
        assert stock.get("t", "ours") == {"n": [1, 2.5, None, "é", b"x"]}
        assert stash.get("t", "theirs") == {"n": [1]}
        stock.put("t", "n", 41)
        assert stash.incr("t", "n") == 42 and stock.get("t", "n") == 42
        assert stash.compare_and_set("t", "theirs", {"n": [1]}, "new") and stock.get("t", "theirs") == "new"
        stash.put("t", "date", datetime.date(2026, 1, 2))
        with pytest.raises(StockError, match="date"):
            stock.get("t", "date")
        assert stock.get("t", "n") == 42


def test_a_missing_key_is_an_error_of_its_own_class(stash: StashClient) -> None:
    table = stash.table("t")
    with pytest.raises(KeyError):
        table["missing"]
    with pytest.raises(StashTableNotFoundError):
        stash.info("nowhere")
    assert issubclass(StashKeyNotFoundError, StockError)


@pytest.mark.parametrize("key", [[1], {"a": 1}, {1}])
def test_a_key_that_cannot_be_one_is_an_error(stash: StashClient, key: Any) -> None:
    with pytest.raises(StockError, match="unhashable"):
        stash.put("t", key, 1)
    stash.put("t", "k", 1)
    assert stash.get("t", "k") == 1


# Ends of processes


def test_it_outlives_a_killed_arbiter() -> None:
    with Gunicorn(app_with(VIEWS), TASKS, {**SETTINGS, "workers": 1, "dirty_workers": 1}) as server:
        path = str(server.wait_log(r"Dirty arbiter listening on (\S+)")[1])
        with StashClient(path, timeout=20) as stash:
            stash.put("t", "k", {"kept": (1, 2)})
            stash.put("t", "short", 1, ttl=600)
            assert stash.incr("t", "n", 7) == 7
            stash.delete("t", "short")
            for sig in (signal.SIGKILL, signal.SIGTERM):
                mark = server.mark()
                server.kill(server.dirty_arbiter_pid(), sig)
                server.wait_log(r"Restored the stash \(tables: \d+\)", 20, since=mark)
                assert stash.get("t", "k") == {"kept": (1, 2)}
                assert not stash.exists("t", "short")
                assert stash.incr("t", "n") == (8 if sig == signal.SIGKILL else 9)


def test_a_lost_arbiter_says_whether_the_operation_may_have_been_done(tmp_path: Any) -> None:
    with StashClient(str(tmp_path / "nobody.sock"), timeout=5) as stash:
        with pytest.raises(StockError, match="cannot connect") as raised:
            stash.put("t", "k", 1)
        assert raised.value.may_have_run is False
    assert json.dumps(str(raised.value))


# The documentation


def test_the_documentation_is_true() -> None:
    text = (Path(__file__).parents[2] / "docs" / "stash.rst").read_text()
    blocks = re.findall(r"^\.\. code-block:: python\n   :name: (.*)\n\n((?:   .*\n|\n)+)", text, re.M)
    code = {name: textwrap.dedent(body) for name, body in blocks}
    assert sorted(code) == ["stash-async", "stash-tasks", "stash-view"]
    views = f"{BASE_APP}\n{code['stash-view']}\n" + textwrap.dedent(
        """
        sync_view = view

        @route("/sync")
        def sync(environ, query):
            return sync_view()
        """
    )
    tasks = f"{code['stash-tasks']}\n{code['stash-async']}\n" + textwrap.dedent(
        """
        class Async(DirtyApp):
            async def run(self):
                return repr(await view())
        """
    )
    views += textwrap.dedent(
        """
        @route("/async")
        def asynchronous(environ, query):
            return get_dirty_client().execute("tasks:Async", "run")
        """
    )
    settings = {"dirty_apps": ["tasks:Reports", "tasks:Async"], "dirty_workers": 1}
    with Gunicorn(views, tasks, settings) as server:
        assert ask(server, "/sync") == "report on sales; 1 built, 1 visits, 0 x"
        assert ask(server, "/sync") == "report on sales; 1 built, 2 visits, 0 x"
        assert ask(server, "/async") == repr({"cart": (1, 2)})
