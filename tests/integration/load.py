"""Calls that keep coming while a test does something to gunicorn."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from asking import Failure, answer
from support.gunicorn import Gunicorn
from support.waiting import wait_until


@dataclass(frozen=True)
class Outcome:
    """One call of the load."""

    number: int
    said: Any  # what the call returned, its `Failure`, or the error that HTTP ended with
    began: float
    seconds: float

    @property
    def failed(self) -> bool:
        return isinstance(self.said, (Failure, Exception))


class Load:
    """`concurrency` threads that each ask for `paths(n)` again and again until the block is left."""

    def __init__(
        self, gunicorn: Gunicorn, paths: Callable[[int], str], concurrency: int = 4, timeout: float = 40.0
    ) -> None:
        self._gunicorn = gunicorn
        self._paths = paths
        self._timeout = timeout
        self._lock = threading.Lock()
        self._next = 0
        self._stop = threading.Event()
        self.outcomes: list[Outcome] = []
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(concurrency)]

    def _run(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                number = self._next
                self._next += 1
            began = time.monotonic()
            said: Any
            try:
                said = answer(self._gunicorn.get(self._paths(number), self._timeout))
            except (OSError, AssertionError, http.client.HTTPException) as error:
                said = error
            self.outcomes.append(Outcome(number, said, began, time.monotonic() - began))

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self.more(len(self._threads))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(self._timeout + 5)
        assert not any(thread.is_alive() for thread in self._threads)

    def more(self, calls: int, deadline: float = 20.0) -> Load:
        """Wait until this many further calls have *begun and* ended."""
        since = time.monotonic()

        def enough() -> bool:
            return sum(outcome.began >= since for outcome in list(self.outcomes)) >= calls

        wait_until(enough, deadline, f"{calls} more calls of the load", self._gunicorn.evidence)
        return self

    @property
    def failures(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.failed]

    def assert_none_failed(self) -> None:
        assert self.outcomes
        assert not self.failures, f"{len(self.failures)} of {len(self.outcomes)}: {self.failures[:5]}"

    def assert_all_echoed(self) -> None:
        """None failed, and each returned its own number."""
        self.assert_none_failed()
        wrong = [outcome for outcome in self.outcomes if outcome.said != outcome.number]
        assert not wrong, wrong[:5]
