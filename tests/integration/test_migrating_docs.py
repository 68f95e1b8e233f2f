"""The code of docs/migrating.rst, in a real gunicorn."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.gunicorn import Gunicorn

MIGRATING = (Path(__file__).parents[2] / "docs" / "migrating.rst").read_text()

SERVE = """
import json

def app(environ, start_response):
    name, _, argument = environ["PATH_INFO"][1:].partition("/")
    said = "ready" if name == "ready" else globals()[name](json.loads(argument))
    start_response("200 OK", [("content-type", "application/json")])
    return [json.dumps(said if isinstance(said, (int, str, list)) else list(said)).encode()]
"""


def code(name: str) -> str:
    block = re.search(rf"   :name: {name}\n\n((?:   .*\n|\n)+)", MIGRATING)
    assert block is not None
    return textwrap.dedent(block[1])


def first_line() -> str:
    """The one line that switches."""
    block = re.search(r"\.\. code-block:: python\n\n   (.*install\(\))\n", MIGRATING)
    assert block is not None
    return block[1]


@pytest.fixture(params=["celery", "mule"])
def served(request: pytest.FixtureRequest) -> Iterator[tuple[str, Gunicorn]]:
    app = {"celery": "tasks:Reports", "mule": "tasks:Mule"}[request.param]
    settings = {"dirty_apps": [app], "dirty_workers": 2, "dirty_threads": 4}
    views = code(f"{request.param}-views") + SERVE
    with Gunicorn(views, code(f"{request.param}-tasks"), settings, install=first_line()) as running:
        yield request.param, running


def test_the_code_for_those_who_come_from_elsewhere_works(served: tuple[str, Gunicorn]) -> None:
    kind, gunicorn = served
    if kind == "celery":
        assert gunicorn.get("/both_totals/[10, 20]".replace(" ", "%20")).json() == [30.0, 33.0]
        assert gunicorn.get("/progress/[1,2]").json() == ["1 of 2\n", "2 of 2\n"]
    else:
        hits = sorted(answer.json() for answer in gunicorn.get_many(['/count/"home"'] * 20))
        assert hits == list(range(1, 21))
