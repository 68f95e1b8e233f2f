"""Processes that die, and apps that do not load, in a real gunicorn."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from asking import app_source, ask, ask_many, asking, failure, path, wait_ready
from load import Load
from support.gunicorn import Gunicorn
from support.processes import read_process
from support.waiting import wait_until

APP, OTHER = "tasks:App", "tasks:Other"

TASKS = """
import ctypes
import os
import sys
import time
import gunicorn_dirty_gevent
from gunicorn.dirty import DirtyApp


class App(DirtyApp):
    def echo(self, value):
        return value

    def nap(self, value, seconds):
        time.sleep(seconds)
        return value

    def hold(self, name):
        # Until the test makes the file.
        print(f"holding {name} in {os.getpid()}", flush=True)
        while not os.path.exists(f"release-{name}"):
            time.sleep(0.005)
        return os.getpid()

    def kill_itself(self):
        os.kill(os.getpid(), 9)

    def exit_7(self):
        os._exit(7)

    def leave(self):
        sys.exit(3)

    def segfault(self):
        ctypes.string_at(0)

    def stuck(self):
        print(f"stuck in {os.getpid()}", flush=True)
        sum(range(10**11))

    def chunks_then_exit(self, n):
        yield from range(n)
        time.sleep(0.05)
        os._exit(7)

    @gunicorn_dirty_gevent.action(idempotent=True)
    def exit_at_first(self, name, times):
        with open(f"runs-{name}", "a") as file:
            file.write(f"{os.getpid()}\\n")
        with open(f"runs-{name}") as file:
            runs = file.read().split()
        if len(runs) <= times:
            os._exit(7)
        return runs


class Other(App):
    pass


class Broken(App):
    def init(self):
        with open("inits", "a") as file:
            file.write(f"{time.monotonic()}\\n")
        self.load_weights()

    def load_weights(self):
        raise RuntimeError("no weights in model.bin")


class Slow(App):
    def init(self):
        print("init begins", flush=True)
        while not os.path.exists("release-init"):
            time.sleep(0.005)
"""


def settings(*apps: str, **changed: object) -> dict[str, object]:
    base = {"dirty_workers": 2, "dirty_threads": 10, "dirty_timeout": 60}
    return base | {"dirty_apps": list(apps) or [APP, OTHER]} | changed


def gunicorn_with(settings: dict[str, object], **options: object) -> Gunicorn:
    return Gunicorn(app_source(), TASKS, settings, **options)


@pytest.fixture(scope="module")
def pool() -> Iterator[Gunicorn]:
    """Two dirty workers with ten greenlets each, and two HTTP workers."""
    with gunicorn_with(settings(workers=2)) as gunicorn:
        wait_ready(gunicorn, 2)
        yield gunicorn


def release(gunicorn: Gunicorn, name: str) -> None:
    gunicorn.write(f"release-{name}", "")


def wait_held(gunicorn: Gunicorn, name: str) -> int:
    """The worker that runs `hold(name)`, when it does."""
    return int(gunicorn.wait_log(rf"^holding {name} in (\d+)$").group(1))


def socket_directory(gunicorn: Gunicorn) -> Path:
    return Path(gunicorn.wait_log(r"Dirty arbiter listening on (\S+)").group(1)).parent


def told(name: str, text: object) -> None:
    print(f"measured: {name}: {text}")


def check_service(gunicorn: Gunicorn, app: str = APP) -> None:
    assert ask_many(gunicorn, [path(app, "echo", n) for n in range(20)], 5) == list(range(20))


# A worker


@pytest.mark.parametrize(
    ("action", "how", "logged"),
    [
        ("kill", "was killed by SIGKILL", "killed by signal 9: SIGKILL"),
        ("kill_itself", "was killed by SIGKILL", "killed by signal 9: SIGKILL"),
        ("exit_7", "exited with code 7", "exited with code 7"),
        ("segfault", "was killed by SIGSEGV", "killed by signal 11: SIGSEGV"),
    ],
)
def test_a_worker_that_dies_costs_its_own_calls_only(
    pool: Gunicorn, action: str, how: str, logged: str
) -> None:
    before = set(wait_ready(pool, 2))
    mark = pool.mark()
    names = [f"{action}-{n}" for n in range(2)]
    with asking(pool, [path(APP, "hold", names[0]), path(OTHER, "hold", names[1])]) as calls:
        try:
            held = [wait_held(pool, name) for name in names]
            assert set(held) == before
            began = time.monotonic()
            if action == "kill":
                victim = held[0]
                pool.kill(victim, signal.SIGKILL)
            else:
                said = failure(ask(pool, APP, action), "DirtyWorkerDiedError")
                victim = int(said.attrs["worker_id"])
                assert how in said.message and f"{APP}.{action}" in said.message
                assert said.may_have_run is True
                assert said.elapsed < 3
            lost, kept = (calls[0], calls[1]) if victim == held[0] else (calls[1], calls[0])
            said = failure(lost.result(10), "DirtyWorkerDiedError")
            told(f"{action}: calls lost were told after", time.monotonic() - began)
            app = APP if lost is calls[0] else OTHER
            assert how in said.message and f"{app}.hold" in said.message and str(victim) in said.message
            assert said.may_have_run is True
            check_service(pool)
            check_service(pool, OTHER)
            after = set(wait_ready(pool, 2))
            told(f"{action}: pool whole after", time.monotonic() - began)
            assert not kept.done()
        finally:
            for name in names:
                release(pool, name)
        assert {kept.result(10)} == before - {victim}
    assert victim not in after and len(after & before) == 1
    assert time.monotonic() - began < 10
    pool.wait_log(rf"Dirty worker \(pid:{victim}\) {logged}", since=mark)
    pool.wait_log(rf"{APP}\.hold|{OTHER}\.hold", since=mark)
    if action == "segfault":
        pool.wait_log("Fatal Python error: Segmentation fault", since=mark)
        pool.wait_log(r'File ".*tasks\.py", line \d+ in segfault', since=mark)


def test_an_action_cannot_leave_the_worker_politely(pool: Gunicorn) -> None:
    before = wait_ready(pool, 2)
    said = failure(ask(pool, APP, "leave"), "DirtyAppError")
    assert said.attrs["traceback"] and "SystemExit" in said.attrs["traceback"]
    check_service(pool)
    assert wait_ready(pool, 2) == before


def test_a_stream_gives_its_chunks_and_then_says_that_its_worker_died(pool: Gunicorn) -> None:
    said = ask(pool, APP, "chunks_then_exit", 5, route="/collect")
    said = failure(said, "DirtyWorkerDiedError")
    assert said.chunks == list(range(5))
    assert "exited with code 7" in said.message
    wait_ready(pool, 2)


def test_an_idempotent_call_is_run_once_more_and_no_more(pool: Gunicorn) -> None:
    runs = ask(pool, APP, "exit_at_first", "one", 1)
    assert len(set(runs)) == 2
    said = failure(ask(pool, APP, "exit_at_first", "all", 99), "DirtyWorkerDiedError")
    assert said.may_have_run is True
    assert len((pool.dir / "runs-all").read_text().split()) == 2
    check_service(pool)
    wait_ready(pool, 2)


def test_workers_that_keep_dying_are_spawned_with_growing_pauses() -> None:
    with gunicorn_with(settings(dirty_workers=1)) as gunicorn:
        wait_ready(gunicorn, 1)
        for _ in range(6):
            failure(ask(gunicorn, APP, "exit_7"), "DirtyWorkerDiedError")
        found = re.findall(
            r"keep failing: (\d+) in a row died right after.*spawned in ([\d.]+) s", gunicorn.log_text()
        )
        pauses = [float(pause) for _, pause in found]
        told("pauses between workers that keep dying", pauses)
        assert len(pauses) >= 3
        assert pauses == sorted(pauses) and len(set(pauses)) == len(pauses)
        check_service(gunicorn)


# The load of an app


def test_an_app_that_does_not_load_tells_its_callers_why() -> None:
    with gunicorn_with(settings(APP, "tasks:Broken")) as gunicorn:
        # How long a worker takes to boot is not what is measured below.
        gunicorn.wait_log("Failed to initialize dirty app tasks:Broken")
        said = failure(ask(gunicorn, "tasks:Broken", "echo", 1), "DirtyAppError")
        assert "no weights in model.bin" in said.message
        assert "self.load_weights()" in said.attrs["traceback"]
        assert said.may_have_run is False
        assert said.elapsed < 3
        check_service(gunicorn)
        gunicorn.wait_log(r"tasks:Broken.*no weights in model\.bin")
        # While the pool tries again, with growing pauses: 0, 1, 2, 4 s ...
        with Load(gunicorn, lambda n: path(APP, "nap", n, 0.01), 2) as load:
            gunicorn.wait_log(r"Dirty workers keep failing: 4 in a row.*spawned in \d", deadline=20)
            load.more(2)
        load.assert_none_failed()
        # By a clock that all processes share: a test that comes late to this has seen the pauses too.
        inits = [float(at) for at in (gunicorn.dir / "inits").read_text().split()]
        seconds = time.monotonic() - min(inits)
        spawned = gunicorn.log_text().count("Spawned dirty worker")
        told("restarts of an app that does not load", f"{spawned} workers in {seconds:.1f} s")
        assert len(inits) <= 10 and spawned <= 10
        assert seconds > 2.5
        said = failure(ask(gunicorn, "tasks:Broken", "echo", 1), "DirtyAppError")
        assert "no weights in model.bin" in said.message
        assert said.elapsed < 2


def test_calls_wait_for_a_slow_init_within_their_own_deadline() -> None:
    with gunicorn_with(settings("tasks:Slow")) as gunicorn:
        gunicorn.wait_log("^init begins$")
        waiting = [path("tasks:Slow", "echo", n) for n in range(5)]
        with asking(gunicorn, waiting) as calls:
            try:
                said = ask(gunicorn, "tasks:Slow", "echo", 1, options={"timeout": 0.7})
                said = failure(said, "DirtyTimeoutError")
                assert 0.65 <= said.elapsed < 3
                assert said.may_have_run is False
                assert "no dirty worker was ready" in said.message
                assert not any(call.done() for call in calls)
            finally:
                release(gunicorn, "init")
            assert [call.result(15) for call in calls] == list(range(5))
        wait_ready(gunicorn, 2)
        assert gunicorn.log_text().count("Spawned dirty worker") == 2


def test_a_stop_does_not_wait_for_a_slow_init() -> None:
    with gunicorn_with(settings("tasks:Slow")) as gunicorn:
        gunicorn.wait_log("^init begins$")
        report = gunicorn.stop()
        assert report.seconds < 6
        assert (report.exit_code, report.left) == (0, [])


# The arbiter


def test_a_killed_arbiter_under_load(pool: Gunicorn) -> None:
    workers = wait_ready(pool, 2)
    http = pool.http_worker_pids()
    arbiter = pool.dirty_arbiter_pid()
    mark = pool.mark()
    names = [f"arbiter-{n}" for n in range(4)]
    with asking(pool, [path(APP, "hold", name) for name in names]) as holds:
        try:
            # Before the load: an idle worker comes before a busy one. Beside naps both are busy, and all
            # may go to the one that was heard of a moment ago.
            held = {wait_held(pool, name) for name in names}
            assert held == set(workers)
            with Load(pool, lambda n: path(APP, "nap", n, 0.03), 6) as load:
                # The last: beside it in the same worker nothing more would begin.
                with asking(pool, [path(APP, "stuck")]) as stuck:
                    assert int(pool.wait_log(r"^stuck in (\d+)$", since=mark).group(1)) in workers
                    killed = time.monotonic()
                    pool.kill(arbiter, signal.SIGKILL)
                    lost = [failure(call.result(10), "DirtyConnectionError") for call in [*holds, *stuck]]
                    told("killed arbiter: calls in flight were told after", time.monotonic() - killed)
                    assert time.monotonic() - killed < 3
                    for pid in workers:  # also the one in C code
                        pool.wait_gone(pid)
                    told("killed arbiter: its workers had ended after", time.monotonic() - killed)
                load.more(20)
                told("killed arbiter: 20 more calls had been served after", time.monotonic() - killed)
        finally:
            for name in names:
                release(pool, name)
    assert all(said.may_have_run is True and "may have run" in said.message for said in lost)
    # Of the load, those in flight at that moment; all others waited for the next arbiter.
    for outcome in load.failures:
        assert failure(outcome.said, "DirtyConnectionError").may_have_run is True
        assert outcome.began <= killed + 0.5
    # A dying process loses its connections one after the other: a caller that was told by one HTTP
    # worker can have asked the other once more before that one's connection was gone too.
    assert 0 < len(load.failures) <= 6 * len(http)
    told("killed arbiter: longest call of the load", max(outcome.seconds for outcome in load.outcomes))
    assert pool.http_worker_pids() == http
    assert pool.dirty_arbiter_pid() != arbiter
    assert not set(wait_ready(pool, 2)) & set(workers)
    check_service(pool)


def test_an_arbiter_that_exits_with_3_does_not_halt_gunicorn() -> None:
    hook = """
    def on_dirty_starting(arbiter):
        import os, sys
        with open("starts", "a") as file:
            file.write("start\\n")
        with open("starts") as file:
            starts = len(file.readlines())
        if starts <= 2:
            sys.exit(2 + starts)
    """
    with gunicorn_with(settings(), extra_config=hook) as gunicorn:
        wait_ready(gunicorn, 2)
        check_service(gunicorn)
        # gunicorn 25's master may take it for a worker when it reaps it, and then says so.
        words = r"(?:Dirty arbiter|Worker) \(pid:\d+\) exited with code (\d+)"
        codes = re.findall(words, gunicorn.log_text())
        assert len(codes) == 2 and not set(codes) & {"3", "4"}
        assert "Shutting down" not in gunicorn.log_text()
        report = gunicorn.stop()
        assert (report.exit_code, report.left) == (0, [])


# The master


def test_a_killed_master_leaves_nothing_of_the_dirty_side() -> None:
    with gunicorn_with(settings(), leftovers=["wgunicorn-*"]) as gunicorn:
        workers = wait_ready(gunicorn, 2)
        arbiter = gunicorn.dirty_arbiter_pid()
        directory = socket_directory(gunicorn)
        assert directory.is_dir() and str(directory).startswith(str(gunicorn.tmp))
        with (
            Load(gunicorn, lambda n: path(APP, "echo", n), 2),
            asking(gunicorn, [path(APP, "stuck")]) as calls,
        ):
            stuck = int(gunicorn.wait_log(r"^stuck in (\d+)$").group(1))
            assert stuck in workers
            killed = time.monotonic()
            os.kill(gunicorn.master_pid, signal.SIGKILL)

            def gone() -> bool:
                left = [read_process(pid) for pid in (arbiter, *workers)]
                return not any(process is not None and process.alive for process in left)

            wait_until(gone, 5, "the dirty side to end", gunicorn.evidence)
            told("killed master: the dirty side had ended after", time.monotonic() - killed)
            wait_until(lambda: not directory.exists(), 2, "its directory to go", gunicorn.evidence)
            assert calls[0].exception(10) or calls[0].result()
        # HTTP workers are gunicorn's own: they end when they see that their parent has gone.
        wait_until(lambda: not alive(gunicorn), 10, "HTTP workers to end", gunicorn.evidence)


def alive(gunicorn: Gunicorn) -> list[int]:
    return [pid for pid, process in gunicorn.pids().items() if process.alive]


def test_gunicorns_of_the_same_name_do_not_disturb_each_other() -> None:
    """gunicorn ends the arbiter whose pid a file in TMPDIR, called after proc_name, has."""
    named = settings(dirty_workers=1, proc_name="same")
    with gunicorn_with(named) as first:
        (before,) = wait_ready(first, 1)
        arbiter = first.dirty_arbiter_pid()
        with (
            Load(first, lambda n: path(APP, "echo", n), 2) as load,
            gunicorn_with(named, env={"TMPDIR": str(first.tmp)}) as second,
        ):
            wait_ready(second, 1)
            assert socket_directory(second).parent == socket_directory(first).parent
            assert socket_directory(second) != socket_directory(first)
            check_service(second)
            # A new arbiter is where gunicorn looks for an old one.
            mark = second.mark()
            second.kill(second.dirty_arbiter_pid(), signal.SIGKILL)
            second.wait_log("Dirty worker ready", since=mark)
            check_service(second)
            load.more(10)
            assert second.stop().left == []
            load.more(10)
        load.assert_none_failed()
        assert first.dirty_arbiter_pid() == arbiter
        assert wait_ready(first, 1) == [before]
        assert socket_directory(first).is_dir()
        assert not list(first.tmp.glob("*.pid"))
        assert "orphan" not in first.log_text()
