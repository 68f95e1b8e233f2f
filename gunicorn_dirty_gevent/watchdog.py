"""What acts while a dirty worker's hub is blocked: an interval timer's signal.

gevent's own timeouts need the hub to run. When Python code never yields, the kernel's timer still
interrupts it between two bytecodes, in the very greenlet that blocks. There the watchdog

* tells the arbiter, which then does not kill the worker over a call that could not start,
* names it in the log once it has blocked for `hub_blocked_after` seconds, and
* raises the task's own timeout in it once its time has been up for `INTERRUPT_AFTER`: the action
  ends, the worker keeps its process and state.

Code stuck in C without a look at signals is left to the arbiter, which kills the worker.
"""

from __future__ import annotations

import itertools
import signal
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

import gevent

from .app import is_ours
from .runner import Runner
from .task import Task

INTERVAL = 0.25
"""Seconds between two looks. Four signals a second cost nothing that can be measured, and none come
while the worker is idle."""

TELL_AFTER = 0.5
"""Seconds a task must have blocked the hub for the arbiter to be told."""

INTERRUPT_AFTER = 0.4
"""Seconds past a task's time limit until it is interrupted: `gevent.Timeout` has had its chance."""


class Watchdog:
    """Watches the hub of this process's main thread."""

    def __init__(self, log: Any, pid: int, blocked_after: float, busy: Callable[[], bool]) -> None:
        self._log = log
        self._pid = pid
        self._blocked_after = blocked_after
        self._busy = busy
        self._armed = False
        self._turn = -1
        self._since = 0.0
        self._named = False
        self._turns = _Turns()
        signal.signal(signal.SIGALRM, self._on_alarm)
        # Native code that waits in a system call should not see it fail because of us.
        signal.siginterrupt(signal.SIGALRM, False)

    def arm(self) -> None:
        """A task begins. The timer runs until it finds none."""
        if not self._armed:
            self._armed = True
            self._turn = -1
            signal.setitimer(signal.ITIMER_REAL, INTERVAL, INTERVAL)

    def disarm(self) -> None:
        self._armed = False
        signal.setitimer(signal.ITIMER_REAL, 0.0)

    def _on_alarm(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        turn = self._turns.count()
        if turn != self._turn:
            self._turn, self._since, self._named = turn, now, False
            if not self._busy():
                self.disarm()
            return
        runner = gevent.getcurrent()
        if not isinstance(runner, Runner) or not isinstance(runner.task, Task):
            return
        task = runner.task
        blocked = now - self._since
        if blocked >= TELL_AFTER:
            # Safe here: while the app's code runs, neither the link nor a lane is in use.
            task.tell_blocked()
        if blocked >= self._blocked_after and not self._named:
            self._named = True
            self._name(task, blocked, frame)
        if task.overdue(now) >= INTERRUPT_AFTER:
            task.interrupt()

    def _name(self, task: Task, blocked: float, frame: FrameType | None) -> None:
        stack = "".join(traceback.format_list(app_frames(frame)))
        try:
            self._log.warning(
                "Dirty worker (pid: %s): %s.%s has blocked the hub for %.1f s (told from hub_blocked_after = "
                "%g s): no other greenlet of this worker runs. Use I/O that gevent patches, call "
                "gevent.sleep(0) in long loops, or move it to gevent.get_hub().threadpool. It is at:\n%s",
                self._pid,
                task.request.app,
                task.request.action,
                blocked,
                self._blocked_after,
                stack,
            )
        except Exception:  # the interrupted code may be in the middle of the same log write
            pass


def app_frames(frame: FrameType | None) -> list[traceback.FrameSummary]:
    """The stack from the app's first frame on: ours above it say nothing."""
    frames = list(traceback.extract_stack(frame))
    return list(itertools.dropwhile(lambda entry: is_ours(entry.filename), frames)) or frames


class _Turns:
    """Tells turns of the hub's loop apart: `count` differs between two of them."""

    def __init__(self) -> None:
        self._loop: Any = gevent.get_hub().loop
        self._seen = 0
        # libev counts them itself; libuv's answer is -1 for ever.
        self._counted = getattr(self._loop, "iteration", -1) >= 0
        if not self._counted:
            self._watcher = self._loop.check(ref=False)
            self._watcher.start(self._see)

    def _see(self) -> None:
        self._seen += 1

    def count(self) -> int:
        return int(self._loop.iteration) if self._counted else self._seen
