"""Processes of the dirty side are killed all the time: every call ends, and ends right or with an error."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
from asking import app_source, ask_many, path, wait_ready
from support.gunicorn import Gunicorn

APP = "tasks:App"

TASKS = """
import time
from gunicorn.dirty import DirtyApp


class App(DirtyApp):
    def echo(self, value):
        return value

    def nap(self, value, seconds):
        time.sleep(seconds)
        return value

    def compute(self, value, n):
        return [value, sum(i * i for i in range(n))]

    def big(self, value):
        return value

    def tokens(self, value, n):
        for number in range(n):
            yield [value, number]
            time.sleep(0.005)
"""

DEADLINE = 5.0
"""Seconds that a caller gives its call."""

GRACE = 2.5
"""Seconds that HTTP and two busy cores may add."""

KILL_INTERVAL = 0.7
CALLERS = 10


@dataclass(frozen=True)
class Call:
    """A call, what it must return, and whether it is a stream."""

    path: str
    value: Any
    stream: bool = False


@dataclass(frozen=True)
class Ended:
    call: Call
    seconds: float
    verdict: (
        str  # "ok", "wrong", "broken" (HTTP), "foreign" (an error that is none of ours), or the error's name
    )
    detail: str = ""


def make_call(n: int) -> Call:
    options = {"timeout": json.dumps(DEADLINE)}
    token = f"token {n}"
    kind = n % 10
    if kind < 4:
        return Call(path(APP, "echo", token, options=options), token)
    if kind < 6:
        return Call(path(APP, "nap", token, 0.01 * (n % 7), options=options), token)
    if kind == 6:
        value = [token, sum(i * i for i in range(20000))]
        return Call(path(APP, "compute", token, 20000, options=options), value)
    if kind == 7:
        big = token * 300
        return Call(path(APP, "big", big, options=options), big)
    chunks = [[token, number] for number in range(12)]
    return Call(path(APP, "tokens", token, 12, route="/collect", options=options), chunks, stream=True)


def make(gunicorn: Gunicorn, call: Call) -> Ended:
    began = time.monotonic()
    try:
        response = gunicorn.get(call.path, timeout=DEADLINE + 15)
    except (OSError, http.client.HTTPException) as error:
        return Ended(call, time.monotonic() - began, "broken", repr(error))
    seconds = time.monotonic() - began
    if response.status != 200:
        return Ended(call, seconds, "broken", f"{response.status} {response.text[:500]}")
    said = response.json()
    if "error" in said:
        return Ended(call, seconds, *judged(call, said))
    value = said["chunks"] if call.stream else said["result"]
    right = value == call.value
    return Ended(call, seconds, "ok" if right else "wrong", "" if right else repr(value)[:500])


def judged(call: Call, said: dict[str, Any]) -> tuple[str, str]:
    """An error: it must be one of the library's, and what a stream gave before it must be right."""
    chunks = said.get("chunks", [])
    if call.stream and chunks != call.value[: len(chunks)]:
        return "wrong", repr(chunks)[:500]
    ours = said["module"] in ("gunicorn.dirty.errors", "gunicorn_dirty_gevent.errors")
    if not ours or "DirtyError" not in said["bases"] or "may_have_run" not in said["attrs"]:
        return "foreign", f"{said['module']}.{said['error']}: {said['message']}"
    return said["error"], said["message"]


class Callers:
    """Threads that call until they are told to stop."""

    def __init__(self, gunicorn: Gunicorn) -> None:
        self._gunicorn = gunicorn
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._next = 0
        self.ended: list[Ended] = []
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(CALLERS)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                number = self._next
                self._next += 1
            self.ended.append(make(self._gunicorn, make_call(number)))

    def finish(self) -> list[Ended]:
        self._stop.set()
        until = time.monotonic() + DEADLINE + 20
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        assert not any(thread.is_alive() for thread in self._threads), "a call has not ended"
        return self.ended


def kill_now_and_then(gunicorn: Gunicorn, seconds: float, chance: random.Random) -> Counter[str]:
    """`kill -9` to a random dirty worker, and every fourth time to the arbiter."""
    killed: Counter[str] = Counter()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        # The interval is the test's load, not a wait for something.
        threading.Event().wait(KILL_INTERVAL)
        workers = gunicorn.dirty_worker_pids()
        arbiter = sum(killed.values()) % 4 == 3
        victim = gunicorn.dirty_arbiter_pid(15) if arbiter else chance.choice(workers) if workers else 0
        if not victim:
            killed["nobody there"] += 1
            continue
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            continue
        killed["arbiter" if arbiter else "worker"] += 1
    return killed


@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param(15, marks=pytest.mark.deadline(120)),
        pytest.param(120, marks=[pytest.mark.deadline(300), pytest.mark.long]),
    ],
)
def test_every_call_ends_while_processes_are_killed(seconds: int, request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("long") and "long" not in request.config.getoption("markexpr"):
        pytest.skip("takes minutes: run with -m long")
    seed = int(os.environ.get("CHAOS_SEED", random.randrange(10**6)))
    print(f"CHAOS_SEED={seed}")
    settings = {
        "workers": 2,
        "dirty_apps": [APP],
        "dirty_workers": 3,
        "dirty_threads": 20,
        "dirty_timeout": 10,
    }
    with Gunicorn(app_source(), TASKS, settings) as gunicorn:
        wait_ready(gunicorn, 3)
        http_workers = gunicorn.http_worker_pids()
        callers = Callers(gunicorn)
        try:
            killed = kill_now_and_then(gunicorn, seconds, random.Random(seed))
        finally:
            ended = callers.finish()
        report(ended, killed)
        check(ended, seconds, killed)
        # The pool is whole.
        wait_ready(gunicorn, 3, deadline=20)
        echoes = ask_many(gunicorn, [path(APP, "nap", n, 0.01) for n in range(60)], 6)
        assert echoes == list(range(60))
        assert gunicorn.http_worker_pids() == http_workers
        stopped = gunicorn.stop()
        assert (stopped.exit_code, stopped.left) == (0, [])
        gunicorn.assert_clean()


def report(ended: list[Ended], killed: Counter[str]) -> None:
    counts = Counter(one.verdict for one in ended)
    errors = len(ended) - counts["ok"]
    longest = max(one.seconds for one in ended)
    print(f"killed: {dict(killed)}")
    print(
        f"calls: {len(ended)}, {errors} errors ({100 * errors / len(ended):.2f} %), longest {longest:.2f} s"
    )
    print(f"verdicts: {dict(counts)}")


def check(ended: list[Ended], seconds: float, killed: Counter[str]) -> None:
    assert killed["worker"] >= seconds / 3 and killed["arbiter"] >= 2
    bad = [one for one in ended if one.verdict in ("wrong", "broken", "foreign")]
    assert not bad, bad[:5]
    late = [one for one in ended if one.seconds > DEADLINE + GRACE]
    assert not late, late[:5]
    errors = [one for one in ended if one.verdict != "ok"]
    assert errors, "nothing was hit: this has not tested much"
    assert len(errors) < 0.08 * len(ended), errors[:5]
    assert {one.verdict for one in errors} <= {
        "DirtyWorkerDiedError",
        "DirtyConnectionError",
        "DirtyTimeoutError",
    }
    assert any(one.call.stream and one.verdict == "ok" for one in ended)
