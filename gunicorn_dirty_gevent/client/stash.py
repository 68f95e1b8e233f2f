"""The stash, from views and from dirty apps: operations on the same multiplexed connection as calls."""

from __future__ import annotations

import math
import time
from typing import Any

from gunicorn.dirty import protocol
from gunicorn.dirty.errors import DirtyError
from gunicorn.dirty.stash import (
    StashClient as _StockClient,
)
from gunicorn.dirty.stash import (
    StashError,
    StashKeyNotFoundError,
    StashTableNotFoundError,
)
from gunicorn.dirty.stash import (
    StashTable as _StockTable,
)

from ..core import values, wire
from ..core.mux import Call
from . import aio, channels
from .results import checked_time, result

_NAMES = {
    protocol.STASH_OP_PUT: "put",
    protocol.STASH_OP_GET: "get",
    protocol.STASH_OP_DELETE: "delete",
    protocol.STASH_OP_KEYS: "keys",
    protocol.STASH_OP_CLEAR: "clear",
    protocol.STASH_OP_INFO: "info",
    protocol.STASH_OP_ENSURE: "ensure",
    protocol.STASH_OP_DELETE_TABLE: "delete_table",
    protocol.STASH_OP_TABLES: "tables",
    protocol.STASH_OP_EXISTS: "exists",
    wire.STASH_ADD: "add",
    wire.STASH_INCR: "incr",
    wire.STASH_COMPARE_AND_SET: "compare_and_set",
}


class StashClient(_StockClient):  # type: ignore[misc]
    """gunicorn's client of the stash, on the connection that dirty calls use.

    A light handle, as `DirtyClient` is: for any greenlet, thread or asyncio task, also at once and after
    a fork. Has gunicorn's constructor and methods, and `add`, `incr`, `compare_and_set` and `ttl`.
    `timeout` is seconds for one operation, None for no limit; 30 is gunicorn's default.

    Errors are gunicorn's: `StashTableNotFoundError`, `StashKeyNotFoundError`, and `StashError` for
    everything else, a lost connection included. Its `may_have_run` says whether the operation may
    have been carried out.

    Keys are what a dict takes and the wire carries: the types that calls take.
    """

    def __init__(self, socket_path: str, timeout: float | None = 30.0) -> None:
        super().__init__(socket_path, timeout)
        self.timeout = checked_time("timeout", timeout)
        self._found: Any = None  # kept by `channels`
        self._handle = channels.Handle()

    # gunicorn's operations are its own methods, which end in `_execute`.

    def put(self, table: str, key: Any, value: Any, ttl: float | None = None) -> None:
        """Store a value. After `ttl` seconds it is gone; None, the default, is never."""
        self._execute(protocol.STASH_OP_PUT, table, key=key, value=value, ttl=ttl)

    def add(self, table: str, key: Any, value: Any, ttl: float | None = None) -> bool:
        """Store a value if there is none for the key. Whether it was stored."""
        return bool(self._execute(wire.STASH_ADD, table, key=key, value=value, ttl=ttl))

    def incr(
        self, table: str, key: Any, amount: float = 1, initial: float = 0, ttl: float | None = None
    ) -> Any:
        """Add `amount` to a number and return the sum. One step: no increment is lost.

        A key that is not there starts at `initial`, with `ttl`; one that is there keeps its time.
        Raises `StashError` when the value is no number.
        """
        return self._execute(wire.STASH_INCR, table, key=key, amount=amount, initial=initial, ttl=ttl)

    def compare_and_set(
        self, table: str, key: Any, expected: Any, value: Any, ttl: float | None = None
    ) -> bool:
        """Store `value` if the value that is there equals `expected`. Whether it was stored.

        One step: of several that expect the same, one wins. A key that is not there equals nothing;
        see `add`.
        """
        more = {"value": value, "expected": expected, "ttl": ttl}
        return bool(self._execute(wire.STASH_COMPARE_AND_SET, table, key=key, **more))

    def table(self, name: str) -> StashTable:
        """A dict-like interface to a table."""
        return StashTable(self, name)

    def close(self) -> None:
        """Let go of the connection. It is closed when no other client of this process holds it."""
        channels.release(self)

    # asyncio: the operations that a view needs; the others are for set-up.

    async def aget(self, table: str, key: Any, default: Any = None) -> Any:
        """`get` for asyncio."""
        try:
            return await self._execute_async(protocol.STASH_OP_GET, table, key=key)
        except StashKeyNotFoundError:
            return default

    async def aput(self, table: str, key: Any, value: Any, ttl: float | None = None) -> None:
        """`put` for asyncio."""
        await self._execute_async(protocol.STASH_OP_PUT, table, key=key, value=value, ttl=ttl)

    async def adelete(self, table: str, key: Any) -> bool:
        """`delete` for asyncio."""
        return bool(await self._execute_async(protocol.STASH_OP_DELETE, table, key=key))

    async def aadd(self, table: str, key: Any, value: Any, ttl: float | None = None) -> bool:
        """`add` for asyncio."""
        return bool(await self._execute_async(wire.STASH_ADD, table, key=key, value=value, ttl=ttl))

    async def aincr(
        self, table: str, key: Any, amount: float = 1, initial: float = 0, ttl: float | None = None
    ) -> Any:
        """`incr` for asyncio."""
        more = {"amount": amount, "initial": initial, "ttl": ttl}
        return await self._execute_async(wire.STASH_INCR, table, key=key, **more)

    async def acompare_and_set(
        self, table: str, key: Any, expected: Any, value: Any, ttl: float | None = None
    ) -> bool:
        """`compare_and_set` for asyncio."""
        more = {"value": value, "expected": expected, "ttl": ttl}
        return bool(await self._execute_async(wire.STASH_COMPARE_AND_SET, table, key=key, **more))

    # Shared.

    def _execute(
        self, op: int, table: str, key: Any = None, value: Any = None, pattern: Any = None, **more: Any
    ) -> Any:
        call = self._call(op, table, {"key": key, "value": value, "pattern": pattern, **more})
        try:
            self._carry(call)
            return result(call)
        except DirtyError as error:
            raise _stash_error(error, table, key) from error

    async def _execute_async(self, op: int, table: str, key: Any = None, **more: Any) -> Any:
        call = self._call(op, table, {"key": key, **more})
        try:
            await self._carry_async(call)
            return result(call)
        except DirtyError as error:
            raise _stash_error(error, table, key) from error

    def _carry(self, call: Call) -> None:
        channels.perform(channels.get(self), call, self.timeout)

    async def _carry_async(self, call: Call) -> None:
        await aio.perform(aio.get(self.socket_path), call, self.timeout)

    def _call(self, op: int, table: str, more: dict[str, Any]) -> Call:
        """The message has gunicorn's names; its value is encoded apart: the arbiter passes it on so."""
        checked_time("ttl", more.get("ttl"))
        name = _NAMES[op]
        deadline = math.inf if self.timeout is None else time.monotonic() + self.timeout
        try:
            message = {"op": op, "table": table, **more, "value": values.dumps(more.get("value"), "value")}
            body = values.dumps(message, "stash")
        except values.UnencodableValue as error:
            refusal = StashError(f"stash.{name} was not sent: {error}")
            refusal.may_have_run = False
            raise refusal from error
        return Call("stash", name, body, deadline, stream=False, kind=wire.STASH)


class StashTable(_StockTable):  # type: ignore[misc]
    """gunicorn's dict-like interface to a table, with `put`, `add`, `incr` and `compare_and_set`."""

    def put(self, key: Any, value: Any, ttl: float | None = None) -> None:
        """See `StashClient.put`."""
        self._client.put(self.name, key, value, ttl)

    def add(self, key: Any, value: Any, ttl: float | None = None) -> bool:
        """See `StashClient.add`."""
        return bool(self._client.add(self.name, key, value, ttl))

    def incr(self, key: Any, amount: float = 1, initial: float = 0, ttl: float | None = None) -> Any:
        """See `StashClient.incr`."""
        return self._client.incr(self.name, key, amount, initial, ttl)

    def compare_and_set(self, key: Any, expected: Any, value: Any, ttl: float | None = None) -> bool:
        """See `StashClient.compare_and_set`."""
        return bool(self._client.compare_and_set(self.name, key, expected, value, ttl))


def _stash_error(error: DirtyError, table: str, key: Any) -> StashError:
    """What gunicorn's client raises, with our client's words."""
    name = error.details.get("stash_error")
    told: StashError
    if name == "StashTableNotFoundError":
        told = StashTableNotFoundError(table)
    elif name == "StashKeyNotFoundError":
        told = StashKeyNotFoundError(table, key)
    else:
        told = StashError(error.message)
    told.may_have_run = getattr(error, "may_have_run", True)
    return told
