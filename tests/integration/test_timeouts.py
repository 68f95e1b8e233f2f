"""Calls that run too long or that nobody waits for any more, in a real gunicorn."""

from __future__ import annotations

import http.client
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from asking import app_source, ask, ask_many, asking, failure, path, wait_ready
from load import Load
from support.gunicorn import OURS, Gunicorn
from support.waiting import wait_until

APP = "tasks:App"

TASKS = """
import ctypes
import gevent
import os
import re
import time
import uuid
import gunicorn_dirty_gevent
from gunicorn.dirty import DirtyApp


def note(name, line):
    with open(name, "a") as file:
        file.write(f"{line}\\n")


class App(DirtyApp):
    def init(self):
        self.loaded = uuid.uuid4().hex

    def state(self):
        return [os.getpid(), self.loaded]

    def echo(self, value):
        return value

    def sleep_long(self, name):
        try:
            time.sleep(60)
        finally:
            note(f"left-{name}", "left")

    def spin(self):
        while True:
            pass

    @gunicorn_dirty_gevent.action(timeout=60)
    def spin_until(self, name, more=0):
        while not os.path.exists(f"release-{name}"):
            pass
        self.spin_for(more)

    def spin_for(self, seconds):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pass

    def stuck_in_sum(self):
        print(f"stuck in {os.getpid()}", flush=True)
        sum(range(10**11))

    def stuck_in_read(self):
        # In a system call, with the GIL held.
        print(f"stuck in {os.getpid()}", flush=True)
        reader, writer = os.pipe()
        ctypes.PyDLL(None).read(reader, ctypes.create_string_buffer(1), 1)

    def backtrack(self):
        # In C code that looks at signals now and then.
        re.match(r"(a+)+$", "a" * 40 + "b")

    def swallow_sleeping(self):
        while True:
            try:
                time.sleep(60)
            except BaseException:
                pass

    def swallow_spinning(self):
        while True:
            try:
                while True:
                    pass
            except BaseException:
                pass

    @gunicorn_dirty_gevent.action(timeout=60)
    def hold(self, name):
        print(f"holding {name} in {os.getpid()}", flush=True)
        try:
            while not os.path.exists(f"release-{name}"):
                time.sleep(0.005)
            return os.getpid()
        finally:
            note(f"left-{name}", "left")

    @gunicorn_dirty_gevent.action(timeout=60, idempotent=True)
    def hold_first(self, name):
        # Stays in the worker that runs it first.
        note(f"runs-{name}", os.getpid())
        with open(f"runs-{name}") as file:
            runs = file.read().split()
        if len(runs) == 1:
            print(f"holding {name} in {os.getpid()}", flush=True)
            time.sleep(60)
        return runs

    def run(self, name):
        note(f"runs-{name}", os.getpid())

    @gunicorn_dirty_gevent.action(timeout=0.3)
    def around(self, seconds, spins):
        # Ends at about the time of its timeout.
        began = time.monotonic()
        try:
            if spins:
                self.spin_for(seconds)
            else:
                time.sleep(seconds)
            return "ended"
        except BaseException as error:
            early = time.monotonic() - began < 0.29
            note("around", f"{'foreign' if early else 'own'} {type(error).__name__}")
            raise

    @gunicorn_dirty_gevent.action(timeout=30)
    def nap(self, seconds):
        time.sleep(seconds)
        return "slept"

    def chunks(self, n, seconds):
        for number in range(n):
            time.sleep(seconds)
            yield number

    @gunicorn_dirty_gevent.action(timeout=60)
    def ticks(self, name):
        print(f"holding {name} in {os.getpid()}", flush=True)
        try:
            n = 0
            while True:
                yield n
                n += 1
                time.sleep(0.01)
        finally:
            note(f"left-{name}", "left")

    def wrong(self):
        raise ValueError("wrong")


class Brief(DirtyApp):
    dirty_timeout = 0.6

    def sleep_long(self):
        time.sleep(60)

    @gunicorn_dirty_gevent.action(timeout=1.2)
    def sleep_longer(self):
        time.sleep(60)
"""

VIEWS = """
import gc

APP = "tasks:App"
kept = {}


@route("/spawn")
def spawn(environ, query):
    kept[query["name"]] = gevent.spawn(get_dirty_client().execute, APP, query["action"], query["name"])
    return "spawned"


@route("/kill")
def kill(environ, query):
    greenlet = kept.pop(query["name"])
    greenlet.kill(timeout=5)
    return {"result": greenlet.dead}


@route("/gevent-timeout")
def gevent_timeout(environ, query):
    with gevent.Timeout(0.3) as timeout:
        try:
            get_dirty_client().execute(APP, "hold", query["name"])
        except gevent.Timeout as fired:
            return {"result": fired is timeout}


@route("/submit")
def submit(environ, query):
    kept[query["name"]] = get_dirty_client().submit(APP, "hold", query["name"])
    return {"result": kept[query["name"]].done()}


@route("/cancel")
def cancel(environ, query):
    future = kept.pop(query["name"])
    said = [future.cancel(), future.done(), future.cancel()]
    try:
        future.get()
    except Exception as error:
        return caught(error) | {"chunks": said}


@route("/future")
def future(environ, query):
    future = get_dirty_client().submit(APP, "nap", 0.4)
    said = [future.done()]
    try:
        future.get(timeout=0.05)
    except Exception as error:
        said += [type(error).__name__, str(error)]
    said += [future.get(timeout=10), future.done(), future.get(timeout=0), future.cancel()]
    wrong = get_dirty_client().submit(APP, "wrong")
    try:
        wrong.get(timeout=10)
    except Exception as error:
        said += [type(error).__name__, wrong.done()]
    return {"result": said}


@route("/stream")
def leave_stream(environ, query):
    stream = get_dirty_client().stream(APP, "ticks", query["name"])
    got = [next(stream) for _ in range(3)]
    if query["how"] == "close":
        stream.close()
        kept["closed"] = stream
    elif query["how"] == "collect":
        del stream
        gc.collect()
    elif query["how"] == "kill":
        reader = gevent.spawn(list, stream)
        gevent.sleep(0.05)
        reader.kill(timeout=5)
        kept["killed"] = stream
    return {"result": got}


@route("/ticks")
def ticks(environ, query):
    for n in get_dirty_client().stream(APP, "ticks", query["name"]):
        yield f"{n}\\n"
"""


@contextmanager
def started(threads: int, install: str = OURS) -> Iterator[Gunicorn]:
    settings = {
        "dirty_apps": [APP, "tasks:Brief"],
        "dirty_workers": 1,
        "dirty_threads": threads,
        "dirty_timeout": 2,
    }
    with Gunicorn(app_source(VIEWS), TASKS, settings, install=install) as gunicorn:
        wait_ready(gunicorn, 1)
        yield gunicorn


@pytest.fixture(scope="module")
def pool() -> Iterator[Gunicorn]:
    """One dirty worker with ten greenlets."""
    with started(10) as gunicorn:
        yield gunicorn


@pytest.fixture(scope="module")
def serial() -> Iterator[Gunicorn]:
    """One dirty worker that runs one call at a time."""
    with started(1) as gunicorn:
        yield gunicorn


def release(gunicorn: Gunicorn, name: str) -> None:
    gunicorn.write(f"release-{name}", "")


def wait_held(gunicorn: Gunicorn, name: str) -> int:
    """The worker that runs `hold(name)`, when it does."""
    return int(gunicorn.wait_log(rf"^holding {name} in (\d+)$").group(1))


def wait_left(gunicorn: Gunicorn, name: str) -> None:
    """Wait until the `finally` block of the task with this name has run."""
    left = gunicorn.dir / f"left-{name}"
    wait_until(left.exists, 10, f"the finally block of {name}", gunicorn.evidence)


def runs(gunicorn: Gunicorn, name: str) -> list[int]:
    """The workers that have run `run(name)` or `hold_first(name)`."""
    file = gunicorn.dir / f"runs-{name}"
    return [int(pid) for pid in file.read_text().split()] if file.exists() else []


def told(name: str, text: object) -> None:
    print(f"measured: {name}: {text}")


# The three steps of a timeout


def test_a_sleeping_action_is_ended_at_its_time(pool: Gunicorn) -> None:
    before = ask(pool, APP, "state")
    said = failure(ask(pool, APP, "sleep_long", "slept"), "DirtyTimeoutError")
    told("sleeping action", said.elapsed)
    assert 1.9 <= said.elapsed < 4
    assert f"{APP}.sleep_long was stopped after 2 s" in said.message
    assert "dirty_timeout" in said.message
    assert said.may_have_run is True
    assert said.attrs["timeout"] == 2
    wait_left(pool, "slept")
    assert ask(pool, APP, "state") == before


@pytest.mark.parametrize("action", ["spin", "backtrack"])
def test_a_python_loop_is_interrupted_and_its_worker_kept(pool: Gunicorn, action: str) -> None:
    before = ask(pool, APP, "state")
    said = failure(ask(pool, APP, action), "DirtyTimeoutError")
    told(action, said.elapsed)
    assert 2 <= said.elapsed < 6
    assert said.may_have_run is True
    assert ask(pool, APP, "state") == before


@pytest.mark.parametrize("action", ["stuck_in_sum", "stuck_in_read"])
def test_a_worker_stuck_in_c_is_killed_and_replaced(pool: Gunicorn, action: str) -> None:
    before = ask(pool, APP, "state")
    mark = pool.mark()
    name = f"beside-{action}"
    beside = [path(APP, "hold", name), path(APP, "hold_first", f"again-{name}")]
    with asking(pool, beside) as (other, idempotent):
        wait_held(pool, name)
        wait_held(pool, f"again-{name}")
        began = time.monotonic()
        said = failure(ask(pool, APP, action), "DirtyTimeoutError")
        after = ask(pool, APP, "state")
        served = time.monotonic() - began
        lost = failure(other.result(10), "DirtyWorkerDiedError")
        pids = idempotent.result(10)
    told(f"{action}: answered", said.elapsed)
    told(f"{action}: next call served", served)
    assert 2.9 <= said.elapsed < 6
    assert served < 9
    assert "could not be stopped" in said.message
    assert said.may_have_run is True
    # The calls beside it.
    assert lost.may_have_run is True
    assert f"{APP}.hold" in lost.message and "SIGABRT" in lost.message
    assert list(map(int, pids)) == [before[0], after[0]], "the idempotent call ran again, once"
    # The worker.
    assert after[0] != before[0] and after[1] != before[1]
    pool.wait_gone(before[0])
    pool.wait_log("Fatal Python error: Aborted", since=mark)
    pool.wait_log(rf'File ".*tasks\.py", line \d+ in {action}', since=mark)
    pool.wait_log(rf"DIRTY WORKER TIMEOUT \(pid:{before[0]}\): {APP}.{action} ran past", since=mark)
    assert wait_ready(pool, 1) == [after[0]]


def test_queued_calls_go_to_the_replacement(serial: Gunicorn) -> None:
    before, _ = ask(serial, APP, "state")
    mark = serial.mark()
    with asking(serial, [path(APP, "stuck_in_sum")]) as (stuck,):
        serial.wait_log(rf"^stuck in {before}$", since=mark)
        with asking(serial, [path(APP, "state")] * 3) as queued:
            after = {call.result(15)[0] for call in queued}
        failure(stuck.result(15), "DirtyTimeoutError")
    assert after == set(wait_ready(serial, 1)) != {before}


@pytest.mark.parametrize("action", ["swallow_sleeping", "swallow_spinning"])
def test_an_action_that_swallows_its_timeout_ends_with_its_worker(pool: Gunicorn, action: str) -> None:
    before, _ = ask(pool, APP, "state")
    said = failure(ask(pool, APP, action), "DirtyTimeoutError")
    told(action, said.elapsed)
    assert 2.9 <= said.elapsed < 6
    assert "could not be stopped" in said.message
    assert said.may_have_run is True
    pool.wait_gone(before)
    assert ask(pool, APP, "state")[0] != before
    assert before not in wait_ready(pool, 1)


# Which time limit holds


def test_an_apps_and_an_actions_own_limit(pool: Gunicorn) -> None:
    brief, longer = path("tasks:Brief", "sleep_long"), path("tasks:Brief", "sleep_longer")
    said, said_longer = (failure(one, "DirtyTimeoutError") for one in ask_many(pool, [brief, longer]))
    assert "was stopped after 0.6 s" in said.message
    assert 0.55 <= said.elapsed < 1.9
    assert "was stopped after 1.2 s" in said_longer.message
    assert 1.15 <= said_longer.elapsed < 3


def test_the_callers_shorter_deadline_wins(pool: Gunicorn) -> None:
    said = ask(pool, APP, "sleep_long", "caller", options={"timeout": 0.5})
    said = failure(said, "DirtyTimeoutError")
    assert 0.45 <= said.elapsed < 1.9
    assert "the time its caller gave it" in said.message
    assert said.may_have_run is True
    wait_left(pool, "caller")


def test_the_callers_longer_deadline_does_not(pool: Gunicorn) -> None:
    said = ask(pool, "tasks:Brief", "sleep_long", options={"timeout": 20})
    assert failure(said, "DirtyTimeoutError").elapsed < 3


def test_a_streams_limit_is_for_each_chunk(pool: Gunicorn) -> None:
    slow = [path(APP, "chunks", 3, 0.9, route="/collect"), path(APP, "chunks", 1, 9, route="/collect")]
    whole, cut = ask_many(pool, slow)
    assert whole == [0, 1, 2]
    said = failure(cut, "DirtyTimeoutError")
    assert said.chunks == []
    assert 1.9 <= said.elapsed < 4


def test_queueing_counts(serial: Gunicorn) -> None:
    with asking(serial, [path(APP, "hold", "slot")]) as (held,):
        try:
            wait_held(serial, "slot")
            said = failure(ask(serial, APP, "run", "late", options={"timeout": 0.6}), "DirtyTimeoutError")
        finally:
            release(serial, "slot")
        assert held.result(10) in wait_ready(serial, 1)
    assert 0.55 <= said.elapsed < 3
    assert said.may_have_run is False
    assert "all 1 slots of 1 workers were busy" in said.message
    assert "it has not run" in said.message
    assert ask(serial, APP, "echo", "after") == "after"
    assert runs(serial, "late") == []


def test_time_spent_in_the_queue_is_taken_from_the_run(serial: Gunicorn) -> None:
    with asking(serial, [path(APP, "chunks", 1, 0.8, route="/collect")]):
        serial_busy = ask(serial, APP, "sleep_long", "queued-first", options={"timeout": 1.4})
    said = failure(serial_busy, "DirtyTimeoutError")
    assert 1.3 <= said.elapsed < 3


def test_a_late_timer_never_hits_another_task(pool: Gunicorn) -> None:
    before = ask(pool, APP, "state")
    sleeping = [path(APP, "around", 0.27 + n % 60 / 1000, False) for n in range(120)]
    # A spinning one is stopped 0.7 to 0.95 s after its start: the first ends in any case, the last does not.
    spins = [0.5, *(0.62 + n / 12 for n in range(4)), 1.2]
    spinning = [path(APP, "around", seconds, True) for seconds in spins]
    # Ends by signal or timer, beside tasks that have much time left.
    for name, paths, concurrency in (("sleeping", sleeping, 20), ("spinning", spinning, 1)):
        with Load(pool, lambda n: path(APP, "nap", 0.02), 4) as naps:
            answers = ask_many(pool, paths, concurrency)
        naps.assert_none_failed()
        ended = [said for said in answers if said == "ended"]
        cut = [failure(said, "DirtyTimeoutError").message for said in answers if said != "ended"]
        told(f"{name} around their time", f"{len(ended)} ended, {len(cut)} cut, {len(naps.outcomes)} naps")
        assert ended and cut, "they end on both sides of their limit"
        assert all("around was stopped after 0.3 s" in message for message in cut), set(cut)
    seen = (pool.dir / "around").read_text().split("\n")
    assert set(seen) <= {"own Timeout", ""}, [line for line in seen if line.startswith("foreign")]
    assert ask(pool, APP, "state") == before


# The log of a blocked hub


def test_what_blocks_the_hub_is_named(pool: Gunicorn) -> None:
    pid, _ = ask(pool, APP, "state")
    mark = pool.mark()
    assert ask(pool, APP, "nap", 1.0) == "slept"
    assert ask(pool, APP, "spin_for", 0.1) is None
    assert "blocked the hub" not in pool.log_since(mark)
    # It goes on for a while when it has been named: it is not to be named again.
    with asking(pool, [path(APP, "spin_until", "blocked", 0.6)]) as (blocking,):
        try:
            named = rf"Dirty worker \(pid: {pid}\): {APP}\.spin_until has blocked the hub for (\d+\.\d) s"
            seconds = float(pool.wait_log(rf"{named}.*gevent\.sleep\(0\)", since=mark).group(1))
            pool.wait_log(r'File ".*tasks\.py", line \d+, in spin_until', since=mark)
            assert not blocking.done()
        finally:
            release(pool, "blocked")
        assert blocking.result(10) is None
    assert seconds >= 1.0
    assert pool.log_since(mark).count("blocked the hub") == 1


def test_the_threshold_of_a_blocked_hub_can_be_set() -> None:
    # Above the usual one, which would be seen in what is told.
    with started(10, OURS.replace("install()", "install(hub_blocked_after=2.5)")) as gunicorn:
        with asking(gunicorn, [path(APP, "spin_until", "threshold")]):
            try:
                named = gunicorn.wait_log(rf"{APP}\.spin_until has blocked the hub for (\d+\.\d) s")
            finally:
                release(gunicorn, "threshold")
        assert float(named.group(1)) >= 2.5


# A caller that goes away


def test_a_killed_greenlet_cancels_its_call(pool: Gunicorn) -> None:
    pool.get("/spawn?action=hold&name=killed")
    pid = wait_held(pool, "killed")
    assert pool.get("/kill?name=killed").json() == {"result": True}
    wait_left(pool, "killed")
    assert ask(pool, APP, "state")[0] == pid


def test_a_gevent_timeout_cancels_its_call(pool: Gunicorn) -> None:
    assert pool.get("/gevent-timeout?name=fired").json() == {"result": True}
    wait_held(pool, "fired")
    wait_left(pool, "fired")


@pytest.mark.parametrize("how", ["close", "collect", "kill"])
def test_a_stream_that_is_left_closes_its_generator(pool: Gunicorn, how: str) -> None:
    assert pool.get(f"/stream?how={how}&name=stream-{how}").json() == {"result": [0, 1, 2]}
    wait_left(pool, f"stream-{how}")


def test_a_browser_that_hangs_up_closes_its_generator(pool: Gunicorn) -> None:
    with pool.open("/ticks?name=browser") as stream:
        assert next(iter(stream)) == "0"
        assert not (pool.dir / "left-browser").exists()
    wait_left(pool, "browser")


@pytest.mark.parametrize("how", ["kill", "client timeout"])
def test_a_queued_call_that_nobody_waits_for_never_runs(serial: Gunicorn, how: str) -> None:
    name = how.replace(" ", "-")
    with asking(serial, [path(APP, "hold", name)]) as (held,):
        try:
            wait_held(serial, name)
            if how == "kill":
                serial.get(f"/spawn?action=run&name={name}")
                # One connection: when this one has been refused, the other is in the queue...
                failure(ask(serial, APP, "echo", 1, options={"timeout": 0.2}), "DirtyTimeoutError")
                assert serial.get(f"/kill?name={name}").json() == {"result": True}
                # ... and now its end has arrived, before that of the call that holds the slot.
                failure(ask(serial, APP, "echo", 1, options={"timeout": 0.2}), "DirtyTimeoutError")
            else:
                failure(ask(serial, APP, "run", name, options={"timeout": 0.2}), "DirtyTimeoutError")
        finally:
            release(serial, name)
        held.result(10)
    assert ask(serial, APP, "echo", "after") == "after"
    assert runs(serial, name) == []


def test_the_calls_of_a_killed_http_worker_are_cancelled(pool: Gunicorn) -> None:
    (before,) = pool.http_worker_pids()
    mark = pool.mark()
    paths = [path(APP, "hold", "http"), path(APP, "ticks", "http-stream", route="/collect")]
    with asking(pool, paths) as calls:
        # Both, or the second may wait in the listener's backlog for the next HTTP worker.
        pid = wait_held(pool, "http")
        assert wait_held(pool, "http-stream") == pid
        pool.kill(before, signal.SIGKILL)
        for call in calls:
            assert isinstance(call.exception(10), (OSError, http.client.HTTPException))
    wait_left(pool, "http")
    wait_left(pool, "http-stream")
    pool.wait_http_workers(1, since=mark)
    assert ask(pool, APP, "state")[0] == pid


# Futures


def test_a_future_gives_its_value_when_it_is_there(pool: Gunicorn) -> None:
    said = pool.get("/future").json()["result"]
    assert said[:2] == [False, "DirtyTimeoutError"]
    assert "has not ended after 0.05 s; it goes on" in said[2]
    assert said[3:7] == ["slept", True, "slept", False]
    assert said[7:] == ["DirtyAppError", True]


def test_a_cancelled_future_ends_its_call(pool: Gunicorn) -> None:
    assert pool.get("/submit?name=future").json() == {"result": False}
    wait_held(pool, "future")
    said = failure(ask(pool, APP, "", route="/cancel", options={"name": "future"}), "DirtyCancelledError")
    assert said.chunks == [True, True, False]
    assert said.may_have_run is True
    wait_left(pool, "future")
