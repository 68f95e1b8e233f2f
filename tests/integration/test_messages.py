"""What somebody who does not know this library reads when something is wrong, in a real gunicorn: whose
fault it is, what it cost, and what to do next."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from asking import app_source, ask, asking, collect, failure, path, wait_ready
from support.gunicorn import OURS, STOCK, Gunicorn

APP = "tasks:App"
BRIEF = "tasks:Brief"

TASKS = """
import functools
import os
import time

import gevent
from gunicorn.dirty import DirtyApp
from gunicorn_dirty_gevent import action


def injected(method):
    @functools.wraps(method)
    def wrapper(self, *args):
        return method(self, "thing", *args)
    return wrapper


class Deciding(DirtyApp):
    def __call__(self, action, *args):
        self.prepared = True
        return super().__call__("echo" if action == "batch" else action, *args)

    def echo(self, value):
        return value


class App(DirtyApp):
    def echo(self, value="nothing"):
        return value

    def decorated(self, *args, **kwargs):
        return self.echo(*args, **kwargs)

    def look_up(self):
        return {}["colour"]

    def leave(self):
        raise SystemExit(3)

    def give_up(self):
        raise gevent.Timeout(5)

    def make(self):
        return {"made": [App()]}

    def rest(self):
        print("resting", flush=True)
        try:
            gevent.sleep(60)
        finally:
            gevent.sleep(0.2)
            print("rested", flush=True)

    def redeem(self, code=None):
        return code

    def inner(self, value):
        return value

    @injected
    def outer(self, thing, value):
        return self("inner", value, "too", "many")

    @action(timeout=0.3)
    def nap(self):
        gevent.sleep(60)

    def spin(self, seconds):
        print("spinning", flush=True)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pass

    def drip(self):
        try:
            yield 1
            gevent.sleep(60)
        finally:
            gevent.sleep(1)


class Brief(DirtyApp):
    dirty_timeout = 0.4

    def rest(self):
        gevent.sleep(60)


class Crashing(DirtyApp):
    def init(self):
        os.kill(os.getpid(), 11)

    def echo(self, value):
        return value
"""


def gunicorn_with(*apps: str, extra_config: str = "", **settings: Any) -> Gunicorn:
    chosen = {"dirty_apps": list(apps), "dirty_workers": 1, "dirty_threads": 4, **settings}
    return Gunicorn(app_source(), TASKS, chosen, extra_config=extra_config)


@pytest.fixture(scope="module")
def busy() -> Iterator[Gunicorn]:
    with gunicorn_with(APP, BRIEF, "tasks:Deciding", dirty_timeout=20) as gunicorn:
        wait_ready(gunicorn, 1)
        yield gunicorn


# The call


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ([1, 2], {}, "echo() takes from 1 to 2 positional arguments but 3 were given"),
        ([], {"color": 1}, "echo() got an unexpected keyword argument 'color'"),
        ([], {"timeout": 1}, "A call's own limit is given with client.options(timeout=...)"),
    ],
)
def test_arguments_that_do_not_fit_have_run_nothing(
    busy: Gunicorn, args: list[object], kwargs: dict[str, object], words: str
) -> None:
    said = failure(ask(busy, APP, "echo", *args, **kwargs), "DirtyAppError")
    assert words in said.message
    assert said.may_have_run is False


@pytest.mark.parametrize(
    ("app", "action"),
    [(APP, "decorated"), (APP, "outer"), ("tasks:Deciding", "echo"), ("tasks:Deciding", "batch")],
)
def test_arguments_that_do_not_fit_further_in_may_have_run_something(
    busy: Gunicorn, app: str, action: str
) -> None:
    args = [1] if action == "outer" else [1, 2]
    said = failure(ask(busy, app, action, *args), "DirtyAppError")
    assert "positional argument" in said.message and "given" in said.message
    assert "it has not run" not in said.message
    assert said.may_have_run is True


def test_an_actions_argument_may_have_any_name(busy: Gunicorn) -> None:
    assert ask(busy, APP, "redeem", code="X") == "X"


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("look_up", "KeyError: 'colour'"),
        ("leave", "SystemExit: 3"),
        ("give_up", "Timeout: 5 seconds"),
    ],
)
def test_an_error_whose_text_is_no_sentence_has_its_name(busy: Gunicorn, action: str, message: str) -> None:
    assert failure(ask(busy, APP, action), "DirtyAppError").attrs["message"] == message
    busy.wait_log(rf"Error executing tasks:App\.{action}: {message}")


def test_an_answer_that_cannot_be_sent(busy: Gunicorn) -> None:
    said = failure(ask(busy, APP, "make"), "DirtyEncodeError")
    assert said.attrs["message"] == (
        "tasks:App.make ran, but its answer was not sent: cannot encode tasks.App at result['made'][0]: "
        "send plain data made from it (such as a dict, a list or a str)"
    )


# Time


@pytest.mark.parametrize(
    ("app", "action", "limit"),
    [(APP, "nap", "0.3 s .*@action(timeout=0.3)"), (BRIEF, "rest", "0.4 s .*Brief.dirty_timeout")],
)
def test_a_timeout_names_the_limit_that_was_passed(busy: Gunicorn, app: str, action: str, limit: str) -> None:
    said = failure(ask(busy, app, action), "DirtyTimeoutError")
    seconds, whose = limit.split(" .*")
    assert f"was stopped after {seconds} in dirty worker" in said.message
    assert f"({whose})" in said.message


def test_gunicorns_own_limit() -> None:
    with gunicorn_with(APP, dirty_timeout=1) as gunicorn:
        said = failure(ask(gunicorn, APP, "rest"), "DirtyTimeoutError")
        assert "was stopped after 1 s" in said.message and "(gunicorn's dirty_timeout)" in said.message


@pytest.mark.parametrize("option", ["timeout", "idle_timeout"])
def test_a_streams_timeout_is_called_as_its_caller_called_it(busy: Gunicorn, option: str) -> None:
    """The worker, which has a limit too, takes another second to answer: this is what the client says."""
    assert ask(busy, APP, "echo") == "nothing"  # the HTTP worker is connected from here on
    # Enough for the first chunk, which must be there before.
    said = failure(collect(busy, APP, "drip", options={option: 1}), "DirtyTimeoutError")
    assert f"({option})" in said.message
    assert said.chunks == [1]


def test_a_call_behind_another_that_keeps_the_hub(busy: Gunicorn) -> None:
    """The one that had no fault names the one that has; the log shows the app's frames only."""
    mark = busy.mark()
    with asking(busy, [path(APP, "spin", 3)]) as (spinning,):
        busy.wait_log("^spinning$", since=mark)
        said = failure(ask(busy, APP, "echo", options={"timeout": 1}), "DirtyTimeoutError")
        assert "it was probably not started: tasks:App.spin keeps the hub of dirty worker" in said.message
        assert spinning.result(10) is None
    told = busy.wait_log(r"tasks:App\.spin has blocked the hub .*It is at:\n((?:  .*\n)+)", since=mark)
    stack = told.group(1)
    assert "in spin" in stack
    assert "task.py" not in stack and "gunicorn/dirty" not in stack


# Starts and stops


def test_a_worker_that_dies_while_it_loads() -> None:
    with gunicorn_with("tasks:Crashing") as gunicorn:
        gunicorn.wait_log(
            r"Dirty worker \(pid:\d+\) killed by signal 11: SIGSEGV while it loaded tasks:Crash"
        )
        gunicorn.wait_log(r"Dirty workers keep failing: 3 in a row failed to boot \(see above\)")
        said = failure(
            ask(gunicorn, "tasks:Crashing", "echo", 1, options={"timeout": 1}), "DirtyTimeoutError"
        )
        assert "(the last one was killed by SIGSEGV while it loaded its apps); it has not run" in said.message
        assert said.may_have_run is False


def test_each_failed_load_is_told_to_the_callers() -> None:
    """Also where a worker's end is seen before its last words are read: callers must not wait on."""
    with gunicorn_with("tasks:Absent") as gunicorn:
        said = failure(ask(gunicorn, "tasks:Absent", "echo", 1), "DirtyAppError")
        assert said.attrs["message"] == "the app failed to load: module 'tasks' has no attribute 'Absent'"
        gunicorn.wait_log(r"Dirty worker failed to boot \(pid:\d+\): none of its apps loaded \(see above\)")


@pytest.mark.parametrize(
    ("sig", "why"),
    [(signal.SIGTERM, "dirty_graceful_timeout of 1 s is over"), (signal.SIGQUIT, "told to quit at once")],
)
def test_calls_that_a_stop_cuts_off(sig: int, why: str) -> None:
    with gunicorn_with(APP, dirty_graceful_timeout=1, graceful_timeout=10) as gunicorn:
        wait_ready(gunicorn, 1)
        with asking(gunicorn, [path(APP, "rest")]) as (call,):
            gunicorn.wait_log("^resting$")
            gunicorn.stop(sig)
            said = failure(call.result(10), "DirtyWorkerError")
        assert said.attrs["message"] == (
            f"tasks:App.rest: the dirty arbiter stopped before the call ended ({why}); "
            "it was cut off while it ran"
        )
        log = gunicorn.log_text()
        assert f"Cutting off dirty calls, {why}: 1 (tasks:App.rest)" in log
        assert "Traceback" not in log and "Error executing" not in log, "it is no error of the app's"
        assert "\nrested\n" in log, "its finally block has run to its end, though it waits"


def test_a_call_in_a_worker_that_is_told_to_quit(busy: Gunicorn) -> None:
    (pid,) = wait_ready(busy, 1)
    mark = busy.mark()
    with asking(busy, [path(APP, "rest")]) as (call,):
        busy.wait_log("^resting$", since=mark)
        busy.kill(pid, signal.SIGQUIT)
        said = failure(call.result(10), "DirtyWorkerError")
    assert f"dirty worker {pid} was told to quit at once; it was cut off while it ran" in said.message
    assert said.may_have_run is True
    wait_ready(busy, 1)


def test_an_arbiter_that_cannot_start_does_not_flood_the_log() -> None:
    hook = "def on_dirty_starting(arbiter):\n    raise ValueError('boo')\n"
    began = time.monotonic()  # of the first of its starts that are counted below
    with gunicorn_with(APP, extra_config=hook) as gunicorn:
        gunicorn.wait_log(r"Exception in dirty arbiter process \(pid: \d+\): it cannot start(.*\n)+?.*: boo")
        said = failure(ask(gunicorn, APP, "echo", options={"timeout": 2.5}), "DirtyTimeoutError")
        assert "there was no connection to the dirty arbiter at /" in said.message
        assert said.may_have_run is False
        starts = len(re.findall("it cannot start", gunicorn.log_text()))
        assert starts <= 3 + time.monotonic() - began
        assert gunicorn.stop().seconds < 8


def test_no_calls_at_once_is_no_setting() -> None:
    """Nor one that a reload may end gunicorn with: the HTTP workers go on."""
    with gunicorn_with(APP) as gunicorn:
        config = gunicorn.dir / "gunicorn.conf.py"
        right = config.read_text()
        config.write_text(right + "\ndirty_threads = 0\n")
        gunicorn.kill(gunicorn.master_pid, signal.SIGHUP)
        gunicorn.wait_log(r"it cannot start(.*\n)+?ValueError: dirty_threads is 0: it is how many calls each")
        said = failure(ask(gunicorn, APP, "echo", options={"timeout": 0.5}), "DirtyTimeoutError")
        assert said.may_have_run is False
        mark = gunicorn.mark()
        config.write_text(right)
        gunicorn.kill(gunicorn.master_pid, signal.SIGHUP)
        gunicorn.wait_log("Dirty worker ready", 20, since=mark)
        assert ask(gunicorn, APP, "echo") == "nothing"


def test_an_unknown_option_is_told_with_those_that_there_are() -> None:
    install = OURS.replace("install()", "install(queue_sice=5)")
    with (
        pytest.raises(
            AssertionError, match=r"TypeError: install.. has no queue_sice; its options are queue_size, "
        ),
        Gunicorn(app_source(), TASKS, {"dirty_apps": [APP], "dirty_workers": 1}, install=install),
    ):
        pytest.fail("started")


def test_a_worker_that_is_stopped_while_it_loads_is_no_warning() -> None:
    source = (
        TASKS
        + "\n\nclass Slow(App):\n    def init(self):\n"
        + "        print('loading', flush=True)\n        time.sleep(60)\n"
    )
    settings = {"dirty_apps": ["tasks:Slow"], "dirty_workers": 1}
    with Gunicorn(app_source(), source, settings) as gunicorn:
        gunicorn.wait_log("^loading$")
        gunicorn.stop()
        assert re.search(r"\[INFO\] Dirty worker \(pid:\d+\) killed by signal 15", gunicorn.log_text())
        assert "[WARNING]" not in gunicorn.log_text()


# Set-up


def test_the_log_says_which_arbiter_it_is_and_what_cannot_hold() -> None:
    with gunicorn_with(APP, dirty_graceful_timeout=9, graceful_timeout=5) as gunicorn:
        gunicorn.wait_log(r"gunicorn_dirty_gevent \d.*: 1 dirty workers, up to 4 calls at once in each")
        gunicorn.wait_log(r"\[WARNING\] dirty_graceful_timeout \(9 s\) is above graceful_timeout \(5 s\)")


LATE = """
@route("/install")
def late(environ, query):
    import gunicorn_dirty_gevent
    gunicorn_dirty_gevent.install()
    return "installed"
"""


@pytest.mark.parametrize("install", [OURS, STOCK], ids=["ours", "stock"])
def test_install_in_a_view_is_too_late(install: str) -> None:
    settings = {"dirty_apps": [APP], "dirty_workers": 1}
    leftovers = ["gunicorn-dirty-*"] if install == STOCK else []
    with Gunicorn(app_source(LATE), TASKS, settings, install=install, leftovers=leftovers) as gunicorn:
        gunicorn.wait_log("Initialized dirty app")
        assert gunicorn.get("/install").text == "installed"
        assert ("install() comes too late" in gunicorn.log_text()) == (install == STOCK)


def test_a_class_that_is_no_dirty_app() -> None:
    source = TASKS + "\n\nclass Plain:\n    def echo(self, value):\n        return value\n"
    with Gunicorn(app_source(), source, {"dirty_apps": ["tasks:Plain"], "dirty_workers": 1}) as gunicorn:
        said = failure(ask(gunicorn, "tasks:Plain", "echo", 1), "DirtyAppError")
        assert said.attrs["message"] == (
            "the app failed to load: tasks:Plain is missing required method: init; "
            "does it inherit from DirtyApp?"
        )


@pytest.mark.parametrize("written", ["@action", "@action(1)"])
def test_action_without_its_parentheses_or_names(written: str) -> None:
    source = TASKS.replace("@action(timeout=0.3)", written)
    with Gunicorn(app_source(), source, {"dirty_apps": [APP], "dirty_workers": 1}) as gunicorn:
        said = failure(ask(gunicorn, APP, "echo"), "DirtyAppError")
        assert "action is written with parentheses and names: @action(timeout=5)" in said.message


ASYNC = """
@route("/coroutine")
def coroutine(environ, query):
    import asyncio

    async def view():
        client = get_dirty_client()
        return [client.execute("tasks:App", "echo", 1), client.execute("tasks:App", "echo", 2)]

    return asyncio.run(view())
"""


def test_a_call_that_blocks_an_event_loop_is_told_once() -> None:
    settings = {"dirty_apps": [APP], "dirty_workers": 1}
    with Gunicorn(app_source(ASYNC), TASKS, settings, worker_class="gthread") as gunicorn:
        assert ask(gunicorn, APP, "echo", 1) == 1
        assert "RuntimeWarning" not in gunicorn.log_text(), "a view that is no coroutine waits as it should"
        for _ in range(2):
            assert gunicorn.get("/coroutine").json() == [1, 2]
        told = re.findall(r".*RuntimeWarning: a dirty call in a coroutine.*", gunicorn.log_text())
        assert len(told) == 1 and "app.py" in told[0].split(":")[0]


def test_new_settings_with_broken_code_are_told_for_what_they_are() -> None:
    """The old arbiter does not try the new code: its successor has other settings."""
    with gunicorn_with(APP) as gunicorn:
        wait_ready(gunicorn, 1)
        config = gunicorn.dir / "gunicorn.conf.py"
        config.write_text(config.read_text() + "\ndirty_threads = 2\n")
        gunicorn.write("tasks.py", "no Python")
        mark = gunicorn.mark()
        gunicorn.kill(gunicorn.master_pid, signal.SIGHUP)
        gunicorn.wait_log("Dirty settings have changed: replacing the dirty arbiter", since=mark)
        gunicorn.wait_log(r"Dirty worker failed to boot \(pid:\d+\): none of its apps loaded", since=mark)
        said = failure(ask(gunicorn, APP, "echo"), "DirtyAppError")
        assert "the app failed to load: invalid syntax" in said.message
        log = gunicorn.log_since(mark)
        assert "Reload failed" not in log and "Reloading dirty workers" not in log
        assert log.index("Spawned dirty arbiter") < log.index("Failed to initialize dirty app")
        gunicorn.write("tasks.py", TASKS)
        gunicorn.wait_log("Dirty worker ready", 20, since=mark)
        assert ask(gunicorn, APP, "echo") == "nothing"
