"""Large bodies in sealed memory files, which travel as descriptors (`core.wire.Detached`).

The sender writes a body once, the receiver maps it; the arbiter between them hands on a number. The
seals are what lets a receiver read another process's memory: nobody can change or shorten it any more
(fcntl(2), F_ADD_SEALS). Linux only, as this library is; where a memory file cannot be made (a container
may forbid the call, the descriptors may be used up), the body goes in its frame as a small one does.
"""

from __future__ import annotations

import array
import fcntl
import os
import stat
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import gevent
from gevent._hub_local import get_hub_if_exists

from .core.wire import DEFAULT_MAX_MESSAGE, Body, Pieces, WireError

T = TypeVar("T")

NAME = "gunicorn-dirty-body"
"""What the files are called: /proc/PID/fd shows ``/memfd:gunicorn-dirty-body (deleted)``."""

RESERVE = 64
"""Descriptors below the limit that bodies leave free, for connections, forks and log files. A body that
arrives when fewer are left is read at once instead of being kept open."""

APART = 2 * 1024 * 1024
"""Bytes from which copying is left to a thread. Handing it over takes some 0.1 ms, in which 0.3 MiB are
written; so much less keeps a hub from running for 0.6 ms."""

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


class Blob:
    """Bytes in a memory file. Closes its descriptor when nobody has it any more."""

    __slots__ = ("_size", "descriptor")

    def __init__(self, descriptor: int, size: int) -> None:
        self.descriptor = descriptor
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)

    def take(self) -> int:
        """The descriptor, which is the caller's to close from now on."""
        descriptor, self.descriptor = self.descriptor, -1
        return descriptor

    def read(self, start: int, size: int) -> bytes:
        """Some of the bytes. May switch greenlets, see `apart`."""
        data = apart(size, os.pread, self.descriptor, size, start)
        # One call reads 2 GiB at most.
        return data if len(data) == size else bytes(self.view()[start : start + size])

    def view(self) -> memoryview:
        """The bytes, mapped for as long as the view is kept."""
        import mmap  # not in gunicorn's master, which loads this module

        # Private: before Linux 6.7 a file sealed against writing could not be mapped as shared.
        flags = mmap.MAP_PRIVATE | mmap.MAP_POPULATE
        return memoryview(mmap.mmap(self.descriptor, self._size, flags=flags, prot=mmap.PROT_READ))


def apart(size: int, copy: Callable[..., T], *args: Any) -> T:
    """Call a function that copies so many bytes with the GIL released: if they are many, and in a greenlet,
    in a thread of gevent's pool, so that other greenlets run meanwhile."""
    hub = get_hub_if_exists() if size >= APART else None
    if hub is None or gevent.getcurrent() is hub:
        return copy(*args)
    copied: T = hub.threadpool.apply(copy, args)
    return copied


def detach(body: Body) -> Blob | None:
    """A blob of these bytes, or None where none can be made."""
    try:
        descriptor = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except (AttributeError, OSError):
        return None
    blob = Blob(descriptor, len(body))
    try:
        _write(descriptor, body.parts if isinstance(body, Pieces) else (body,))
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:  # no memory left for it
        return None
    return blob


def _write(descriptor: int, parts: tuple[bytes, ...]) -> None:
    rest = [memoryview(part) for part in parts]
    while rest:
        written = os.writev(descriptor, rest)
        while rest and written >= len(rest[0]):
            written -= len(rest.pop(0))
        if rest:
            rest[0] = rest[0][written:]


def received(ancillary: Iterable[tuple[int, int, bytes]], lanes: bool = False) -> list[Blob | bytes]:
    """What came beside the bytes of one read, as blobs; as bytes where the descriptor's number is near
    the limit of this process. Raises `WireError` when it is no sealed memory file (or the end of a
    lane, where those may come)."""
    descriptors = array.array("i")
    for _level, _kind, data in ancillary:  # nothing but SCM_RIGHTS comes without being asked for
        descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    blobs = [Blob(number, 0) for number in descriptors]  # from here on each is closed, whatever happens
    return [_checked(blob, lanes) for blob in blobs]


def few_left(descriptor: int) -> bool:
    """Whether this is one of the last descriptors that this process may have."""
    import resource  # not in gunicorn's master, which loads this module

    return descriptor > resource.getrlimit(resource.RLIMIT_NOFILE)[0] - RESERVE


def _checked(blob: Blob, lanes: bool) -> Blob | bytes:
    try:
        sealed = fcntl.fcntl(blob.descriptor, fcntl.F_GET_SEALS)
    except OSError:  # not a memory file
        sealed = 0
    if lanes and stat.S_ISSOCK(os.fstat(blob.descriptor).st_mode):
        return blob
    if sealed & _SEALS != _SEALS:
        raise WireError("a descriptor that is no sealed memory file")
    blob._size = os.fstat(blob.descriptor).st_size
    # A file may claim any size; one above every message is left for the decoder to refuse.
    readable = 0 < len(blob) <= DEFAULT_MAX_MESSAGE
    return bytes(blob.view()) if readable and few_left(blob.descriptor) else blob
