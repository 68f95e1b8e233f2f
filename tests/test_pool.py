"""What the pool does that a real gunicorn shows only by chance."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

from gunicorn_dirty_gevent.core import faults, wire
from gunicorn_dirty_gevent.core.calls import Limits, Refuse
from gunicorn_dirty_gevent.core.dispatch import Dispatcher
from gunicorn_dirty_gevent.pool import Pool
from gunicorn_dirty_gevent.settings import Settings


def test_why_an_app_did_not_load_is_told_though_its_worker_has_been_reaped() -> None:
    """A worker's last words may be read after its end was seen: callers must not wait for nothing."""
    dispatcher = Dispatcher(["a"], Limits(10, 1000, 10))
    acts: list[Any] = []
    router: Any = SimpleNamespace(dispatcher=dispatcher, act=acts.extend)
    arbiter: Any = SimpleNamespace(
        cfg=SimpleNamespace(dirty_workers=1), log=logging.getLogger(__name__), app_worker_map={"a": set()}
    )
    pool = Pool(arbiter, {"a": None}, router, Settings())
    request = wire.unpack_request(wire.pack_envelope(wire.pack_names("a", "go"), 5.0, 0))
    assert dispatcher.submit("c", 1, request, 0.0) == []
    broken = faults.fault("DirtyAppError", "no weights", may_have_run=False)
    pool.ready(99, {"failed": {"a": broken}, "apps": {}, "slots": 1})
    assert acts == [Refuse("c", 1, broken)]
