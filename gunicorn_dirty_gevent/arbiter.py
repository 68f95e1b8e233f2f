"""The dirty arbiter process: carries frames and signals to the pure core, and its actions out.

No policy stands here: which call runs where is `core.dispatch`'s, which workers should exist is
`core.roster`'s. Frames are handled in the hub's callbacks and never block; forking, reaping, logging
and hooks are done by the main greenlet, which the callbacks wake through `_todo`.
"""

from __future__ import annotations

import _socket
import math
import os
import random
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import gevent
from gevent.event import Event
from gunicorn import util
from gunicorn.dirty.app import parse_dirty_app_spec

from . import process, settings
from .core import dispatch, faults, roster, values, wire
from .core.wire import Frame
from .link import Link
from .listener import get_listener
from .worker import DirtyWorker

ABORT_TIME = 1.0
"""Seconds between the signal that has a stuck worker write its stacks and die (ABRT), and KILL."""

QUICK_TIME = 1.5
"""Seconds that workers get to end on a quick stop: their tasks' `finally` blocks (1 s) and apps'
`close()`. Below the 2 s that gunicorn's master waits before it kills us."""

GOAWAY_TIME = 1.0
"""Seconds a client gets to confirm that it sends its new calls to the next arbiter."""

MEMORY_INTERVAL = 5.0
"""Seconds between looks at the workers' memory, when it is limited."""

BASE_DESCRIPTORS, DESCRIPTORS_PER_TASK = 256, 4
"""Descriptors a dirty process may need: HTTP workers, files and libraries, and some for each call
that a worker runs at once."""

SIBLING_INTERVAL = 0.1
"""Seconds between looks at the HTTP workers of a master that stops; its own interval."""

ACCEPT_PAUSE = 0.5
"""Seconds without accepting after the process ran out of descriptors."""


class _Member:
    """A worker process as its arbiter sees it."""

    def __init__(self, key: int, worker: DirtyWorker, link: Link) -> None:
        self.key = key
        self.worker = worker
        self.link = link
        self.pid = int(worker.pid)
        self.kill_at = math.inf


class DirtyArbiter:
    """gunicorn's seam: made in the master, `run()` in the process that the master forks for it.

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
        self.worker_age = 0
        self.workers: dict[int, DirtyWorker] = {}
        self.app_worker_map: dict[str, set[int]] = {}
        self.app_specs: dict[str, dict[str, Any]] = {}
        self.settings = settings.current
        for spec in cfg.dirty_apps:
            path, count = parse_dirty_app_spec(spec)
            self.app_specs[path] = {
                "import_path": path,
                "worker_count": count,
                "original_spec": spec,
            }
            self.app_worker_map[path] = set()
        self._listener = get_listener(cfg)
        self.socket_path = self._listener.path
        self.tmpdir = self._listener.directory

    @property
    def num_workers(self) -> int:
        """How many dirty workers there should be."""
        return self._roster.size

    def master_stops(self) -> None:
        """In the master, before it sends TERM: no arbiter will follow this one.

        The HTTP workers are told to stop at the same moment, and requests they still finish may
        make new calls. TERM alone does not say so: sent to the arbiter only, the next one takes over.
        """
        self._listener.announce_stop()

    # The process.

    def run(self) -> None:
        """Run the dirty arbiter in this (just forked) process; does not return."""
        kept = [self._listener.sock.fileno(), *self._log_descriptors()]
        process.run_child(self._main, lambda: kept, lambda: None)

    def _log_descriptors(self) -> list[int]:
        statsd = getattr(self.log, "sock", None)  # gunicorn's statsd logger
        return [] if statsd is None else [statsd.fileno()]

    def _main(self) -> None:
        self.pid = os.getpid()
        self.log.info("Dirty arbiter starting (pid: %s)", self.pid)
        process.raise_descriptor_limit(
            BASE_DESCRIPTORS + self.cfg.dirty_workers + DESCRIPTORS_PER_TASK * self.cfg.dirty_threads
        )
        util.set_owner_process(self.cfg.uid, self.cfg.gid, initgroups=self.cfg.initgroups)
        process.die_with_parent(signal.SIGQUIT, self.ppid)
        os.environ["GUNICORN_DIRTY_SOCKET"] = self.socket_path
        self._prepare()
        self.cfg.on_dirty_starting(self)
        util._setproctitle("dirty-arbiter")
        self._init_signals()
        self._accepter.start(self._accept)
        self.log.info("Dirty arbiter listening on %s", self.socket_path)
        try:
            self._supervise()
        finally:
            if os.getppid() != self.ppid:
                self._listener.remove()  # the master could not
            self.log.info("Dirty arbiter exiting (pid: %s)", self.pid)

    def _prepare(self) -> None:
        """Everything that belongs to this process and its hub."""
        limits = dispatch.Limits(
            self.settings.queue_size, self.settings.queue_bytes, self.settings.calls_per_connection
        )
        self._dispatcher = dispatch.Dispatcher(self.app_specs, limits)
        counts = {path: spec["worker_count"] for path, spec in self.app_specs.items()}
        self._roster = roster.Roster(self.cfg.dirty_workers, counts)
        self._members: dict[int, _Member] = {}
        self._clients: set[Link] = set()
        self._signals: deque[int] = deque()
        self._todo: deque[Callable[[], None]] = deque()
        self._wake = Event()
        self._wakes_at = 0.0
        self._stop_by = math.inf
        self._leaving: set[Link] = set()  # clients that have not confirmed a GOAWAY
        self._hand_over_by = math.inf
        self._memory_at = time.monotonic() + MEMORY_INTERVAL if self.settings.max_memory else math.inf
        self._hub = gevent.get_hub()
        self._accepter = self._hub.loop.io(self._listener.sock.fileno(), 1)

    # The main greenlet.

    def _supervise(self) -> None:
        while not self._finished():
            now = time.monotonic()
            self._wakes_at = self._next_deadline()
            wait = None if math.isinf(self._wakes_at) else max(0.0, self._wakes_at - now)
            self._wake.wait(wait)
            self._wake.clear()
            self._handle_signals()
            while self._todo:
                self._todo.popleft()()
            now = time.monotonic()
            self._act(self._dispatcher.tick(now))
            self._manage(self._roster.step(now))
            self._kill_overdue(now)
            self._weigh_workers(now)
        self._flush_clients()

    def _flush_clients(self) -> None:
        """Give the last answers to the kernel; clients read them after we have gone."""
        until = time.monotonic() + QUICK_TIME
        gevent.sleep(0)
        while any(link.outbox_bytes for link in self._clients) and time.monotonic() < until:
            gevent.sleep(0.01)

    def _next_deadline(self) -> float:
        times = [self._memory_at, *(member.kill_at for member in self._members.values())]
        times += [t for t in (self._dispatcher.next_deadline(), self._roster.next_deadline()) if t]
        if self.alive:
            if not self._members and not self._roster.members:
                times.append(0.0)  # nothing has been spawned yet
        else:
            times.append(self._stop_by)
            if self._leaving:
                times.append(self._hand_over_by)
            if self._listener.stop_announced():
                # No event tells us that the last HTTP worker has gone.
                times.append(time.monotonic() + SIBLING_INTERVAL)
        return min(times, default=math.inf)

    def _soon(self, what: Callable[[], None]) -> None:
        """From a callback: have the main greenlet do it."""
        self._todo.append(what)
        self._wake.set()

    def _init_signals(self) -> None:
        for name in ("HUP", "QUIT", "INT", "TERM", "TTIN", "TTOU", "USR1", "CHLD"):
            signal.signal(getattr(signal, "SIG" + name), self._on_signal)
        # Sent to a whole process group, these are meant for the master.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        signal.signal(signal.SIGWINCH, signal.SIG_IGN)

    def _on_signal(self, number: int, frame: object) -> None:
        self._signals.append(number)
        self._hub.loop.run_callback_threadsafe(self._wake.set)

    def _handle_signals(self) -> None:
        while self._signals:
            number = self._signals.popleft()
            if number == signal.SIGCHLD:
                self._reap_workers()
            elif number == signal.SIGUSR1:
                self.log.reopen_files()
                for pid in self.workers:
                    process.kill(pid, signal.SIGUSR1)
            elif number == signal.SIGHUP and self.alive:
                self.log.info("Reloading dirty workers")
                self._roster.reload()
            elif number in (signal.SIGTTIN, signal.SIGTTOU):
                self._resize(1 if number == signal.SIGTTIN else -1)
            elif number != signal.SIGHUP:
                self._stop(graceful=number == signal.SIGTERM)

    def _resize(self, change: int) -> None:
        before = self._roster.size
        after = self._roster.resize(before + change)
        if after == before:
            self.log.warning("Cannot decrease below %s dirty workers (required by app specs)", after)
        else:
            self.log.info("Dirty workers changed from %s to %s", before, after)

    # Stopping.

    def _stop(self, *, graceful: bool) -> None:
        now = time.monotonic()
        if not self.alive and graceful:
            return  # a second TERM, or one to the whole process group
        self.alive = False
        self._stop_by = min(self._stop_by, now + (self.cfg.dirty_graceful_timeout if graceful else 0.0))
        if graceful and not self._listener.stop_announced():
            self._hand_over(now)

    def _hand_over(self, now: float) -> None:
        """The next arbiter takes the new calls: they wait at the listener until it is there."""
        self._accepter.stop()
        self._hand_over_by = now + GOAWAY_TIME
        for link in self._clients:
            self._leaving.add(link)
            link.send((wire.pack_frame(wire.GOAWAY, 0),))

    def _finished(self) -> bool:
        """Called before each wait: takes a stop one step on, and says whether it is done."""
        if self.alive:
            return False
        now = time.monotonic()
        cut = now >= self._stop_by
        if cut:
            self._act(self._dispatcher.stop())
        if cut or (self._dispatcher.idle and not self._awaits_calls(now)):
            self._manage(self._roster.stop())
            if cut:
                for member in self._members.values():
                    if member.kill_at > now + QUICK_TIME:
                        process.kill(member.pid, signal.SIGQUIT)
                        member.kill_at = now + QUICK_TIME
                self._stop_by = math.inf
        return not self._members and self._dispatcher.idle

    def _awaits_calls(self, now: float) -> bool:
        """Calls may still come: from requests that a stopping master's HTTP workers finish, or from
        clients that have not confirmed the hand-over."""
        if self._listener.stop_announced():
            return process.has_siblings(self.ppid)
        return bool(self._leaving) and now < self._hand_over_by

    # Workers.

    def _manage(self, actions: Iterable[roster.Action]) -> None:
        for action in actions:
            if isinstance(action, roster.Spawn):
                self._spawn_worker(action)
            elif isinstance(action, roster.Say):
                getattr(self.log, action.level)(action.message)
            elif action.key in self._members:
                if isinstance(action, roster.Retire):
                    self._retire_worker(self._members[action.key], action.why)
                else:
                    self._kill_worker(self._members[action.key], action.why, signal.SIGQUIT)

    def _spawn_worker(self, spawn: roster.Spawn) -> None:
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
        self.worker_age += 1
        maximum = self.settings.max_message_size
        worker = DirtyWorker(self.worker_age, os.getpid(), list(spawn.apps), self.cfg, self.log, maximum)
        pid = process.fork(
            partial(worker.run, theirs),
            lambda: [theirs.fileno(), *self._log_descriptors()],
            self._release,
        )
        theirs.close()
        worker.pid = pid
        frames = partial(self._on_worker_frames, spawn.key)
        link = Link(ours, frames, partial(self._on_worker_close, spawn.key), maximum)
        self._members[spawn.key] = _Member(spawn.key, worker, link)
        self.workers[pid] = worker
        for path in spawn.apps:
            self.app_worker_map[path].add(pid)
        self.cfg.dirty_post_fork(self, worker)
        self.log.info("Spawned dirty worker (pid: %s) with apps: %s", pid, list(spawn.apps))

    def _release(self) -> None:
        """In a worker just forked: let go of what is the arbiter's."""
        self._accepter.stop()
        self._accepter.close()
        for link in [*self._clients, *(member.link for member in self._members.values())]:
            link.close("forked")

    def _retire_worker(self, member: _Member, why: str) -> None:
        self._dispatcher.worker_draining(member.key)
        self.log.info("Stopping dirty worker (pid: %s): %s", member.pid, why)
        if member.worker.booted:
            self._drain(member)
        else:  # it runs nothing yet, and may load for minutes
            process.kill(member.pid, signal.SIGTERM)
            member.kill_at = min(member.kill_at, time.monotonic() + ABORT_TIME)

    def _drain(self, member: _Member) -> None:
        member.link.send((wire.pack_frame(wire.STOP, 0),))
        until = time.monotonic() + self.cfg.dirty_graceful_timeout + QUICK_TIME
        member.kill_at = min(member.kill_at, until)

    def _kill_worker(self, member: _Member, why: str, number: int) -> None:
        self.log.warning("Killing dirty worker (pid: %s): %s", member.pid, why)
        member.worker.aborted = True
        process.kill(member.pid, number)
        member.kill_at = min(member.kill_at, time.monotonic() + ABORT_TIME)

    def _kill_overdue(self, now: float) -> None:
        for member in self._members.values():
            if member.kill_at <= now:
                process.kill(member.pid, signal.SIGKILL)
                member.kill_at = math.inf

    def _weigh_workers(self, now: float) -> None:
        if now < self._memory_at:
            return
        self._memory_at = now + MEMORY_INTERVAL
        limit = self.settings.max_memory
        for member in self._members.values():
            size = process.memory_of(member.pid)
            if size > limit:
                self._replace_worker(member.key, f"it has {size} bytes of memory (max_memory {limit})")

    def _replace_worker(self, key: int, why: str) -> None:
        if self._roster.replace(key, why):
            self.log.info("Replacing dirty worker (pid: %s): %s", self._members[key].pid, why)

    def _reap_workers(self) -> None:
        for member in list(self._members.values()):
            status = process.reap(member.pid)
            if status is not None:
                self._worker_exited(member, status)

    def _worker_exited(self, member: _Member, status: int) -> None:
        # What it wrote before it ended counts: its answers come before its loss.
        member.link.read_rest()
        member.link.close("the worker has ended")
        now = time.monotonic()
        how = process.describe_status(status)
        lost = self._dispatcher.running_on(member.key)
        del self._members[member.key]
        worker = self.workers.pop(member.pid)
        for path in worker.app_paths:
            self.app_worker_map[path].discard(member.pid)
        if lost:
            names = ", ".join(f"{app}.{action}" for app, action in lost[:10])
            self.log.error("Dirty worker (pid: %s) %s; %s calls lost: %s", member.pid, how, len(lost), names)
        elif status:
            self.log.warning("Dirty worker (pid: %s) %s", member.pid, how)
        else:
            self.log.info("Dirty worker exited (pid: %s)", member.pid)
        self._act(self._dispatcher.worker_lost(member.key, how, now))
        self._manage(self._roster.exited(member.key, now))
        self.cfg.dirty_worker_exit(self, worker)

    # Frames from workers, in the hub.

    def _on_worker_frames(self, key: int, link: Link, frames: list[Frame]) -> None:
        now = time.monotonic()
        for kind, call_id, payload in frames:
            if kind in (wire.CHUNK, wire.RESPONSE, wire.ERROR, wire.END):
                self._act(self._dispatcher.frame_from_worker(key, kind, call_id, payload, now))
            elif kind == wire.READY:
                self._soon(partial(self._worker_ready, key, values.loads(payload)))
            elif kind == wire.CLASSES:
                declared = {path: said["workers"] for path, said in values.loads(payload).items()}
                self._soon(partial(self._roster.classes, key, declared))
            elif kind == wire.STOP:
                self._dispatcher.worker_draining(key)
                self._soon(partial(self._worker_leaving, key))
            else:
                raise wire.WireError(f"a dirty worker sent a frame of kind {kind:#x}")
        if not self.alive:
            self._wake.set()

    def _worker_ready(self, key: int, told: dict[str, Any]) -> None:
        member = self._members.get(key)
        if member is None:
            return
        now = time.monotonic()
        for path, fault in told["failed"].items():
            self.app_worker_map[path].discard(member.pid)
            self.log.error("Dirty worker (pid: %s): %s: %s", member.pid, path, fault["message"])
            self._act(self._dispatcher.app_failed(path, fault))
        if not told["apps"]:
            return  # it exits, and that is the failure
        member.worker.booted = True
        self._manage(self._roster.ready(key, now, whole=not told["failed"]))
        apps = {path: _traits(plain) for path, plain in told["apps"].items()}
        self._act(self._dispatcher.worker_ready(key, member.pid, apps, told["slots"], now, self._max_calls()))
        self.log.info("Dirty worker ready (pid: %s)", member.pid)

    def _max_calls(self) -> int:
        """When a worker is due for replacement (gunicorn's rule for its own)."""
        if not self.settings.max_requests:
            return 0
        return self.settings.max_requests + random.randint(0, self.settings.max_requests_jitter)

    def _worker_leaving(self, key: int) -> None:
        self._roster.leaving(key)
        if key in self._members:
            self._drain(self._members[key])

    def _on_worker_close(self, key: int, link: Link, reason: str) -> None:
        # A worker never closes its end before it exits: it is dying, or can't be talked to any more.
        self._soon(partial(self._worker_cut_off, key, reason))

    def _worker_cut_off(self, key: int, reason: str) -> None:
        self._reap_workers()
        member = self._members.get(key)
        if member is not None:
            self.log.debug("Link to dirty worker (pid: %s) ended: %s", member.pid, reason)
            process.kill(member.pid, signal.SIGKILL)

    # Clients, in the hub.

    def _accept(self) -> None:
        for _ in range(64):
            try:
                number, _address = self._listener.sock._accept()  # type: ignore[attr-defined]
                sock = _socket.socket(fileno=number)
            except BlockingIOError:
                return
            except OSError as error:
                self._pause_accepting(error)
                return
            self._clients.add(
                Link(
                    sock,
                    self._on_client_frames,
                    self._on_client_close,
                    self.settings.max_message_size,
                )
            )

    def _pause_accepting(self, error: OSError) -> None:
        """Out of descriptors, most likely: a readable listener would spin."""
        self._accepter.stop()
        timer = self._hub.loop.timer(ACCEPT_PAUSE)
        timer.start(self._accepter.start, self._accept)
        self._soon(partial(self.log.error, "Cannot accept a dirty client: %s; trying again", error.strerror))

    def _on_client_frames(self, link: Link, frames: list[Frame]) -> None:
        now = time.monotonic()
        dispatcher = self._dispatcher
        for kind, call_id, payload in frames:
            if kind == wire.REQUEST:
                request = wire.unpack_request(payload)
                self._act(dispatcher.submit(link, call_id, request, now))
            elif kind == wire.CREDIT:
                self._act(dispatcher.credit(link, call_id, payload, now))
            elif kind == wire.CANCEL:
                self._act(dispatcher.cancel(link, call_id, now))
            elif kind == wire.GOAWAY:
                self._leaving.discard(link)
            elif kind == wire.HELLO:
                link.send((wire.pack_hello(self.settings.max_message_size),))
            else:
                raise wire.WireError(f"a client sent a frame of kind {kind:#x}")
        due = dispatcher.next_deadline()
        if not self.alive or (due is not None and due < self._wakes_at):
            self._wake.set()

    def _on_client_close(self, link: Link, reason: str) -> None:
        self._clients.discard(link)
        self._leaving.discard(link)
        self._act(self._dispatcher.client_lost(link, time.monotonic()))
        if "protocol error" in reason:
            self._soon(partial(self.log.warning, "Dropped a dirty client: %s", reason))
        if not self.alive:
            self._wake.set()

    # Actions of the dispatcher.

    def _act(self, actions: Iterable[dispatch.Action]) -> None:
        for action in actions:
            if isinstance(action, dispatch.Assign):
                parts = wire.repack_request(action.call_id, action.request, action.budget)
                self._members[action.worker].link.send(parts)
            elif isinstance(action, dispatch.Reply):
                self._reply(action)
            elif isinstance(action, dispatch.Forward):
                frame = wire.pack_frame(action.kind, action.call_id, action.payload)
                self._members[action.worker].link.send((frame,))
            elif isinstance(action, dispatch.Refuse):
                frame = wire.pack_frame(wire.ERROR, action.call_id, values.dumps(action.fault))
                action.client.send((frame,))
            elif isinstance(action, dispatch.Worn):
                self._soon(partial(self._replace_worker, action.worker, action.why))
            else:
                self._soon(partial(self._stuck, action.worker, action.why))

    def _reply(self, reply: dispatch.Reply) -> None:
        link, kind, call_id, payload = reply
        size = link.outbox_bytes + len(payload)
        if kind == wire.RESPONSE and size > self.settings.unread_bytes and link.outbox_bytes:
            fault = faults.answer_dropped(len(payload), self.settings.unread_bytes)
            kind, payload = wire.ERROR, values.dumps(fault)
        link.send((wire.pack_frame(kind, call_id, payload),))

    def _stuck(self, key: int, why: str) -> None:
        member = self._members.get(key)
        if member is not None:
            self._dispatcher.worker_draining(key)
            self._kill_worker(member, why, signal.SIGABRT)


def _traits(plain: dict[str, Any]) -> dispatch.AppTraits:
    actions = {name: dispatch.ActionTraits(*action) for name, action in plain["actions"].items()}
    return dispatch.AppTraits(dispatch.ActionTraits(*plain["default"]), actions)
