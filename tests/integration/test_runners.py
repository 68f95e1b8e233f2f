"""One greenlet may serve several quick calls, and nobody can tell: no call finds what another left."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from asking import app_source, ask, ask_many, path, wait_ready
from support.gunicorn import Gunicorn

APP = "tasks:App"

TASKS = """
import weakref
import gevent
import gevent.local
from gunicorn.dirty import DirtyApp


class App(DirtyApp):
    def init(self):
        self.seen = []
        self.last = None
        self.local = gevent.local.local()

    def which(self):
        me = gevent.getcurrent()
        if not any(me is other() for other in self.seen):
            self.seen.append(weakref.ref(me))
        return next(number for number, other in enumerate(self.seen) if me is other())

    def rest(self, seconds):
        gevent.sleep(seconds)
        return self.which()

    def leave_timer(self):
        gevent.Timeout(0.2).start()
        return self.which()

    def leave_link(self):
        gevent.getcurrent().link(print)
        return self.which()

    def leave_local(self):
        self.local.left = "mine"
        return self.which()

    def stop_the_last(self):
        # As a search box may: a new question ends the one before.
        last, self.last = self.last, gevent.getcurrent()
        if last is not None:
            last.kill()
        return self.which()

    def find_local(self):
        return getattr(self.local, "left", None)
"""


@pytest.fixture(scope="module")
def pool() -> Iterator[Gunicorn]:
    settings = {"dirty_apps": [APP], "dirty_workers": 1, "dirty_threads": 50}
    with Gunicorn(app_source(), TASKS, settings) as gunicorn:
        wait_ready(gunicorn, 1)
        yield gunicorn


def test_quick_calls_one_after_the_other_share_a_greenlet(pool: Gunicorn) -> None:
    """Each new greenlet costs more than all else that a worker does for such a call."""
    assert len({ask(pool, APP, "which") for _ in range(10)}) == 1


def test_a_greenlet_that_its_code_remembers_is_that_calls_only(pool: Gunicorn) -> None:
    assert all(isinstance(ask(pool, APP, "stop_the_last"), int) for _ in range(4))


def test_quick_calls_at_once_do_too(pool: Gunicorn) -> None:
    paths = [path(APP, "which") for _ in range(100)]
    assert len(set(ask_many(pool, paths, 20))) <= 20


@pytest.mark.parametrize(
    ("action", "args"), [("rest", [0]), ("rest", [0.01]), ("leave_timer", []), ("leave_link", [])]
)
def test_a_greenlet_that_waited_or_has_something_left_on_it_is_not_used_again(
    pool: Gunicorn, action: str, args: list[float]
) -> None:
    left = ask(pool, APP, action, *args)
    assert [ask(pool, APP, "which") == left for _ in range(5)] == [False] * 5


def test_a_timer_that_a_call_left_hits_no_other(pool: Gunicorn) -> None:
    ask(pool, APP, "leave_timer")
    assert isinstance(ask(pool, APP, "rest", 0.6), int)


def test_a_greenlets_local_values_are_a_calls_own(pool: Gunicorn) -> None:
    ask(pool, APP, "leave_local")
    assert [ask(pool, APP, "find_local") for _ in range(3)] == [None] * 3
