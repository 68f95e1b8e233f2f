"""Who takes part: how each one's servers are started, and how its client is made.

``start`` is for the process that compares; ``caller_factory`` for the client processes, which are
gevent-patched before they import anything.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gevent

CONTESTANTS = (
    *("ours", "stock-shared", "stock-per-greenlet"),
    *("executor", "zerorpc", "floor-direct", "floor-relay", "least-direct", "least-relay"),
)

FLOORS = {"floor": "sockets", "least": "callbacks"}
"""The first word of a name, and the kind of ``floor.py``."""

WORKERS = 2
APP = "tasks:Bench"
CALL_TIMEOUT = 60.0
CONNECT_TRIES = 500

TASKS = """
import time
from gunicorn.dirty import DirtyApp

class Bench(DirtyApp):
    def add(self, a, b):
        return a + b

    def echo(self, value):
        return value

    def sleep(self, seconds, value):
        time.sleep(seconds)
        return value

    def burn(self, seconds, value):
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass
        return value

    def items(self, tag, count, pause):
        for number in range(count):
            if pause:
                time.sleep(pause)
            yield [tag, number]
"""


def is_floor(name: str) -> bool:
    return name.partition("-")[0] in FLOORS


class Caller(NamedTuple):
    """What one greenlet uses."""

    execute: Callable[..., Any]
    stream: Callable[..., Iterator[Any]] | None = None


class Missing(Exception):
    """The contestant has no such thing."""


# The servers.


@contextmanager
def start(name: str) -> Iterator[str]:
    """Start a contestant's servers; the path of the socket to call."""
    with ExitStack() as stack:
        if name == "ours":
            yield stack.enter_context(_gunicorn(stock=False, threads=200))
        elif name.startswith("stock"):
            # Its arbiter gives a worker one call at a time, whatever this says.
            yield stack.enter_context(_gunicorn(stock=True, threads=8))
        elif name == "executor":
            yield ""  # its workers are children of its client
        elif name == "zerorpc":
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="zerorpc-")))
            servers = [str(folder / f"server{number}") for number in range(WORKERS)]
            for path in servers:
                stack.enter_context(_program("peers.py", path))
            yield ",".join(servers)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="floor-")))
            kind = FLOORS[name.partition("-")[0]]
            relay = name.endswith("relay")
            servers = [str(folder / f"server{number}") for number in range(WORKERS if relay else 1)]
            for path in servers:
                stack.enter_context(_program("floor.py", kind, "serve", path))
            if relay:
                stack.enter_context(_program("floor.py", kind, "relay", str(folder / "relay"), *servers))
                servers = [str(folder / "relay")]
            yield servers[0]


@contextmanager
def _gunicorn(*, stock: bool, threads: int) -> Iterator[str]:
    from support.gunicorn import OURS, STOCK, Gunicorn

    settings = {
        "dirty_apps": [APP],
        "dirty_workers": WORKERS,
        "dirty_threads": threads,
        "dirty_timeout": int(CALL_TIMEOUT),
    }
    # What stock leaves in its TMPDIR is not our subject.
    leftovers = ["*"] if stock else []
    install = STOCK if stock else OURS
    with Gunicorn(tasks_source=TASKS, settings=settings, install=install, leftovers=leftovers) as server:
        for pid in server.wait_dirty_workers(WORKERS):
            server.wait_log(rf"Initialized dirty app: {APP} \(pid: {pid}\)|\[{pid}\].*Initialized dirty app")
        yield server.wait_log(r"Dirty arbiter listening on (\S+)").group(1)


@contextmanager
def _program(name: str, *arguments: str) -> Iterator[None]:
    """A server of this folder's, which says "ready"."""
    with child([str(Path(__file__).with_name(name)), *arguments]) as process:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{name} {arguments[0]} did not start")
        yield


@contextmanager
def child(arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A Python program on two pipes, which is to end when its stdin does."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, *arguments], stdin=pipe, stdout=pipe, text=True, env=environment
    )
    try:
        yield process
    finally:
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


# The clients.


def caller_factory(name: str, path: str) -> Callable[[], Caller]:
    """A function that each greenlet calls once for its `Caller`."""
    if name == "stock-per-greenlet":
        return partial(_dirty, _stock_class(), path)
    if is_floor(name):
        from floor import KINDS, Client

        shared = Caller(Client(KINDS[FLOORS[name.partition("-")[0]]], path).execute)
    elif name == "executor":
        from peers import executor

        shared = Caller(executor(WORKERS))
    elif name == "zerorpc":
        from peers import zerorpc_client

        shared = Caller(*zerorpc_client(path.split(","), CALL_TIMEOUT))
    elif name == "ours":
        from gunicorn_dirty_gevent import DirtyClient

        shared = _dirty(DirtyClient, path)
    else:
        shared = _dirty(_stock_class(), path)
    return lambda: shared


def _stock_class() -> Any:
    from gunicorn.dirty.client import DirtyClient

    assert DirtyClient.__module__ == "gunicorn.dirty.client"
    return DirtyClient


def _dirty(client_class: Any, path: str) -> Caller:
    client = client_class(path, timeout=CALL_TIMEOUT)
    _connect(client)
    return Caller(partial(client.execute, APP), partial(client.stream, APP))


def _connect(client: Any) -> None:
    """200 clients at once overflow the backlog of stock's listener (100): those try again."""
    from gunicorn.dirty.errors import DirtyConnectionError

    for _ in range(CONNECT_TRIES):
        try:
            return client.connect()
        except DirtyConnectionError:
            gevent.sleep(0.01)
    raise RuntimeError(f"cannot connect to {client.socket_path}")
