"""The clients in docs/protocol.rst, against a real gunicorn; and what its text says of JSON."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.gunicorn import Gunicorn
from support.waiting import wait_until

PROTOCOL = (Path(__file__).parents[2] / "docs" / "protocol.rst").read_text()

TASKS = """
import datetime, os, time
from gunicorn.dirty import DirtyApp

class Words(DirtyApp):
    def spell(self, word):
        try:
            for letter in word:
                yield letter
        finally:
            print("spelled", word[:5], flush=True)

    def echo(self, *args, **kwargs):
        return [args, kwargs]

    def hold(self, name):
        while not os.path.exists(f"release-{name}"):
            time.sleep(0.005)
        return name

    def date(self):
        return datetime.date(2026, 1, 2)

    def nan(self):
        return float("nan")

    def boom(self):
        raise ValueError("boo")
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Gunicorn]:
    settings = {"dirty_apps": ["tasks:Words"], "dirty_workers": 1, "dirty_threads": 8}
    with Gunicorn(tasks_source=TASKS, settings=settings) as running:
        running.wait_log("Dirty worker ready")
        yield running


@pytest.fixture
def path(server: Gunicorn) -> str:
    return str(server.wait_log(r"Dirty arbiter listening on (\S+)")[1])


class Json:
    """A connection that speaks JSON."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(path)
        self.stream = self.sock.makefile("rb")

    def send(self, value: Any) -> None:
        text = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.sock.sendall(len(text).to_bytes(4, "big") + text)

    def ask(self, theirs: Any, action: str, *args: Any, **kwargs: Any) -> None:
        names = {"type": "request", "id": theirs, "app_path": "tasks:Words", "action": action}
        self.send({**names, "args": args, "kwargs": kwargs})

    def answer(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.stream.read(int.from_bytes(self.stream.read(4), "big")))
        return told

    def __enter__(self) -> Json:
        return self

    def __exit__(self, *error: object) -> None:
        self.stream.close()
        self.sock.close()


def code(name: str) -> str:
    found = re.search(rf"^   :name: {name}\n\n((?:   .*\n|\n)+)", PROTOCOL, re.M)
    assert found is not None, name
    return textwrap.dedent(found[1]).strip()


@pytest.mark.parametrize(
    ("name", "command"),
    [("json-client-python", [sys.executable, "-c"]), ("json-client-node", ["node", "-e"])],
)
def test_the_clients_of_the_documentation(path: str, name: str, command: list[str]) -> None:
    program = shutil.which(command[0])
    if program is None:
        pytest.skip(f"no {command[0]} here")  # .ci/run installs it
    done = subprocess.run(
        [program, *command[1:], code(name)],
        env={"GUNICORN_DIRTY_SOCKET": path},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.stderr == "" and done.returncode == 0
    *letters, end = done.stdout.splitlines()
    assert letters == list("hello")
    assert json.loads(end.replace("'", '"')) == {"type": "end", "id": 1}


def test_answers_come_as_they_are_ready(server: Gunicorn, path: str) -> None:
    with Json(path) as client:
        client.ask("slow", "hold", "slow")
        client.ask("quick", "echo", 1, two=[None, "é"])
        assert client.answer() == {"type": "response", "id": "quick", "result": [[1], {"two": [None, "é"]}]}
        server.write("release-slow", "")
        assert client.answer() == {"type": "response", "id": "slow", "result": "slow"}


def test_args_and_kwargs_may_be_left_out(path: str) -> None:
    with Json(path) as client:
        client.send({"type": "request", "id": 1, "app_path": "tasks:Words", "action": "echo"})
        assert client.answer()["result"] == [[], {}]


@pytest.mark.parametrize(
    ("message", "error_type", "why"),
    [
        (b"{", "DirtyProtocolError", "not JSON"),
        ([1], "DirtyProtocolError", "a JSON object"),
        ({"id": 1, "type": "request"}, "DirtyProtocolError", "app_path"),
        (
            {"id": 1, "type": "request", "app_path": "tasks:Words", "action": "echo", "args": {"a": 1}},
            "DirtyProtocolError",
            "args",
        ),
        ({"id": 1, "app_path": "tasks:Nope", "action": "x"}, "DirtyAppNotFoundError", "tasks:Words"),
        ({"id": 1, "app_path": "tasks:Words", "action": "x"}, "DirtyActionNotFoundError", "spell"),
    ],
)
def test_a_message_that_makes_no_sense_has_an_answer(
    path: str, message: Any, error_type: str, why: str
) -> None:
    with Json(path) as client:
        client.ask(0, "echo")  # the first bytes tell the dialect
        client.answer()
        client.send(message)
        error = client.answer()["error"]
        assert error["error_type"] == error_type and why in error["message"]
        assert error["details"]["may_have_run"] is False
        client.ask(2, "echo", "after")
        assert client.answer()["result"] == [["after"], {}]


@pytest.mark.parametrize("action", ["date", "nan"])
def test_what_json_has_no_form_for_is_an_error(path: str, action: str) -> None:
    with Json(path) as client:
        client.ask(1, action)
        assert client.answer()["error"]["error_type"] == "DirtyEncodeError"


def test_an_error_of_the_action_has_its_traceback(path: str) -> None:
    with Json(path) as client:
        client.ask(1, "boom")
        error = client.answer()["error"]
        assert (error["error_type"], error["message"]) == ("DirtyAppError", "boo")
        assert "ValueError: boo" in error["details"]["traceback"]


def test_closing_the_connection_cancels_its_calls(server: Gunicorn, path: str) -> None:
    with Json(path) as client:
        client.ask(1, "spell", "abcde" * 1_000_000)
        assert client.answer()["data"] == "a"
    wait_until(lambda: "spelled abcde" in server.log_text(), 10, "the generator to be closed")
