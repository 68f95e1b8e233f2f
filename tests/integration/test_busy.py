"""Calls beside an action that computes: they go to a worker whose hub runs."""

from __future__ import annotations

from asking import app_source, ask, asking, failure, path, wait_ready
from support.gunicorn import Gunicorn

APP = "tasks:App"

TASKS = """
import os
import time
from gunicorn.dirty import DirtyApp
from gunicorn_dirty_gevent.core.crew import SILENCE


class App(DirtyApp):
    def spin(self, name):
        # Until the arbiter counts this worker as silent: the line says that it does.
        silent = time.monotonic() + 4 * SILENCE
        while time.monotonic() < silent:
            pass
        print(f"spinning in {os.getpid()}", flush=True)
        while not os.path.exists(f"release-{name}"):
            pass
        return os.getpid()

    def nap(self, seconds):
        time.sleep(seconds)
        return os.getpid()
"""

VIEWS = """
@route("/small")
def small(environ, query):
    client = get_dirty_client()
    pids = set()
    for _ in range(int(query["n"])):
        # More at once than the other worker has running.
        calls = [gevent.spawn(client.execute, "tasks:App", "nap", 0.002) for _ in range(3)]
        gevent.joinall(calls, raise_error=True)
        pids |= {call.value for call in calls}
    return {"result": sorted(pids)}
"""

SETTINGS = {"dirty_apps": [APP], "dirty_workers": 2, "dirty_threads": 9, "dirty_timeout": 40}


def test_no_call_waits_for_a_worker_that_computes_while_another_is_free() -> None:
    with Gunicorn(app_source(VIEWS), TASKS, SETTINGS) as gunicorn:
        both = wait_ready(gunicorn, 2)
        with asking(gunicorn, [path(APP, "spin", "spin")]) as calls:
            spinning = int(gunicorn.wait_log(r"^spinning in (\d+)$").group(1))
            assert gunicorn.get("/small?n=100", timeout=30).json()["result"] == [
                pid for pid in both if pid != spinning
            ]
            assert not calls[0].done()
            (gunicorn.dir / "release-spin").touch()
            assert calls[0].result(20) == spinning
        # Then it takes its share again.
        assert sorted(gunicorn.get("/small?n=100", timeout=30).json()["result"]) == sorted(both)


def test_of_busy_workers_that_have_been_silent_the_one_whose_hub_runs_gets_the_call() -> None:
    with Gunicorn(app_source(VIEWS), TASKS, SETTINGS) as gunicorn:
        both = wait_ready(gunicorn, 2)
        spins, nap = path(APP, "spin", "one"), path(APP, "nap", 5)
        with asking(gunicorn, [spins, nap, nap, nap]) as calls:
            spinning = int(gunicorn.wait_log(r"^spinning in (\d+)$").group(1))
            (other,) = set(both) - {spinning}
            # By load alone it would be the computing one, which has no more calls than the other.
            assert {ask(gunicorn, APP, "nap", 0) for _ in range(50)} == {other}
            assert not calls[0].done()
            (gunicorn.dir / "release-one").touch()


def test_where_no_hub_runs_a_call_waits_for_the_first_that_does() -> None:
    with Gunicorn(app_source(VIEWS), TASKS, SETTINGS) as gunicorn:
        both = wait_ready(gunicorn, 2)
        with asking(gunicorn, [path(APP, "spin", name) for name in "ab"]) as calls:
            held = {int(gunicorn.wait_log(rf"^spinning in ({pid})$").group(1)) for pid in both}
            assert held == set(both)
            said = failure(ask(gunicorn, APP, "nap", 0, options={"timeout": 1.5}), "DirtyTimeoutError")
            assert said.may_have_run is False
            assert "of 2 workers 2 had a free slot, but their hubs did not run" in said.message
            assert "tasks:App.spin keeps the hub of dirty worker" in said.message
            with asking(gunicorn, [path(APP, "nap", 0)] * 3) as waiting:
                (gunicorn.dir / "release-b").touch()
                freed = calls[1].result(20)
                assert [call.result(20) for call in waiting] == [freed] * 3
            assert not calls[0].done()
            (gunicorn.dir / "release-a").touch()


def test_calls_that_wait_in_a_worker_do_not_keep_others_from_it() -> None:
    with Gunicorn(app_source(VIEWS), TASKS, SETTINGS) as gunicorn:
        both = wait_ready(gunicorn, 2)
        with asking(gunicorn, [path(APP, "nap", 5)] * 2) as calls:
            assert sorted(gunicorn.get("/small?n=200", timeout=30).json()["result"]) == sorted(both)
            assert ask(gunicorn, APP, "nap", 0) in both
            assert {call.result(20) for call in calls} <= set(both)
