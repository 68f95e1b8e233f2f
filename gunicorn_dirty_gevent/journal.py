"""The stash's records, in memory that outlives the arbiter.

The master makes two memory files (``memfd_create``) and every arbiter that it forks inherits them. The
arbiter appends each change to one of them before it answers, and the next arbiter reads them again. A
record that a killed arbiter wrote in part is cut off by its length. When the file has grown far beyond
what it describes, the records of what is there now go to the other file, which then takes over: its
generation, written last, says so.

What this keeps is kept over the death of any arbiter, SIGKILL included. It is lost with the master.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator

from .core import values
from .core.stash import Record, Stash

_GENERATION = struct.Struct(">Q")
_LENGTH = struct.Struct(">I")

SLACK = 1024 * 1024
"""Bytes a file may grow before it is worth a rewriting."""

_BATCH = 1024 * 1024


class Journal:
    """Made in the master, used by one arbiter after the other."""

    def __init__(self) -> None:
        self._files = [os.memfd_create("gunicorn-dirty-stash") for _ in range(2)]
        self._active = 0
        self._generation = 0
        self._end = 0
        self._rewrite_at = 0

    @property
    def descriptors(self) -> list[int]:
        return self._files

    def open(self, stash: Stash) -> int:
        """In a new arbiter: fill the stash from what the last one wrote, and record its changes from
        now on. The number of records read."""
        generations = [self._read_generation(number) for number in self._files]
        self._generation = max(generations)
        self._active = generations.index(self._generation)
        count = 0
        for record in self._read_records():
            stash.apply(record)
            count += 1
        self._rewrite(stash.records())
        stash.record = self._recorder(stash)
        return count

    def close(self) -> None:
        """In a process that is no arbiter."""
        for number in self._files:
            os.close(number)

    def _recorder(self, stash: Stash) -> Callable[[Record], None]:
        def record(change: Record) -> None:
            # A write that fails leaves the end where it was: the next one takes the torn one's place.
            self._end = _write(self._files[self._active], _pack(change), self._end)
            if self._end > self._rewrite_at:
                self._rewrite(stash.records())

        return record

    def _rewrite(self, records: Iterable[Record]) -> None:
        old, new = self._files[self._active], self._files[1 - self._active]
        os.ftruncate(new, 0)
        end = _GENERATION.size
        batch = bytearray()
        for record in records:
            batch += _pack(record)
            if len(batch) >= _BATCH:
                end = _write(new, batch, end)
                batch = bytearray()
        end = _write(new, batch, end)
        os.pwrite(new, _GENERATION.pack(self._generation + 1), 0)
        self._generation += 1
        self._active, self._end = 1 - self._active, end
        self._rewrite_at = 2 * end + SLACK
        os.ftruncate(old, 0)

    def _read_generation(self, number: int) -> int:
        head = os.pread(number, _GENERATION.size, 0)
        return int(_GENERATION.unpack(head)[0]) if len(head) == _GENERATION.size else 0

    def _read_records(self) -> Iterator[Record]:
        number, position = self._files[self._active], _GENERATION.size
        while len(head := os.pread(number, _LENGTH.size, position)) == _LENGTH.size:
            position += _LENGTH.size
            size = int(_LENGTH.unpack(head)[0])
            data = _read(number, size, position)
            if len(data) < size:
                return  # its arbiter was killed while it wrote
            position += size
            yield values.loads(data)


def _pack(record: Record) -> bytes:
    data = values.dumps(record)
    return _LENGTH.pack(len(data)) + data


def _write(number: int, data: bytes | bytearray, position: int) -> int:
    """Write all of it; the position after it."""
    view = memoryview(data)
    while view:
        written = os.pwrite(number, view, position)
        position += written
        view = view[written:]
    return position


def _read(number: int, size: int, position: int) -> bytes:
    found = bytearray()
    while len(found) < size and (data := os.pread(number, size - len(found), position + len(found))):
        found += data
    return bytes(found)
