"""Which workers should exist: allocation of apps, generations, backoff, resize, reload, stop.

Events in, `Spawn`, `Retire` and `Kill` out; the arbiter forks and signals. After any event `step`
says what has to be done now, and `next_deadline` when to ask again: what should be is worked out
afresh each time from what is, so no event can be missed.

The first worker of a generation loads every app, and before it loads them it says what their
classes declare (``workers``). Only then are the others spawned, with the apps they are allotted: the
arbiter learns the limits without importing an app itself, and nobody imports an app only to ask.

Backoff is the pool's, not a worker's. It starts over once a worker that came up after the last
failure has stayed up for `PROVEN_AFTER`.
"""

from __future__ import annotations

import enum
import math
from typing import NamedTuple

PROVEN_AFTER = 1.0
"""Seconds that a worker must have been ready for its end not to count as "it keeps dying"."""

BOOT_BACKOFF = (1.0, 60.0)
"""First and longest pause, in seconds, between workers that fail to boot. It doubles: 7 attempts in
the first minute, however many workers the pool has."""

CRASH_BACKOFF = (0.1, 10.0)
"""The same for workers that booted and then died at once."""


class Phase(enum.Enum):
    """A worker's life. BOOTING -> READY -> RETIRING, and the end at any point."""

    BOOTING = "booting"
    READY = "ready"
    RETIRING = "retiring"


class Member:
    """A worker process."""

    __slots__ = ("apps", "generation", "key", "phase", "ready_at", "replace")

    def __init__(self, key: int, apps: tuple[str, ...], generation: int) -> None:
        self.key = key
        self.apps = apps
        self.generation = generation
        self.phase = Phase.BOOTING
        self.ready_at = math.inf
        self.replace = ""  # why it serves only until a better one is ready


def _proven_at(member: Member) -> float:
    return member.ready_at + PROVEN_AFTER


class Spawn(NamedTuple):
    """Fork a worker, known as `key`, that loads `apps`."""

    key: int
    apps: tuple[str, ...]
    generation: int


class Retire(NamedTuple):
    """Let the worker finish what it runs, and end."""

    key: int
    why: str


class Kill(NamedTuple):
    """End the worker at once."""

    key: int
    why: str


class Say(NamedTuple):
    """A line for the log; `level` is a method of gunicorn's logger."""

    level: str
    message: str


Action = Spawn | Retire | Kill | Say


class Roster:
    """See the module's text. `limits` gives, per app, in how many workers it is loaded (None: all,
    or what its class says)."""

    def __init__(self, size: int, limits: dict[str, int | None]) -> None:
        self.size = size
        self.generation = 1
        self.members: dict[int, Member] = {}
        self._configured = dict(limits)
        self._declared: dict[int, dict[str, int | None]] = {}  # generation -> what classes say
        self._serving = 1  # the newest generation that has been ready: what a failed reload keeps
        self._bad = 0  # ends in a row that count for backoff
        self._last_bad = -math.inf  # when
        self._not_before = -math.inf
        self._last_key = 0
        self._stopping = False

    # What is known.

    def limit(self, app: str) -> int | None:
        """In how many workers the app is loaded; None for all."""
        configured = self._configured.get(app)
        if configured is not None:
            return configured
        return self._declared.get(self.generation, {}).get(app)

    @property
    def minimum(self) -> int:
        """The size below which an app would not get the workers it asks for (gunicorn's rule)."""
        return max(self._most_wanted(self.generation), self._most_wanted(self._serving))

    def _most_wanted(self, generation: int) -> int:
        declared = self._declared.get(generation, {})
        limits = (limit or declared.get(app) or 1 for app, limit in self._configured.items())
        return max(limits, default=1)

    @property
    def empty(self) -> bool:
        return not self.members

    # Events. `step` follows each.

    def classes(self, key: int, declared: dict[str, int | None]) -> None:
        """A worker has imported its app classes: what their ``workers`` attributes say."""
        member = self.members.get(key)
        if member is not None:
            # It speaks of its own apps only.
            self._declared.setdefault(member.generation, {}).update(declared)

    def ready(self, key: int, now: float, *, whole: bool = True) -> list[Action]:
        """A worker takes calls. Not `whole`: some of its apps failed to load, so it serves the
        others until a replacement has loaded more; replacements back off like failed boots."""
        member = self.members.get(key)
        if member is None or member.phase is not Phase.BOOTING:
            return []
        member.phase = Phase.READY
        member.ready_at = now
        if whole:
            return []
        if self._abandons_reload(member):
            return self._give_up_reload(member)
        member.replace = "apps failed to load"
        return self._back_off(BOOT_BACKOFF, "could not load every app (see above)", now)

    def replace(self, key: int, why: str) -> bool:
        """Spawn a worker in the place of this one, which serves until that one is ready. False if it
        is being replaced already, or not ready."""
        member = self.members.get(key)
        if member is None or member.phase is not Phase.READY or member.replace:
            return False
        member.replace = why
        return True

    def leaving(self, key: int) -> None:
        """A worker ends by its own wish (TERM sent to it): its replacement need not wait."""
        if key in self.members:
            self.members[key].phase = Phase.RETIRING

    def exited(self, key: int, now: float) -> list[Action]:
        """A worker has ended."""
        self._prove(now)
        member = self.members.pop(key, None)
        if member is None or self._stopping or member.phase is Phase.RETIRING:
            return []
        if member.generation != self.generation or now >= member.ready_at + PROVEN_AFTER:
            return []
        if member.phase is Phase.READY:
            return self._back_off(CRASH_BACKOFF, "died right after they were ready", now)
        if self._abandons_reload(member):
            return self._give_up_reload(member)
        return self._back_off(BOOT_BACKOFF, "failed to boot (see above)", now)

    def resize(self, size: int) -> int:
        """Change the number of workers; returns the new one. It never goes below `minimum`, and
        stays where it is if it started there."""
        self.size = max(size, min(self.size, self.minimum))
        return self.size

    def reload(self) -> None:
        """Bring up a new generation; the old one serves until the new one is ready."""
        self.generation = max([self.generation, *(m.generation for m in self.members.values())]) + 1
        self._declared.pop(self.generation, None)
        self._bad = 0
        self._not_before = -math.inf

    def stop(self) -> list[Action]:
        """Spawn nothing more and retire everybody."""
        self._stopping = True
        return [self._retire(member, "stop") for member in self._in(Phase.BOOTING, Phase.READY)]

    # What to do.

    def step(self, now: float) -> list[Action]:
        """What has to be done for the roster to be as it should."""
        if self._stopping:
            return []
        actions: list[Action] = []
        self._prove(now)
        while (spawn := self._spawn(now)) is not None:
            actions.append(spawn)
        return actions + self._retire_superseded() + self._retire_surplus()

    def next_deadline(self) -> float | None:
        """When `step` is worth calling without a new event."""
        if self._stopping or not self._bad:
            return None
        times = [self._not_before, *map(_proven_at, self._coming_up())]
        return min(filter(math.isfinite, times), default=None)

    def _in(self, *phases: Phase) -> list[Member]:
        return [member for member in self.members.values() if member.phase in phases]

    def _current(self) -> list[Member]:
        """The generation that is wanted, without those that have been told to go."""
        alive = self._in(Phase.BOOTING, Phase.READY)
        return [member for member in alive if member.generation == self.generation]

    def _kept(self) -> list[Member]:
        return [member for member in self._current() if not member.replace]

    def _wants_more(self) -> bool:
        kept = self._kept()
        if len(kept) >= self.size or not self._apps_for_next(kept):
            return False
        if self.generation not in self._declared and self._limits_unknown():
            # Until the limits are known, one worker is all there can be.
            return not kept
        # While the pool backs off, one at a time is enough to find out whether it works again.
        return not (self._bad and any(m.phase is Phase.BOOTING for m in kept))

    def _limits_unknown(self) -> bool:
        return any(limit is None for limit in self._configured.values())

    def _apps_for_next(self, kept: list[Member]) -> tuple[str, ...]:
        """Every app that is for all workers, and those that have fewer workers than they ask for."""
        apps = []
        for app in self._configured:
            limit = self.limit(app)
            if limit is None or sum(app in member.apps for member in kept) < limit:
                apps.append(app)
        return tuple(apps)

    def _spawn(self, now: float) -> Spawn | None:
        if now < self._not_before:
            return None
        self._not_before = -math.inf
        if not self._wants_more():
            return None
        self._last_key += 1
        member = Member(self._last_key, self._apps_for_next(self._kept()), self.generation)
        self.members[member.key] = member
        return Spawn(member.key, member.apps, member.generation)

    def _retire(self, member: Member, why: str) -> Retire:
        member.phase = Phase.RETIRING
        return Retire(member.key, why)

    def _retire_superseded(self) -> list[Action]:
        """Those that still boot for a reload that was followed by another one."""
        wanted = (self._serving, self.generation)
        booting = [member for member in self._in(Phase.BOOTING) if member.generation not in wanted]
        return [self._retire(member, "reload") for member in booting]

    def _retire_surplus(self) -> list[Action]:
        current, kept = self._current(), self._kept()
        ready = [member for member in current if member.phase is Phase.READY]
        actions: list[Action] = []
        if ready and len(ready) == len(current) and not self._wants_more():
            self._serving = self.generation
            for member in self._in(Phase.BOOTING, Phase.READY):
                if member.generation != self.generation:
                    actions.append(self._retire(member, "reload"))
        # Those to be replaced go first, then those with the fewest apps: as the first worker has
        # every app, no app loses its last worker. Among equals the oldest (gunicorn's choice).
        ready.sort(key=lambda member: (not member.replace, len(member.apps), member.key))
        surplus = max(0, len(ready) - self.size)
        if kept and all(member in ready for member in kept) and not self._wants_more():
            # Also where the apps' limits leave the pool smaller than it may be.
            surplus = max(surplus, len(ready) - len(kept))
        for member in ready[:surplus]:
            actions.append(self._retire(member, member.replace or "fewer workers"))
        return actions

    # Failures.

    def _prove(self, now: float) -> None:
        if any(_proven_at(member) <= now for member in self._coming_up()):
            self._bad = 0
            self._not_before = -math.inf

    def _coming_up(self) -> list[Member]:
        """The workers that may show that the failures are over: older ones know nothing of that."""
        ready = self._in(Phase.READY)
        return [member for member in ready if not member.replace and member.ready_at > self._last_bad]

    def _back_off(self, backoff: tuple[float, float], what: str, now: float) -> list[Action]:
        self._bad += 1
        self._last_bad = now
        if self._bad == 1:
            return []
        first, longest = backoff
        pause = min(longest, first * 2.0 ** min(self._bad - 2, 32))
        self._not_before = max(self._not_before, now + pause)
        message = (
            f"Dirty workers keep failing: {self._bad} in a row {what}; the next is spawned in {pause:.3g} s"
        )
        return [Say("warning", message)]

    def _abandons_reload(self, member: Member) -> bool:
        """The member's failure is that of a reload, and there is an old generation to keep."""
        return (
            member.generation == self.generation
            and self._serving != self.generation
            and any(m.generation == self._serving for m in self._in(Phase.READY))
        )

    def _give_up_reload(self, member: Member) -> list[Action]:
        """A worker of the new generation failed: the old one goes on serving."""
        failed = self.generation
        self.generation = self._serving
        message = (
            f"Reload failed: a dirty worker of generation {failed} did not load all of its apps (see above); "
            f"generation {self._serving} goes on serving. Mend the code and send HUP again"
        )
        actions: list[Action] = [Say("error", message)]
        for other in self._in(Phase.BOOTING, Phase.READY):
            if other.generation == failed:
                other.phase = Phase.RETIRING
                actions.append(Kill(other.key, "reload given up"))
        return actions
