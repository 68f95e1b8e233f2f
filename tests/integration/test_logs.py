"""What gunicorn's log says of the dirty side: stock's words, at its levels, in its place."""

from __future__ import annotations

import inspect
import re
import signal

import gunicorn.dirty.worker
import pytest
from support.gunicorn import OURS, STOCK, STOCK_HANGS, Gunicorn, app_with

TASKS = """
import time
from gunicorn.dirty import DirtyApp

class App(DirtyApp):
    def echo(self, value):
        return value

    def boom(self):
        raise ValueError("boo")

    def nap(self):
        time.sleep(2.5)

    def close(self):
        raise RuntimeError("cannot close")

class Broken(DirtyApp):
    def init(self):
        raise RuntimeError("cannot load")
"""

VIEWS = """
    from gunicorn.dirty import get_dirty_client

    @route("/call")
    def call(environ, query):
        return get_dirty_client().execute("tasks:App", *query["do"].split())
"""

SHARED = [
    ("INFO", r"Dirty arbiter starting \(pid: \d+\)"),
    ("INFO", r"Dirty arbiter listening on /\S+"),
    ("INFO", r"Spawned dirty worker \(pid: \d+\) with apps: \['tasks:App'\]"),
    ("DEBUG", r"Loaded dirty app: tasks:App"),
    ("INFO", r"Initialized dirty app: tasks:App"),
    ("ERROR", r"Error executing tasks:App\.boom: boo\nTraceback"),
    ("INFO", r"SIGTTIN: Increasing dirty workers to 2"),
    ("INFO", r"SIGTTOU: Decreasing dirty workers to 1"),
    ("WARNING", r"SIGTTOU: Cannot decrease below 1 workers \(required by app specs\)"),
    ("WARNING", r"Dirty worker \(pid:\d+\) killed by signal 9"),
    ("INFO", r"Dirty worker exited \(pid:\d+\)"),
    ("INFO", r"Reloading dirty workers"),
    ("ERROR", r"Error closing dirty app tasks:App: cannot close"),
    ("INFO", r"Dirty worker \d+ exiting"),
    ("INFO", r"Dirty arbiter exiting \(pid: \d+\)"),
]


stock_ends = pytest.mark.skipif(STOCK_HANGS, reason="stock gunicorn's dirty workers do not end on TERM there")


@pytest.fixture(scope="module", params=[pytest.param("stock", marks=stock_ends), "ours"])
def log(request: pytest.FixtureRequest) -> str:
    """What a life with every kind of event leaves in the log."""
    install = OURS if request.param == "ours" else STOCK
    settings = {
        "dirty_apps": ["tasks:App"],
        "dirty_workers": 1,
        "dirty_timeout": 1,
        "loglevel": "debug",
        "dirty_graceful_timeout": 3,
    }
    with Gunicorn(app_with(VIEWS), TASKS, settings, worker_class="gthread", install=install) as server:
        server.wait_log("Initialized dirty app: tasks:App")
        arbiter = server.dirty_arbiter_pid()
        if request.param == "stock":
            server.wait_log(r"Dirty worker \d+ listening on")
        assert server.get("/call?do=echo+hello").text == "hello"
        assert server.get("/call?do=boom").status == 500
        server.kill(arbiter, signal.SIGTTIN)
        server.wait_log("Increasing dirty workers")
        server.wait_dirty_workers(2)
        server.kill(arbiter, signal.SIGTTOU)
        server.wait_log("Decreasing dirty workers")
        (left,) = server.wait_dirty_workers(1)
        server.kill(arbiter, signal.SIGTTOU)
        server.wait_log("Cannot decrease")
        mark = server.mark()
        server.kill(left, signal.SIGKILL)
        server.wait_log("killed by signal 9")
        server.wait_log("Initialized dirty app: tasks:App", since=mark)  # or it would not say goodbye
        mark = server.mark()
        server.kill(arbiter, signal.SIGHUP)
        server.wait_log("Initialized dirty app: tasks:App", since=mark)
        server.wait_log(r"Dirty worker \d+ exiting", since=mark)
        if request.param == "ours":
            server.wait_log("Dirty worker exited", since=mark)
        assert server.get("/call?do=nap").status == 500
        server.stop()
        return server.log_text()


# Which of stock's two timeouts speaks first is a race there.
TIMEOUT = ("WARNING", r"Execution timeout for tasks:App\.nap after 1s")


def test_a_timeout_is_told_in_gunicorns_words(request: pytest.FixtureRequest, log: str) -> None:
    assert "Execution timeout for %s.%s after %ds" in inspect.getsource(gunicorn.dirty.worker)
    if "ours" in request.node.name:
        assert logged(log, *TIMEOUT)


def logged(log: str, level: str, words: str) -> re.Match[str] | None:
    """gunicorn's format: [time] [pid] [LEVEL] message."""
    return re.search(rf"^\[[^\]]+\] \[\d+\] \[{level}\] {words}", log, re.M)


@pytest.mark.parametrize(("level", "words"), SHARED, ids=lambda value: str(value)[:40])
def test_the_words_and_levels_are_gunicorns(log: str, level: str, words: str) -> None:
    assert logged(log, level, words), log


def test_an_app_that_does_not_load() -> None:
    settings = {"dirty_apps": ["tasks:Broken"], "dirty_workers": 1}
    with Gunicorn(tasks_source=TASKS, settings=settings) as server:
        server.wait_log(r"\[ERROR\] Failed to initialize dirty app tasks:Broken.*: cannot load")
        server.wait_log(r"\[ERROR\] Dirty worker failed to boot \(pid:\d+\)")


def test_the_level_and_the_place_are_gunicorns_settings() -> None:
    settings = {"dirty_apps": ["tasks:App"], "dirty_workers": 1, "errorlog": "-", "capture_output": True}
    tasks = TASKS + '\nprint("printed while the app is imported", flush=True)\n'
    with Gunicorn(app_with(VIEWS), tasks, settings) as server:
        server.wait_log("printed while the app is imported")
        server.wait_log(r"\[INFO\] Initialized dirty app: tasks:App")
        assert not (server.dir / "error.log").exists()
        assert "[DEBUG]" not in server.log_text()


LOGGER = """
    from gunicorn.glogging import Logger

    class Shouting(Logger):
        def info(self, message, *args, **kwargs):
            super().info("LOUD " + message, *args, **kwargs)

    logger_class = Shouting
"""


def test_a_logger_class_of_the_users_own() -> None:
    settings = {"dirty_apps": ["tasks:App"], "dirty_workers": 1}
    with Gunicorn(tasks_source=TASKS, settings=settings, extra_config=LOGGER) as server:
        server.wait_log("LOUD Dirty arbiter starting")
        server.wait_log("LOUD Initialized dirty app: tasks:App")
