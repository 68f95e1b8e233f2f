"""What has no gunicorn setting: the arguments of `install`."""

from __future__ import annotations

from dataclasses import dataclass, fields

from .core.wire import DEFAULT_MAX_MESSAGE


@dataclass(frozen=True)
class Settings:
    """Bounds of the dirty side. Reaching one is a clear error for the call that would cross it."""

    queue_size: int = 16384
    """Calls that may wait per app. Above the 10,000 calls that one connection may have in flight, so
    that a single busy client meets its own bound first. `DirtyOverloadedError` beyond."""

    queue_bytes: int = 256 * 1024 * 1024
    """Bytes of waiting requests per app: what bounds the arbiter's memory when arguments are large.
    `DirtyOverloadedError` beyond."""

    calls_per_connection: int = 12000
    """Calls in flight on one connection, that is, of one HTTP worker. Ten times gunicorn's default
    `worker_connections` (1,000), with room for views that make several. `DirtyOverloadedError`
    beyond."""

    unread_bytes: int = 256 * 1024 * 1024
    """Bytes of answers that may wait for one client to read them; an answer beyond is replaced by
    `DirtyOverloadedError`."""

    max_message_size: int = DEFAULT_MAX_MESSAGE
    """Bytes of one encoded request, answer or chunk: 128 MiB, twice gunicorn's 64, so that a value of
    64 MiB fits together with its framing. `DirtyMessageTooLargeError` beyond; at most 4 GiB - 1."""

    backlog: int = 2048
    """Connections that may wait while an arbiter is being replaced. gunicorn's default for its own
    sockets; the kernel caps it at ``net.core.somaxconn``."""

    hub_blocked_after: float = 1.0
    """Seconds an action may keep its worker's hub from running until the log names it: far above what
    a cooperative action takes between two waits, and below what users notice as a hang."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kinds = (int, float) if isinstance(field.default, float) else (int,)
            if not isinstance(value, kinds) or isinstance(value, bool) or not value > 0:
                kind = "number" if float in kinds else "int"
                raise ValueError(f"install({field.name}=...) takes a positive {kind}, not {value!r}")
        if self.max_message_size > 0xFFFFFFFF:
            raise ValueError("install(max_message_size=...) is limited to 4294967295 by the wire")


current = Settings()
"""The settings of this process tree; `install` puts the user's in place, forks inherit them."""
