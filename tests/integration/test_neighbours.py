"""A worker that is blocked by one call is not killed over another that could not start."""

from __future__ import annotations

from support.gunicorn import Gunicorn, app_with

VIEWS = """
import os, time
from gunicorn.dirty import get_dirty_client
from gunicorn.dirty.errors import DirtyError

@route("/call")
def call(environ, query):
    try:
        return {"value": get_dirty_client().execute("tasks:App", query["action"])}
    except DirtyError as error:
        return {"error": type(error).__name__, "message": error.message}
"""

TASKS = """
import os, time
from gunicorn.dirty import DirtyApp
from gunicorn_dirty_gevent import action

class App(DirtyApp):
    @action(timeout=30)
    def compute(self):
        print("computing", flush=True)
        end = time.monotonic() + 4
        while time.monotonic() < end:
            pass
        return os.getpid()

    def pid(self):
        return os.getpid()
"""


def test_a_call_that_computes_within_its_limit_does_not_lose_its_worker() -> None:
    settings = {"dirty_apps": ["tasks:App"], "dirty_workers": 1, "dirty_threads": 4, "dirty_timeout": 1}
    with Gunicorn(app_with(VIEWS), TASKS, settings=settings) as gunicorn:
        gunicorn.wait_log("Dirty worker ready")
        (worker,) = gunicorn.dirty_worker_pids()
        computing, beside = gunicorn.get_many(["/call?action=compute", "/call?action=pid"], timeout=20)
        assert computing.json() == {"value": worker}
        # Which of the two came first is the system's choice.
        if "value" not in beside.json():
            assert beside.json()["error"] == "DirtyTimeoutError"
            assert "tasks:App.compute keeps the hub" in beside.json()["message"]
        assert gunicorn.get("/call?action=pid").json() == {"value": worker}
        assert "DIRTY WORKER TIMEOUT" not in gunicorn.log_text()
