"""Connecting to a dirty arbiter, for all kinds of clients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

RETRY_PAUSE = 0.05
"""Seconds until the next try when a connection ended before the arbiter said hello, or its backlog
was full."""


def connected(make_socket: Callable[[], Any], socket_path: str) -> Any:
    """A non-blocking socket that is connected; None when the arbiter's backlog is full.

    Never waits: a Unix socket is connected at once or not at all. Raises `OSError` when nobody listens there,
    or no descriptor is left here.
    """
    sock = make_socket()
    try:
        sock.setblocking(False)
        sock.connect(socket_path)
    except BlockingIOError:
        sock.close()
        return None
    except BaseException:
        sock.close()
        raise
    return sock
