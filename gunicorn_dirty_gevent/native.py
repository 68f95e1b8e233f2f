"""An asyncio event loop for a native thread of a monkey-patched process.

There `threading`, `select` and the thread pool of `concurrent.futures` are gevent's, and would wait in
a hub that never runs in the loop's thread. So the thread, its selector and the threads behind
``asyncio.to_thread`` are native ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from gevent.monkey import get_original

THREADS = 32
"""The most native threads behind ``asyncio.to_thread`` and name look-ups; as many as Python's own
default executor has at most."""


def start_thread(run: Callable[..., None], *args: Any) -> int:
    """Start a native thread; its number, as in ``sys._current_frames()``."""
    number: int = get_original("_thread", "start_new_thread")(run, args)
    return number


class NativeLoop(asyncio.SelectorEventLoop):
    """See the module's text."""

    def __init__(self) -> None:
        super().__init__(get_original("selectors", "DefaultSelector")())
        self._threads = _Threads(self)

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> Any:
        """`executor` None, as in ``asyncio.to_thread``, is native threads, at most `THREADS`."""
        if executor is not None:
            return super().run_in_executor(executor, func, *args)
        return self._threads.run(func, args)

    async def getaddrinfo(self, host: Any, port: Any, **options: int) -> Any:
        names = ("family", "type", "proto", "flags")
        rest = [options.get(name, 0) for name in names]
        return await self.run_in_executor(None, get_original("socket", "getaddrinfo"), host, port, *rest)

    async def getnameinfo(self, sockaddr: Any, flags: int = 0) -> Any:
        return await self.run_in_executor(None, get_original("socket", "getnameinfo"), sockaddr, flags)

    async def subprocess_exec(self, *args: Any, **kwargs: Any) -> Any:
        """gevent owns this process's children, and reaps them in the hub."""
        raise NotImplementedError(
            "a coroutine in a dirty worker cannot start subprocesses: start them in an action that is no "
            "coroutine, where subprocess waits cooperatively"
        )

    subprocess_shell = subprocess_exec

    def close(self) -> None:
        self._threads.end()
        super().close()


class _Threads:
    """Native threads, started when there is more to do than threads. Used from the loop's thread."""

    def __init__(self, loop: NativeLoop) -> None:
        self._loop = loop
        self._work: Any = get_original("queue", "SimpleQueue")()
        self._count = 0
        self._pending = 0

    def run(self, func: Callable[..., Any], args: tuple[Any, ...]) -> asyncio.Future[Any]:
        future = self._loop.create_future()
        self._work.put((future, func, args))
        self._pending += 1
        if self._pending > self._count and self._count < THREADS:
            self._count += 1
            start_thread(self._serve)
        return future

    def end(self) -> None:
        for _ in range(self._count):
            self._work.put(None)

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            future, func, args = work
            value, failure = None, None
            try:
                value = func(*args)
            except BaseException as error:
                failure = error
            try:
                self._loop.call_soon_threadsafe(self._deliver, future, value, failure)
            except RuntimeError:  # the loop is closed: nobody waits any more
                return

    def _deliver(self, future: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
        self._pending -= 1
        if future.cancelled():
            return
        if isinstance(error, StopIteration):  # which a future cannot carry
            error = RuntimeError(f"a function in a thread raised {error!r}")
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)
