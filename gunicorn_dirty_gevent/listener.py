"""The Unix socket of the dirty side: bound once per gunicorn master, kept over its arbiters.

While an arbiter is being replaced, connections wait in the kernel's backlog.
"""

from __future__ import annotations

import _socket
import atexit
import os
import shutil
import tempfile
from typing import Any

from . import settings

_PATH_LIMIT = 107
"""Bytes of a Unix socket's path (``sun_path`` is 108 with its terminating zero)."""

_SOCKET_NAME = "arbiter.sock"


class Listener:
    """A bound and listening socket in a directory of its own."""

    def __init__(self, uid: int, gid: int) -> None:
        self.owner = os.getpid()
        self.directory = _make_directory()
        self.path = os.path.join(self.directory, _SOCKET_NAME)
        self.sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        # The mode from the start: a chmod after the bind would leave a moment in between. (The
        # directory's 0700 keeps others out as well.)
        before = os.umask(0o177)
        try:
            self.sock.bind(self.path)
        finally:
            os.umask(before)
        if os.geteuid() == 0 and (uid, gid) != (0, 0):
            # Arbiter and HTTP workers will run as this user; gunicorn's own socket stays root's.
            os.chown(self.path, uid, gid)
            os.chown(self.directory, uid, gid)
        self.sock.listen(settings.current.backlog)
        self.sock.setblocking(False)
        atexit.register(self._at_exit)

    def remove(self) -> None:
        """Take the socket's directory away; connections that stand are not touched."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _at_exit(self) -> None:
        if os.getpid() == self.owner:  # atexit handlers also run in HTTP workers, which inherit us
            self.remove()


_listener: Listener | None = None


def get_listener(cfg: Any) -> Listener:
    """The listener of this master process, made when it is first asked for."""
    global _listener
    if _listener is None or _listener.owner != os.getpid() or not os.path.exists(_listener.path):
        _listener = Listener(cfg.uid, cfg.gid)
    return _listener


def _make_directory() -> str:
    """A new 0700 directory whose socket path is short enough.

    ``TMPDIR`` first, as gunicorn does; where it is too long or not writable, the system's usual
    places. Raises OSError when none will do.
    """
    tried = []
    for base in (tempfile.gettempdir(), "/tmp", "/dev/shm", "/var/tmp"):
        try:
            directory = tempfile.mkdtemp(prefix="gunicorn-dirty-", dir=base)
        except OSError as error:
            tried.append(f"{base}: {error.strerror}")
            continue
        if len(os.fsencode(os.path.join(directory, _SOCKET_NAME))) <= _PATH_LIMIT:
            return directory
        os.rmdir(directory)
        tried.append(f"{base}: too long, a socket's path has {_PATH_LIMIT} bytes at most")
    raise OSError(
        "no place for the dirty arbiter's socket; set TMPDIR to a short, writable directory "
        f"({'; '.join(tried)})"
    )
