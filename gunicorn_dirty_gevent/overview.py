"""What the master knows of the dirty workers: it asks the arbiter, which is another process.

gunicorn's control interface (``gunicornc show dirty``) reads ``workers`` and ``app_worker_map`` off the
arbiter object that the master has. The arbiter proper fills these in its own process, so the
master's would be empty (as they are in stock gunicorn).
"""

from __future__ import annotations

import socket
import time
from types import SimpleNamespace
from typing import Any

from gunicorn.dirty.protocol import DirtyProtocol

TIMEOUT = 2.0
"""Seconds to wait for the arbiter; as gunicorn's control interface does for ``show all``."""

KEPT = 0.1
"""Seconds an answer is used again: one command reads it several times."""


class Overview:
    """The dirty workers, seen from the master. Empty while the arbiter does not answer."""

    def __init__(self, socket_path: str) -> None:
        self._socket_path = socket_path
        self._asked_at = -KEPT
        self._told: dict[str, Any] = {}

    def workers(self) -> dict[int, Any]:
        """By pid; each has the attributes of a dirty worker that say what it is and does."""
        return {
            told["pid"]: SimpleNamespace(age=told["age"], app_paths=told["apps"], booted=told["booted"])
            for told in self._ask().get("workers", [])
        }

    def app_workers(self, apps: list[str]) -> dict[str, set[int]]:
        """The pids of the workers that an app is allotted to."""
        workers = self._ask().get("workers", [])
        return {path: {worker["pid"] for worker in workers if path in worker["apps"]} for path in apps}

    def limits(self) -> dict[str, int | None]:
        """In how many workers each app is loaded; None for all."""
        limits: dict[str, int | None] = self._ask().get("limits", {})
        return limits

    def _ask(self) -> dict[str, Any]:
        now = time.monotonic()
        if now - self._asked_at >= KEPT:
            self._told = self._fetch()
            self._asked_at = now
        return self._told

    def _fetch(self) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(TIMEOUT)
            try:
                sock.connect(self._socket_path)
                DirtyProtocol.write_message(sock, {"type": DirtyProtocol.MSG_TYPE_STATUS, "id": 1})
                answer = DirtyProtocol.read_message(sock)
            except Exception:  # none there, or none that answers: then nothing is known
                return {}
        told: dict[str, Any] = answer.get("result", {})
        return told
