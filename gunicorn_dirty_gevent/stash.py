"""The stash: gunicorn's functions (``gunicorn.dirty.stash``), and what they have not.

::

    from gunicorn_dirty_gevent import stash

    stash.put("sessions", "user:1", {"name": "Alice"}, ttl=3600)
    hits = stash.incr("counters", "hits")
    if stash.add("locks", "report", "me", ttl=60):
        ...

Where these functions stand in a view or in a dirty app makes no difference. In asyncio code use
`client()`, whose ``aget``, ``aput`` and so on are awaited.
"""

from __future__ import annotations

from typing import Any

from gunicorn.dirty import stash as _stock
from gunicorn.dirty.stash import StashError, StashKeyNotFoundError, StashTableNotFoundError

from .client.stash import StashClient, StashTable

__all__ = [
    "StashClient",
    "StashError",
    "StashKeyNotFoundError",
    "StashTable",
    "StashTableNotFoundError",
    "add",
    "clear",
    "client",
    "compare_and_set",
    "delete",
    "delete_table",
    "ensure",
    "exists",
    "get",
    "incr",
    "info",
    "keys",
    "put",
    "table",
    "tables",
]

_client: StashClient | None = None


def client() -> StashClient:
    """The client that the functions use. Raises `StashError` where there is no dirty arbiter."""
    global _client
    path = _stock.get_stash_socket_path()
    if _client is None or _client.socket_path != path:
        _client = StashClient(path)
    return _client


def put(table: str, key: Any, value: Any, ttl: float | None = None) -> None:
    """See `StashClient.put`."""
    client().put(table, key, value, ttl)


def get(table: str, key: Any, default: Any = None) -> Any:
    """The value, or `default` when there is none (stock gunicorn raises then)."""
    return client().get(table, key, default)


def delete(table: str, key: Any) -> bool:
    """Delete a key. Whether it was there."""
    return bool(client().delete(table, key))


def add(table: str, key: Any, value: Any, ttl: float | None = None) -> bool:
    """See `StashClient.add`."""
    return client().add(table, key, value, ttl)


def incr(table: str, key: Any, amount: float = 1, initial: float = 0, ttl: float | None = None) -> Any:
    """See `StashClient.incr`."""
    return client().incr(table, key, amount, initial, ttl)


def compare_and_set(table: str, key: Any, expected: Any, value: Any, ttl: float | None = None) -> bool:
    """See `StashClient.compare_and_set`."""
    return client().compare_and_set(table, key, expected, value, ttl)


def keys(table: str, pattern: str | None = None) -> list[Any]:
    """The keys of a table; those that match a glob pattern, where one is given."""
    return list(client().keys(table, pattern))


def clear(table: str) -> None:
    """Delete all entries of a table."""
    client().clear(table)


def info(table: str) -> dict[str, Any]:
    """``{"table": name, "size": entries}``. Raises `StashTableNotFoundError`."""
    return dict(client().info(table))


def ensure(table: str) -> None:
    """Make a table that may be there already."""
    client().ensure(table)


def exists(table: str, key: Any = None) -> bool:
    """Whether there is such a table or, with a key, such an entry."""
    return bool(client().exists(table, key))


def delete_table(table: str) -> None:
    """Delete a table and its entries."""
    client().delete_table(table)


def tables() -> list[str]:
    """The names of the tables."""
    return list(client().tables())


def table(name: str) -> StashTable:
    """A dict-like interface to a table."""
    return client().table(name)
