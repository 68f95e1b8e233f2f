"""A stash without gunicorn, for the tests of apps: the arbiter's, in the test's own process."""

from __future__ import annotations

import asyncio
import threading

import pytest
from gunicorn.dirty import stash as stock

from gunicorn_dirty_gevent import stash
from gunicorn_dirty_gevent.settings import Settings
from gunicorn_dirty_gevent.testing import local_stash


def test_the_functions_of_both_modules_use_it() -> None:
    with local_stash("made"):
        assert stash.tables() == stock.tables() == ["made"]
        stash.put("visits", "alice", (1, {2}))
        assert stock.get("visits", "alice") == (1, {2})
        assert stash.get("visits", "bob", "nobody") == "nobody"
        assert [stash.incr("counters", "all") for _ in range(3)] == [1, 2, 3]
        assert stash.add("counters", "all", 9) is False
        assert stash.compare_and_set("counters", "all", 3, 10) is True
        table = stash.table("counters")
        table["x"] = 5
        assert dict(table.items()) == {"all": 10, "x": 5}
        assert stash.delete("counters", "x") is True and "x" not in table
        seen: list[object] = []
        thread = threading.Thread(target=lambda: seen.append(stock.get("counters", "all")))
        thread.start()
        thread.join(10)
        assert seen == [10]


def test_asyncio() -> None:
    async def use(client: stash.StashClient) -> object:
        await client.aput("sessions", "alice", {"cart": 1})
        assert await client.aget("sessions", "bob", "none") == "none"
        return await client.aget("sessions", "alice")

    with local_stash() as client:
        assert asyncio.run(use(client)) == {"cart": 1}


def test_errors_are_the_arbiters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gunicorn_dirty_gevent.settings.current", Settings(stash_size=1000))
    with local_stash():
        with pytest.raises(stash.StashTableNotFoundError):
            stash.info("none")
        with pytest.raises(KeyError):
            stash.table("none")["key"]
        with pytest.raises(stash.StashError, match="cannot encode object at value"):
            stash.put("some", "key", object())
        with pytest.raises(stash.StashError, match="the stash is full"):
            stash.put("some", "key", b"x" * 2000)
        for wrong in (lambda: stash.put("some", [1], 2), lambda: stash.incr("some", "n", amount="x")):  # type: ignore[arg-type]
            with pytest.raises(stash.StashError, match="cannot be answered: TypeError"):
                wrong()
        stash.put("some", "key", "no number")
        with pytest.raises(stash.StashError, match="cannot be incremented"):
            stash.incr("some", "key")


def test_it_is_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GUNICORN_DIRTY_SOCKET", raising=False)
    monkeypatch.setattr(stock, "_stash_socket_path", None)
    for _ in range(2):
        with local_stash():
            assert stash.tables() == []
            stash.ensure("left")
    with pytest.raises(stash.StashError):
        stash.tables()
    with pytest.raises(stash.StashError):
        stock.tables()
