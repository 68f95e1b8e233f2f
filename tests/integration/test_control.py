"""gunicorn's control interface (``gunicornc``) and the dirty side of a real gunicorn."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from support.gunicorn import Gunicorn
from support.waiting import wait_until

TASKS = """
import os
from gunicorn.dirty import DirtyApp

class Everywhere(DirtyApp):
    def pid(self):
        return os.getpid()

class Once(Everywhere):
    workers = 1

class Twice(Everywhere):
    workers = 5
"""

CONTROL = "Control socket listening"  # by a thread of the master's, perhaps later than HTTP
APPS = ["tasks:Everywhere", "tasks:Once", "tasks:Twice:2"]


@pytest.fixture
def server() -> Iterator[Gunicorn]:
    settings = {"dirty_apps": APPS, "dirty_workers": 3}
    options = {"control_socket": True, "ready_log": CONTROL}
    with Gunicorn(tasks_source=TASKS, settings=settings, **options) as running:
        running.wait_dirty_workers(3)
        yield running


def gunicornc(server: Gunicorn, words: str) -> str:
    socket = str(server.control_socket_path)
    command = [sys.executable, "-m", "gunicorn.ctl.cli", "-s", socket, "-c", words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def show_dirty(server: Gunicorn) -> tuple[str, dict[int, str], dict[str, tuple[int, str]]]:
    """The text, the workers' apps by pid, and each app's number of workers and limit."""
    text = gunicornc(server, "show dirty")
    workers = {int(pid): apps for pid, apps in re.findall(r"^(\d+)\s+\d+\s+(.*?)\s+n/a$", text, re.M)}
    apps = re.findall(r"^(tasks:\w+)\s+(\d+)\s+(\S+)$", text, re.M)
    return text, workers, {app: (int(count), limit) for app, count, limit in apps}


def test_show_dirty_is_full(server: Gunicorn) -> None:
    text, workers, apps = show_dirty(server)
    assert f"Dirty arbiter PID: {server.dirty_arbiter_pid()}" in text
    assert set(workers) == set(server.dirty_worker_pids())
    assert sorted(workers.values())[0] == "tasks:Everywhere"
    # The configuration's number wins over the class's.
    assert {app: count for app, (count, _) in apps.items()} == {
        "tasks:Everywhere": 3,
        "tasks:Once": 1,
        "tasks:Twice": 2,
    }
    assert apps["tasks:Once"][1] == "1" and apps["tasks:Twice"][1] == "2"


def test_the_other_commands_go_on_working(server: Gunicorn) -> None:
    pids = server.dirty_worker_pids()
    text = gunicornc(server, "show all")
    for pid in (*pids, server.dirty_arbiter_pid(), *server.http_worker_pids()):
        assert str(pid) in text
    assert str(server.dirty_arbiter_pid()) in gunicornc(server, "show stats")
    for command in ("show workers", "show config", "show listeners", "help"):
        assert gunicornc(server, command)


def test_workers_are_added_and_removed(server: Gunicorn) -> None:
    gunicornc(server, "dirty add 2")
    wait_until(lambda: len(show_dirty(server)[1]) == 5, 10, "five dirty workers")
    _, workers, apps = show_dirty(server)
    assert apps["tasks:Once"][0] == 1 and apps["tasks:Twice"][0] == 2  # the limits hold
    assert set(workers) == set(server.dirty_worker_pids())
    gunicornc(server, "dirty remove 3")
    wait_until(lambda: len(server.dirty_worker_pids()) == 2, 10, "two dirty workers")
    assert show_dirty(server)[2]["tasks:Twice"][0] == 2
    assert "ask for no fewer" in gunicornc(server, "dirty remove 1")
    assert len(server.dirty_worker_pids()) == 2


def test_a_dead_worker_is_replaced_in_the_view_too(server: Gunicorn) -> None:
    _, before, apps = show_dirty(server)
    victim = next(pid for pid, loaded in before.items() if "Once" in loaded)
    server.kill(victim)
    server.wait_gone(victim)
    server.wait_dirty_workers(3)

    def replaced() -> bool:
        _, after, again = show_dirty(server)
        return len(after) == 3 and victim not in after and again == apps

    wait_until(replaced, 10, "the replacement to be shown with the same apps")


def test_without_a_dirty_side_it_says_so() -> None:
    with Gunicorn(control_socket=True, ready_log=CONTROL) as server:
        assert "not running" in gunicornc(server, "show dirty")
