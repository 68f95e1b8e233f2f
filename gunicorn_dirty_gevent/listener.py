"""The Unix socket of the dirty side: bound once per gunicorn master, kept over its arbiters.

While an arbiter is being replaced, connections wait in the kernel's backlog.
"""

from __future__ import annotations

import _socket
import atexit
import fcntl
import os
import shutil
import stat
import tempfile
import time
from typing import Any

from . import settings
from .journal import Journal

_PATH_LIMIT = 107
"""Bytes of a Unix socket's path (``sun_path`` is 108 with its terminating zero)."""

_PREFIX = "gunicorn-dirty-"

_LOCK_NAME = "lock"

_STOPS = b"s"

_STALE_AGE = 60.0
"""Seconds a directory must have stood before it may count as stale: a master that starts at the same
moment has made its own, but not locked it yet."""

_SOCKET_NAME = "arbiter.sock"


class Listener:
    """A bound and listening socket in a directory of its own, and what else outlives an arbiter."""

    def __init__(self, uid: int, gid: int) -> None:
        self.owner = os.getpid()
        self.directory = _make_directory()
        _remove_stale(os.path.dirname(self.directory), {os.geteuid(), uid})
        # Held by this master and what it forks, for as long as any of them lives.
        self._lock = os.open(
            os.path.join(self.directory, _LOCK_NAME), os.O_CREAT | os.O_RDWR | os.O_EXCL, 0o600
        )
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
            os.chown(self._lock, uid, gid)
            os.chown(self.directory, uid, gid)
        self.journal = Journal()
        self.sock.listen(settings.current.backlog)
        self.sock.setblocking(False)
        atexit.register(self._at_exit)

    def announce_stop(self) -> None:
        """In the master: tell its arbiter, which shares our lock file, that none will follow it."""
        os.pwrite(self._lock, _STOPS, 0)

    def stop_announced(self) -> bool:
        return os.pread(self._lock, 1, 0) == _STOPS

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
            directory = tempfile.mkdtemp(prefix=_PREFIX, dir=base)
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


def _remove_stale(base: str, owners: set[int]) -> None:
    """Remove the directories of masters that were killed together with all that they had forked.

    Only what is certainly ours: made by this user or for the configured one, with nothing but our
    files in it, and its lock held by nobody.
    """
    try:
        entries = list(os.scandir(base))
    except OSError:  # a directory that may be written but not listed
        return
    for entry in entries:
        if not entry.name.startswith(_PREFIX):
            continue
        try:
            if _is_stale(entry.path, owners):
                shutil.rmtree(entry.path, ignore_errors=True)
        except OSError:
            continue


def _is_stale(directory: str, owners: set[int]) -> bool:
    status = os.lstat(directory)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid not in owners:
        return False
    if time.time() - status.st_mtime < _STALE_AGE:
        return False
    # Without a lock file it is ours only if it is empty: stock gunicorn's have the same name.
    files = set(os.listdir(directory))
    if not files or not {_LOCK_NAME} <= files <= {_LOCK_NAME, _SOCKET_NAME}:
        return not files
    lock = os.open(os.path.join(directory, _LOCK_NAME), os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True
