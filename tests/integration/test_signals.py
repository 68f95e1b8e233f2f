"""Signals to a real gunicorn and its dirty side: stop, reload, resize, upgrade; and recycling."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asking import Failure, app_source, ask, ask_many, asking, failure, path, ready_pids, wait_ready
from load import Load
from support.gunicorn import OURS, Gunicorn
from support.processes import read_process
from support.waiting import wait_until

APP, PAIR = "tasks:App", "tasks:Pair"

TASKS = """
import os
import time
from gunicorn.dirty import DirtyApp

VERSION = 1


class App(DirtyApp):
    def version(self):
        return VERSION

    def echo(self, value):
        return value

    def pid(self):
        time.sleep(0.05)  # so that calls at once do overlap, however slow their way here is
        return os.getpid()

    def nap(self, value, seconds):
        time.sleep(seconds)
        return value

    def hold(self, name):
        # Until the test makes the file.
        print(f"holding {name} in {os.getpid()}", flush=True)
        try:
            while not os.path.exists(f"release-{name}"):
                time.sleep(0.005)
            return os.getpid()
        finally:
            with open(f"left-{name}", "a") as file:
                file.write("left\\n")

    def fail(self, text):
        raise ValueError(text)

    def stuck(self):
        print(f"stuck in {os.getpid()}", flush=True)
        sum(range(10**11))

    def grow(self, size):
        self.kept = b"x" * size
        return os.getpid()


class Pair(App):
    pass
"""

SLOW_INIT = """

class App(App):
    def init(self):
        print(f"init begins, version {VERSION}", flush=True)
        while not os.path.exists(f"release-version-{VERSION}"):
            time.sleep(0.005)
"""

BROKEN_INIT = """

class App(App):
    def init(self):
        raise RuntimeError("no weights in this version")
"""

VIEWS = '''
@route("/late")
def late(environ, query):
    """A call, and another one when it has ended."""
    client = get_dirty_client()
    first = client.execute("tasks:App", "hold", query["name"])
    return {"result": [first, client.execute("tasks:App", "nap", "late", 0.05)]}
'''


def settings(**changed: object) -> dict[str, object]:
    base = {"dirty_apps": [APP], "dirty_workers": 2, "dirty_threads": 10, "dirty_timeout": 60}
    return base | {"dirty_graceful_timeout": 10, "graceful_timeout": 12} | changed


def gunicorn_with(settings: dict[str, object], **options: Any) -> Gunicorn:
    return Gunicorn(app_source(VIEWS), TASKS, settings, **options)


@pytest.fixture(scope="module")
def pool() -> Iterator[Gunicorn]:
    """Two HTTP workers, two dirty workers, and an app that wants both of these."""
    with gunicorn_with(settings(dirty_apps=[APP, f"{PAIR}:2"], workers=2)) as gunicorn:
        wait_ready(gunicorn, 2)
        yield gunicorn


def release(gunicorn: Gunicorn, name: str) -> None:
    gunicorn.write(f"release-{name}", "")


def wait_held(gunicorn: Gunicorn, name: str) -> int:
    """The worker that runs `hold(name)`, when it does."""
    return int(gunicorn.wait_log(rf"^holding {name} in (\d+)$").group(1))


def wait_taken(pid: int) -> None:
    """Wait until no signal is pending for the process."""

    def taken() -> bool:
        status = Path(f"/proc/{pid}/status").read_text()
        return not any(int(mask, 16) for mask in re.findall(r"^(?:SigPnd|ShdPnd):\s(\w+)$", status, re.M))

    wait_until(taken, 5, f"{pid} to take its signals")


def wait_refused(gunicorn: Gunicorn) -> None:
    """Wait until gunicorn takes no more connections: all of it knows that it stops."""

    def refused() -> bool:
        try:
            gunicorn.get("/ready", timeout=5)
        except OSError:
            return True
        return False

    wait_until(refused, 10, "connections to be refused", gunicorn.evidence)


def echo(n: int) -> str:
    return path(APP, "nap", n, 0.02)


def told(name: str, text: object) -> None:
    print(f"measured: {name}: {text}")


def assert_no_halting_codes(gunicorn: Gunicorn) -> None:
    assert not re.search(r"exited with code [34]\b", gunicorn.log_text())


# Stop


@pytest.mark.parametrize("target", ["master", "master twice", "group", "group twice"])
def test_term_lets_running_calls_and_those_they_lead_to_finish(target: str) -> None:
    with gunicorn_with(settings()) as gunicorn:
        workers = wait_ready(gunicorn, 2)
        arbiter = gunicorn.dirty_arbiter_pid()
        late = [path(APP, "", route="/late", options={"name": f"late{n}"}) for n in range(2)]
        with asking(gunicorn, [*late, path(APP, "hold", "plain")]) as calls:
            for name in ("late0", "late1", "plain"):
                wait_held(gunicorn, name)
            for _ in range(2 if target.endswith("twice") else 1):
                if target.startswith("group"):
                    os.killpg(gunicorn.master_pid, signal.SIGTERM)
                else:
                    gunicorn.kill(gunicorn.master_pid, signal.SIGTERM)
                for pid in (gunicorn.master_pid, arbiter, *workers):
                    wait_taken(pid)
            wait_refused(gunicorn)
            assert not any(call.done() for call in calls)
            for name in ("late0", "late1", "plain"):
                release(gunicorn, name)
            answers = [call.result(10) for call in calls]
        assert all(answer[0] in workers and answer[1] == "late" for answer in answers[:2]), answers
        assert answers[2] in workers
        report = gunicorn.stop()
        assert (report.exit_code, report.left) == (0, [])
        assert report.seconds < 8
        gunicorn.assert_clean()
        assert_no_halting_codes(gunicorn)
        if target != "group twice":  # which may hit a replacement while it boots
            assert "was killed" not in gunicorn.log_text()


@pytest.mark.parametrize("action", ["hold", "stuck"])
def test_a_call_beyond_the_graceful_timeout_is_cut(action: str) -> None:
    with gunicorn_with(settings(dirty_graceful_timeout=1)) as gunicorn:
        wait_ready(gunicorn, 2)
        args = ["cut"] if action == "hold" else []
        with asking(gunicorn, [path(APP, action, *args)]) as (call,):
            gunicorn.wait_log(r"^(holding cut|stuck) in \d+$")
            report = gunicorn.stop()
            said = failure(call.result(10), "DirtyError")
        told(f"cut {action}: the master had stopped after", report.seconds)
        assert said.may_have_run is True
        assert f"{APP}.{action}" in said.message
        why = "dirty_graceful_timeout of 1 s is over"
        assert f"stopped before the call ended ({why}); it was cut off while it ran" in said.message
        assert 1 <= said.elapsed < 5
        assert report.seconds < 7
        assert (report.exit_code, report.left) == (0, [])
        if action == "hold":
            assert (gunicorn.dir / "left-cut").exists(), "its finally block has run"
        gunicorn.assert_clean()


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGQUIT])
def test_int_and_quit_are_quick(sig: int) -> None:
    with gunicorn_with(settings()) as gunicorn:
        wait_ready(gunicorn, 2)
        with asking(gunicorn, [path(APP, "hold", "quick"), path(APP, "stuck")]) as calls:
            wait_held(gunicorn, "quick")
            gunicorn.wait_log(r"^stuck in \d+$")
            report = gunicorn.stop(sig)
            # HTTP workers do not wait for their requests either.
            ended = [call.exception(10) or call.result() for call in calls]
        told(f"{signal.Signals(sig).name}: the master had stopped after", report.seconds)
        assert all(isinstance(one, (Exception, Failure)) for one in ended)
        assert report.seconds < 4
        assert (report.exit_code, report.left) == (0, [])
        assert (gunicorn.dir / "left-quick").exists(), "its finally block has run"
        gunicorn.assert_clean()
        assert_no_halting_codes(gunicorn)


# The arbiter and a worker alone


def test_ttin_and_ttou_resize_but_not_below_what_an_app_needs(pool: Gunicorn) -> None:
    arbiter = pool.dirty_arbiter_pid()
    before = wait_ready(pool, 2)
    mark = pool.mark()
    with Load(pool, echo, 2) as load:
        pool.kill(arbiter, signal.SIGTTIN)
        pool.wait_log("SIGTTIN: Increasing dirty workers to 3", since=mark)
        assert set(before) < set(wait_ready(pool, 3))
        pool.kill(arbiter, signal.SIGTTOU)
        pool.wait_log("SIGTTOU: Decreasing dirty workers to 2", since=mark)
        after = wait_ready(pool, 2)
        pool.kill(arbiter, signal.SIGTTOU)
        pool.wait_log(r"SIGTTOU: Cannot decrease below 2 workers \(required by app specs\)", since=mark)
        load.more(20)
        assert wait_ready(pool, 2) == after
    load.assert_all_echoed()
    assert set(ask_many(pool, [path(PAIR, "pid")] * 20, 4)) == set(after)
    assert pool.dirty_arbiter_pid() == arbiter


def test_a_storm_of_chld_does_no_harm(pool: Gunicorn) -> None:
    arbiter = pool.dirty_arbiter_pid()
    before = wait_ready(pool, 2)
    with Load(pool, echo, 4) as load, asking(pool, [path(APP, "hold", "storm")]) as (held,):
        wait_held(pool, "storm")
        for _ in range(200):
            os.kill(arbiter, signal.SIGCHLD)
        wait_taken(arbiter)
        load.more(20)
        release(pool, "storm")
        assert held.result(10) in before
    load.assert_all_echoed()
    assert wait_ready(pool, 2) == before
    assert pool.dirty_arbiter_pid() == arbiter


def test_term_to_a_worker_replaces_it_and_its_call_finishes(pool: Gunicorn) -> None:
    before = set(wait_ready(pool, 2))
    with Load(pool, echo, 4) as load, asking(pool, [path(APP, "hold", "worker")]) as (held,):
        pid = wait_held(pool, "worker")
        pool.kill(pid, signal.SIGTERM)
        wait_until(lambda: len(ready_pids(pool)) == 3, 10, "its replacement", pool.evidence)
        load.more(20)
        assert not held.done()
        release(pool, "worker")
        assert held.result(10) == pid
        pool.wait_gone(pid)
        load.more(10)
    load.assert_all_echoed()
    after = set(wait_ready(pool, 2))
    assert pid not in after and before - {pid} <= after
    assert not re.search(rf"pid: {pid}\).* (was killed|exited with)", pool.log_text())


def test_term_to_the_arbiter_alone_hands_over_to_the_next(pool: Gunicorn) -> None:
    arbiter = pool.dirty_arbiter_pid()
    before = wait_ready(pool, 2)
    http = pool.http_worker_pids()
    mark = pool.mark()
    with Load(pool, echo, 6) as load, asking(pool, [path(APP, "hold", "arbiter")]) as (held,):
        wait_held(pool, "arbiter")
        for _ in range(2):
            pool.kill(arbiter, signal.SIGTERM)
            wait_taken(arbiter)
        assert not held.done()
        release(pool, "arbiter")
        assert held.result(10) in before
        pool.wait_log("Spawned dirty arbiter", since=mark)
        load.more(20)
    told("TERM to the arbiter: longest call", max(outcome.seconds for outcome in load.outcomes))
    load.assert_all_echoed()
    pool.wait_gone(arbiter)
    assert pool.dirty_arbiter_pid() != arbiter
    assert not set(wait_ready(pool, 2)) & set(before)
    assert pool.http_worker_pids() == http
    # "exited", or on gunicorn 25, whose master may reap it as one of its workers, nothing.
    assert not re.search(rf"\(pid:{arbiter}\) (exited with|was sent|killed)", pool.log_since(mark))


# Reload


def version(n: int, more: str = "") -> str:
    return TASKS.replace("VERSION = 1", f"VERSION = {n}") + more


def versions(gunicorn: Gunicorn, calls: int = 20) -> set[object]:
    return set(map(str, ask_many(gunicorn, [path(APP, "version")] * calls, 4)))


@pytest.fixture(scope="module")
def reloaded() -> Iterator[Gunicorn]:
    with gunicorn_with(settings()) as gunicorn:
        wait_ready(gunicorn, 2)
        yield gunicorn


def test_hup_serves_the_new_code_and_no_call_fails(reloaded: Gunicorn) -> None:
    before = set(wait_ready(reloaded, 2))
    assert versions(reloaded) == {"1"}
    reloaded.write("tasks.py", version(2))
    arbiter = reloaded.dirty_arbiter_pid()
    with Load(reloaded, echo, 4) as load, asking(reloaded, [path(APP, "hold", "hup")]) as (held,):
        pid = wait_held(reloaded, "hup")
        mark = reloaded.mark()
        reloaded.kill(reloaded.master_pid, signal.SIGHUP)
        # HTTP workers first: the old ones finish what they have, and only then do the dirty ones follow.
        reloaded.wait_log("Handling signal: hup", since=mark)
        release(reloaded, "hup")
        assert held.result(20) == pid
        wait_until(lambda: len(set(ready_pids(reloaded)) - before) == 2, 20, "new ones", reloaded.evidence)
        for old in before:
            reloaded.wait_gone(old, 15)
        load.more(20)
    load.assert_all_echoed()
    assert versions(reloaded) == {"2"}
    assert reloaded.dirty_arbiter_pid() == arbiter


def test_hup_to_the_arbiter_lets_old_workers_finish_their_calls(reloaded: Gunicorn) -> None:
    before = set(wait_ready(reloaded, 2))
    with Load(reloaded, echo, 4) as load, asking(reloaded, [path(APP, "hold", "old")]) as (held,):
        pid = wait_held(reloaded, "old")
        reloaded.kill(reloaded.dirty_arbiter_pid(), signal.SIGHUP)
        wait_until(lambda: len(set(ready_pids(reloaded)) - before) == 2, 10, "new ones", reloaded.evidence)
        (idle,) = before - {pid}
        reloaded.wait_gone(idle)
        load.more(20)
        assert not held.done()
        release(reloaded, "old")
        assert held.result(10) == pid
        reloaded.wait_gone(pid)
    load.assert_all_echoed()
    assert not before & set(wait_ready(reloaded, 2))


def test_the_old_code_serves_while_the_new_one_loads(reloaded: Gunicorn) -> None:
    before = set(wait_ready(reloaded, 2))
    (old,) = versions(reloaded)
    reloaded.write("tasks.py", version(3, SLOW_INIT))
    with Load(reloaded, echo, 4) as load:
        reloaded.kill(reloaded.master_pid, signal.SIGHUP)
        reloaded.wait_log("^init begins, version 3$", deadline=20)
        assert versions(reloaded) == {old}
        assert before <= set(ready_pids(reloaded))
        release(reloaded, "version-3")
        for pid in before:
            reloaded.wait_gone(pid)
        load.more(10)
    load.assert_all_echoed()
    assert versions(reloaded) == {"3"}
    assert not before & set(wait_ready(reloaded, 2))


def test_a_reload_during_a_reload_wins(reloaded: Gunicorn) -> None:
    before = set(wait_ready(reloaded, 2))
    arbiter = reloaded.dirty_arbiter_pid()
    reloaded.write("tasks.py", version(4, SLOW_INIT))
    with Load(reloaded, echo, 4) as load:
        reloaded.kill(arbiter, signal.SIGHUP)
        reloaded.wait_log("^init begins, version 4$")
        reloaded.write("tasks.py", version(5))
        reloaded.kill(arbiter, signal.SIGHUP)
        for pid in before:
            reloaded.wait_gone(pid)
        load.more(10)
    load.assert_all_echoed()
    assert versions(reloaded) == {"5"}
    wait_ready(reloaded, 2)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ('raise RuntimeError("this version is broken")', "this version is broken"),
        (BROKEN_INIT, "no weights in this version"),
        ("def wrong(:", "SyntaxError"),
        ("import os; os._exit(3)", "exited with code 3"),
    ],
)
def test_broken_code_leaves_the_old_one_serving(reloaded: Gunicorn, code: str, reason: str) -> None:
    before = wait_ready(reloaded, 2)
    (old,) = versions(reloaded)
    reloaded.write("tasks.py", version(99, "\n\n" + code))
    mark = reloaded.mark()
    with Load(reloaded, echo, 4) as load:
        reloaded.kill(reloaded.dirty_arbiter_pid(), signal.SIGHUP)
        reloaded.wait_log("Reload failed: .* goes on serving", since=mark)
        reloaded.wait_log(re.escape(reason), since=mark)
        load.more(20)
        assert wait_ready(reloaded, 2) == before
    load.assert_all_echoed()
    assert versions(reloaded) == {old}
    # One that dies meanwhile is replaced by what the files have now; mended, they are as good as any.
    mended = int(str(old)) + 10
    reloaded.write("tasks.py", version(mended))
    reloaded.kill(reloaded.dirty_arbiter_pid(), signal.SIGHUP)
    for pid in before:
        reloaded.wait_gone(pid)
    assert versions(reloaded) == {str(mended)}
    wait_ready(reloaded, 2)


def test_hup_with_changed_dirty_settings_replaces_the_arbiter() -> None:
    with gunicorn_with(settings(dirty_workers=1)) as gunicorn:
        (before,) = wait_ready(gunicorn, 1)
        arbiter = gunicorn.dirty_arbiter_pid()
        config = gunicorn.dir / "gunicorn.conf.py"
        config.write_text(config.read_text() + "\ndirty_workers = 3\n")
        mark = gunicorn.mark()
        with Load(gunicorn, echo, 4) as load:
            gunicorn.kill(gunicorn.master_pid, signal.SIGHUP)
            gunicorn.wait_log("Dirty settings have changed: replacing the dirty arbiter", 20, since=mark)
            gunicorn.wait_log("Spawned dirty arbiter", 20, since=mark)
            after = wait_ready(gunicorn, 3)
            load.more(20)
        load.assert_all_echoed()
        told("HUP with changed settings: longest call", max(outcome.seconds for outcome in load.outcomes))
        assert before not in after
        assert gunicorn.dirty_arbiter_pid() != arbiter
        # The same settings again: no reason to replace it.
        arbiter = gunicorn.dirty_arbiter_pid()
        gunicorn.kill(gunicorn.master_pid, signal.SIGHUP)
        for pid in after:
            gunicorn.wait_gone(pid, 20)
        wait_ready(gunicorn, 3)
        assert gunicorn.dirty_arbiter_pid() == arbiter


# Logs


def test_usr1_reopens_the_log_in_every_dirty_process() -> None:
    with gunicorn_with(settings()) as gunicorn:
        workers = wait_ready(gunicorn, 2)
        dirty = [gunicorn.dirty_arbiter_pid(), *workers]
        log, old = gunicorn.dir / "error.log", gunicorn.dir / "error.log.1"
        log.rename(old)
        assert all(str(old) in opened(pid) for pid in dirty)
        gunicorn.kill(gunicorn.master_pid, signal.SIGUSR1)

        def reopened() -> bool:
            return all(str(old) not in opened(pid) and str(log) in opened(pid) for pid in dirty)

        wait_until(reopened, 10, "the log to be reopened", gunicorn.evidence)
        for n in range(10):
            failure(ask(gunicorn, APP, "fail", f"after USR1 {n}"), "DirtyAppError")
        for pid in workers:
            gunicorn.wait_log(rf"\[{pid}\] \[ERROR\] Error executing {APP}\.fail: after USR1 \d")
        os.kill(dirty[0], signal.SIGTTIN)
        gunicorn.wait_log(rf"\[{dirty[0]}\].*SIGTTIN: Increasing dirty workers to 3")
        # Also what C code writes when it ends.
        os.kill(workers[0], signal.SIGABRT)
        gunicorn.wait_log("Fatal Python error: Aborted")
        assert "after USR1" not in old.read_text() and "Fatal" not in old.read_text()


def opened(pid: int) -> set[str]:
    """The files that a process has open, where they are now."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            found.add(os.readlink(link))
    return found


# Upgrade

# gunicorn's own would run the package's __main__.py as a script, whose directory shadows modules.
PRE_EXEC = """
def pre_exec(server):
    import sys
    server.START_CTX["args"] = [sys.executable, "-m", "gunicorn", *sys.argv[1:]]
"""


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGQUIT])
def test_usr2_has_two_masters_serve_and_the_old_one_may_go(sig: int) -> None:
    with gunicorn_with(settings(), extra_config=PRE_EXEC) as gunicorn:
        before = set(wait_ready(gunicorn, 2))
        old_master, old_arbiter = gunicorn.master_pid, gunicorn.dirty_arbiter_pid()
        mark = gunicorn.mark()
        with Load(gunicorn, echo, 4) as load:
            gunicorn.kill(old_master, signal.SIGUSR2)
            master = int(gunicorn.wait_log(r"Listening at: \S+ \((\d+)\)", 20, since=mark).group(1))
            assert master != old_master
            gunicorn.wait_log("HTTP worker ready", 20, since=mark)
            both = set(wait_ready(gunicorn, 4))
            assert before < both
            arbiter = gunicorn.dirty_arbiter_pid()
            assert arbiter != old_arbiter
            served: set[int] = set()

            def both_serve() -> bool:
                served.update(ask_many(gunicorn, [path(APP, "pid")] * 20, 4))
                return served == both

            wait_until(both_serve, 20, "answers of all dirty workers", gunicorn.evidence)
            load.more(10)
            if sig == signal.SIGQUIT:  # quick: it cuts its requests
                load.assert_all_echoed()
                load.outcomes.clear()
            gunicorn.kill(old_master, sig)
            for pid in (old_master, old_arbiter, *before):
                wait_until(lambda pid=pid: not is_alive(pid), 10, f"{pid} to end", gunicorn.evidence)
            load.more(20)
        if sig == signal.SIGTERM:
            load.assert_all_echoed()
        assert set(ready_pids(gunicorn)) == both - before
        assert set(ask_many(gunicorn, [path(APP, "pid")] * 20, 4)) == both - before
        gunicorn.kill(master, signal.SIGTERM)
        wait_until(lambda: not is_alive(master), 10, "the new master to end", gunicorn.evidence)
        gunicorn.assert_clean()
        assert_no_halting_codes(gunicorn)


def is_alive(pid: int) -> bool:
    process = read_process(pid)
    return process is not None and process.alive


# Recycling


def recycling(**options: int) -> Gunicorn:
    """With these options of `install`."""
    given = ", ".join(f"{name}={value}" for name, value in options.items())
    return gunicorn_with(settings(), install=OURS.replace("install()", f"install({given})"))


def test_a_worker_of_many_requests_is_replaced_before_it_goes() -> None:
    with recycling(max_requests=40, max_requests_jitter=10) as gunicorn:
        wait_ready(gunicorn, 2)

        def limits() -> set[int]:
            found = re.findall(r"it has served max_requests \((\d+)\)", gunicorn.log_text())
            return set(map(int, found))

        with asking(gunicorn, [path(APP, "hold", "recycled")]) as (held,):
            pid = wait_held(gunicorn, "recycled")
            try:
                with Load(gunicorn, lambda n: path(APP, "pid"), 4) as load:
                    gunicorn.wait_log(rf"Stopping dirty worker \(pid: {pid}\): it has served max_requests")
                    seen = lambda: len({outcome.said for outcome in list(load.outcomes)}) >= 5  # noqa: E731
                    wait_until(seen, 20, "five workers to have served", gunicorn.evidence)
                    # Of a few workers all may happen to have the same.
                    wait_until(lambda: len(limits()) > 1, 20, "another limit", gunicorn.evidence)
                    assert not held.done()
            finally:
                release(gunicorn, "recycled")
            assert held.result(10) == pid, "what it ran has finished"
        load.assert_none_failed()
        calls: dict[int, int] = {}
        for outcome in load.outcomes:
            calls[outcome.said] = calls.get(outcome.said, 0) + 1
        told("max_requests=40+10: calls per worker", list(calls.values()))
        gunicorn.wait_gone(pid)
        wait_ready(gunicorn, 2)
        # Two were always ready. (The log is written in order by one process.)
        ready = 0
        for what, _ in re.findall(
            r"(Dirty worker ready|Stopping dirty worker) \(pid: (\d+)\)", gunicorn.log_text()
        ):
            ready += 1 if what == "Dirty worker ready" else -1
            assert ready >= 2 or what == "Dirty worker ready"
        # How many each was given, and a few more until its replacement was ready.
        assert limits() <= set(range(40, 51))


MEMORY = 300 * 1024 * 1024


def test_a_worker_of_much_memory_is_replaced() -> None:
    with recycling(max_memory=MEMORY) as gunicorn:
        wait_ready(gunicorn, 2)
        mark = gunicorn.mark()
        pid = ask(gunicorn, APP, "grow", MEMORY)
        began = time.monotonic()
        said = rf"Replacing dirty worker \(pid: {pid}\): it has (\d+) bytes of memory \(max_memory {MEMORY}\)"
        size = int(gunicorn.wait_log(said, 15, since=mark).group(1))
        told("max_memory: noticed after", time.monotonic() - began)
        assert size > MEMORY
        gunicorn.wait_gone(pid)
        assert pid not in wait_ready(gunicorn, 2)
        stops = re.findall(r"Stopping dirty worker \(pid: (\d+)\)", gunicorn.log_since(mark))
        assert stops == [str(pid)], "the other one stays"
