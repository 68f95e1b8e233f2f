"""What the arbiter answers itself: stash, STATUS and MANAGE messages."""

from __future__ import annotations

from typing import Any, Protocol

from gunicorn.dirty import protocol

from .codecs import CODECS
from .core import dialects, faults, wire
from .core.stash import Stash
from .journal import Journal
from .stash_desk import Refusal, StashDesk, unanswerable

MAX_CHANGE = 64
"""Workers that one MANAGE message may add or remove: a slip of the finger should not fork a million."""


class Office(Protocol):
    """Who knows the workers."""

    def status(self) -> dict[str, Any]: ...

    def resize(self, change: int) -> tuple[int, int]: ...


class Desk:
    """Answers questions of a client in the encoding that its dialect has."""

    def __init__(self, office: Office, stash_size: int, journal: Journal) -> None:
        self.stash = Stash(stash_size)
        self.restored = journal.open(self.stash)
        self._journal = journal
        self._office = office
        self._stash_desk = StashDesk(self.stash)

    def ensure(self, tables: list[str]) -> None:
        """Make the tables that an app class declares. Raises `StashFailure`."""
        for table in tables:
            self.stash.ensure(table)

    def abandon(self) -> None:
        """In a process just forked: the stash is not its own."""
        self._journal.close()

    def answer(self, kind: int, payload: bytes, codec: int) -> bytes:
        """The encoded result. Raises `Refusal`."""
        try:
            message = CODECS[codec].loads(payload) if payload else {}
            if kind == wire.STASH:
                return self._stash_desk.answer(message, codec)
            result = self._office.status() if kind == dialects.STATUS else self._manage(message)
            return CODECS[codec].dumps(result, "answer")
        except Refusal:
            raise
        except Exception as error:
            raise unanswerable(error) from error

    # The workers.

    def _manage(self, message: dict[str, Any]) -> dict[str, Any]:
        adds = message["op"] == protocol.MANAGE_OP_ADD
        if not adds and message["op"] != protocol.MANAGE_OP_REMOVE:
            raise Refusal(faults.protocol(f"Unknown manage operation: {message['op']}", may_have_run=False))
        count = min(max(1, int(message.get("count", 1))), MAX_CHANGE)
        before, after = self._office.resize(count if adds else -count)
        told = {
            "success": True,
            "operation": "add" if adds else "remove",
            "requested": count,
            "spawned" if adds else "removed": abs(after - before),
            "total_workers": before,
            "target_workers": after,
        }
        if before == after:
            why = f"there are {after} dirty workers, and the apps in dirty_apps ask for no fewer"
            told |= {"success": False, "error": why}
        return told
