"""Which of gunicorn's worker classes can be had here."""

from __future__ import annotations

import importlib.util

import pytest

EVENTLET = (
    importlib.util.find_spec("gunicorn.workers.geventlet") is not None
    and importlib.util.find_spec("eventlet") is not None
)

needs_eventlet = pytest.mark.skipif(
    not EVENTLET, reason="gunicorn before 26 with eventlet: tox -e gunicorn253, which CI runs"
)

green = pytest.mark.parametrize(
    "worker_class", ["gevent", pytest.param("eventlet", marks=needs_eventlet)], scope="module"
)
"""For a test that is the same under both."""
