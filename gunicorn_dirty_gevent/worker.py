"""The dirty worker process: loads apps, takes calls from the arbiter, runs each in a greenlet."""

from __future__ import annotations

import _socket
import os
import signal
import time
import weakref
from collections import deque
from functools import partial
from typing import Any

import gevent
from gevent import monkey
from gevent.event import Event
from gunicorn import util

from . import app as apps
from . import process, settings
from .blob import few_left
from .core import values, wire
from .core.calls import AppTraits
from .core.faults import Fault
from .core.wire import Frame
from .coroutines import Coroutines
from .lane import MAX_PAYLOAD, Sender
from .link import Link
from .runner import Runner
from .task import Answer, Task
from .watchdog import Watchdog

SILENCE = 0.0025
"""Seconds without a word to the arbiter after which a worker that sends by its lanes says that its hub
runs: half of what the dispatcher takes as a sign that it does not."""

CLOSE_TIME = 1.0
"""Seconds that tasks get to run their `finally` blocks when the worker is told to end at once."""


class DirtyWorker:
    """A dirty worker. Made in the arbiter, run in its own process; hooks get it in both.

    Its attributes are those of gunicorn's dirty worker.
    """

    def __init__(
        self, age: int, ppid: int, app_paths: list[str], cfg: Any, log: Any, max_message: int
    ) -> None:
        self.age = age
        self.pid: int | str = "[booting]"
        self.ppid = ppid
        self.app_paths = app_paths
        self.cfg = cfg
        self.log = log
        self.booted = False
        self.aborted = False
        self.alive = True
        self.apps: dict[str, Any] = {}
        self.traits: dict[str, AppTraits] = {}
        self.max_message = max_message
        self.coroutines: Coroutines
        self.failed: dict[str, Fault] = {}
        self._tasks: dict[int, Task] = {}
        self._runners: weakref.WeakSet[Runner] = weakref.WeakSet()
        self._spare: Runner | None = None
        self._link: Link | None = None
        self._lanes: dict[int, Sender] = {}
        self._signals: deque[int] = deque()
        self._wake: Event | None = None
        self._draining = False
        self._hub: Any = None
        self._watchdog: Any = None

    def __str__(self) -> str:
        return f"<DirtyWorker {self.pid}>"

    # The process.

    def run(self, sock: _socket.socket) -> None:
        """The whole life of the process; returns when it should exit."""
        self.pid = os.getpid()
        process.die_with_parent(signal.SIGKILL, self.ppid)
        util._setproctitle(f"dirty-worker [{self.cfg.proc_name}]")
        util.seed()
        process.keep_freed_memory()
        monkey.patch_all()
        self._hub = gevent.get_hub()
        self._wake = Event()
        self._init_signals()
        blocked_after = settings.current.hub_blocked_after
        self._watchdog = Watchdog(self.log, self.pid, blocked_after, lambda: bool(self._tasks))
        self.coroutines = Coroutines(self.log, self.pid, blocked_after)
        decoder = wire.FrameDecoder(self.max_message + wire.ROUTE_SIZE)
        self._link = Link(sock, self._on_frames, self._on_close, decoder, lanes=True)
        try:
            self._boot()
            self._serve()
        finally:
            self._flush()
            self._close_apps()
            self._flush()
            self.log.info("Dirty worker %s exiting", self.pid)
        if not self.booted:
            raise SystemExit(process.EXIT_UNLOADED)

    def _boot(self) -> None:
        """Load the apps and say so; what fails to load is told with its reason."""
        self._describe()
        for path in self.app_paths:
            if path in self.failed or not self.alive:
                continue
            try:
                app = apps.load(path)
                self.log.debug("Loaded dirty app: %s", path)
                self._finish(app.init(), f"{path}.init")
                self.traits[path] = apps.traits(type(app), apps.task_limit(self.cfg))
                self.apps[path] = app
                self.log.info("Initialized dirty app: %s (pid: %s)", path, self.pid)
            except BaseException as error:  # a Timeout or SystemExit too is this app's failure only
                self._load_failed(path, error)
        if not self.alive:
            return
        if self.apps:
            self._call_init_hook()
        self.booted = bool(self.apps)
        told = {
            "apps": {path: _plain(traits) for path, traits in self.traits.items()},
            "failed": self.failed,
            "slots": self.cfg.dirty_threads,
        }
        self.send(wire.READY, 0, values.dumps(told))
        self.alive = self.booted and self.alive

    def _finish(self, result: Any, name: str) -> None:
        """An ``async def`` of the app's life cycle ends before the next step."""
        if hasattr(result, "__await__"):
            self.coroutines.result(result, name, lambda: None)

    def _call_init_hook(self) -> None:
        try:
            self.cfg.dirty_worker_init(self)
        except Exception as error:
            for path in self.apps:
                self._load_failed(path, error, "the hook dirty_worker_init raised ")
            self._close_apps()
            self.apps, self.traits = {}, {}

    def _describe(self) -> None:
        declared = {}
        for path in self.app_paths:
            try:
                declared[path] = apps.describe_class(path)
            except BaseException as error:
                self._load_failed(path, error)
        self.send(wire.CLASSES, 0, values.dumps(declared))

    def _load_failed(self, path: str, error: BaseException, what: str = "") -> None:
        fault = apps.error_fault(error, path, None)
        why = f"{what}{type(error).__name__}: {error}" if what else fault["message"]
        fault["message"] = f"the app failed to load: {why}"
        self.failed[path] = fault
        text = fault["details"]["traceback"]
        self.log.error("Failed to initialize dirty app %s (pid: %s): %s\n%s", path, self.pid, why, text)

    def _serve(self) -> None:
        """Until the worker is to end: on a STOP when its tasks have ended, else at once."""
        assert self._wake is not None
        while self.alive and not (self._draining and not self._tasks):
            self._wake.wait()
            self._wake.clear()
            self._handle_signals()

    def _flush(self) -> None:
        """Give the last answers to the kernel; the arbiter reads them after we have gone."""
        assert self._link is not None and self._wake is not None
        until = time.monotonic() + CLOSE_TIME
        gevent.sleep(0)
        while self._link.outbox_bytes and not self._link.closed and time.monotonic() < until:
            gevent.sleep(0.005)

    def _close_apps(self) -> None:
        if self._tasks:
            for task in list(self._tasks.values()):
                task.cut_off()
            runners = list(self._runners)
            for runner in runners:
                runner.kill(block=False)
            gevent.joinall(runners, timeout=CLOSE_TIME)
        for path, app in self.apps.items():
            try:
                self._finish(app.close(), f"{path}.close")
                self.log.debug("Closed dirty app: %s", path)
            except BaseException as error:
                self.log.error("Error closing dirty app %s: %s", path, error)
        self.coroutines.close(CLOSE_TIME)

    # Signals: the handlers record, the main greenlet acts.

    def _init_signals(self) -> None:
        # Stacks go to the log when C code crashes, and when the arbiter ends a stuck worker (ABRT).
        process.dump_stacks_on_crash(self.log)
        for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        # Sent to a whole process group, these are meant for the master.
        for number in (
            signal.SIGHUP,
            signal.SIGUSR2,
            signal.SIGTTIN,
            signal.SIGTTOU,
            signal.SIGWINCH,
        ):
            signal.signal(number, signal.SIG_IGN)

    def _on_signal(self, number: int, frame: object) -> None:
        if not self.booted and number != signal.SIGUSR1:
            # An `init()` that takes minutes must not hold up a stop; there is no call to finish.
            process.die_of(number)
        self._signals.append(number)
        self._hub.loop.run_callback_threadsafe(self._wake_up)

    def _wake_up(self) -> None:
        assert self._wake is not None
        self._wake.set()

    def _handle_signals(self) -> None:
        while self._signals:
            number = self._signals.popleft()
            if number == signal.SIGUSR1:
                self.log.reopen_files()
                process.dump_stacks_on_crash(self.log)
            elif number == signal.SIGTERM:
                # The arbiter answers with STOP once it sends nothing more.
                self.send(wire.STOP, 0, b"")
            else:
                self.alive = False

    # Frames, in the hub.

    def _on_frames(self, link: Link, frames: list[Frame]) -> None:
        for kind, call_id, payload in frames:
            if kind == wire.ROUTED:
                number, client_id, request = wire.unpack_routed(payload)
                self._take(Task(self, call_id, request, client_id, self._lanes.get(number)))
            elif kind == wire.REQUEST:
                self._take(Task(self, call_id, wire.unpack_request(payload)))
            elif kind == wire.CANCEL:
                if call_id in self._tasks:
                    self._tasks[call_id].cancel()
            elif kind == wire.CREDIT:
                if call_id in self._tasks:
                    self._tasks[call_id].add_credit(wire.unpack_credit(payload))
            elif kind == wire.PING:
                # The calls before it have run until they ended or waited.
                self.send(wire.PONG, 0, b"")
            elif kind == wire.LANE:
                self._open_lane(payload)
            elif kind == wire.STOP:
                self._draining = True
                self._wake_up()
            else:
                raise wire.WireError(f"the arbiter sent a frame of kind {kind:#x}")

    def _open_lane(self, payload: wire.Payload) -> None:
        number, descriptor = wire.unpack_lane(payload)
        if descriptor is None:
            return  # then its calls are answered by the link
        if few_left(descriptor):
            os.close(descriptor)
            return
        self._lanes[number] = Sender(self, descriptor, partial(self._lanes.__delitem__, number))

    def _take(self, task: Task) -> None:
        self._tasks[task.call_id] = task
        self._watchdog.arm()
        spare, self._spare = self._spare, None
        runner = Runner() if spare is None or spare.dead else spare
        self._runners.add(runner)
        runner.give(task)
        if runner.spare and not runner.dead:
            self._spare = runner

    def _on_close(self, link: Link, reason: str) -> None:
        """The arbiter is gone: nobody is left to answer."""
        self.alive = False
        self._wake_up()

    # For the tasks.

    def send(self, kind: int, call_id: int, payload: Answer) -> None:
        assert self._link is not None
        self._link.send(wire.pack_parts(kind, call_id, payload))

    def reply(self, task: Task, kind: int, payload: Answer) -> None:
        """Send a frame of a task's to its caller: by its lane, or by the arbiter."""
        lane = task.lane
        if lane is not None:
            if kind in wire.BY_LANE and isinstance(payload, bytes) and len(payload) <= MAX_PAYLOAD:
                lane.send(task, kind, payload)
                return
            lane.flush()  # what it has sent before comes first
            task.lane = None
        self.send(kind, task.call_id, payload)

    def sent_by_lane(self, ended: list[int], now: float) -> None:
        """The kernel has frames that went by a lane, the last ones of these calls among them."""
        assert self._link is not None
        if ended:
            # At once: the callers may be making their next calls already.
            self._link.send(tuple(wire.pack_frame(wire.DONE, call_id) for call_id in ended))
            self._link.flush()
        else:
            self.break_silence(now)

    def break_silence(self, now: float) -> None:
        """Tell the arbiter that this hub runs, if it has heard nothing for a while. Before an answer by a
        lane too: the caller's next call may be placed before DONE is there, and must not find this worker
        as silent as one whose hub is blocked."""
        assert self._link is not None
        if now - self._link.flushed_at > SILENCE:
            self.send(wire.PING, 0, b"")
            self._link.flush()

    def ended(self, task: Task) -> None:
        del self._tasks[task.call_id]
        if self._draining and not self._tasks:
            self._wake_up()


def _plain(traits: AppTraits) -> dict[str, Any]:
    """Traits as values that travel; `DirtyArbiter` makes them again."""
    actions = {name: tuple(action) for name, action in traits.actions.items()}
    return {"default": tuple(traits.default), "actions": actions}
