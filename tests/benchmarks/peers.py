"""What else a gevent program can use for slow work: a process pool, and zerorpc.

As a program: ``peers.py PATH`` is a zerorpc server; it prints "ready" and ends when its stdin does.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import bench_tasks


def executor(workers: int) -> Callable[..., Any]:
    """The standard library's process pool, submitted to from greenlets. It has no streams."""
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(workers, mp_context=context)

    def execute(action: str, *args: Any) -> Any:
        return pool.submit(bench_tasks.run, action, *args).result()

    return execute


def zerorpc_client(
    paths: list[str], timeout: float
) -> tuple[Callable[..., Any], Callable[..., Iterator[Any]]]:
    """One client for each server process, used in turn by all greenlets."""
    import zerorpc

    clients = [zerorpc.Client(f"ipc://{path}", timeout=timeout, heartbeat=None) for path in paths]
    turns = itertools.cycle(clients)

    def execute(action: str, *args: Any) -> Any:
        return next(turns)(action, *args)

    def stream(action: str, *args: Any) -> Iterator[Any]:
        return iter(next(turns)(action, *args))

    return execute, stream


def serve(path: str) -> None:
    import gevent
    import zerorpc

    bench = bench_tasks.Bench()
    methods = {name: getattr(bench, name) for name in ("add", "echo", "sleep", "burn")}
    methods["items"] = zerorpc.stream(bench.items)
    server = zerorpc.Server(methods, heartbeat=None)
    server.bind(f"ipc://{path}")
    parent = gevent.get_hub().loop.io(sys.stdin.fileno(), 1)
    parent.start(os._exit, 0)
    print("ready", flush=True)
    server.run()


if __name__ == "__main__":
    from gevent import monkey

    monkey.patch_all()
    serve(sys.argv[1])
