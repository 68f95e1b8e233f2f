"""A stand-in for a memory file (`gunicorn_dirty_gevent.blob.Blob`), for tests without processes."""

from __future__ import annotations

from gunicorn_dirty_gevent.core import wire


class Beside:
    """Bytes that would be in a descriptor."""

    descriptor = -1

    def __init__(self, body: wire.Body = bytes(wire.MIN_DETACHED)) -> None:
        self.data = b"".join(body.parts) if isinstance(body, wire.Pieces) else body

    def __len__(self) -> int:
        return len(self.data)

    def read(self, start: int, size: int) -> bytes:
        return self.data[start : start + size]

    def view(self) -> memoryview:
        return memoryview(self.data)
