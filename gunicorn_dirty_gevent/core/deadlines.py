"""Many deadlines, most of which never fire: O(1) to set and to drop.

A heap with lazy deletion would keep every finished call until its deadline (300 s by default); a
bucket per slice of time forgets at once.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

SLICE = 0.0625
"""Seconds a deadline may fire late. Callers and workers keep their own exact timers; the arbiter's
are the net below them. A power of two, so that slices are exact and nothing fires early."""


_STALE_SLICES = 64
"""Slices that have become empty and stay in the heap, beyond as many as there are live ones."""


class Deadlines(Generic[T]):
    """A set of items, each with one time (of a clock that is never negative) at which it is due."""

    def __init__(self) -> None:
        self._buckets: dict[int, set[T]] = {}
        self._slices: list[int] = []  # heap of the keys of _buckets, possibly with stale ones
        self._where: dict[T, int] = {}

    def __len__(self) -> int:
        return len(self._where)

    def set(self, item: T, when: float) -> None:
        """Make `item` due at `when` (in place of an earlier setting); inf drops it."""
        self.drop(item)
        slices = when / SLICE
        if slices == math.inf:
            return
        key = math.ceil(max(slices, 0.0))
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = set()
            heapq.heappush(self._slices, key)
        bucket.add(item)
        self._where[item] = key

    def drop(self, item: T) -> None:
        key = self._where.pop(item, None)
        if key is None:
            return
        bucket = self._buckets[key]
        bucket.discard(item)
        if not bucket:
            del self._buckets[key]
            if len(self._slices) > 2 * len(self._buckets) + _STALE_SLICES:
                self._slices = list(self._buckets)
                heapq.heapify(self._slices)

    def due(self, now: float, most: int | None = None) -> list[T]:
        """Take out and return the items whose time has come, `most` of them if it is given."""
        found: list[T] = []
        while self._slices and self._slices[0] * SLICE <= now:
            bucket = self._buckets.get(self._slices[0], set())
            while bucket and (most is None or len(found) < most):
                item = bucket.pop()
                del self._where[item]
                found.append(item)
            if bucket:
                break
            self._buckets.pop(heapq.heappop(self._slices), None)
        return found

    def next(self) -> float | None:
        """When `due` is worth calling next."""
        while self._slices and self._slices[0] not in self._buckets:
            heapq.heappop(self._slices)
        return self._slices[0] * SLICE if self._slices else None
