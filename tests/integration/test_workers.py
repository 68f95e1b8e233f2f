"""Dirty workers and their arbiter in a real gunicorn: boot, death, hooks and stop."""

from __future__ import annotations

import json
import re
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from asking import app_source, ask, ask_many, asking, failure, path, wait_ready
from support.gunicorn import Gunicorn
from support.waiting import wait_until

TASKS = """
import gevent.monkey
import json
import os
import time
from gunicorn.dirty import DirtyApp, get_dirty_client

PATCHED_AT_IMPORT = [name for name in ("socket", "threading", "time", "ssl", "os", "subprocess")
                     if gevent.monkey.is_module_patched(name)]
with open("imported-by", "a") as file:
    file.write(f"{os.getpid()}\\n")


class Everywhere(DirtyApp):
    def pid(self):
        time.sleep(0.05)  # so that calls at once do overlap, however slow their way here is
        return os.getpid()

    def echo(self, value):
        return value

    def patched(self):
        return PATCHED_AT_IMPORT

    def hold(self, name):
        # Until the test makes the file; returns the worker's pid.
        print(f"holding {name} in {os.getpid()}", flush=True)
        while not os.path.exists(f"release-{name}"):
            time.sleep(0.005)
        print(f"released {name}", flush=True)
        return os.getpid()

    def close(self):
        print(f"closed {type(self).__name__} in {os.getpid()}", flush=True)


class Pair(Everywhere):
    pass


class Solo(Everywhere):
    workers = 1

    def call_others(self, n):
        client = get_dirty_client()
        mine = client.execute("tasks:Pair", "echo", n * 2)
        own = client.execute("tasks:Solo", "echo", n)
        return [mine, own, list(client.stream("tasks:Chunks", "count", 3))]


class Chunks(DirtyApp):
    def count(self, n):
        yield from range(n)


class Slow(Everywhere):
    def init(self):
        print("init begins", flush=True)
        time.sleep(3)


class Broken(Everywhere):
    def init(self):
        with open("inits", "a") as file:
            file.write(f"{time.monotonic()}\\n")
        self.load_weights()

    def load_weights(self):
        raise RuntimeError("no weights in model.bin")
"""

VIEWS = '''
import builtins
import os

@route("/fork")
def fork(environ, query):
    """A child that makes a call of its own while the parent's calls run."""
    client = get_dirty_client()
    client.execute("tasks:Everywhere", "echo", "connected")
    calls = [gevent.spawn(client.execute, "tasks:Everywhere", "hold", "fork") for _ in range(5)]
    echoes = [gevent.spawn(client.execute, "tasks:Everywhere", "echo", n) for n in range(5)]
    gevent.sleep(0)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            # gevent copies the worker's main greenlet too; it would see a changed parent, and exit.
            builtins.http_worker.ppid = os.getppid()
            answers = [client.execute("tasks:Everywhere", "echo", f"child {n}") for n in range(10)]
            code = 0 if answers == [f"child {n}" for n in range(10)] else 2
            open("release-fork", "w").close()
        except BaseException as error:
            os.write(2, f"child failed: {error!r}\\n".encode())
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    values = [greenlet.get(timeout=10) for greenlet in echoes]
    held = [greenlet.get(timeout=10) for greenlet in calls]
    later = [client.execute("tasks:Everywhere", "echo", n) for n in range(20)]
    return {"child": os.waitstatus_to_exitcode(status), "values": values, "held": len(held), "later": later}
'''

# Where the view finds it.
KEEP_WORKER = """
def post_worker_init(worker):
    import builtins
    builtins.http_worker = worker
"""

EVERYWHERE, PAIR, SOLO = "tasks:Everywhere", "tasks:Pair", "tasks:Solo"


def settings(*apps: str, **changed: object) -> dict[str, object]:
    base = {"dirty_workers": 2, "dirty_threads": 10, "dirty_timeout": 30}
    return base | {"dirty_apps": list(apps) or [EVERYWHERE]} | changed


def gunicorn_with(settings: dict[str, object], **options: object) -> Gunicorn:
    return Gunicorn(app_source(VIEWS), TASKS, settings, **options)


@pytest.fixture(scope="module")
def pool() -> Iterator[Gunicorn]:
    """Three dirty workers: one app in all, one in two (setting), one in one (class attribute)."""
    limited = settings(EVERYWHERE, f"{PAIR}:2", SOLO, "tasks:Chunks", dirty_workers=3)
    with gunicorn_with(limited, extra_config=KEEP_WORKER) as gunicorn:
        wait_ready(gunicorn, 3)
        yield gunicorn


def pids_of(gunicorn: Gunicorn, app: str) -> set[int]:
    """The workers that answer for an app; the calls overlap, so that each has its turn."""
    return set(ask_many(gunicorn, [path(app, "pid")] * 40, 8))


def release(gunicorn: Gunicorn, name: str) -> None:
    gunicorn.write(f"release-{name}", "")


def held_in(gunicorn: Gunicorn, name: str) -> int:
    """The worker that runs `hold(name)`, when it does."""
    return int(gunicorn.wait_log(rf"^holding {name} in (\d+)$").group(1))


def check_service(gunicorn: Gunicorn, concurrency: int = 5) -> None:
    paths = [path(EVERYWHERE, "echo", n) for n in range(20)]
    assert ask_many(gunicorn, paths, concurrency) == list(range(20))


# Which worker has what


def test_apps_have_the_workers_that_they_ask_for(pool: Gunicorn) -> None:
    workers = set(pool.dirty_worker_pids())
    assert len(workers) == 3
    assert pids_of(pool, EVERYWHERE) == workers
    pair, solo = pids_of(pool, PAIR), pids_of(pool, SOLO)
    assert (len(pair), len(solo)) == (2, 1)
    assert solo | pair <= workers


def test_apps_call_other_apps_and_themselves(pool: Gunicorn) -> None:
    answers = ask_many(pool, [path(SOLO, "call_others", n) for n in range(30)], 5)
    assert answers == [[n * 2, n, [0, 1, 2]] for n in range(30)]


def test_workers_are_patched_before_they_import_an_app(pool: Gunicorn) -> None:
    wanted = ["socket", "threading", "time", "ssl", "os", "subprocess"]
    assert ask(pool, EVERYWHERE, "patched") == wanted


def test_only_dirty_workers_import_apps(pool: Gunicorn) -> None:
    spawned = set(map(int, re.findall(r"Spawned dirty worker \(pid: (\d+)\)", pool.log_text())))
    importers = set(map(int, (pool.dir / "imported-by").read_text().split()))
    assert len(importers) >= 3
    assert importers <= spawned


def test_the_socket_is_for_its_owner_only(pool: Gunicorn) -> None:
    socket = Path(pool.wait_log(r"Dirty arbiter listening on (\S+)").group(1))
    assert socket.is_socket()
    assert stat.S_IMODE(socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
    bound = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()]
    assert {p for p in bound if p.startswith(str(pool.dir))} == {str(socket)}


def test_a_forked_child_does_not_disturb_its_parents_calls(pool: Gunicorn) -> None:
    assert pool.get("/fork", timeout=30).json() == {
        "child": 0,
        "values": list(range(5)),
        "held": 5,
        "later": list(range(20)),
    }
    check_service(pool)


# The death of a worker. (These come after what needs the workers as they were.)


def test_a_killed_worker_costs_its_own_calls_only(pool: Gunicorn) -> None:
    workers = wait_ready(pool, 3)
    names = [f"killed{n}" for n in range(3)]
    with asking(pool, [path(EVERYWHERE, "hold", name) for name in names]) as calls:
        try:
            running = {name: held_in(pool, name) for name in names}
            assert set(running.values()) == set(workers), "each worker runs one of them"
            victim = running["killed1"]
            pool.kill(victim, signal.SIGKILL)
            said = failure(calls[1].result(10), "DirtyWorkerDiedError")
            assert not calls[0].done()
            assert not calls[2].done()
            check_service(pool)
        finally:
            for name in names:
                release(pool, name)
        assert [calls[0].result(), calls[2].result()] == [running["killed0"], running["killed2"]]
    assert "DirtyWorkerError" in said.bases
    assert "SIGKILL" in said.message
    assert str(victim) in said.message
    assert f"{EVERYWHERE}.hold" in said.message
    assert said.may_have_run is True
    assert said.elapsed < 10
    pool.wait_log(rf"Dirty worker \(pid:{victim}\) killed by signal 9: SIGKILL")
    now = wait_ready(pool, 3)
    assert victim not in now
    assert len(set(now) & set(workers)) == 2
    assert pids_of(pool, EVERYWHERE) == set(now)


def test_the_replacement_takes_over_the_limited_apps(pool: Gunicorn) -> None:
    wait_ready(pool, 3)
    for _ in range(2):
        (before,) = pids_of(pool, SOLO)
        pool.kill(before, signal.SIGKILL)
        pool.wait_gone(before)
        assert ask(pool, SOLO, "echo", "at once") == "at once"
        workers = set(wait_ready(pool, 3))
        assert before not in workers
        (after,) = pids_of(pool, SOLO)
        assert after in workers - {before}
        pair = pids_of(pool, PAIR)
        assert len(pair) == 2 and pair <= workers
        assert pids_of(pool, EVERYWHERE) == workers


def test_the_death_of_another_worker_does_not_multiply_a_limited_app(pool: Gunicorn) -> None:
    for _ in range(3):
        before = set(wait_ready(pool, 3))
        (solo,) = pids_of(pool, SOLO)
        victim = max(before - {solo})
        pool.kill(victim, signal.SIGKILL)
        pool.wait_gone(victim)
        assert set(wait_ready(pool, 3)) >= before - {victim}
        assert pids_of(pool, SOLO) == {solo}
        assert len(pids_of(pool, PAIR)) == 2


# Boot


def test_calls_wait_for_a_slow_init() -> None:
    with gunicorn_with(settings("tasks:Slow")) as gunicorn:
        gunicorn.wait_log("^init begins$")
        answers = ask_many(gunicorn, [path("tasks:Slow", "echo", n) for n in range(10)])
        assert answers == list(range(10))
        assert "Dirty worker ready" in gunicorn.log_text()
        wait_ready(gunicorn, 2)
        spawned = gunicorn.log_text().count("Spawned dirty worker")
        assert spawned == 2, "one that boots is not taken for one that hangs"


def test_apps_that_do_not_load_fail_their_own_callers_only() -> None:
    apps = [EVERYWHERE, "tasks:Broken", "imports:Missing", "tasks:Absent"]
    with gunicorn_with(settings(*apps), ready=None) as gunicorn:
        gunicorn.write("imports.py", "import no_such_library\n\nclass Missing: pass\n")
        check_failed_apps(gunicorn)
        assert gunicorn.stop().seconds < 8


def check_failed_apps(gunicorn: Gunicorn) -> None:
    said = failure(ask(gunicorn, "tasks:Broken", "echo", 1), "DirtyAppError")
    assert "no weights in model.bin" in said.message
    assert "self.load_weights()" in said.attrs["traceback"]
    assert said.attrs["app_path"] == "tasks:Broken"
    assert said.may_have_run is False
    said = failure(ask(gunicorn, "imports:Missing", "echo", 1), "DirtyAppError")
    assert "no_such_library" in said.message
    said = failure(ask(gunicorn, "tasks:Absent", "echo", 1), "DirtyAppError")
    assert "Absent" in said.message
    assert ask(gunicorn, EVERYWHERE, "echo", "fine") == "fine"
    check_backoff(gunicorn)
    for app in (EVERYWHERE, "tasks:Broken"):
        said = ask_many(gunicorn, [path(app, "echo", n) for n in range(20)], 5)
        if app == EVERYWHERE:
            assert said == list(range(20))
        else:
            assert all("no weights" in failure(one, "DirtyAppError").message for one in said)
            assert max(one.elapsed for one in said) < 2


def check_backoff(gunicorn: Gunicorn) -> None:
    """Stock forks a hundred workers a second. Here the pauses grow: 0, 1, 2, 4 ... seconds."""

    def inits() -> list[float]:
        lines = (gunicorn.dir / "inits").read_text().splitlines()
        return [float(line) for line in lines]

    wait_until(lambda: len(inits()) >= 4, 20, "four attempts at init()", gunicorn.evidence)
    assert inits()[3] - inits()[0] >= 2
    gunicorn.wait_log(r"Dirty workers keep failing: 3 in a row")


def test_a_pool_of_which_no_app_loads_says_so_at_once() -> None:
    with gunicorn_with(settings("tasks:Broken")) as gunicorn:
        said = failure(ask(gunicorn, "tasks:Broken", "echo", 1), "DirtyAppError")
        assert "no weights in model.bin" in said.message
        assert "load_weights" in said.attrs["traceback"]
        check_backoff(gunicorn)
        said = failure(ask(gunicorn, "tasks:Broken", "echo", 1), "DirtyAppError")
        assert said.elapsed < 2
        assert gunicorn.stop().seconds < 8


# Overload


def test_a_full_queue_refuses_at_once() -> None:
    install = "import gunicorn_dirty_gevent\ngunicorn_dirty_gevent.install(queue_size=3)\n"
    one = settings(dirty_workers=1, dirty_threads=1)
    with gunicorn_with(one, install=install) as gunicorn:
        wait_ready(gunicorn, 1)
        with asking(gunicorn, [path(EVERYWHERE, "hold", "queue")]) as (held,):
            held_in(gunicorn, "queue")
            with asking(gunicorn, [path(EVERYWHERE, "echo", n) for n in range(8)]) as calls:
                try:
                    wait_until(
                        lambda: sum(call.done() for call in calls) == 5,
                        10,
                        "five calls to be refused",
                        gunicorn.evidence,
                    )
                    refused = [failure(c.result(), "DirtyOverloadedError") for c in calls if c.done()]
                finally:
                    release(gunicorn, "queue")
                answers = [call.result() for call in calls]
            assert held.result() in gunicorn.dirty_worker_pids()
        assert len(refused) == 5
        assert sum(answer == n for n, answer in enumerate(answers)) == 3
        assert all("DirtyNoWorkersAvailableError" in said.bases for said in refused)
        assert all(said.may_have_run is False for said in refused)
        assert max(said.elapsed for said in refused) < 2
        assert "queue_size" in refused[0].message
        check_service(gunicorn, 3)


# Hooks


HOOKS = """
def told(hook, *objects):
    import json, os
    said = {"hook": hook, "in": os.getpid()}
    for name, thing in zip(("arbiter", "worker") if len(objects) == 2 else ("it",), objects):
        said[name] = {
            "class": type(thing).__name__,
            "pid": thing.pid,
            "age": getattr(thing, "age", None),
            "apps": sorted(getattr(thing, "apps", ())),
            "app_paths": sorted(getattr(thing, "app_paths", ())),
            "cfg": getattr(thing.cfg, "dirty_threads", None),
            "log": hasattr(thing.log, "info"),
        }
    with open("hooks", "a") as file:
        file.write(json.dumps(said) + "\\n")

def on_dirty_starting(arbiter):
    told("on_dirty_starting", arbiter)

def dirty_post_fork(arbiter, worker):
    told("dirty_post_fork", arbiter, worker)

def dirty_worker_init(worker):
    told("dirty_worker_init", worker)

def dirty_worker_exit(arbiter, worker):
    told("dirty_worker_exit", arbiter, worker)
"""


def test_hooks_are_called_with_what_gunicorn_gives_them() -> None:
    with gunicorn_with(settings(EVERYWHERE, PAIR), extra_config=HOOKS) as gunicorn:
        workers = wait_ready(gunicorn, 2)
        arbiter = gunicorn.dirty_arbiter_pid()
        assert ask(gunicorn, EVERYWHERE, "pid") in workers
        report = gunicorn.stop()
        assert (report.exit_code, report.left) == (0, [])
        said = [json.loads(line) for line in (gunicorn.dir / "hooks").read_text().splitlines()]
        log = gunicorn.log_text()
    by_hook = {hook: [s for s in said if s["hook"] == hook] for hook in {s["hook"] for s in said}}
    assert {hook: len(calls) for hook, calls in by_hook.items()} == {
        "on_dirty_starting": 1,
        "dirty_post_fork": 2,
        "dirty_worker_init": 2,
        "dirty_worker_exit": 2,
    }
    apps = sorted([EVERYWHERE, PAIR])
    (starting,) = by_hook["on_dirty_starting"]
    assert starting["in"] == starting["it"]["pid"] == arbiter
    for call in by_hook["dirty_worker_init"]:
        assert call["in"] == call["it"]["pid"]
        assert call["it"]["apps"] == call["it"]["app_paths"] == apps
        assert call["it"]["cfg"] == 10 and call["it"]["log"] is True
    assert sorted(c["in"] for c in by_hook["dirty_worker_init"]) == sorted(workers)
    for hook in ("dirty_post_fork", "dirty_worker_exit"):
        for call in by_hook[hook]:
            assert call["arbiter"]["class"] == "DirtyArbiter"
            assert call["in"] == arbiter  # as in gunicorn
            assert call["arbiter"]["pid"] == arbiter
            assert call["worker"]["app_paths"] == apps
            assert call["worker"]["cfg"] == 10
        assert sorted(c["worker"]["pid"] for c in by_hook[hook]) == sorted(workers), hook
        assert sorted(c["worker"]["age"] for c in by_hook[hook]) == [1, 2], hook
    # app.close(), once for each app in each worker
    for pid in workers:
        assert sorted(re.findall(rf"^closed (\w+) in {pid}$", log, re.M)) == ["Everywhere", "Pair"]


# The death of the arbiter


def test_a_killed_arbiter_costs_the_calls_in_flight_only() -> None:
    with gunicorn_with(settings(workers=2)) as gunicorn:
        workers = wait_ready(gunicorn, 2)
        http = gunicorn.http_worker_pids()
        arbiter = gunicorn.dirty_arbiter_pid()
        path_before = gunicorn.wait_log(r"Dirty arbiter listening on (\S+)").group(1)
        mark = gunicorn.mark()
        with asking(gunicorn, [path(EVERYWHERE, "hold", f"cut{n}") for n in range(4)]) as calls:
            for n in range(4):
                held_in(gunicorn, f"cut{n}")
            gunicorn.kill(arbiter, signal.SIGKILL)
            lost = [failure(call.result(10), "DirtyConnectionError") for call in calls]
            # Sent while there is no arbiter, or no worker yet: they wait.
            check_service(gunicorn)
        assert all(said.may_have_run is True for said in lost)
        assert all("may have run" in said.message for said in lost)
        for pid in workers:
            gunicorn.wait_gone(pid, 4)
        path_after = gunicorn.wait_log(r"Dirty arbiter listening on (\S+)", since=mark).group(1)
        assert path_after == path_before
        assert gunicorn.dirty_arbiter_pid() != arbiter
        assert not set(wait_ready(gunicorn, 2)) & set(workers)
        assert gunicorn.http_worker_pids() == http
        # Both HTTP workers have found the new arbiter.
        answered: set[int] = set()

        def both() -> bool:
            check_service(gunicorn)
            answered.add(gunicorn.get("/pid").json()["pid"])
            return answered == set(http)

        wait_until(both, 10, "answers of both HTTP workers", gunicorn.evidence)
        report = gunicorn.stop()
        assert (report.exit_code, report.left) == (0, [])


# Stop


def test_stops_on_term_with_nothing_left() -> None:
    with gunicorn_with(settings()) as gunicorn:
        wait_ready(gunicorn, 2)
        check_service(gunicorn)
        before = set(gunicorn.pids())
        assert len(before) == 5
        report = gunicorn.stop(signal.SIGTERM)
        assert report.exit_code == 0
        assert report.seconds < 8
        assert report.left == []
        gunicorn.assert_clean()
        log = gunicorn.log_text()
        assert "Traceback" not in log
        assert "was killed" not in log


@pytest.mark.parametrize("terms", [1, 2])
def test_running_calls_finish_within_the_graceful_timeout(terms: int) -> None:
    with gunicorn_with(settings(dirty_graceful_timeout=10, graceful_timeout=10)) as gunicorn:
        workers = wait_ready(gunicorn, 2)
        arbiter = gunicorn.dirty_arbiter_pid()
        names = [f"stop{n}" for n in range(4)]
        with asking(gunicorn, [path(EVERYWHERE, "hold", name) for name in names]) as calls:
            for name in names:
                held_in(gunicorn, name)
            for _ in range(terms):
                for pid in (gunicorn.master_pid, arbiter):
                    gunicorn.kill(pid, signal.SIGTERM)
                    wait_until(lambda pid=pid: not signals_wait(pid), 5, f"{pid} to take TERM")
                gunicorn.wait_log("Handling signal: term")
            assert not any(call.done() for call in calls)
            assert set(workers) <= set(gunicorn.pids())
            for name in names:
                release(gunicorn, name)
            assert {call.result(10) for call in calls} == set(workers)
        report = gunicorn.stop(signal.SIGTERM)
        assert (report.exit_code, report.left) == (0, [])
        assert report.seconds < 8
        gunicorn.assert_clean()


def signals_wait(pid: int) -> bool:
    """Whether signals were sent to the process that it has not taken yet."""
    status = Path(f"/proc/{pid}/status").read_text()
    return any(int(mask, 16) for mask in re.findall(r"^(?:SigPnd|ShdPnd):\s(\w+)$", status, re.M))


def test_calls_that_do_not_finish_are_cut_after_the_graceful_timeout() -> None:
    with gunicorn_with(settings(dirty_graceful_timeout=1, graceful_timeout=10)) as gunicorn:
        wait_ready(gunicorn, 2)
        with asking(gunicorn, [path(EVERYWHERE, "hold", "never")]) as (call,):
            held_in(gunicorn, "never")
            report = gunicorn.stop(signal.SIGTERM)
            said = failure(call.result(), "DirtyError")
        assert said.may_have_run is True
        assert 1 <= said.elapsed < 8
        assert (report.exit_code, report.left) == (0, [])
        assert report.seconds < 8


def test_no_process_outlives_a_killed_master() -> None:
    with gunicorn_with(settings(), leftovers=["wgunicorn-*"]) as gunicorn:
        workers = wait_ready(gunicorn, 2)
        arbiter = gunicorn.dirty_arbiter_pid()
        gunicorn.stop(signal.SIGKILL, grace=0)
        for pid in (arbiter, *workers):
            wait_until(lambda pid=pid: pid not in alive(gunicorn), 2.5, f"{pid} to end")
        # HTTP workers are gunicorn's own: they end when they see that their parent has gone.
        wait_until(lambda: not alive(gunicorn), 15, "HTTP workers to end", gunicorn.evidence)


def alive(gunicorn: Gunicorn) -> list[int]:
    return [pid for pid, process in gunicorn.pids().items() if process.alive]
