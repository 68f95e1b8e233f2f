"""``async def`` actions: an asyncio event loop in a native thread of the dirty worker.

The hub and the loop each have a thread, so neither holds up the other. A call is one asyncio task;
the call's greenlet waits for it in the hub. What ends the greenlet (its time is up, the caller has
gone) cancels the task, and the greenlet ends when the task really has: the slot is free no sooner.
"""

from __future__ import annotations

import asyncio
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import Any

import gevent
from gevent.event import Event

from .native import NativeLoop, start_thread

INTERVAL = 0.25
"""Seconds between two looks at whether the loop still turns, while calls are on it."""

TELL_AFTER = 0.5
"""Seconds the loop must have been blocked for the arbiter to be told; as for the hub."""

_END = object()

Blocked = Callable[[], None]


class Coroutines:
    """The event loop of a dirty worker. Its thread is started when it is first needed.

    `blocked_after`: seconds after which a coroutine that keeps the loop from turning is named in the
    log.
    """

    def __init__(self, log: Any, pid: int, blocked_after: float) -> None:
        self._log = log
        self._pid = pid
        self._blocked_after = blocked_after
        self._hub_loop: Any = gevent.get_hub().loop
        self._loop: NativeLoop | None = None
        self._thread = 0
        self._closed = Event()
        self._jobs: dict[_Job, Blocked] = {}
        self._timer: Any = None
        self._asked_at = 0.0
        self._answered = True
        self._named = False

    def result(self, awaitable: Awaitable[Any], name: str, blocked: Blocked) -> Any:
        """Wait for it, in a greenlet. Raises what it raises, and what is raised in the greenlet.

        `name` stands in the log when it blocks the loop; `blocked` is then called, from the hub.
        """
        return self._start(_guarded(awaitable), name, blocked, Event()).result()

    def iterate(self, chunks: AsyncIterator[Any], name: str, blocked: Blocked) -> Iterator[Any]:
        """Its chunks, for a greenlet. All of it runs in one asyncio task; `close()` ends that."""
        return _Chunks(chunks, lambda main, news: self._start(main, name, blocked, news))

    def close(self, seconds: float) -> None:
        """Cancel what is left on the loop, give it `seconds` to end, and end the thread."""
        if self._loop is not None:
            loop, self._loop = self._loop, None
            loop.call_soon_threadsafe(loop.stop)
            self._closed.wait(seconds)

    def _start(self, main: Coroutine[Any, Any, Any], name: str, blocked: Blocked, news: Event) -> _Job:
        job = _Job(self._running(), main, name, news, self._ended)
        self._jobs[job] = blocked
        if self._timer is None:
            self._answered = True
            self._timer = self._hub_loop.timer(INTERVAL, INTERVAL)
            self._timer.start(self._look)
        return job

    def _running(self) -> NativeLoop:
        if self._loop is None:
            self._loop = NativeLoop()
            self._thread = start_thread(self._run, self._loop)
        return self._loop

    # In the loop's thread.

    def _run(self, loop: NativeLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            while self._loop is loop:
                try:
                    loop.run_forever()
                except BaseException:
                    # A SystemExit in a task or callback of the app's own ends `run_forever`; it must
                    # not end the loop for the others.
                    traceback.print_exc()
            loop.run_until_complete(_cancel_all())
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            loop.close()
            self._tell_hub(self._closed.set)

    def _ended(self, job: _Job) -> None:
        self._tell_hub(self._forget, job)

    def _tell_hub(self, what: Callable[..., None], *args: Any) -> None:
        self._hub_loop.run_callback_threadsafe(what, *args)

    # In the hub.

    def _forget(self, job: _Job) -> None:
        self._jobs.pop(job, None)
        job.ended.set()
        job.news.set()

    def _look(self) -> None:
        """Ask the loop for a sign of life, and see what became of the last one."""
        if not self._jobs or self._loop is None:
            self._timer.stop()
            self._timer.close()
            self._timer = None
            return
        now = time.monotonic()
        if self._answered:
            self._answered, self._named, self._asked_at = False, False, now
            self._loop.call_soon_threadsafe(self._answer)
        elif now - self._asked_at >= TELL_AFTER:
            self._tell_blocked(now - self._asked_at)

    def _answer(self) -> None:
        self._answered = True

    def _tell_blocked(self, seconds: float) -> None:
        task = asyncio.current_task(self._loop)
        name = "a callback" if task is None else task.get_name()
        for job, blocked in list(self._jobs.items()):
            if task is not None and job.task is task:
                blocked()
        if seconds >= self._blocked_after and not self._named:
            self._named = True
            stack = "".join(traceback.format_stack(sys._current_frames().get(self._thread)))
            # Not from here: the log may have to wait.
            gevent.spawn(
                self._log.warning,
                "Dirty worker (pid: %s): %s has blocked the asyncio loop for %.1f s (told from "
                "hub_blocked_after = %g s): no other coroutine of this worker runs. Await what waits, or "
                "move the work to asyncio.to_thread. It is at:\n%s",
                self._pid,
                name,
                seconds,
                self._blocked_after,
                stack,
            )


class _Job:
    """One asyncio task, and the greenlet that waits for it."""

    def __init__(
        self,
        loop: NativeLoop,
        main: Coroutine[Any, Any, Any],
        name: str,
        news: Event,
        ended: Callable[[_Job], None],
    ) -> None:
        self.loop = loop
        self.ended = Event()
        self.news = news
        """Something has come of it: a chunk, or its end."""
        self.task: asyncio.Task[Any] | None = None
        self._told = ended
        loop.call_soon_threadsafe(self._begin, main, name)

    def _begin(self, main: Coroutine[Any, Any, Any], name: str) -> None:
        self.task = self.loop.create_task(main, name=name)
        self.task.add_done_callback(lambda task: self._told(self))

    def result(self) -> Any:
        self.wait(self.ended)
        assert self.task is not None
        try:
            return self.task.result()
        except _Left as left:
            raise left.error from None

    def wait(self, event: Event) -> None:
        """In the greenlet. What is raised in it meanwhile cancels the task, and waits for its end."""
        try:
            event.wait()
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Cancel the task, and wait for its end: its `finally` blocks run."""
        if not self.ended.is_set():
            self.loop.call_soon_threadsafe(self._cancel)
        while not self.ended.is_set():
            try:
                self.ended.wait()
            except BaseException:
                # The first reason is on its way already. A task that does not give in is the arbiter's
                # to end, with its worker.
                continue

    def _cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()


class _Chunks(Iterator[Any]):
    """An async iterator, chunk by chunk: each is fetched when it is asked for."""

    def __init__(
        self, chunks: AsyncIterator[Any], start: Callable[[Coroutine[Any, Any, Any], Event], _Job]
    ) -> None:
        self._chunks = chunks
        self._start = start
        self._news = Event()
        self._hub_loop: Any = gevent.get_hub().loop
        self._job: _Job | None = None
        self._wanted: asyncio.Event | None = None
        self._chunk: Any = _END

    def __next__(self) -> Any:
        job = self._job
        if job is None:
            job = self._job = self._start(_guarded(self._pump()), self._news)
        else:
            self._news.clear()
            if not job.ended.is_set():
                job.loop.call_soon_threadsafe(self._want)
            else:
                self._news.set()
        job.wait(self._news)
        chunk, self._chunk = self._chunk, _END
        if chunk is _END:
            job.result()  # raises what ended it
            raise StopIteration
        return chunk

    def close(self) -> None:
        """End the task; the generator is closed, its `finally` blocks run."""
        if self._job is not None:
            self._job.cancel()

    # In the loop.

    def _want(self) -> None:
        assert self._wanted is not None
        self._wanted.set()

    async def _pump(self) -> None:
        self._wanted = asyncio.Event()
        try:
            async for chunk in self._chunks:
                self._chunk = chunk
                self._hub_loop.run_callback_threadsafe(self._news.set)
                await self._wanted.wait()
                self._wanted.clear()
        finally:
            close = getattr(self._chunks, "aclose", None)
            if close is not None:
                await close()


async def _guarded(main: Awaitable[Any]) -> Any:
    """What would end the loop itself (asyncio lets SystemExit and its like through) is the call's."""
    try:
        return await main
    except (Exception, asyncio.CancelledError):
        raise
    except BaseException as error:
        raise _Left(error) from None


class _Left(Exception):
    def __init__(self, error: BaseException) -> None:
        self.error = error


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
