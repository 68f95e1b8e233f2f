"""The calls that wait for one app, and the bounds of that."""

from __future__ import annotations

from collections import OrderedDict

from .calls import Call, Limits, State
from .faults import Fault


class Queue:
    """Calls, oldest first; and `overflow`: those for which there is no place among them, with what they
    will be told if that has not changed in a moment (`dispatch.LANE_WORD`)."""

    def __init__(self, limits: Limits) -> None:
        # Not a deque: a call that is cancelled in the middle must not hold its bytes until its turn.
        self._calls: OrderedDict[Call, None] = OrderedDict()
        self._limits = limits
        self.bytes = 0
        self.overflow: OrderedDict[Call, Fault] = OrderedDict()
        self._overflow_bytes = 0

    def __len__(self) -> int:
        """The calls that have a place."""
        return len(self._calls)

    def full_for(self, call: Call, room: int = 0) -> str:
        """Why the call cannot wait; "" if it can. `room`: so many more may, for whom there are slots."""
        if self._calls and self.bytes + len(call.request.payload) > self._limits.queue_bytes:
            return f"its queue holds {self.bytes} bytes of requests (queue_bytes)"
        if len(self._calls) >= self._limits.queue_calls + room:
            return f"its queue is full with {len(self._calls)} calls (queue_size)"
        return ""

    def put(self, call: Call, *, first: bool = False) -> None:
        call.state = State.QUEUED
        self._calls[call] = None
        if first:
            self._calls.move_to_end(call, last=False)
        self.bytes += len(call.request.payload)

    def put_over(self, call: Call, fault: Fault, most: int) -> bool:
        """Put it into the overflow, where `most` calls may be, and bytes as in the queue; False if it does
        not fit there either."""
        size = self._overflow_bytes + len(call.request.payload)
        if len(self.overflow) >= most or size > self._limits.queue_bytes:
            return False
        call.state = State.QUEUED
        self.overflow[call] = fault
        self._overflow_bytes = size
        return True

    def remove(self, call: Call) -> None:
        if self.overflow.pop(call, None) is not None:
            self._overflow_bytes -= len(call.request.payload)
        else:
            del self._calls[call]
            self.bytes -= len(call.request.payload)

    def promote(self, room: int) -> None:
        """Give places to the oldest of the overflow; `room` as for `full_for`."""
        while self.overflow:
            call = next(iter(self.overflow))
            if self.full_for(call, room):
                return
            self.remove(call)
            self.put(call)

    def head(self) -> Call | None:
        """The oldest that has a place."""
        return next(iter(self._calls), None)

    def waiting(self) -> list[Call]:
        """All."""
        return [*self._calls, *self.overflow]
