"""For every test: a hard deadline, and nothing left behind."""

from __future__ import annotations

import faulthandler
import os
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

# `support` is imported by this name from every directory below.
HERE = str(Path(__file__).parent)
if HERE not in sys.path:
    sys.path.insert(0, HERE)

from support import leaks, waiting  # noqa: E402

# Hypothesis fails an example that takes 200 ms: on a busy machine that says nothing about the code. All
# else stays as it is (in CI its `ci` profile), and --hypothesis-profile goes on to win over this.
try:
    from hypothesis import settings
except ImportError:  # where only the examples are tested it is not installed
    pass
else:
    settings.register_profile("no-deadline", settings(), deadline=None)
    settings.load_profile("no-deadline")

DEADLINE_SECONDS = 60.0
TEARDOWN_SECONDS = 20.0

stderr_key = pytest.StashKey[int]()
temp_key = pytest.StashKey[str]()
end_key = pytest.StashKey[float]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "deadline(seconds): end the run if the test takes longer")
    # The terminal's descriptor: what goes to fd 2 later is captured and lost in a hard exit.
    config.stash[stderr_key] = os.dup(2)
    _use_own_temp_dir(config)


def pytest_unconfigure(config: pytest.Config) -> None:
    os.close(config.stash[stderr_key])
    shutil.rmtree(config.stash[temp_key], ignore_errors=True)


def _use_own_temp_dir(config: pytest.Config) -> None:
    # Another test run on this machine must not look like a leak of this one.
    root = os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    # Short: Unix socket paths below it are limited to 107 bytes. Not below that of the process that
    # started this one to run tests beside others: tests let other users in here.
    config.stash[temp_key] = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="gdt-", dir=root)
    tempfile.tempdir = config.stash[temp_key]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    marker = item.get_closest_marker("deadline")
    seconds = float(marker.args[0]) if marker else DEADLINE_SECONDS
    item.stash[end_key] = time.monotonic() + seconds
    _arm(item, seconds)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, Any, Any]:
    # pytest disarms faulthandler's timer when a test raises; teardown needs it still.
    _arm(item, max(item.stash[end_key] - time.monotonic(), TEARDOWN_SECONDS))
    return (yield)


def _arm(item: pytest.Item, seconds: float) -> None:
    faulthandler.dump_traceback_later(seconds, exit=True, file=item.config.stash[stderr_key])


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail a test that leaves a process, descriptor, greenlet, thread or temporary file."""
    before = leaks.take()
    yield
    leaks.check(before)


@pytest.fixture
def gevent_hub() -> Iterator[Any]:
    """The hub of a gevent test: at the end no greenlet may be left, and the hub is destroyed."""
    import gevent

    before = weakref.WeakSet(leaks.greenlets())
    had_hub = waiting.gevent_hub() is not None
    yield gevent.get_hub()
    try:
        # Before the hub goes: without it they would be collected, not seen.
        leaks.check_greenlets(before)
    finally:
        if not had_hub:
            gevent.get_hub().destroy(destroy_loop=True)
