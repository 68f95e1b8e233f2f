"""The README's two set-up commands, .ci/run, and the quickstart served by a real gunicorn."""

import base64
import io
import json
import os
import pathlib
import re
import subprocess

from PIL import Image
from support.gunicorn import Gunicorn, Response

TOP = pathlib.Path(__file__).parent.parent
QUICKSTART = TOP / "examples" / "quickstart"

START = 40.0  # seconds until gunicorn listens; a loaded machine of 2 cores needs far less
ANSWER = 40.0  # seconds for one answer, the dirty workers' start included


# -- the README's commands ------------------------------------------------------------------------


def setup_commands() -> dict[str, str]:
    """What stands in the README's code blocks with a name that begins with ``setup-``."""
    readme = (TOP / "README.rst").read_text(encoding="utf-8")
    block = re.compile(r"^\.\. code-block:: sh\n +:name: (setup-\w+)\n\n((?: .*\n)+)", re.M)
    return {name: body.strip() for name, body in block.findall(readme)}


def test_the_readme_has_two_set_up_commands_of_one_line_each():
    readme = (TOP / "README.rst").read_text(encoding="utf-8")
    commands = setup_commands()
    assert list(commands) == ["setup-run", "setup-test"]
    assert readme.count(":name: setup-") == 2
    assert readme.count("pip install") == readme.count("venv .venv") == 2
    assert [len(command.splitlines()) for command in commands.values()] == [1, 1]


def test_the_first_command_runs_the_quickstart_and_the_second_the_tests():
    run, tests = setup_commands().values()
    assert "cd examples/quickstart" in run
    assert "gunicorn -k gevent app:app" in run
    assert "curl" in run
    assert tests.endswith("-m pytest -n 2")


def test_ci_run_runs_ruff_mypy_and_sphinx_and_then_the_second_command(tmp_path):
    checkout = tmp_path / "checkout"
    readme = (TOP / "README.rst").read_text(encoding="utf-8")
    tests = setup_commands()["setup-test"]
    called = tmp_path / "called"
    (checkout / ".ci").mkdir(parents=True)
    (checkout / ".ci" / "run").write_bytes((TOP / ".ci" / "run").read_bytes())
    (checkout / "README.rst").write_text(
        readme.replace(tests, f"pwd >> {called} && exit 7"), encoding="utf-8"
    )
    # node and dot: the real script must not find them missing and call apt-get.
    for stub in ("bin/python3", "bin/node", "bin/dot", "checkout/.venv/bin/pip", "checkout/.venv/bin/ruff",
                 "checkout/.venv/bin/mypy", "checkout/.venv/bin/sphinx-build"):  # fmt: skip
        path = tmp_path / stub
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/bin/sh\necho {path.name} "$1" >> {called}\n')
        path.chmod(0o755)
    done = subprocess.run(
        ["bash", str(checkout / ".ci" / "run")],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=30,
    )
    assert done.returncode == 7, done.stderr.decode()
    *_, ruff, mypy, sphinx, last = called.read_text().splitlines()
    assert [ruff, mypy, sphinx] == ["ruff check", "mypy ", "sphinx-build -W"]
    assert last == str(checkout.resolve())


# -- the quickstart -------------------------------------------------------------------------------


def quickstart() -> Gunicorn:
    """gunicorn with the quickstart's own configuration, on a port of the kernel's choice."""
    config = str(QUICKSTART / "gunicorn.conf.py")
    args = ["-c", config, "--chdir", str(QUICKSTART), "-k", "gevent", "-b", "127.0.0.1:0"]
    return Gunicorn(
        app_source="",  # what is served is in examples/quickstart
        args=[*args, "--no-control-socket"],
        ready=None,  # the first answer waits for the HTTP worker and the dirty workers
        start_deadline=START,
    )


def picture(jpeg: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(jpeg))
    image.load()
    assert image.format == "JPEG"
    return image


def events(response: Response) -> list[dict]:
    """The data of every server-sent event, in order."""
    assert response.headers["content-type"] == "text/event-stream"
    assert response.text.endswith("\n\n")
    return [json.loads(event.removeprefix("data: ")) for event in response.text.split("\n\n")[:-1]]


def test_the_quickstart_answers_streams_and_stops():
    with quickstart() as gunicorn:
        answer = gunicorn.get("/thumbnail?width=160", timeout=ANSWER)
        assert (answer.status, answer.headers["content-type"]) == (200, "image/jpeg")
        assert picture(answer.body).size == (160, 107)

        answer = gunicorn.get("/histogram?bins=4", timeout=ANSWER)
        assert answer.headers["content-type"] == "application/json"
        counts = answer.json()
        assert (counts["width"], counts["height"]) == (1200, 800)
        assert [sum(counts[c]) for c in ("red", "green", "blue")] == [1200 * 800] * 3

        assert gunicorn.get("/thumbnail?width=many", timeout=ANSWER).status == 400

        # Eight readers at once, each with a width of its own: each must get its own sheet.
        widths = [60, 70, 80, 90, 100, 110, 120, 130]
        paths = [f"/progress?width={width}" for width in widths]
        answers = gunicorn.get_many(paths, timeout=ANSWER)
        for width, answer in zip(widths, answers, strict=True):
            *cells, last = events(answer)
            assert [(cell["done"], cell["of"]) for cell in cells] == [(n, 6) for n in range(1, 7)]
            assert picture(base64.b64decode(last["sheet"])).width == 3 * width

        report = gunicorn.stop()
        assert (report.exit_code, report.left) == (0, [])
        assert "Traceback" not in gunicorn.log_text()
