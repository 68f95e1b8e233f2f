"""Stock clients and JSON, both on the one socket of a real gunicorn."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from gunicorn.dirty.client import DirtyClient as StockClient
from gunicorn.dirty.errors import DirtyAppError, DirtyNoWorkersAvailableError
from gunicorn.dirty.stash import StashClient, StashError, StashTableNotFoundError
from support.gunicorn import Gunicorn

TASKS = """
import time
from gunicorn.dirty import DirtyApp

class Echo(DirtyApp):
    def echo(self, value, **named):
        return [value, named] if named else value

    def count(self, n):
        for number in range(n):
            yield f"chunk-{number}"

    def big_chunks(self, n):
        for number in range(n):
            yield str(number) * 65536

    def boom(self):
        raise ValueError("boo")

    def thing(self):
        return object()

    def hold(self, seconds):
        time.sleep(seconds)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Gunicorn]:
    settings = {"dirty_apps": ["tasks:Echo"], "dirty_workers": 1, "dirty_threads": 8}
    with Gunicorn(tasks_source=TASKS, settings=settings) as running:
        running.wait_log("Dirty worker ready")
        yield running


@pytest.fixture
def path(server: Gunicorn) -> str:
    return str(server.wait_log(r"Dirty arbiter listening on (\S+)")[1])


def test_stock_client_executes(path: str) -> None:
    with StockClient(path, timeout=10) as client:
        values = [None, True, 7, 1.5, "é", b"\x00\xff", [1, [2]], {"a": {"b": 1}}]
        for value in values:
            assert client.execute("tasks:Echo", "echo", value) == value
        assert client.execute("tasks:Echo", "echo", 1, name=2) == [1, {"name": 2}]


def test_stock_client_streams(path: str) -> None:
    with StockClient(path, timeout=10) as client:
        assert list(client.stream("tasks:Echo", "count", 300)) == [f"chunk-{n}" for n in range(300)]
        assert client.execute("tasks:Echo", "echo", "after") == "after"


def test_a_slow_stock_reader_gets_every_chunk(path: str) -> None:
    with StockClient(path, timeout=20) as client, StockClient(path, timeout=10) as other:
        chunks = client.stream("tasks:Echo", "big_chunks", 100)
        assert next(chunks) == "0" * 65536
        assert other.execute("tasks:Echo", "echo", 1) == 1
        assert [len(chunk) // 65536 for chunk in chunks] == [len(str(n)) for n in range(1, 100)]


def test_stock_client_gets_errors_of_its_classes(path: str) -> None:
    with StockClient(path, timeout=10) as client:
        with pytest.raises(DirtyAppError) as raised:
            client.execute("tasks:Echo", "boom")
        assert raised.value.action == "boom"
        assert "ValueError: boo" in raised.value.traceback
        with pytest.raises(DirtyAppError, match="Unknown action: nope"):
            client.execute("tasks:Echo", "nope")
        with pytest.raises(DirtyAppError, match="not found"):
            client.execute("tasks:Other", "echo", 1)
        with pytest.raises(Exception, match="object"):
            client.execute("tasks:Echo", "thing")
        assert client.execute("tasks:Echo", "echo", "after") == "after"


def test_stock_async_client(path: str) -> None:
    async def use() -> tuple[Any, list[Any]]:
        async with StockClient(path, timeout=10) as client:
            value = await client.execute_async("tasks:Echo", "echo", [1, "x"])
            return value, [chunk async for chunk in client.stream_async("tasks:Echo", "count", 3)]

    assert asyncio.run(use()) == ([1, "x"], ["chunk-0", "chunk-1", "chunk-2"])


def test_stock_stash_client(path: str) -> None:
    with StashClient(path, timeout=10) as stash:
        stash.put("t", "a", {"n": [1, 2]})
        stash.put("t", "b", "x")
        assert stash.get("t", "a") == {"n": [1, 2]}
        assert stash.get("t", "missing", "default") == "default"
        assert stash.get("no-table", "k") is None
        assert sorted(stash.keys("t")) == ["a", "b"]
        assert stash.keys("t", pattern="a*") == ["a"]
        assert stash.info("t") == {"size": 2, "table": "t"}
        assert stash.exists("t") and stash.exists("t", "a") and not stash.exists("t", "z")
        assert stash.delete("t", "a") and not stash.delete("t", "a")
        stash.ensure("u")
        assert sorted(stash.tables()) == ["t", "u"]
        stash.clear("t")
        assert stash.keys("t") == []
        with pytest.raises(StashTableNotFoundError):
            stash.info("nope")
        stash.delete_table("t")
        stash.delete_table("u")
        assert stash.tables() == []


def test_a_full_stash_says_so(path: str) -> None:
    with StashClient(path, timeout=20) as stash:
        with pytest.raises(StashError, match="stash_size"):
            for number in range(9):
                stash.put("t", f"k{number}", b"x" * (8 << 20))
        stash.delete_table("t")
        stash.put("t", "k", b"x")
        stash.delete_table("t")


def _ask(sock: socket.socket, message: dict[str, Any]) -> None:
    text = json.dumps(message).encode()
    sock.sendall(len(text).to_bytes(4, "big") + text)


def _answer(sock: socket.socket) -> dict[str, Any]:
    stream = sock.makefile("rb")
    answer: dict[str, Any] = json.loads(stream.read(int.from_bytes(stream.read(4), "big")))
    return answer


def test_json(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(path)
        for number, args in enumerate(([1], [{"a": [None, 2.5]}], ["é"])):
            ours = f"id-{number}"
            request = {"type": "request", "id": ours, "app_path": "tasks:Echo", "action": "echo"}
            _ask(sock, {**request, "args": args})
            assert _answer(sock) == {"type": "response", "id": ours, "result": args[0]}
        _ask(sock, {"type": "request", "id": 7, "app_path": "tasks:Echo", "action": "boom"})
        error = _answer(sock)
        assert (error["type"], error["id"]) == ("error", 7)
        assert error["error"]["error_type"] == "DirtyAppError"


def test_json_stream_in_order(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(path)
        _ask(sock, {"type": "request", "id": "s", "app_path": "tasks:Echo", "action": "count", "args": [3]})
        stream = sock.makefile("rb")
        answers = [json.loads(stream.read(int.from_bytes(stream.read(4), "big"))) for _ in range(4)]
        assert answers == [
            *({"type": "chunk", "id": "s", "data": f"chunk-{n}"} for n in range(3)),
            {"type": "end", "id": "s"},
        ]


def test_overload_reaches_a_stock_client_as_its_own_class() -> None:
    settings = {"dirty_apps": ["tasks:Echo"], "dirty_workers": 1}
    install = "import gunicorn_dirty_gevent\ngunicorn_dirty_gevent.install(queue_size=1)\n"
    with Gunicorn(tasks_source=TASKS, settings=settings, install=install) as server:
        path = str(server.wait_log(r"Dirty arbiter listening on (\S+)")[1])
        server.wait_log("Dirty worker ready")
        text = {"type": "request", "id": 1, "app_path": "tasks:Echo", "action": "hold", "args": [5]}
        with socket.socket(socket.AF_UNIX) as busy, StockClient(path, timeout=10) as client:
            busy.connect(path)
            _ask(busy, text)  # runs
            _ask(busy, text)  # waits
            busy.settimeout(10)
            _ask(busy, text)
            assert _answer(busy)["error"]["error_type"] == "DirtyOverloadedError"
            with pytest.raises(DirtyNoWorkersAvailableError, match=re.escape("queue_size")):
                client.execute("tasks:Echo", "hold", 0)
