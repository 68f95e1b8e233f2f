"""The stash: tables of keys and values that all processes share. Kept by the arbiter.

The operations are gunicorn's (``gunicorn/dirty/stash.py``) and some more. Values stay encoded as they
came; whoever asks for one in another encoding has it translated (`desk`).

Every change has a record, a tuple. `apply` takes them again: that is how a stash outlives its arbiter.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .deadlines import Deadlines

Record = tuple[Any, ...]

PUT, DELETE, CLEAR, ENSURE, DELETE_TABLE = range(5)
"""What a record does; its first element."""

SWEEP = 1000
"""Entries at most that one operation frees because their time is over: nobody waits for more."""


class StashFailure(Exception):
    """An operation has no result. `error_type` is the name of gunicorn's exception class."""

    def __init__(self, error_type: str, message: str) -> None:
        super().__init__(message)
        self.error_type = error_type


class Value(NamedTuple):
    """A value as it came."""

    codec: int
    data: bytes
    expires: float = math.inf
    """When it is gone, of the clock that `now` is of."""


class Stash:
    """Tables by name, values by key. Bounded: `limit` is in bytes of values (and of keys, roughly).

    `record` gets every change, before the operation returns.
    """

    ENTRY_COST = 128
    """Bytes that an entry, or a table, counts beside its value and its key or name."""

    def __init__(self, limit: int, record: Callable[[Record], None] = lambda record: None) -> None:
        self.limit = limit
        self.size = 0
        self.record = record
        self._tables: dict[str, dict[Any, Value]] = {}
        self._expiring: Deadlines[tuple[str, Any]] = Deadlines()

    def put(self, table: str, key: Any, value: Value) -> None:
        self._put(table, key, value)
        self.record((PUT, table, key, *value))

    def get(self, table: str, key: Any, now: float) -> Value:
        value = self.find(table, key, now)
        if value is None:
            raise StashFailure("StashKeyNotFoundError", f"Key not found in {table}: {key}")
        return value

    def find(self, table: str, key: Any, now: float) -> Value | None:
        """`get` for those who expect that there may be none."""
        value = self._tables.get(table, {}).get(key)
        return value if value is not None and now < value.expires else None

    def delete(self, table: str, key: Any, now: float) -> bool:
        there = self.find(table, key, now) is not None
        if self._delete(table, key):
            self.record((DELETE, table, key))
        return there

    def keys(self, table: str, pattern: str | None, now: float) -> list[Any]:
        keys = [key for key, value in self._tables.get(table, {}).items() if now < value.expires]
        return [key for key in keys if fnmatch.fnmatch(str(key), pattern)] if pattern else keys

    def clear(self, table: str) -> None:
        self._clear(table)
        self.record((CLEAR, table))

    def info(self, table: str, now: float) -> dict[str, Any]:
        if table not in self._tables:
            raise StashFailure("StashTableNotFoundError", f"Stash table not found: {table}")
        return {"size": len(self.keys(table, None, now)), "table": table}

    def ensure(self, table: str) -> None:
        if table not in self._tables:
            self._ensure(table)
            self.record((ENSURE, table))

    def exists(self, table: str, key: Any, now: float) -> bool:
        return table in self._tables and (key is None or self.find(table, key, now) is not None)

    def delete_table(self, table: str) -> bool:
        there = self._delete_table(table)
        if there:
            self.record((DELETE_TABLE, table))
        return there

    def tables(self) -> list[str]:
        return list(self._tables)

    def sweep(self, now: float, most: int = SWEEP) -> None:
        """Free entries whose time is over. They need no record: theirs names their time."""
        for item in self._expiring.due(now, most):
            self._delete(*item)

    # Records.

    def records(self) -> Iterator[Record]:
        """What makes this stash out of an empty one."""
        for table, entries in self._tables.items():
            yield (ENSURE, table)
            for key, value in entries.items():
                yield (PUT, table, key, *value)

    def apply(self, record: Record) -> None:
        """Do it again; the limit does not hold for what was there before."""
        kind, table, *rest = record
        limit, self.limit = self.limit, 1 << 62
        try:
            if kind == PUT:
                key, codec, data, expires = rest
                self._put(table, key, Value(codec, data, expires))
            elif kind == DELETE:
                self._delete(table, *rest)
            elif kind == CLEAR:
                self._clear(table)
            elif kind == ENSURE:
                self._ensure(table)
            else:
                self._delete_table(table)
        finally:
            self.limit = limit

    # The changes themselves.

    def _put(self, table: str, key: Any, value: Value) -> None:
        old = self._tables.get(table, {}).get(key)
        grown = self._cost(key, value.data) - (0 if old is None else self._cost(key, old.data))
        self._grow(grown)
        try:
            self._ensure(table)
        except StashFailure:
            self.size -= grown
            raise
        self._tables[table][key] = value
        self._expiring.set((table, key), value.expires)

    def _delete(self, table: str, key: Any) -> bool:
        value = self._tables.get(table, {}).pop(key, None)
        if value is None:
            return False
        self.size -= self._cost(key, value.data)
        self._expiring.drop((table, key))
        return True

    def _clear(self, table: str) -> None:
        for key in list(self._tables.get(table, ())):
            self._delete(table, key)

    def _ensure(self, table: str) -> None:
        if table not in self._tables:
            self._grow(self._cost(table, b""))
            self._tables[table] = {}

    def _delete_table(self, table: str) -> bool:
        self._clear(table)
        if self._tables.pop(table, None) is None:
            return False
        self.size -= self._cost(table, b"")
        return True

    def _grow(self, amount: int) -> None:
        size = self.size + amount
        if amount > 0 and size > self.limit:
            message = f"the stash is full: it would hold {size} bytes, stash_size is {self.limit}"
            raise StashFailure("StashError", message)
        self.size = size

    def _cost(self, key: Any, data: bytes) -> int:
        return len(data) + self.ENTRY_COST + (len(key) if isinstance(key, (str, bytes)) else 0)
