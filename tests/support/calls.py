"""What the tests of the client ask of it at a `FakeArbiter`."""

from __future__ import annotations

import threading

import pytest

from gunicorn_dirty_gevent.client import DirtyClient
from gunicorn_dirty_gevent.errors import DirtyConnectionError

from .fake_arbiter import FakeArbiter
from .waiting import wait_until

APP = "tasks:App"

LONG = 25.0
"""Seconds that a client waits. What has not ended after `SOON` waits for this end."""

SOON = 10.0

LARGE = bytes(5_000_000)
"""More than a socket takes when nobody reads."""


def hang_up_on(client: DirtyClient) -> None:
    """A call whose connection the arbiter closes."""
    with pytest.raises(DirtyConnectionError):
        client.execute(APP, "hang_up")


def started_since(before: set[threading.Thread]) -> set[threading.Thread]:
    return set(threading.enumerate()) - before


def wait_for_threads(before: set[threading.Thread]) -> None:
    wait_until(lambda: not started_since(before), 8, "the calls' threads to end")


def check_places(client: DirtyClient, arbiter: FakeArbiter, places: int) -> None:
    """So many calls are with a stock arbiter at once."""
    before = arbiter.ran("hold")
    futures = [client.submit(APP, "hold", n) for n in range(places)]
    arbiter.wait(lambda: arbiter.ran("hold") == before + places, "a place for each call")
    arbiter.release()
    assert [future.get(10) for future in futures] == list(range(places))
