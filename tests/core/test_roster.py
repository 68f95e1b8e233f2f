"""What `core.roster` promises: a small simulation of workers' lives, and what was asked for when."""

import heapq
import itertools
import math

import pytest

from gunicorn_dirty_gevent.core.roster import (
    BOOT_BACKOFF,
    CRASH_BACKOFF,
    PROVEN_AFTER,
    Kill,
    Phase,
    Retire,
    Roster,
    Say,
    Spawn,
)

FOREVER = math.inf


class Life:
    """How a worker fares, in seconds from its fork."""

    def __init__(self, classes=0.1, ready=1.0, dies=FOREVER, whole=True, drains=0.5):
        self.classes = classes
        self.ready = ready
        self.dies = dies
        self.whole = whole
        self.drains = drains


FAILS_AT_ONCE = Life(FOREVER, FOREVER, 0.0)
FAILS_IN_INIT = Life(0.0, FOREVER, 0.0)


class World:
    """A roster, and processes that do as it says and live as `life(spawn)` says."""

    def __init__(self, size, limits=None, life=lambda spawn: Life(), declared=None):
        self.roster = Roster(size, limits or {"a": None})
        self.life = life
        self.declared = declared or {}
        self.now = 0.0
        self.spawned = {}  # key -> (when, Spawn)
        self.lives = {}  # key -> Life, of those alive
        self.ready = set()  # keys that would take calls
        self.log = []
        self._events = []
        self._order = itertools.count()
        self.step()

    # Driving it.

    def run(self, until):
        """Let time pass. Between events the roster is only asked when it wanted to be."""
        steps = 0
        while (when := min(self._next_event(), self._deadline())) <= until:
            steps = steps + 1 if when <= self.now else 0
            assert steps < 200, "time stands still: next_deadline() is not in the future"
            self.now = max(self.now, when)
            if self._next_event() <= self.now:
                heapq.heappop(self._events)[2]()
            self.step()
        self.now = max(self.now, until)
        return self

    def _next_event(self):
        return self._events[0][0] if self._events else FOREVER

    def _deadline(self):
        when = self.roster.next_deadline()
        return FOREVER if when is None else when

    def _at(self, when, what):
        if when < FOREVER:
            heapq.heappush(self._events, (when, next(self._order), what))

    def step(self):
        self.carry_out(self.roster.step(self.now))
        assert len(self.lives) <= 3 * max(self.roster.size, 1) + 3, "too many processes"

    def do(self, method, *arguments):
        found = getattr(self.roster, method)(*arguments)
        self.carry_out(found if isinstance(found, list) else [])
        self.step()

    def carry_out(self, actions):
        for action in actions:
            if isinstance(action, Spawn):
                self._spawn(action)
            elif isinstance(action, Say):
                self.log.append((self.now, action.level, action.message))
            else:
                assert isinstance(action, (Retire, Kill))
                assert action.key in self.lives, "told to end a worker that has ended"
                self.log.append((self.now, type(action).__name__, action.key, action.why))
                gentle = isinstance(action, Retire)
                if gentle and action.key not in self.ready:
                    gentle = False  # it has nothing to finish
                wait = self.lives[action.key].drains if gentle else 0.0
                self._at(self.now + wait, lambda key=action.key: self.die(key))

    def _spawn(self, spawn):
        assert spawn.key not in self.spawned
        assert spawn.apps
        life = self.life(spawn)
        self.spawned[spawn.key] = (self.now, spawn)
        self.lives[spawn.key] = life
        self._at(self.now + life.classes, lambda: self._classes(spawn))
        self._at(self.now + life.ready, lambda: self._ready(spawn, life))
        self._at(self.now + life.dies, lambda: self.die(spawn.key))

    def _classes(self, spawn):
        if spawn.key in self.lives:
            self.roster.classes(spawn.key, {app: self.declared.get(app) for app in spawn.apps})

    def _ready(self, spawn, life):
        if spawn.key in self.lives:
            self.ready.add(spawn.key)
            self.carry_out(self.roster.ready(spawn.key, self.now, whole=life.whole))

    def die(self, key):
        if self.lives.pop(key, None) is not None:
            self.ready.discard(key)
            self.carry_out(self.roster.exited(key, self.now))

    def kill(self, key):
        self.die(key)
        self.step()

    # Looking at it.

    def spawns(self, since=0.0, until=FOREVER):
        return [spawn for when, spawn in self.spawned.values() if since <= when <= until]

    def times(self):
        return [when for when, _ in self.spawned.values()]

    def serving(self):
        """Apps of each worker that takes calls, most first."""
        apps = ["".join(self.spawned[key][1].apps) for key in self.ready]
        return sorted(apps, key=lambda names: (-len(names), names))

    def generations(self):
        return {self.spawned[key][1].generation for key in self.ready}

    def said(self, level):
        return [line[2] for line in self.log if line[1] == level]

    def retired(self):
        return [line[2] for line in self.log if line[1] == "Retire"]


# Who loads what.


def test_the_others_wait_until_the_limits_are_known():
    world = World(4)
    assert [spawn.key for spawn in world.spawns()] == [1]
    assert world.roster.next_deadline() is None
    world.run(0.09)
    assert len(world.spawned) == 1
    world.run(0.1)
    assert [spawn.key for spawn in world.spawns()] == [1, 2, 3, 4]
    world.run(5.0)
    assert world.serving() == ["a"] * 4


def test_nobody_waits_when_the_configuration_names_all_limits():
    world = World(3, {"a": 3, "b": 1})
    assert [spawn.apps for spawn in world.spawns()] == [("a", "b"), ("a",), ("a",)]


@pytest.mark.parametrize(
    ("size", "limits", "declared", "expected", "minimum"),
    [
        (3, {"a": None}, {}, ["a", "a", "a"], 1),
        (3, {"a": None, "b": 1}, {}, ["ab", "a", "a"], 1),
        (3, {"a": None, "b": None}, {"b": 2}, ["ab", "ab", "a"], 2),
        (3, {"a": None, "b": 1}, {"b": 2}, ["ab", "a", "a"], 1),  # the configuration wins
        (3, {"a": None, "b": 3}, {"b": 1}, ["ab", "ab", "ab"], 3),
        (3, {"a": 1, "b": 2}, {}, ["ab", "b"], 2),  # a third would have nothing to load
        (2, {"a": None, "b": 5}, {}, ["ab", "ab"], 5),  # as many as there are
        (1, {"a": 1, "b": 1, "c": 1}, {}, ["abc"], 1),
    ],
)
def test_allocation(size, limits, declared, expected, minimum):
    world = World(size, limits, declared=declared).run(10.0)
    assert world.serving() == expected
    assert world.roster.minimum == minimum
    assert world.retired() == [] and world.roster.size == size


@pytest.mark.parametrize("which", [1, 2, 3])
def test_a_replacement_gets_the_apps_of_the_dead(which):
    world = World(3, {"a": None, "b": 1, "c": 2}).run(10.0)
    assert world.serving() == ["abc", "ac", "a"]
    world.kill(which)
    assert [spawn.apps for spawn in world.spawns(since=10.0)] == [world.spawned[which][1].apps]
    world.run(20.0)
    assert world.serving() == ["abc", "ac", "a"]
    assert len(world.spawned) == 4


def test_several_deaths_at_once():
    world = World(3, {"a": None, "b": 1, "c": 2}).run(10.0)
    for key in (1, 2, 3):
        world.die(key)
    world.step()
    world.run(20.0)
    assert world.serving() == ["abc", "ac", "a"]


# Resizing.


def test_more_workers():
    world = World(1, {"a": None, "b": 2}).run(10.0)
    assert world.serving() == ["ab"]
    world.do("resize", 3)
    world.run(20.0)
    assert world.serving() == ["ab", "ab", "a"]


def test_fewer_workers_keeps_every_app():
    world = World(4, {"a": None, "b": 1, "c": 2}).run(10.0)
    world.do("resize", 2)
    assert world.retired() == [3, 4]  # the fewest apps, then the oldest
    world.run(20.0)
    assert world.serving() == ["abc", "ac"]


def test_among_equals_the_oldest_goes():
    world = World(3).run(10.0)
    world.do("resize", 2)
    assert world.retired() == [1]


@pytest.mark.parametrize(
    ("size", "limits", "wanted", "got"),
    [
        (3, {"a": None}, 0, 1),
        (3, {"a": None}, -5, 1),
        (3, {"a": None, "b": 2}, 1, 2),
        (3, {"a": None, "b": 2}, 5, 5),
        (1, {"a": None, "b": 3}, 0, 1),  # less than it should be from the start: not even less
        (1, {"a": None, "b": 3}, 2, 2),
    ],
)
def test_never_below_the_minimum(size, limits, wanted, got):
    world = World(size, limits).run(10.0)
    assert world.roster.resize(wanted) == got == world.roster.size


def test_the_minimum_holds_while_a_reload_has_not_said_its_limits():
    world = World(3, {"a": None}, declared={"a": 2}).run(10.0)
    world.life = lambda spawn: Life(classes=60.0, ready=90.0)
    world.do("reload")
    assert world.roster.resize(1) == 2


def test_a_worker_that_still_boots_is_not_retired_before_it_can_replace_one():
    world = World(2).run(10.0)
    world.kill(2)
    world.do("resize", 1)
    assert len(world.ready) == 1
    world.run(20.0)
    assert world.serving() == ["a"]


# Backoff.


@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("limits", [{"a": None}, {"a": 8}], ids=["asked", "known"])
@pytest.mark.parametrize("life", [FAILS_AT_ONCE, FAILS_IN_INIT, Life(0.1, FOREVER, 0.5)])
def test_workers_that_never_boot(size, limits, life):
    world = World(size, limits, lambda spawn: life).run(60.0)
    assert len(world.spawned) <= 10
    world.run(3600.0)
    assert len(world.spawned) <= 80
    gaps = [after - before for before, after in itertools.pairwise(world.times())]
    assert max(gaps) <= BOOT_BACKOFF[1] + 1.0  # it never gives up
    assert len(world.said("warning")) > 5


def test_the_first_failure_is_no_reason_to_wait():
    lives = iter([FAILS_AT_ONCE])
    world = World(1, life=lambda spawn: next(lives, Life())).run(0.0)
    assert world.times() == [0.0, 0.0]
    world.run(10.0)
    assert world.serving() == ["a"] and world.said("warning") == []


def test_pauses_double():
    world = World(1, life=lambda spawn: FAILS_AT_ONCE).run(200.0)
    assert world.times() == [0, 0, 1, 3, 7, 15, 31, 63, 123, 183]


def test_while_the_pool_backs_off_one_worker_tries():
    lives = iter([FAILS_AT_ONCE] * 3)
    world = World(4, life=lambda spawn: next(lives, Life(0.1, 5.0))).run(3.0)
    assert world.times() == [0.0, 0.0, 1.0, 3.0]
    world.run(7.9)
    assert len(world.lives) == 1
    world.run(8.0)
    assert len(world.ready) == 1 and len(world.lives) == 2
    world.run(8.0 + PROVEN_AFTER)  # it works again: the others all at once
    assert len(world.lives) == 4


def test_the_roster_sleeps_while_a_worker_boots_after_a_pause():
    """A deadline that has passed would have its shell spin through a long `init()`."""
    lives = iter([FAILS_AT_ONCE] * 2)
    world = World(1, life=lambda spawn: next(lives, Life(0.1, 300.0)))
    assert world.run(0.5).roster.next_deadline() == 1.0
    world.run(1.0)
    assert len(world.spawned) == 3
    assert world.roster.next_deadline() is None
    world.run(301.0)
    assert world.roster.next_deadline() == 301.0 + PROVEN_AFTER
    world.run(400.0)
    assert world.roster.next_deadline() is None


def test_backoff_starts_over_when_a_worker_has_proved_itself():
    lives = iter([*[FAILS_AT_ONCE] * 4, Life(dies=1.0 + PROVEN_AFTER), FAILS_AT_ONCE])
    world = World(1, life=lambda spawn: next(lives, Life())).run(100.0)
    # The fifth, at 7 s, stayed up; then one failure is forgiven again.
    assert world.times() == [0, 0, 1, 3, 7, 9, 9]


def test_a_worker_that_dies_too_soon_after_ready_has_proved_nothing():
    lives = iter([*[FAILS_AT_ONCE] * 4, Life(dies=1.0 + PROVEN_AFTER / 2)])
    world = World(1, life=lambda spawn: next(lives, Life())).run(100.0)
    pause = CRASH_BACKOFF[0] * 2 ** (5 - 2)
    assert world.times() == [0, 0, 1, 3, 7, pytest.approx(8.5 + pause)]


def test_workers_that_crash_right_after_ready():
    world = World(2, life=lambda spawn: Life(0.0, 0.0, 0.01)).run(60.0)
    assert 5 < len(world.spawned) <= 20
    assert "died right after they were ready" in world.said("warning")[0]


def test_a_worker_that_crashes_after_long_service_is_replaced_at_once():
    world = World(1, life=lambda spawn: Life(ready=0.5, dies=10.0)).run(100.0)
    assert world.times() == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]
    assert world.said("warning") == []


@pytest.mark.parametrize("bad", [FAILS_AT_ONCE, Life(0.0, 0.0, 0.0), Life(0.0, 0.0, whole=False)])
def test_healthy_workers_beside_it_do_not_make_a_failing_one_be_forked_without_end(bad):
    world = World(4, {"a": None, "b": 1}).run(10.0)
    world.life = lambda spawn: bad
    world.kill(1)
    world.run(70.0)
    assert len(world.spawns(since=10.0)) <= 15
    assert len(world.ready) >= 3
    assert {2, 3, 4} <= world.ready


# Workers that are not whole.


def test_a_worker_with_some_apps_serves_until_a_whole_one_replaces_it():
    lives = iter([Life(whole=False), Life(whole=False)])
    world = World(1, {"a": None, "b": None}, lambda spawn: next(lives, Life())).run(1.0)
    assert len(world.ready) == 1
    world.run(2.0)
    assert world.retired() == [1]  # the second is no worse
    world.run(2.9)
    assert len(world.spawned) == 2
    world.run(3.0)
    assert len(world.spawned) == 3
    assert len(world.ready) >= 1
    world.run(20.0)
    assert world.retired() == [1, 2] and world.ready == {3}
    assert len(world.spawned) == 3


def test_an_app_that_never_loads_does_not_disturb_the_others_much():
    world = World(2, {"a": None, "b": None}, lambda spawn: Life(whole=False))
    for second in range(1, 120):
        world.run(float(second))
        assert world.ready, "nobody serves the apps that do load"
        assert len(world.lives) <= 4
    assert len(world.spawned) <= 14


# Workers that are to be replaced while they serve.


@pytest.mark.parametrize(
    ("size", "limits"),
    [(1, {"a": None}), (3, {"a": None, "b": 1}), (4, {"a": 1}), (4, {"a": 1, "b": 2})],
)
def test_a_worn_worker_goes_when_its_replacement_is_ready(size, limits):
    world = World(size, limits).run(10.0)
    before = world.serving()
    assert world.roster.replace(1, "worn")
    world.step()
    (spawn,) = world.spawns(since=10.0)
    assert spawn.apps == world.spawned[1][1].apps
    world.run(10.9)
    assert world.retired() == [] and world.serving()[1:] == before[1:]
    world.run(20.0)
    assert world.retired() == [1] and world.serving() == before
    assert len(world.spawned) == len(before) + 1


def test_only_a_ready_worker_is_replaced_and_only_once():
    world = World(1)
    assert not world.roster.replace(1, "worn")
    world.run(5.0)
    assert world.roster.replace(1, "worn")
    assert not world.roster.replace(1, "worn")
    assert not world.roster.replace(99, "worn")


def test_all_worn_at_once():
    world = World(3).run(10.0)
    for key in (1, 2, 3):
        world.do("replace", key, "worn")
    for tenth in range(100, 200):
        world.run(tenth / 10)
        assert len(world.ready) >= 3
    assert world.ready == {4, 5, 6} and world.retired() == [1, 2, 3]


# Reload.


def loaded(size=2, **options):
    return World(size, **options).run(10.0)


def test_reload_brings_up_the_new_before_the_old_go():
    world = loaded(2)
    world.life = lambda spawn: Life(ready=30.0)
    world.do("reload")
    world.run(39.9)
    assert world.generations() == {1} and len(world.ready) == 2 and world.retired() == []
    world.run(40.0)
    assert world.retired() == []  # the second was spawned a moment later: all, or none
    world.run(41.0)
    assert world.generations() == {2} and len(world.ready) == 2
    assert world.retired() == [1, 2]
    world.run(1000.0)
    assert len(world.spawned) == 4 and world.said("error") == []


def test_reload_takes_the_limits_of_the_new_code():
    world = World(3, {"a": None, "b": None}, declared={"b": 1}).run(10.0)
    assert world.serving() == ["ab", "a", "a"]
    world.declared = {"b": 2}
    world.do("reload")
    assert [spawn.apps for spawn in world.spawns(since=10.0)] == [("a", "b")]
    world.run(20.0)
    assert world.serving() == ["ab", "ab", "a"]
    assert world.roster.minimum == 2


@pytest.mark.parametrize(
    "bad",
    [FAILS_AT_ONCE, FAILS_IN_INIT, Life(dies=0.5), Life(whole=False)],
    ids=["at once", "in init", "while booting", "not whole"],
)
def test_a_reload_that_fails_keeps_the_old_and_says_so(bad):
    world = loaded(3)
    world.life = lambda spawn: bad
    world.do("reload")
    world.run(100.0)
    assert world.ready == {1, 2, 3} and set(world.lives) == {1, 2, 3}
    assert world.retired() == []
    (message,) = world.said("error")
    assert "generation 2" in message and "generation 1 goes on serving" in message
    assert len(world.spawns(since=10.0)) <= 3
    # Mended, it goes through, without a wait for what failed before.
    world.life = lambda spawn: Life()
    world.do("reload")
    world.run(110.0)
    assert world.generations() == {3} or world.generations() == {2}
    assert not {1, 2, 3} & set(world.lives)


def test_a_failure_in_mid_reload_takes_the_new_ones_down():
    lives = iter([Life(ready=1.0), Life(ready=2.0, dies=1.5)])
    world = loaded(2)
    world.life = lambda spawn: next(lives, Life())
    world.do("reload")
    world.run(30.0)
    assert world.ready == {1, 2} and len(world.said("error")) == 1
    assert len(world.spawned) == 4


def test_reload_twice_ends_the_first_that_still_boots():
    world = loaded(2)
    world.life = lambda spawn: Life(ready=30.0)
    for number in range(10):
        world.run(11.0 + number)
        world.do("reload")
    assert world.ready == {1, 2}
    assert len(world.lives) <= 6, "each reload adds processes"
    world.run(100.0)
    assert world.generations() == {11} and len(world.ready) == len(world.lives) == 2


def test_reload_while_the_first_generation_boots():
    world = World(2, life=lambda spawn: Life(ready=5.0)).run(1.0)
    world.do("reload")
    world.run(5.5)
    assert world.generations() == {1}  # what is ready first serves first
    world.run(20.0)
    assert world.generations() == {2} and len(world.lives) == 2


def test_the_old_die_during_a_reload():
    world = loaded(2)
    world.life = lambda spawn: Life(ready=30.0)
    world.do("reload")
    world.run(20.0)
    world.kill(1)
    world.kill(2)
    world.run(50.0)
    assert world.generations() == {2} and len(world.ready) == 2
    assert len(world.spawned) == 4


def test_nothing_is_left_to_keep_when_a_reload_fails():
    """With no old worker, new ones are tried on: with backoff, as at the start."""
    world = loaded(1)
    world.life = lambda spawn: Life(dies=1.0, ready=FOREVER)
    world.do("reload")
    world.kill(1)
    world.run(70.0)
    assert 5 <= len(world.spawns(since=10.0)) <= 10
    world.life = lambda spawn: Life()
    world.run(200.0)
    assert len(world.ready) == 1


def test_crashes_of_old_workers_do_not_hold_up_a_reload():
    world = loaded(2)
    world.kill(1)
    world.kill(2)
    world.run(11.0)  # two of the first generation again, just ready
    world.do("reload")
    for key in list(world.ready):
        world.kill(key)
    world.run(12.2)
    assert world.generations() == {2} and len(world.ready) == 2


def test_the_old_stay_while_the_new_generation_pauses_short_of_its_size():
    # Both others crash before the first is ready at 20 s; the pause after that ends just after.
    lives = iter([Life(ready=10.0), Life(ready=9.0, dies=9.5), Life(ready=9.8, dies=9.85)])
    world = loaded(3)
    world.life = lambda spawn: next(lives, Life())
    world.do("reload")
    world.run(20.0)
    assert world.ready == {1, 2, 3, 4} and world.retired() == []
    world.run(40.0)
    assert world.generations() == {2} and world.retired() == [1, 2, 3]


def test_a_reload_does_not_wait_for_the_backoff_before_it():
    world = World(1, life=lambda spawn: FAILS_AT_ONCE).run(40.0)
    assert world.roster.next_deadline() == 63.0
    world.life = lambda spawn: Life()
    world.do("reload")
    world.run(41.0)
    assert world.generations() == {2}


# Leaving and stopping.


def test_a_worker_that_leaves_is_replaced_at_once():
    world = loaded(1)
    world.do("leaving", 1)
    assert len(world.spawns(since=10.0)) == 1
    world.kill(1)
    world.run(20.0)
    assert len(world.spawned) == 2 and len(world.ready) == 1 and world.said("warning") == []


def test_stop_retires_everybody_and_spawns_nobody():
    world = World(3, life=lambda spawn: Life(ready=1.0 if spawn.key < 3 else 60.0)).run(10.0)
    world.do("stop")
    assert world.retired() == [1, 2, 3]
    assert world.roster.stop() == []
    assert world.roster.next_deadline() is None
    world.run(100.0)
    assert world.roster.empty and len(world.spawned) == 3


def test_stop_during_backoff():
    world = World(1, life=lambda spawn: FAILS_AT_ONCE).run(5.0)
    world.do("stop")
    count = len(world.spawned)
    world.run(1000.0)
    assert len(world.spawned) == count and world.roster.empty


def test_events_of_workers_that_nobody_knows():
    roster = Roster(1, {"a": None})
    assert roster.ready(7, 0.0) == []
    assert roster.exited(7, 0.0) == []
    roster.classes(7, {"a": 3})
    roster.leaving(7)
    assert roster.minimum == 1 and roster.empty
    (spawn,) = roster.step(0.0)
    roster.ready(spawn.key, 1.0)
    roster.leaving(spawn.key)
    roster.ready(spawn.key, 2.0)  # crossed its leaving
    assert roster.members[spawn.key].phase is Phase.RETIRING
