"""What a caller makes of a call's end: its value or its error."""

from __future__ import annotations

import time
from typing import Any, Protocol

from ..core import faults, large, values, wire
from ..core.faults import Fault
from ..core.mux import Call, Why
from ..core.wire import Detached, Payload
from ..errors import DirtyProtocolError, error_from_fault


class Canceller(Protocol):
    def cancel(self, call: Call, why: Why | None = None) -> None: ...


REPLY_GRACE = 0.5
"""Seconds past its deadline that a call which was sent waits for the arbiter's own word: it knows
whether the call had been started. Only an arbiter that does not answer makes a caller wait for it."""


def checked_time(name: str, seconds: float | None) -> float | None:
    """A time that a user gave. Raises ValueError when it is not a positive number or None."""
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
        raise ValueError(f"{name} is a positive number of seconds or None, not {seconds!r}")
    return float(seconds)


def wait_time(call: Call) -> float:
    """Seconds that the caller still waits."""
    grace = REPLY_GRACE if call.id else 0.0
    return call.deadline + grace - time.monotonic()


def expire(carrier: Canceller, call: Call, timeout: float | None, socket_path: str) -> None:
    """Nothing has ended the call within its time: end it. (What comes at this moment still counts.)"""

    def why(sent: bool) -> Fault:
        return faults.no_answer(call.app, call.action, timeout, socket_path, sent=sent)

    carrier.cancel(call, why)


def result(call: Call) -> Any:
    """The value of an ended call, or its error raised."""
    if call.fault is not None:
        raise error_from_fault(call.fault)
    assert call.last is not None
    value = decode(call.last.payload, call) if call.last.kind != wire.END else None
    if call.last.kind == wire.ERROR:
        fault: Fault = value if isinstance(value, dict) else {"message": str(value)}
        raise error_from_fault(fault)
    return value


def decode(payload: Payload, call: Call) -> Any:
    """A value that came back for the call. Raises `DirtyProtocolError` when it is none."""
    try:
        return large.loads(payload.blob if isinstance(payload, Detached) else payload)
    except values.UndecodableValue as error:
        message = f"the answer of {call.app}.{call.action} cannot be decoded: {error}"
        unreadable = DirtyProtocolError(message)
        unreadable.may_have_run = True
        raise unreadable from error
