"""gunicorn's dirty hooks as its guide shows them, beside stock; and what a failing hook costs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.gunicorn import OURS, STOCK, Gunicorn

TASKS = """
from gunicorn.dirty import DirtyApp

class App(DirtyApp):
    def echo(self, value):
        return value
"""

APP = """
from gunicorn.dirty import get_dirty_client
from gunicorn.dirty.errors import DirtyError

def app(environ, start_response):
    start_response("200 OK", [("content-type", "text/plain")])
    if environ["PATH_INFO"] == "/ready":
        return [b"ready"]
    try:
        return [get_dirty_client().execute("tasks:App", "echo", "said").encode()]
    except DirtyError as error:
        return [f"{type(error).__name__}: {error.message}".encode()]
"""

GUIDE = """
def on_dirty_starting(arbiter):
    print(f"starting: {arbiter.cfg.dirty_workers} workers, mine {arbiter.num_workers}", flush=True)
    arbiter.log.info("told by on_dirty_starting")

def dirty_post_fork(arbiter, worker):
    print(f"forked: age {worker.age}, {worker.app_paths}, known {worker.pid in arbiter.workers}", flush=True)

def dirty_worker_init(worker):
    for path, app in worker.apps.items():
        print(f"initialized: age {worker.age}, {path} is a {type(app).__name__}", flush=True)
    worker.log.info("told by dirty_worker_init")

def dirty_worker_exit(arbiter, worker):
    print(f"exited: age {worker.age}, known {worker.pid in arbiter.workers}", flush=True)
"""

SETTINGS = {"dirty_apps": ["tasks:App"], "dirty_workers": 2}

HOOKS = {
    "on_dirty_starting": "arbiter",
    "dirty_post_fork": "arbiter, worker",
    "dirty_worker_init": "worker",
    "dirty_worker_exit": "arbiter, worker",
}


def what_hooks_said(install: str) -> list[str]:
    leftovers = ["gunicorn-dirty-*"] if install == STOCK else []
    with Gunicorn(
        APP, TASKS, SETTINGS, "sync", extra_config=GUIDE, install=install, leftovers=leftovers
    ) as running:
        for age in (1, 2):
            running.wait_log(rf"^initialized: age {age}")
        running.wait_log("told by on_dirty_starting")
        running.stop()
        said = re.findall(r"^(?:starting|forked|initialized|exited): .*$", running.log_text(), re.M)
    return sorted(said)


def test_the_guides_hooks_say_the_same_on_stock() -> None:
    ours = what_hooks_said(OURS)
    assert ours == sorted(
        [
            "starting: 2 workers, mine 2",
            *(f"forked: age {age}, ['tasks:App'], known True" for age in (1, 2)),
            *(f"initialized: age {age}, tasks:App is a App" for age in (1, 2)),
            *(f"exited: age {age}, known False" for age in (1, 2)),
        ]
    )
    # Stock's workers may outlive its arbiter's last look: not every exit is told there.
    exits = {line for line in ours if line.startswith("exited")}
    assert [line for line in what_hooks_said(STOCK) if line not in exits] == [
        line for line in ours if line not in exits
    ]


@pytest.mark.parametrize("hook", ["dirty_post_fork", "dirty_worker_exit"])
def test_a_hook_that_raises_in_the_arbiter_costs_nothing(hook: str) -> None:
    raising = f"def {hook}({HOOKS[hook]}):\n    raise ValueError('boo')\n"
    with Gunicorn(APP, TASKS, SETTINGS, extra_config=raising) as running:
        assert running.get("/").text == "said"
        assert running.stop().exit_code == 0
        assert f"Exception in a dirty hook ({hook})" in running.log_text()
        assert "ValueError: boo" in running.log_text()


def test_a_dirty_worker_init_that_raises_is_told_to_callers() -> None:
    raising = "def dirty_worker_init(worker):\n    raise ValueError('boo')\n"
    with Gunicorn(APP, TASKS, SETTINGS, extra_config=raising) as running:
        why = "the hook dirty_worker_init raised ValueError: boo"
        assert running.get("/").text == f"DirtyAppError: the app failed to load: {why}"
        running.wait_log("failed to boot")


SPECS = {
    "tasks:App:0": "Worker count must be >= 1, got 0",
    "tasks:App:many": "Expected integer, got 'many'",
    "tasks": "Expected 'module.path:ClassName' or 'module.path:ClassName:N'",
    "tasks:App:1:2": "Expected 'module.path:ClassName' or 'module.path:ClassName:N'",
}


@pytest.mark.parametrize("install", [OURS, STOCK], ids=["ours", "stock"])
@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_that_is_none_ends_the_start_in_gunicorns_words(
    spec: str, install: str, tmp_path: Path
) -> None:
    (tmp_path / "app.py").write_text(APP)
    config = f"{install}\nbind = '127.0.0.1:0'\ndirty_workers = 1\ndirty_apps = [{spec!r}]\n"
    (tmp_path / "gunicorn.conf.py").write_text(config)
    ended = subprocess.run(
        [sys.executable, "-m", "gunicorn", "app:app"],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode != 0
    assert SPECS[spec] in ended.stderr and spec in ended.stderr
