"""The stash: tables of keys and values that all workers share. Kept by the arbiter, lost with it.

The operations are gunicorn's (``gunicorn/dirty/stash.py``). Values stay encoded as they came.
"""

from __future__ import annotations

import fnmatch
from typing import Any


class StashFailure(Exception):
    """An operation has no result. `error_type` is the name of gunicorn's exception class."""

    def __init__(self, error_type: str, message: str) -> None:
        super().__init__(message)
        self.error_type = error_type


class Stash:
    """Tables by name, values by key. Bounded: `limit` is in bytes of values (and of keys, roughly)."""

    ENTRY_COST = 128
    """Bytes that an entry, or a table, counts beside its value and its key or name."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self._tables: dict[str, dict[Any, bytes]] = {}

    def put(self, table: str, key: Any, value: bytes) -> None:
        entries = self._tables.get(table, {})
        old = entries.get(key)
        self._grow(self._cost(key, value) - (0 if old is None else self._cost(key, old)))
        try:
            self.ensure(table)
        except StashFailure:
            self.size -= self._cost(key, value)
            raise
        self._tables[table][key] = value

    def get(self, table: str, key: Any) -> bytes:
        try:
            return self._tables[table][key]
        except KeyError:
            raise StashFailure("StashKeyNotFoundError", f"Key not found in {table}: {key}") from None

    def delete(self, table: str, key: Any) -> bool:
        value = self._tables.get(table, {}).pop(key, None)
        if value is None:
            return False
        self.size -= self._cost(key, value)
        return True

    def keys(self, table: str, pattern: str | None = None) -> list[Any]:
        keys = list(self._tables.get(table, ()))
        return [key for key in keys if fnmatch.fnmatch(str(key), pattern)] if pattern else keys

    def clear(self, table: str) -> None:
        entries = self._tables.get(table, {})
        self.size -= sum(self._cost(key, value) for key, value in entries.items())
        entries.clear()

    def info(self, table: str) -> dict[str, Any]:
        if table not in self._tables:
            raise StashFailure("StashTableNotFoundError", f"Stash table not found: {table}")
        return {"size": len(self._tables[table]), "table": table}

    def ensure(self, table: str) -> None:
        if table not in self._tables:
            self._grow(self._cost(table, b""))
            self._tables[table] = {}

    def exists(self, table: str, key: Any = None) -> bool:
        return table in self._tables and (key is None or key in self._tables[table])

    def delete_table(self, table: str) -> bool:
        self.clear(table)
        if self._tables.pop(table, None) is None:
            return False
        self.size -= self._cost(table, b"")
        return True

    def tables(self) -> list[str]:
        return list(self._tables)

    def _grow(self, amount: int) -> None:
        size = self.size + amount
        if amount > 0 and size > self.limit:
            message = f"the stash is full: it would hold {size} bytes, stash_size is {self.limit}"
            raise StashFailure("StashError", message)
        self.size = size

    def _cost(self, key: Any, value: bytes) -> int:
        return len(value) + self.ENTRY_COST + (len(key) if isinstance(key, (str, bytes)) else 0)
