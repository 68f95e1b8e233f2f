"""The arbiter's worker processes: carries out what the roster wants. Main greenlet only."""

from __future__ import annotations

import _socket
import math
import os
import random
import signal
import time
from collections.abc import Iterable
from functools import partial
from typing import Any, Protocol

from . import process
from .core import roster
from .core.calls import ActionTraits, AppTraits
from .core.stash import StashFailure
from .router import Router
from .settings import Settings
from .worker import DirtyWorker

ABORT_TIME = 1.0
"""Seconds between the signal that has a stuck worker write its stacks and die (ABRT), and KILL."""

QUICK_TIME = 1.5
"""Seconds that workers get to end on a quick stop: their tasks' `finally` blocks (1 s) and apps'
`close()`. Below the 2 s that gunicorn's master waits before it kills us."""

MEMORY_INTERVAL = 5.0
"""Seconds between looks at the workers' memory, when it is limited."""


class Arbiter(Protocol):
    """What the pool needs of its arbiter; hooks get it too."""

    cfg: Any
    log: Any

    @property
    def workers(self) -> dict[int, DirtyWorker]: ...

    @property
    def app_worker_map(self) -> dict[str, set[int]]: ...


class _Member:
    """A worker process as its arbiter sees it."""

    def __init__(self, key: int, worker: DirtyWorker, pid: int) -> None:
        self.key = key
        self.worker = worker
        self.pid = pid
        self.kill_at = math.inf


class Pool:
    """The workers, by the roster's keys."""

    def __init__(self, arbiter: Arbiter, limits: dict[str, int | None], router: Router, options: Settings):
        self.roster = roster.Roster(arbiter.cfg.dirty_workers, limits)
        self._arbiter = arbiter
        self._cfg = arbiter.cfg
        self._log = arbiter.log
        self._router = router
        self._options = options
        self._members: dict[int, _Member] = {}
        self._age = 0
        self._weigh_at = time.monotonic() + MEMORY_INTERVAL if options.max_memory else math.inf

    @property
    def empty(self) -> bool:
        return not self._members

    def step(self, now: float) -> None:
        """Do what is due."""
        self._manage(self.roster.step(now))
        self._kill_overdue(now)
        self._weigh(now)

    def next_deadline(self) -> float:
        wanted = self.roster.next_deadline()
        times = [self._weigh_at, *(member.kill_at for member in self._members.values())]
        return min(times if wanted is None else [wanted, *times])

    def limits(self) -> dict[str, int | None]:
        """In how many workers each app is loaded; None for all."""
        return {path: self.roster.limit(path) for path in self._arbiter.app_worker_map}

    def status(self) -> list[dict[str, Any]]:
        """The workers, oldest first, as gunicorn's control interface has them."""
        return [
            {
                "pid": member.pid,
                "age": member.worker.age,
                "apps": member.worker.app_paths,
                "booted": member.worker.booted,
                "last_heartbeat": None,  # there are none: a link's end is a worker's
            }
            for member in sorted(self._members.values(), key=lambda member: member.worker.age)
        ]

    def reload(self) -> None:
        self._log.info("Reloading dirty workers")
        self.roster.reload()

    def stop(self) -> None:
        """Have every worker end once it has finished."""
        self._manage(self.roster.stop())

    def tell_cut_off(self, why: str) -> None:
        """Log what a stop is going to cost."""
        dispatcher = self._router.dispatcher
        lost = [call for key in self._members for call in dispatcher.running_on(key, awaited=True)]
        if lost:
            self._log.warning("Cutting off dirty calls, %s: %s", why, _named(lost))

    def quit(self, now: float) -> None:
        """Have every worker end now."""
        self.stop()
        for member in self._members.values():
            if member.kill_at > now + QUICK_TIME:
                process.kill(member.pid, signal.SIGQUIT)
                member.kill_at = now + QUICK_TIME

    def signal_all(self, number: int) -> None:
        for member in self._members.values():
            process.kill(member.pid, number)

    # What workers say.

    def describe(self, key: int, told: dict[str, Any]) -> None:
        """What the classes of its apps declare."""
        self.roster.classes(key, {path: said["workers"] for path, said in told.items()})
        for path, said in told.items():
            try:
                self._router.desk.ensure(said["stashes"])
            except StashFailure as failure:
                self._log.error("Cannot make the stashes of dirty app %s: %s", path, failure)

    def ready(self, key: int, told: dict[str, Any]) -> None:
        for path, fault in told["failed"].items():
            self._router.act(self._router.dispatcher.app_failed(path, fault))
        member = self._members.get(key)
        if member is None:
            return  # its end was seen before its last words were read
        now = time.monotonic()
        for path in told["failed"]:
            self._arbiter.app_worker_map[path].discard(member.pid)
        if not told["apps"] or self.roster.members[key].phase is not roster.Phase.BOOTING:
            return  # it exits: that is the failure, or it was told to while it booted
        member.worker.booted = True
        self._manage(self.roster.ready(key, now, whole=not told["failed"]))
        if self.roster.members[key].phase is not roster.Phase.READY:
            return  # the reload that it was made for is given up
        apps = {path: _traits(plain) for path, plain in told["apps"].items()}
        ready = self._router.dispatcher.worker_ready
        self._router.act(ready(key, member.pid, apps, told["slots"], now, self._max_calls()))
        self._log.info("Dirty worker ready (pid: %s)", member.pid)

    def leave(self, key: int) -> None:
        """It was told to end (TERM sent to it) and asks to be sent nothing more."""
        self.roster.leaving(key)
        if key in self._members:
            self._drain(self._members[key])

    def cut_off(self, key: int, reason: str) -> None:
        """Its link has ended. It never closes that before it exits: it is dying, or beyond talking."""
        self.reap()
        member = self._members.get(key)
        if member is not None:
            self._log.debug("Link to dirty worker (pid: %s) ended: %s", member.pid, reason)
            process.kill(member.pid, signal.SIGKILL)

    def replace(self, key: int, why: str) -> None:
        if self.roster.replace(key, why):
            self._log.info("Replacing dirty worker (pid: %s): %s", self._members[key].pid, why)

    def abort(self, key: int, why: str) -> None:
        """It is stuck: have it write its stacks and die."""
        if key in self._members:
            self._log.critical("DIRTY WORKER TIMEOUT (pid:%s): %s; killing it", self._members[key].pid, why)
            self._kill(self._members[key], signal.SIGABRT)

    # Processes.

    def reap(self) -> None:
        for member in list(self._members.values()):
            status = process.reap(member.pid)
            if status is not None:
                self._exited(member, status)

    def _manage(self, actions: Iterable[roster.Action]) -> None:
        for action in actions:
            if isinstance(action, roster.Spawn):
                self._spawn(action)
            elif isinstance(action, roster.Say):
                getattr(self._log, action.level)(action.message)
            elif action.key in self._members:
                if isinstance(action, roster.Retire):
                    self._retire(self._members[action.key], action.why)
                else:
                    member = self._members[action.key]
                    self._log.warning("Killing dirty worker (pid: %s): %s", member.pid, action.why)
                    self._kill(member, signal.SIGQUIT)

    def _spawn(self, spawn: roster.Spawn) -> None:
        try:
            ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
        except OSError as error:
            self._cannot_spawn(spawn, error)
            return
        self._age += 1
        maximum = self._options.max_message_size
        worker = DirtyWorker(self._age, os.getpid(), list(spawn.apps), self._cfg, self._log, maximum)
        kept = [theirs.fileno(), *process.log_descriptors(self._log)]
        try:
            pid = process.fork(partial(worker.run, theirs), kept, self._router.abandon)
        except OSError as error:
            ours.close()
            self._cannot_spawn(spawn, error)
            return
        finally:
            theirs.close()
        worker.pid = pid
        self._router.add_worker(spawn.key, ours)
        self._members[spawn.key] = _Member(spawn.key, worker, pid)
        self._arbiter.workers[pid] = worker
        for path in spawn.apps:
            self._arbiter.app_worker_map[path].add(pid)
        self._hook(self._cfg.dirty_post_fork, worker)
        self._log.info("Spawned dirty worker (pid: %s) with apps: %s", pid, list(spawn.apps))

    def _cannot_spawn(self, spawn: roster.Spawn, error: OSError) -> None:
        self._log.error("Cannot spawn a dirty worker: %s", error.strerror)
        self._manage(self.roster.exited(spawn.key, time.monotonic()))

    def _exited(self, member: _Member, status: int) -> None:
        self._router.finish_worker(member.key)
        now = time.monotonic()
        how = process.describe_status(status)
        self._log_exit(member, status)
        del self._members[member.key]
        worker = self._arbiter.workers.pop(member.pid)
        for path in worker.app_paths:
            self._arbiter.app_worker_map[path].discard(member.pid)
        dispatcher = self._router.dispatcher
        self._router.act(dispatcher.worker_lost(member.key, how, now))
        if not worker.booted:
            dispatcher.not_ready(worker.app_paths, f"the last one {how} while it loaded its apps")
        if not worker.booted and process.ended_by_request(status):
            self.roster.leaving(member.key)  # no failure of its apps
        self._manage(self.roster.exited(member.key, now))
        self._hook(self._cfg.dirty_worker_exit, worker)

    def _log_exit(self, member: _Member, status: int) -> None:
        """In gunicorn's words, and what it cost."""
        lost = self._router.dispatcher.running_on(member.key)
        cost = f"; calls it was running: {_named(lost)}" if lost else ""
        if not member.worker.booted:
            cost = f" while it loaded {', '.join(member.worker.app_paths)}"
        number = process.signal_of(status)
        log = self._log.error if lost else self._log.warning
        if number is not None:
            if member.kill_at < math.inf and process.ended_by_request(status):
                log = self._log.info
            what = process.describe_signal(number)
            log("Dirty worker (pid:%s) killed by signal %s: %s%s", member.pid, number, what, cost)
        elif status and not member.worker.booted:
            what = f"it {process.describe_status(status)}{cost}"
            if process.could_load_nothing(status):
                what = "none of its apps loaded (see above)"
            self._log.error("Dirty worker failed to boot (pid:%s): %s", member.pid, what)
        elif status or lost:
            log("Dirty worker (pid:%s) %s%s", member.pid, process.describe_status(status), cost)
        self._log.info("Dirty worker exited (pid:%s)", member.pid)

    def _hook(self, hook: Any, worker: DirtyWorker) -> None:
        """A user's hook; its failure must not cost the workers their arbiter."""
        try:
            hook(self._arbiter, worker)
        except Exception:
            self._log.exception("Exception in a dirty hook (%s)", getattr(hook, "__name__", hook))

    def _retire(self, member: _Member, why: str) -> None:
        self._log.info("Stopping dirty worker (pid: %s): %s", member.pid, why)
        if member.worker.booted:
            self._drain(member)
        else:  # it runs nothing yet, and may load for minutes
            process.kill(member.pid, signal.SIGTERM)
            member.kill_at = min(member.kill_at, time.monotonic() + ABORT_TIME)

    def _drain(self, member: _Member) -> None:
        self._router.stop_worker(member.key)
        until = time.monotonic() + self._cfg.dirty_graceful_timeout + QUICK_TIME
        member.kill_at = min(member.kill_at, until)

    def _kill(self, member: _Member, number: int) -> None:
        member.worker.aborted = True
        process.kill(member.pid, number)
        member.kill_at = min(member.kill_at, time.monotonic() + ABORT_TIME)

    def _kill_overdue(self, now: float) -> None:
        for member in self._members.values():
            if member.kill_at <= now:
                process.kill(member.pid, signal.SIGKILL)
                member.kill_at = math.inf

    def _weigh(self, now: float) -> None:
        if now < self._weigh_at:
            return
        self._weigh_at = now + MEMORY_INTERVAL
        limit = self._options.max_memory
        for member in self._members.values():
            size = process.memory_of(member.pid)
            if size > limit:
                self.replace(member.key, f"it has {size} bytes of memory (max_memory {limit})")

    def _max_calls(self) -> int:
        """When a worker is due for replacement (gunicorn's rule for its own)."""
        if not self._options.max_requests:
            return 0
        return self._options.max_requests + random.randint(0, self._options.max_requests_jitter)


def _named(calls: list[tuple[str, str]]) -> str:
    """For the log: how many calls, and which."""
    names = ", ".join(f"{app}.{action}" for app, action in calls[:10]) + (" ..." if len(calls) > 10 else "")
    return f"{len(calls)} ({names})"


def _traits(plain: dict[str, Any]) -> AppTraits:
    actions = {name: ActionTraits(*action) for name, action in plain["actions"].items()}
    return AppTraits(ActionTraits(*plain["default"]), actions)
