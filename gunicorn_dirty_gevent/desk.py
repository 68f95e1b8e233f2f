"""What the arbiter answers itself, in gunicorn's own protocol: stash, STATUS and MANAGE messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from gunicorn.dirty import protocol
from gunicorn.dirty.tlv import TLVEncoder

from .core import dialects, faults
from .core.faults import Fault
from .core.stash import Stash, StashFailure

MAX_CHANGE = 64
"""Workers that one MANAGE message may add or remove: a slip of the finger should not fork a million."""


class Office(Protocol):
    """Who knows the workers."""

    def status(self) -> dict[str, Any]: ...

    def resize(self, change: int) -> tuple[int, int]: ...


class Refusal(Exception):
    """The answer is an error."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault["message"])
        self.fault = fault


class Desk:
    """Answers questions; payload and answer are TLV."""

    def __init__(self, office: Office, stash_size: int) -> None:
        self.stash = Stash(stash_size)
        self._office = office
        stash = self.stash
        self._operations: dict[int, Callable[[dict[str, Any]], Any]] = {
            protocol.STASH_OP_PUT: lambda m: stash.put(
                m["table"], m.get("key"), TLVEncoder.encode(m.get("value"))
            ),
            protocol.STASH_OP_GET: lambda m: TLVEncoder.decode_full(stash.get(m["table"], m.get("key"))),
            protocol.STASH_OP_DELETE: lambda m: stash.delete(m["table"], m.get("key")),
            protocol.STASH_OP_KEYS: lambda m: stash.keys(m["table"], m.get("pattern")),
            protocol.STASH_OP_CLEAR: lambda m: stash.clear(m["table"]),
            protocol.STASH_OP_INFO: lambda m: stash.info(m["table"]),
            protocol.STASH_OP_ENSURE: lambda m: stash.ensure(m["table"]),
            protocol.STASH_OP_DELETE_TABLE: lambda m: stash.delete_table(m["table"]),
            protocol.STASH_OP_TABLES: lambda m: stash.tables(),
            protocol.STASH_OP_EXISTS: lambda m: stash.exists(m["table"], m.get("key")),
        }
        # gunicorn's arbiter answers True to what has no result of its own.
        self._acknowledged = {protocol.STASH_OP_PUT, protocol.STASH_OP_CLEAR, protocol.STASH_OP_ENSURE}

    def answer(self, kind: int, payload: bytes) -> bytes:
        """The encoded result. Raises `Refusal`."""
        try:
            message = TLVEncoder.decode_full(payload) if payload else {}
            if kind == dialects.STATUS:
                result: Any = self._office.status()
            elif kind == dialects.MANAGE:
                result = self._manage(message)
            else:
                result = self._use_stash(message)
            encoded: bytes = TLVEncoder.encode(result)
        except StashFailure as failure:
            fault = faults.fault(failure.error_type, str(failure), may_have_run=False)
            raise Refusal(fault) from failure
        except Refusal:
            raise
        except Exception as error:
            # Whatever is wrong with the message costs its sender an error, nobody else anything.
            message_fault = faults.protocol(f"the message cannot be answered: {error!r}", may_have_run=False)
            raise Refusal(message_fault) from error
        return encoded

    def _use_stash(self, message: dict[str, Any]) -> Any:
        operation = message["op"]
        if operation not in self._operations:
            raise Refusal(faults.protocol(f"Unknown stash operation: {operation}", may_have_run=False))
        result = self._operations[operation](message)
        return True if operation in self._acknowledged else result

    def _manage(self, message: dict[str, Any]) -> dict[str, Any]:
        adds = message["op"] == protocol.MANAGE_OP_ADD
        if not adds and message["op"] != protocol.MANAGE_OP_REMOVE:
            raise Refusal(faults.protocol(f"Unknown manage operation: {message['op']}", may_have_run=False))
        count = min(max(1, int(message.get("count", 1))), MAX_CHANGE)
        before, after = self._office.resize(count if adds else -count)
        return {
            "success": True,
            "operation": "add" if adds else "remove",
            "requested": count,
            "spawned" if adds else "removed": abs(after - before),
            "total_workers": before,
            "target_workers": after,
        }
