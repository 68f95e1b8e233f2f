"""The dirty arbiter process: signals, time and the order of a stop.

No policy stands here: which call runs where is `core.dispatch`'s, which workers should exist is
`core.roster`'s; `router` and `pool` carry their actions out. The main greenlet sleeps until there is
something to do; callbacks hand it work through `soon`.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import gevent
from gevent import monkey
from gevent.event import Event
from gunicorn import util
from gunicorn.dirty.app import parse_dirty_app_spec

from . import __version__, process, settings
from .core import wire
from .listener import get_listener
from .overview import Overview
from .pool import Pool
from .router import Router
from .worker import DirtyWorker

BASE_DESCRIPTORS, DESCRIPTORS_PER_TASK = 256, 4
"""Descriptors a dirty process may need: HTTP workers, files and libraries, and some for each call
that a worker runs at once."""

HAND_OVER_DELAY = 0.5
"""Seconds between a TERM and handing over to the next arbiter. Sent to the whole process group, TERM
reaches us before the master could say that none will follow."""

START_PAUSE = 1.0
"""Seconds that an arbiter which cannot start waits before it ends: its cause is mostly there the next
time too (a hook that raises, a user that cannot read Python's files)."""

SIBLING_INTERVAL = 0.1
"""Seconds between looks at the HTTP workers of a master that stops; its own interval."""


class DirtyArbiter:
    """What gunicorn's master starts: it makes the object, forks, and calls `run()` in the child.

    `workers` (pid -> `DirtyWorker`), `app_specs` and `app_worker_map` are what gunicorn's control
    interface reads.
    """

    def __init__(
        self, cfg: Any, log: Any, socket_path: str | None = None, pidfile: str | None = None
    ) -> None:
        # The pid file is for finding orphans of a crashed master. Ours end with their parent, and a
        # predictable name in /tmp would be one more thing to trust, so it is not written.
        self.cfg = cfg
        self.log = log
        self.pid: int | None = None
        self.ppid = os.getpid()
        self.pidfile = pidfile
        self.alive = True
        self.num_workers: int = cfg.dirty_workers
        self._workers: dict[int, DirtyWorker] = {}
        self._app_specs: dict[str, dict[str, Any]] = {}
        for spec in cfg.dirty_apps:
            path, count = parse_dirty_app_spec(spec)
            self._app_specs[path] = {"import_path": path, "worker_count": count, "original_spec": spec}
        self._app_worker_map: dict[str, set[int]] = {path: set() for path in self._app_specs}
        self.settings = settings.current
        self._listener = get_listener(cfg)
        self.socket_path = self._listener.path
        self.tmpdir = self._listener.directory
        self._overview = Overview(self.socket_path)

    @property
    def workers(self) -> dict[int, Any]:
        """The dirty workers by pid; in the master, what the arbiter says of them."""
        return self._overview.workers() if self.pid is None else self._workers

    @property
    def app_specs(self) -> dict[str, dict[str, Any]]:
        """The dirty apps by import path; ``worker_count`` is the limit that holds, None for no limit."""
        limits = self._overview.limits() if self.pid is None else self._pool.limits()
        return {
            path: {**spec, "worker_count": limits.get(path, spec["worker_count"])}
            for path, spec in self._app_specs.items()
        }

    @property
    def app_worker_map(self) -> dict[str, set[int]]:
        """The pids of the workers of each app, in the same way."""
        if self.pid is None:
            return self._overview.app_workers(list(self._app_specs))
        return self._app_worker_map

    def master_stops(self) -> None:
        """In the master, before it sends TERM: no arbiter will follow this one.

        The HTTP workers are told to stop at the same moment, and requests they still finish may
        make new calls. TERM alone does not say so: sent to the arbiter only, the next one takes over.
        """
        self._listener.announce_stop()

    # The process.

    def run(self) -> None:
        """Run the dirty arbiter in this (just forked) process; does not return."""
        kept = [self._listener.sock.fileno(), *process.log_descriptors(self.log)]
        process.run_child(self._main, kept, lambda: None)

    def _main(self) -> None:
        try:
            self._start()
        except BaseException:
            message = "Exception in dirty arbiter process (pid: %s): it cannot start; the next tries in %g s"
            self.log.exception(message, self.pid, START_PAUSE)
            # The master spawns the next one at once: without a pause, dozens a second.
            monkey.get_original("time", "sleep")(START_PAUSE)
            if os.getppid() != self.ppid:
                self._listener.remove()
            raise SystemExit(process.EXIT_ERROR) from None
        try:
            self._supervise()
        finally:
            if os.getppid() != self.ppid:
                self.log.warning("Parent changed, shutting down dirty arbiter")
                self._listener.remove()  # the master could not
            self.log.info("Dirty arbiter exiting (pid: %s)", self.pid)

    def _start(self) -> None:
        """Everything until clients are accepted."""
        self.pid = os.getpid()
        if self.cfg.dirty_threads < 1:
            # Not in the master: a reload with this setting would end all of gunicorn.
            raise ValueError("dirty_threads is 0: it is how many calls each dirty worker runs at once")
        self.log.info("Dirty arbiter starting (pid: %s)", self.pid)
        # Bodies in descriptors are not counted: where few are left, they are read (`blob.RESERVE`).
        needed = BASE_DESCRIPTORS + self.cfg.dirty_workers + DESCRIPTORS_PER_TASK * self.cfg.dirty_threads
        process.raise_descriptor_limit(needed)
        util.set_owner_process(self.cfg.uid, self.cfg.gid, initgroups=self.cfg.initgroups)
        process.die_with_parent(signal.SIGQUIT, self.ppid)
        os.environ["GUNICORN_DIRTY_SOCKET"] = self.socket_path
        self._prepare()
        self.cfg.on_dirty_starting(self)
        util._setproctitle("dirty-arbiter")
        self._init_signals()
        self._router.open()
        self.log.info("Dirty arbiter listening on %s", self.socket_path)
        self._introduce()

    def _introduce(self) -> None:
        """Say which arbiter this is, and what of its settings cannot hold."""
        cfg = self.cfg
        threads = cfg.dirty_threads
        message = "gunicorn_dirty_gevent %s: %s dirty workers, up to %s calls at once in each"
        self.log.info(message, __version__, cfg.dirty_workers, threads)
        if cfg.dirty_graceful_timeout > cfg.graceful_timeout:
            message = (
                "dirty_graceful_timeout (%s s) is above graceful_timeout (%s s): a stop kills what runs then"
            )
            self.log.warning(message, cfg.dirty_graceful_timeout, cfg.graceful_timeout)

    def _prepare(self) -> None:
        """Everything that belongs to this process and its hub."""
        self._hub = gevent.get_hub()
        self._signals: deque[int] = deque()
        self._todo: deque[Callable[[], None]] = deque()
        self._wake = Event()
        self._stop_by = math.inf
        self._stop_why = ""
        self._hand_over_at = math.inf
        self._router = Router(self, self._app_specs, self.settings, self._listener)
        limits = {path: spec["worker_count"] for path, spec in self._app_specs.items()}
        self._pool = Pool(self, limits, self._router, self.settings)
        if self._router.desk.restored:
            self.log.info("Restored the stash (tables: %s)", len(self._router.desk.stash.tables()))

    # The main greenlet.

    def _supervise(self) -> None:
        self._pool.step(time.monotonic())
        while not self._finished():
            self._router.wakes_at = until = self._next_deadline()
            seconds = None if math.isinf(until) else max(0.0, until - time.monotonic())
            self._wake.wait(seconds)
            self._wake.clear()
            self._handle_signals()
            while self._todo:
                self._todo.popleft()()
            now = time.monotonic()
            self._router.tick(now)
            self._pool.step(now)
        self._router.flush()

    def _next_deadline(self) -> float:
        now = time.monotonic()
        calls = self._router.dispatcher.next_deadline()
        times = [self._pool.next_deadline(), math.inf if calls is None else calls]
        if not self.alive:
            times += [self._stop_by, self._hand_over_at, self._router.handing_over(now) or math.inf]
            if self._listener.stop_announced():
                # No event tells us that the last HTTP worker has gone.
                times.append(now + SIBLING_INTERVAL)
        return min(times)

    def _init_signals(self) -> None:
        for name in ("HUP", "QUIT", "INT", "TERM", "TTIN", "TTOU", "USR1", "CHLD"):
            process.set_signal(getattr(signal, "SIG" + name), self._on_signal)
        # Sent to a whole process group, these are meant for the master.
        process.set_signal(signal.SIGUSR2, signal.SIG_IGN)
        process.set_signal(signal.SIGWINCH, signal.SIG_IGN)

    def _on_signal(self, number: int, frame: object) -> None:
        self._signals.append(number)
        self._hub.loop.run_callback_threadsafe(self._wake.set)

    def _handle_signals(self) -> None:
        while self._signals:
            number = self._signals.popleft()
            if number == signal.SIGHUP and signal.SIGTERM in self._signals:
                # Both waited, and Python tells the lower number first: the master sent TERM before, for our
                # successor is to have other settings. Workers of ours with the new code are for nobody.
                continue
            if number == signal.SIGCHLD:
                self._pool.reap()
            elif number == signal.SIGUSR1:
                self._reopen_logs()
                self._pool.signal_all(signal.SIGUSR1)
            elif number == signal.SIGTTIN:
                _, after = self._resize(1)
                self.log.info("SIGTTIN: Increasing dirty workers to %s", after)
            elif number == signal.SIGTTOU:
                self._decrease()
            elif number != signal.SIGHUP:
                self._stop(graceful=number == signal.SIGTERM)
            elif self.alive:
                self._pool.reload()

    def _decrease(self) -> None:
        before, after = self._resize(-1)
        if after < before:
            self.log.info("SIGTTOU: Decreasing dirty workers to %s", after)
        else:
            message = "SIGTTOU: Cannot decrease below %s workers (required by app specs)"
            self.log.warning(message, after)

    def _resize(self, change: int) -> tuple[int, int]:
        roster = self._pool.roster
        before, after = roster.size, roster.resize(roster.size + change)
        self.num_workers = after
        return before, after

    def _reopen_logs(self) -> None:
        try:
            self.log.reopen_files()
        except OSError as error:  # made anew for another user than ours
            self.log.error("Cannot reopen the log files: %s", error)

    # Stopping.

    def _stop(self, *, graceful: bool) -> None:
        if graceful and not self.alive:
            return  # a second TERM, or one to the whole process group
        now = time.monotonic()
        self.alive = False
        self._router.stopping = True
        grace = self.cfg.dirty_graceful_timeout
        self._stop_why = (
            f"dirty_graceful_timeout of {grace} s is over" if graceful else "told to quit at once"
        )
        self._stop_by = min(self._stop_by, now + (grace if graceful else 0.0))
        self._hand_over_at = now + HAND_OVER_DELAY if graceful else math.inf

    def _finished(self) -> bool:
        """Called before each wait: takes a stop one step on, and says whether it is done."""
        if self.alive:
            return False
        now = time.monotonic()
        if now >= self._stop_by:
            self._stop_by = math.inf
            self._pool.tell_cut_off(self._stop_why)
            self._router.refuse_all(self._stop_why)
            self._pool.quit(now)
        elif not self._awaits_calls(now) and self._router.dispatcher.idle:
            # Whatever comes now would wait for nobody.
            self._router.refuse_all("gunicorn stops" if self._listener.stop_announced() else "it is replaced")
            self._pool.stop()
        return self._pool.empty and self._router.dispatcher.idle

    def _awaits_calls(self, now: float) -> bool:
        """Calls may still come: from requests that a stopping master's HTTP workers finish, or from
        clients that have not confirmed the hand-over."""
        if self._listener.stop_announced():
            self._hand_over_at = math.inf
            self._router.open()  # if it was handing over: there is nobody to hand over to
            return process.has_siblings(self.ppid)
        if now >= self._hand_over_at:
            self._hand_over_at = math.inf
            self._router.hand_over(now)
        return self._hand_over_at < math.inf or self._router.handing_over(now) is not None

    # For the router, from callbacks.

    def status(self) -> dict[str, Any]:
        """What ``gunicornc`` shows; the keys are gunicorn's."""
        return {
            "implementation": "gunicorn_dirty_gevent",  # our clients tell us from a stock arbiter by it
            "arbiter_pid": self.pid,
            "workers": self._pool.status(),
            "worker_count": len(self.workers),
            "apps": list(self._app_specs),
            "limits": self._pool.limits(),
        }

    def resize(self, change: int) -> tuple[int, int]:
        """Have so many workers more (or fewer); the numbers before and after."""
        before, after = self._resize(change)
        message = "Worker management: %s %d workers (spawned/removed: %d)"
        what = ("add" if change > 0 else "remove", abs(change), abs(after - before))
        self.soon(partial(self.log.info, message, *what))
        return before, after

    # For the router, in the main greenlet (but `soon`, which brings things there).

    def soon(self, what: Callable[[], None]) -> None:
        """From a callback: have the main greenlet do it."""
        self._todo.append(what)
        self._wake.set()

    def worker_said(self, key: int, kind: int, told: Any) -> None:
        if kind == wire.READY:
            self._pool.ready(key, told)
        elif kind == wire.CLASSES:
            self._pool.describe(key, told)
        elif self.alive:
            # While we stop ourselves, TERM went to the whole group: it is needed to the end.
            self._pool.leave(key)

    def worker_cut_off(self, key: int, reason: str) -> None:
        self._pool.cut_off(key, reason)

    def worker_worn(self, key: int, why: str) -> None:
        self._pool.replace(key, why)

    def worker_stuck(self, key: int, why: str) -> None:
        self._pool.abort(key, why)
