"""The harness itself: it drives a real (stock) gunicorn, and its leak checks catch leaks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import leaks
from support.gunicorn import STOCK, STOCK_HANGS, Deadline, Gunicorn, app_with
from support.waiting import deadline, wait_until

TASKS = """
import threading
import time
from gunicorn.dirty import DirtyApp

class Echo(DirtyApp):
    def double(self, number):
        return number * 2

    def count(self, n):
        yield from range(n)

    def hang(self):
        threading.Event().wait(30)
"""

VIEWS = """
from gunicorn.dirty import get_dirty_client

@route("/double")
def double(environ, query):
    number = int(query["n"])
    return {"number": get_dirty_client().execute("tasks:Echo", "double", number)}

@route("/count")
def count(environ, query):
    for number in get_dirty_client().stream("tasks:Echo", "count", int(query["n"])):
        yield f"{number}\\n"

@route("/wrong")
def wrong(environ, query):
    error = KeyError("no such thing")
    error.code = 7
    raise error

@route("/wrong-stream")
def wrong_stream(environ, query):
    yield 1 / 0
"""


def stock_gunicorn(**changed: Any) -> Gunicorn:
    options: dict[str, Any] = {
        "app_source": app_with(VIEWS),
        "tasks_source": TASKS,
        "settings": {"dirty_apps": ["tasks:Echo"], "dirty_workers": 1},
        "install": STOCK,
        "ready_log": r"Dirty worker \d+ listening",
    }
    return Gunicorn(**(options | changed))


@pytest.mark.skipif(STOCK_HANGS, reason="stock gunicorn's dirty arbiter does not end on TERM there")
def test_drives_a_stock_gunicorn() -> None:
    with stock_gunicorn(control_socket=True) as gunicorn:
        gunicorn.wait_log("Control socket listening")
        check_answers(gunicorn)
        check_pids(gunicorn)
        report = gunicorn.stop()
        assert report.exit_code == 0
        assert report.left == []
        assert report.seconds < 10
        gunicorn.assert_clean()
    assert not gunicorn.dir.exists()


def check_answers(gunicorn: Gunicorn) -> None:
    answer = gunicorn.get("/double?n=21")
    assert (answer.status, answer.json()) == (200, {"number": 42})
    answers = gunicorn.get_many([f"/double?n={n}" for n in range(8)], concurrency=4)
    assert [a.json()["number"] for a in answers] == [n * 2 for n in range(8)]
    with gunicorn.open("/count?n=3") as stream:
        assert stream.status == 200
        assert list(stream) == ["0", "1", "2"]
    assert gunicorn.get("/nowhere").status == 404
    wrong = gunicorn.get("/wrong")
    assert wrong.status == 500
    assert wrong.json() == {
        "error": "KeyError",
        "module": "builtins",
        "message": "'no such thing'",
        "attrs": {"code": "7"},
    }
    assert gunicorn.get("/wrong-stream").json()["error"] == "ZeroDivisionError"


def check_pids(gunicorn: Gunicorn) -> None:
    processes = gunicorn.pids()
    (http_worker,) = gunicorn.http_worker_pids()
    (dirty_worker,) = gunicorn.dirty_worker_pids()
    arbiter = gunicorn.dirty_arbiter_pid()
    assert set(processes) == {gunicorn.master_pid, http_worker, arbiter, dirty_worker}
    assert processes[dirty_worker].ppid == arbiter
    assert processes[arbiter].ppid == processes[http_worker].ppid == gunicorn.master_pid


def test_sees_a_killed_http_worker_replaced() -> None:
    with stock_gunicorn() as gunicorn:
        mark = gunicorn.mark()
        (old,) = gunicorn.http_worker_pids()
        gunicorn.kill(old, signal.SIGKILL)
        gunicorn.wait_gone(old)
        (new,) = gunicorn.wait_http_workers(1, since=mark)
        assert gunicorn.http_worker_pids() == [new] != [old]
        with pytest.raises(AssertionError, match="no process of this gunicorn"):
            gunicorn.kill(os.getpid(), signal.SIGKILL)


def test_a_missed_deadline_shows_processes_log_and_stacks(capfd: Any) -> None:
    with stock_gunicorn() as gunicorn:
        with pytest.raises(Deadline) as failure:
            gunicorn.wait_log("never logged", deadline=0.1)
        text = str(failure.value)
        assert "never logged" in text
        assert re.search(rf"^{gunicorn.master_pid} .*gunicorn", text, re.MULTILINE)
        assert "Spawned dirty arbiter" in text
        assert "test_a_missed_deadline" in capfd.readouterr().err


def test_a_gunicorn_that_cannot_start_says_why() -> None:
    why = pytest.raises(AssertionError, match=r"exited.*\n(.*\n)*.*not today")
    with why, Gunicorn(install='raise SystemExit("not today")\n'):
        pytest.fail("started")


def test_leftover_files_and_escaped_processes_are_named() -> None:
    with stock_gunicorn(
        settings={}, ready_log=None, leftovers=["declared-*"], extra_config=ESCAPE
    ) as gunicorn:
        escaped = int(gunicorn.wait_log(r"escaped (\d+)").group(1))
        assert escaped in gunicorn.pids()
        (gunicorn.tmp / "declared-file").touch()
        stray = gunicorn.tmp / "stray-file"
        stray.touch()
        assert gunicorn.stop(grace=0.1).left != []
        with pytest.raises(AssertionError, match=rf"process {escaped}(.*\n)*.*stray-file"):
            gunicorn.assert_clean(grace=0.1)
        gunicorn.kill(escaped)
        stray.unlink()
        gunicorn.assert_clean()


# A process that leaves the session, as a badly behaved worker might.
ESCAPE = """
import subprocess, sys

def when_ready(server):
    command = [sys.executable, "-c", "import signal; signal.pause()"]
    child = subprocess.Popen(command, start_new_session=True)
    child.returncode = 0
    server.log.info("escaped %s", child.pid)
"""


# Waits


def test_wait_until_returns_the_value_or_says_what_it_waited_for() -> None:
    values = iter([0, None, "yes"])
    assert wait_until(lambda: next(values), 5, "a value") == "yes"
    with pytest.raises(Deadline, match=r"not within 0\.05 s: the moon\nseen: nothing"):
        wait_until(lambda: False, 0.05, "the moon", lambda: "seen: nothing")


def test_deadline_of_a_block_without_a_hub() -> None:
    with deadline(5):
        pass
    with pytest.raises(Deadline, match="a slow block"), deadline(0.05, "a slow block"):
        threading.Event().wait(0.1)


def test_deadline_interrupts_a_greenlet(gevent_hub: Any) -> None:
    import gevent.event

    started = time.monotonic()
    with pytest.raises(Deadline, match="an event"), deadline(0.05, "an event"):
        gevent.event.Event().wait()
    assert time.monotonic() - started < 5


# Leaks


@pytest.fixture
def before() -> Iterator[leaks.Snapshot]:
    snapshot = leaks.take()
    yield snapshot
    leaks.check(snapshot)


def assert_caught(before: leaks.Snapshot, named: str) -> None:
    with pytest.raises(leaks.Leak, match=named):
        leaks.check(before, grace=0.05)


def test_catches_a_leaked_process(before: leaks.Snapshot) -> None:
    command = [sys.executable, "-c", "input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as child:
        assert_caught(before, rf"child process {child.pid} .*input\(\)")
        child.kill()


def test_catches_a_zombie(before: leaks.Snapshot) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert_caught(before, rf"child process {child.pid} \[Z\]")
    child.wait()


def test_catches_a_leaked_descriptor(before: leaks.Snapshot) -> None:
    reader, writer = os.pipe()
    assert_caught(before, rf"descriptor {reader} -> pipe:.*\n.*descriptor {writer} -> pipe:")
    os.close(reader)
    os.close(writer)


def test_catches_a_leaked_thread(before: leaks.Snapshot) -> None:
    release = threading.Event()
    thread = threading.Thread(target=release.wait, args=(30,), name="forgotten", daemon=True)
    thread.start()
    assert_caught(before, "thread .*forgotten")
    release.set()
    thread.join(5)


def test_catches_a_leaked_temporary_file(before: leaks.Snapshot) -> None:
    directory = tempfile.mkdtemp(prefix="gunicorn-dirty-")
    assert_caught(before, re.escape(f"temporary file {directory}"))
    Path(directory).rmdir()


def test_catches_leaked_greenlets(gevent_hub: Any, before: leaks.Snapshot) -> None:
    import gevent
    import gevent.event

    started = gevent.event.Event()
    never = gevent.event.Event()

    def wait_for_ever() -> None:
        started.set()
        never.wait()

    greenlet = gevent.spawn(wait_for_ever)
    assert started.wait(5)
    assert_caught(before, "greenlet .*wait_for_ever.* at ")
    with pytest.raises(leaks.Leak, match="wait_for_ever"):
        leaks.check_greenlets(before.greenlets, grace=0.05)
    greenlet.kill()


def test_catches_a_hub_that_a_test_made(before: leaks.Snapshot) -> None:
    import gevent

    hub = gevent.get_hub()
    gevent.sleep(0)
    assert_caught(before, r"descriptor \d+ -> anon_inode:\[eventpoll\]")
    hub.destroy(destroy_loop=True)


def test_gives_what_is_just_ending_time_to_end(before: leaks.Snapshot) -> None:
    ending = threading.Thread(target=threading.Event().wait, args=(0.1,))
    ending.start()
    leaks.check(before)
    assert not ending.is_alive()
