"""An arbiter that waits for its test, of either kind, and a client of it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import closing

import pytest
from support.fake_arbiter import FakeArbiter

from gunicorn_dirty_gevent.client import DirtyClient


@pytest.fixture
def path() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as directory:
        yield os.path.join(directory, "arbiter.sock")


@pytest.fixture(params=["ours", "stock"])
def arbiter(path: str, request: pytest.FixtureRequest) -> Iterator[FakeArbiter]:
    with closing(FakeArbiter(path, stock=request.param == "stock")) as arbiter:
        yield arbiter


@pytest.fixture
def ours(path: str) -> Iterator[FakeArbiter]:
    with closing(FakeArbiter(path)) as arbiter:
        yield arbiter


@pytest.fixture
def theirs(path: str) -> Iterator[FakeArbiter]:
    """A stock arbiter."""
    with closing(FakeArbiter(path, stock=True)) as arbiter:
        yield arbiter


@pytest.fixture
def client(path: str) -> Iterator[DirtyClient]:
    with closing(DirtyClient(path, timeout=20)) as client:
        yield client
