"""What has no gunicorn setting: the arguments of `install`."""

from __future__ import annotations

from dataclasses import dataclass, fields

from .core.wire import DEFAULT_MAX_MESSAGE


@dataclass(frozen=True)
class Settings:
    """Bounds of the dirty side. Reaching one is a clear error for the call that would cross it."""

    queue_size: int = 16384
    """Calls that may wait per app, beside those for which there are free slots. Above the 12,000 that one
    connection may have in flight (`calls_per_connection`), so that a single busy client meets its own bound
    first. `DirtyOverloadedError` beyond."""

    queue_bytes: int = 256 * 1024 * 1024
    """Bytes of waiting requests per app: what bounds the arbiter's memory when arguments are large. Two of
    the largest messages, so that each call that may be sent may also wait. `DirtyOverloadedError` beyond."""

    calls_per_connection: int = 12000
    """Calls in flight on one connection, that is, of one HTTP worker; those that run may come on top (they
    may have been answered, which the arbiter learns a moment later). Ten times gunicorn's default
    `worker_connections` (1,000), with room for views that make several. `DirtyOverloadedError`
    beyond."""

    unread_bytes: int = 256 * 1024 * 1024
    """Bytes of answers that may wait for one client to read them, two of the largest for the same reason;
    an answer beyond is replaced by `DirtyOverloadedError`."""

    max_message_size: int = DEFAULT_MAX_MESSAGE
    """Bytes of one encoded request, answer or chunk: 128 MiB, twice gunicorn's 64, so that a value of
    64 MiB fits together with its framing. `DirtyMessageTooLargeError` beyond; at most 4 GiB - 1."""

    stash_size: int = 64 * 1024 * 1024
    """Bytes of all stash tables together, values and 128 for each entry: the arbiter keeps them in its
    memory. Room for some 300,000 values of 100 bytes, and less than one worker with a model or an image
    library takes. `StashError` beyond."""

    backlog: int = 2048
    """Connections that may wait while an arbiter is being replaced. gunicorn's default for its own
    sockets; the kernel caps it at ``net.core.somaxconn``."""

    max_requests: int = 0
    """Calls a dirty worker serves until it is replaced, as gunicorn's setting of this name does for
    HTTP workers: against leaks. Its replacement is ready before it stops. 0, the default, is never."""

    max_requests_jitter: int = 0
    """The most that is added to `max_requests`, at random per worker, so that they do not all restart
    together. 0 as in gunicorn."""

    max_memory: int = 0
    """Bytes of resident memory beyond which a dirty worker is replaced in the same way; looked at every
    5 s. 0, the default, is no limit: what is much depends on the apps."""

    hub_blocked_after: float = 1.0
    """Seconds an action may keep its worker's hub from running until the log names it: far above what
    a cooperative action takes between two waits, and below what users notice as a hang."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, default = getattr(self, field.name), getattr(type(self), field.name)
            if isinstance(default, float):
                fits, wanted = isinstance(value, (int, float)) and value > 0, "a number above 0"
            else:
                lowest = min(1, default)  # where the default is 0, 0 has a meaning
                fits, wanted = isinstance(value, int) and value >= lowest, f"an int of at least {lowest}"
            if not fits or isinstance(value, bool):
                raise ValueError(f"install({field.name}=...) takes {wanted}, not {value!r}")
        if self.max_message_size > 0xFFFFFFFF:
            raise ValueError("install(max_message_size=...) is limited to 4294967295 by the wire")


NAMES = tuple(field.name for field in fields(Settings))

current = Settings()
"""The settings of this process tree; `install` puts the user's in place, forks inherit them."""
