"""The workers that are ready for calls, and which of them gets the next.

An action that computes may keep its worker's hub from running, and a call that is given to that worker then
waits for the action's end. So with several workers a call goes to one that is idle or has been heard of a
moment ago (`SILENCE`). Where there is none, all that have a free slot are asked (PING), and the call waits
for the first that answers, some 0.1 ms where a hub is free. Where all hubs turn slowly, that may be a turn
later than by a guess that is right, and is earlier than by one that is wrong.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from .calls import Worker

SILENCE = 0.005
"""Seconds without a word from a worker that has calls, after which it gets others only when it has answered
a PING. Far above the time in which a free hub answers (some 0.1 ms), and as long as a small call may be late
for the sake of a computing one."""

PROMPT = 0.1
"""Seconds within which a worker answers promptly. While it does, it gets twice as many of the waiting calls
each time (`Worker.grant`), and so takes up a burst in a few turns of its hub. One that its calls keep for
longer gets them one by one, and leaves the others to whoever is free first. Calls that are given together
thus wait for one another about twice this, at most, if they compute."""


class Crew:
    """The ready workers, known by an int."""

    def __init__(self) -> None:
        self._workers: OrderedDict[int, Worker] = OrderedDict()
        """The one to be preferred is the last, see `choose`."""

    def __iter__(self) -> Iterator[Worker]:
        return iter(list(self._workers.values()))

    def get(self, key: int) -> Worker | None:
        return self._workers.get(key)

    def add(self, worker: Worker) -> None:
        self._workers[worker.key] = worker
        self.least_wanted(worker)

    def remove(self, key: int) -> Worker | None:
        return self._workers.pop(key, None)

    def least_wanted(self, worker: Worker) -> None:
        """Of idle ones, take all others before this."""
        self._workers.move_to_end(worker.key, last=False)

    def of(self, app: str) -> list[Worker]:
        """Those that take calls for an app."""
        return [worker for worker in self._workers.values() if app in worker.apps and not worker.draining]

    def untold(self, app: str = "") -> int:
        """The most calls (of an app) that may have been answered by a lane without a word here yet."""
        workers = self._workers.values()
        return sum(len(w.running) for w in workers if w.laned and (not app or app in w.apps))

    @staticmethod
    def silent(worker: Worker, now: float) -> bool:
        return bool(worker.running) and worker.heard < now - SILENCE

    def must_ask(self, worker: Worker, app: str, now: float) -> bool:
        """Whether the worker is to be asked before it gets a call for the app: it is silent, and not the only
        one that has it."""
        return self.silent(worker, now) and len(self.of(app)) > 1

    @staticmethod
    def answered(worker: Worker, now: float) -> int:
        """It has answered the PING. Of calls that wait it is to get so many at least."""
        asked_at, worker.asked_at = worker.asked_at, None
        worker.heard = now
        return worker.grant if asked_at is not None and now - asked_at <= PROMPT else 1

    def choose(self, app: str, now: float) -> tuple[Worker | None, list[Worker]]:
        """The least loaded worker with the app and a free slot, of those that are not silent; and which
        of the others are to be asked.

        Of idle ones, the last that was given a call: its memory is in the caches, which of 64 workers in
        turn would be no one's. (But not one whose last call failed or was given up by its caller: if it
        fails every call, it must not get them all.) Of equally busy ones, that which was given one longest
        ago.
        """
        best: Worker | None = None
        least = 0
        silent: list[Worker] = []
        for worker in reversed(self._workers.values()):
            load = len(worker.running)
            if worker.draining or load >= worker.slots or app not in worker.apps:
                continue
            if not load:  # none is better, and of many workers one mostly is
                best = worker
                silent.clear()
                break
            if self.silent(worker, now):
                silent.append(worker)
            elif best is None or load <= least:
                best, least = worker, load
        if best is None and len(silent) == 1 and len(self.of(app)) == 1:
            best = silent.pop()  # nothing is won by asking
        if best is not None:
            self._workers.move_to_end(best.key)
        return best, [worker for worker in silent if worker.asked_at is None]

    def room(self, app: str) -> int:
        """Free slots, silent workers' too."""
        return sum(worker.slots - len(worker.running) for worker in self.of(app))

    def least_loaded(self, worker: Worker, app: str) -> bool:
        """Whether no other with the app and a free slot, silent or not, has fewer calls."""
        load = len(worker.running)
        return all(len(other.running) >= load or not other.has_room for other in self.of(app))
