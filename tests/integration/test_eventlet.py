"""gunicorn 25.3's eventlet workers: its module patches the master that dirty processes are forked from."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator

import pytest
from support.gunicorn import Gunicorn
from support.waiting import wait_until
from support.worker_classes import needs_eventlet

pytestmark = needs_eventlet

TASKS = """
import logging, os, queue, subprocess, threading, time
from gunicorn.dirty import DirtyApp

class App(DirtyApp):
    def hold(self, name):
        print("holding", name, flush=True)
        try:
            time.sleep(60)
        finally:
            print("let go", name, flush=True)

    def echo(self, value):
        return value

    def both(self, seconds):
        '''All that eventlet had patched waits in gevent's hub.'''
        waited, lock, items = [], threading.Lock(), queue.Queue()
        lock.acquire()
        threading.Timer(seconds, lock.release).start()
        lock.acquire()
        threading.Thread(target=lambda: (time.sleep(seconds), items.put("item"))).start()
        said = subprocess.run(["sh", "-c", "echo said"], stdout=subprocess.PIPE).stdout.decode().strip()
        logging.getLogger("gunicorn.error").info("logged")
        done = [items.get(timeout=10), said]
        assert threading.current_thread() is not threading.main_thread()
        return done

    def patched(self):
        '''What eventlet still has of the standard library here.'''
        import select, socket, selectors, ssl, sys, _thread
        modules = [os, queue, select, selectors, socket, ssl, subprocess, threading, time, _thread]
        return sorted(
            f"{module.__name__}.{name}"
            for module in modules
            for name, value in vars(module).items()
            if (getattr(value, "__module__", None) or "").startswith("eventlet")
        )
"""

APP = """
import json
import eventlet
from urllib.parse import parse_qs
from gunicorn.dirty import get_dirty_client

def app(environ, start_response):
    query = {name: values[0] for name, values in parse_qs(environ["QUERY_STRING"]).items()}
    said = globals()[environ["PATH_INFO"][1:]](query)
    start_response("200 OK", [("content-type", "application/json")])
    return [json.dumps(said).encode()]

def ready(query):
    return "ready"

def call(query):
    return get_dirty_client().execute("tasks:App", query["action"], *json.loads(query.get("args", "[]")))

def timeout(query):
    try:
        with eventlet.Timeout(0.2):
            return get_dirty_client().execute("tasks:App", "hold", "timeout")
    except eventlet.Timeout:
        return "timeout"

def killed(query):
    thread = eventlet.spawn(get_dirty_client().execute, "tasks:App", "hold", "killed")
    eventlet.sleep(0.2)
    thread.kill()
    return "killed" if thread.dead else None
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Gunicorn]:
    settings = {"dirty_apps": ["tasks:App"], "dirty_workers": 1, "dirty_threads": 16}
    with Gunicorn(APP, TASKS, settings, "eventlet") as running:
        running.wait_log("Dirty worker ready")
        yield running


@pytest.mark.parametrize("name", ["timeout", "killed"])
def test_a_caller_that_gives_up_cancels_its_task(server: Gunicorn, name: str) -> None:
    assert server.get(f"/{name}").json() == name
    wait_until(lambda: f"let go {name}" in server.log_text(), 15, "the task to be cancelled", server.evidence)
    assert server.get('/call?action=echo&args=["next"]').json() == "next"


def test_locks_threads_queues_and_pipes_are_gevents_in_a_dirty_worker(server: Gunicorn) -> None:
    started = time.monotonic()
    answers = server.get_many(["/call?action=both&args=[0.25]"] * 12)
    assert [answer.json() for answer in answers] == [["item", "said"]] * 12
    assert time.monotonic() - started < 5  # over 6 s one by one


def test_nothing_of_eventlets_is_left_in_a_dirty_worker(server: Gunicorn) -> None:
    assert server.get("/call?action=patched").json() == []


def test_no_warning_but_eventlets_own_is_printed(server: Gunicorn) -> None:
    assert "MonkeyPatchWarning" not in server.log_text()


def test_install_after_eventlets_patching_says_what_to_do() -> None:
    source = """
        import eventlet
        eventlet.monkey_patch()
        import gunicorn_dirty_gevent
        gunicorn_dirty_gevent.install()
    """
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(source)],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert ended.returncode == 1
    assert "Call it first in gunicorn.conf.py, before eventlet.monkey_patch()" in ended.stderr
