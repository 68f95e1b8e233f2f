"""An example, served by a real gunicorn with the example's own configuration."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from support.gunicorn import Gunicorn

EXAMPLES = Path(__file__).parents[2] / "examples"
START = 40.0  # seconds until gunicorn listens
ANSWER = 40.0  # seconds for one answer, the dirty workers' start included


def needs(*modules: str) -> pytest.MarkDecorator:
    """Skip a module of tests where what its example imports is not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    reason = f"needs {', '.join(missing)}: pip install -e '.[examples]'"
    return pytest.mark.skipif(bool(missing), reason=reason)


def served(name: str, env: dict[str, str] | None = None) -> Gunicorn:
    """gunicorn as examples/<name>/README.rst starts it, but on a port of the kernel's choice."""
    folder = EXAMPLES / name
    own = ["-c", str(folder / "gunicorn.conf.py"), "--chdir", str(folder), "-b", "127.0.0.1:0"]
    return Gunicorn(
        app_source="",  # what is served is in the example's folder
        args=[*own, "--no-control-socket"],
        env=env,
        ready=None,  # the first answer waits for the HTTP worker and the dirty workers
        start_deadline=START,
    )


def stops_clean(gunicorn: Gunicorn) -> None:
    """Stop it; nothing is left, and nothing went wrong that a user would find in the log."""
    report = gunicorn.stop()
    assert (report.exit_code, report.left) == (0, [])
    assert "Traceback" not in gunicorn.log_text()
