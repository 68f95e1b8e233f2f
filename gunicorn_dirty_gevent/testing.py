"""For tests of dirty apps and views without gunicorn: a stash in the test's own process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from gunicorn.dirty import stash as stock_stash

from . import settings, stash
from .client.stash import StashClient
from .core import values, wire
from .core.mux import Call
from .core.stash import Stash
from .core.wire import Frame
from .stash_desk import Refusal, StashDesk

__all__ = ["local_stash"]


@contextmanager
def local_stash(*tables: str) -> Iterator[StashClient]:
    """A stash in this process: with these tables, which are empty, and gone when the block is left.

    In the block the functions of `gunicorn_dirty_gevent.stash` and of ``gunicorn.dirty.stash`` use it in
    place of a dirty arbiter's; the block gets the client that they use. Types, bounds, ``ttl`` and errors
    are those of the arbiter's stash::

        @pytest.fixture
        def reports():
            with gunicorn_dirty_gevent.testing.local_stash(*Reports.stashes):
                app = Reports()
                app.init()
                yield app
    """
    client = _LocalClient()
    for table in tables:
        client.ensure(table)
    before = stash.client, stock_stash._get_client
    stash.client = stock_stash._get_client = lambda: client
    try:
        yield client
    finally:
        stash.client, stock_stash._get_client = before


class _LocalClient(StashClient):
    """Asks a desk of its own, where the others ask the arbiter's."""

    def __init__(self) -> None:
        super().__init__("local_stash()")
        self._desk = StashDesk(Stash(settings.current.stash_size))
        self._lock = threading.Lock()  # one operation is one step, as in the arbiter

    def _carry(self, call: Call) -> None:
        try:
            assert isinstance(call.body, bytes)
            with self._lock:
                answer = self._desk.answer(values.loads(call.body), wire.CODEC_MSGPACK)
        except Refusal as refusal:
            call.fault = refusal.fault
        else:
            call.last = Frame(wire.RESPONSE, 0, answer)

    async def _carry_async(self, call: Call) -> None:
        self._carry(call)
