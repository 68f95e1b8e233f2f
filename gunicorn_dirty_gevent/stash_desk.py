"""The stash's operations as messages ask for them: in the arbiter, and in tests without one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from gunicorn.dirty import protocol

from .codecs import CODECS
from .core import faults, wire
from .core.faults import Fault
from .core.stash import Stash, StashFailure, Value


class Refusal(Exception):
    """The answer is an error."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault["message"])
        self.fault = fault


def unanswerable(error: Exception) -> Refusal:
    """Whatever is wrong with a message costs its sender an error, nobody else anything."""
    return Refusal(faults.protocol(f"the message cannot be answered: {error!r}", may_have_run=False))


class StashDesk:
    """Serves a stash: each message one operation, answered in its own encoding."""

    def __init__(self, stash: Stash) -> None:
        self.stash = stash
        self._operations: dict[int, Callable[[_Question], Any]] = {
            protocol.STASH_OP_PUT: lambda q: stash.put(q.table, q.key, q.value()),
            protocol.STASH_OP_GET: lambda q: stash.get(q.table, q.key, q.now),
            protocol.STASH_OP_DELETE: lambda q: stash.delete(q.table, q.key, q.now),
            protocol.STASH_OP_KEYS: lambda q: stash.keys(q.table, q.message.get("pattern"), q.now),
            protocol.STASH_OP_CLEAR: lambda q: stash.clear(q.table),
            protocol.STASH_OP_INFO: lambda q: stash.info(q.table, q.now),
            protocol.STASH_OP_ENSURE: lambda q: stash.ensure(q.table),
            protocol.STASH_OP_DELETE_TABLE: lambda q: stash.delete_table(q.table),
            protocol.STASH_OP_TABLES: lambda q: stash.tables(),
            protocol.STASH_OP_EXISTS: lambda q: stash.exists(q.table, q.key, q.now),
            wire.STASH_ADD: self._add,
            wire.STASH_INCR: self._incr,
            wire.STASH_COMPARE_AND_SET: self._compare_and_set,
        }
        # gunicorn's arbiter answers True to what has no result of its own.
        self._acknowledged = {protocol.STASH_OP_PUT, protocol.STASH_OP_CLEAR, protocol.STASH_OP_ENSURE}

    def answer(self, message: dict[str, Any], codec: int) -> bytes:
        """The encoded result. Raises `Refusal`."""
        try:
            return self._answer(message, codec)
        except Refusal:
            raise
        except Exception as error:
            raise unanswerable(error) from error

    def _answer(self, message: dict[str, Any], codec: int) -> bytes:
        operation = message["op"]
        if operation not in self._operations:
            raise Refusal(faults.protocol(f"Unknown stash operation: {operation}", may_have_run=False))
        question = _Question(message, codec, time.monotonic())
        self.stash.sweep(question.now)
        result = True if operation in self._acknowledged else None
        try:
            answer = self._operations[operation](question)
        except StashFailure as failure:
            name = failure.error_type
            fault = faults.fault(name, str(failure), may_have_run=False, stash_error=name)
            raise Refusal(fault) from failure
        if isinstance(answer, Value):
            if answer.codec == codec:
                return answer.data
            answer = _decoded(answer)
        return CODECS[codec].dumps(answer if result is None else result, "answer")

    def _add(self, question: _Question) -> bool:
        if self.stash.find(question.table, question.key, question.now) is not None:
            return False
        self.stash.put(question.table, question.key, question.value())
        return True

    def _incr(self, question: _Question) -> Any:
        old = self.stash.find(question.table, question.key, question.now)
        number = question.message["initial"] if old is None else _decoded(old)
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            what = f"{question.table}[{question.key!r}] is {type(number).__name__}, not a number"
            raise StashFailure("StashError", f"{what}: it cannot be incremented")
        number += question.message["amount"]
        # The time that it has is the entry's, as long as there is one.
        expires = question.expires() if old is None else old.expires
        data = CODECS[question.codec].dumps(number, "value")
        self.stash.put(question.table, question.key, Value(question.codec, data, expires))
        return number

    def _compare_and_set(self, question: _Question) -> bool:
        old = self.stash.find(question.table, question.key, question.now)
        if old is None or _decoded(old) != question.message["expected"]:
            return False
        self.stash.put(question.table, question.key, question.value())
        return True


class _Question:
    """One stash message."""

    def __init__(self, message: dict[str, Any], codec: int, now: float) -> None:
        self.message = message
        self.codec = codec
        self.now = now
        self.table = message["table"]
        self.key = message.get("key")
        if not isinstance(self.table, str):
            raise TypeError(f"the name of a table is a str, not {type(self.table).__name__}")

    def value(self) -> Value:
        value = self.message.get("value")
        if self.codec == wire.CODEC_MSGPACK:
            # Our client encodes it apart: the arbiter need not look into it.
            if not isinstance(value, bytes):
                raise TypeError("the value of a stash message is encoded apart")
            return Value(self.codec, value, self.expires())
        return Value(self.codec, CODECS[self.codec].dumps(value, "value"), self.expires())

    def expires(self) -> float:
        ttl = self.message.get("ttl")
        if ttl is None:
            return math.inf
        if not 0 < ttl < math.inf:
            raise ValueError(f"ttl is a positive number of seconds, not {ttl!r}")
        return self.now + float(ttl)


def _decoded(value: Value) -> Any:
    return CODECS[value.codec].loads(value.data)
