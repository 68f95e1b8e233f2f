"""What the dispatcher deals with: calls, workers, queues, and the actions that it returns.

A call is in exactly one of these states:

    ARRIVED    in no table yet                          -> QUEUED, RUNNING, ENDED
    QUEUED     in its app's queue                       -> RUNNING, ENDED
    RUNNING    at a worker, its caller waits            -> ABANDONED, QUEUED (idempotent, worker lost), ENDED
    ABANDONED  at a worker, nobody waits any more       -> ENDED
    ENDED      in no table

A slot is taken from RUNNING until the worker's last frame for the call (or the worker's end): a
cancelled action may still be in its `finally`.
"""

from __future__ import annotations

import enum
import math
from collections import OrderedDict
from typing import Any, NamedTuple

from . import wire
from .faults import Fault
from .wire import Payload, Request


class State(enum.Enum):
    ARRIVED = "arrived"
    QUEUED = "queued"
    RUNNING = "running"
    ABANDONED = "abandoned"
    ENDED = "ended"


class Limits(NamedTuple):
    """Bounds of the queues (see `gunicorn_dirty_gevent.settings`)."""

    queue_calls: int
    queue_bytes: int
    calls_per_client: int


class ActionTraits(NamedTuple):
    """What an app's class says of one action."""

    timeout: float  # seconds; inf for none
    idempotent: bool = False
    limit: str = "dirty_timeout"
    """Where `timeout` was set, in words."""


class Call:
    """One call on its way through the arbiter."""

    __slots__ = (
        "answered",
        "attempts",
        "client",
        "client_id",
        "credit",
        "deadline",
        "enqueued",
        "progress",
        "request",
        "state",
        "traits",
        "worker",
        "worker_id",
    )

    def __init__(self, client: Any, client_id: int, request: Request, now: float) -> None:
        self.client = client
        self.client_id = client_id
        self.request = request
        self.deadline = now + request.budget
        self.enqueued = now
        self.state = State.ARRIVED
        self.worker: Worker | None = None
        self.worker_id = 0
        self.progress = now
        self.credit = wire.STREAM_WINDOW
        self.attempts = 0
        self.answered = False  # chunks have gone to the caller
        self.traits = ActionTraits(math.inf)


class Worker:
    """A dirty worker that is ready for calls."""

    __slots__ = (
        "apps",
        "blocked_at",
        "blocked_by",
        "draining",
        "heard",
        "key",
        "last_id",
        "max_calls",
        "pid",
        "pinged",
        "running",
        "slots",
    )

    def __init__(self, key: int, pid: int, apps: dict[str, AppTraits], slots: int, max_calls: int) -> None:
        self.key = key
        self.max_calls = max_calls
        self.pid = pid
        self.apps = apps
        self.slots = slots
        self.running: dict[int, Call] = {}
        self.last_id = 0
        self.draining = False
        self.blocked_by = 0  # the call that it last said blocks its hub
        self.blocked_at = -math.inf
        self.heard = -math.inf  # when it last showed that its hub runs, or was given its only call
        self.pinged = False  # and has been asked since


class AppTraits(NamedTuple):
    """What a worker said of an app it has loaded."""

    default: ActionTraits
    actions: dict[str, ActionTraits]


class Assign(NamedTuple):
    """Send the call to its worker under `call_id`; `budget` is what is left of its time."""

    worker: int
    call_id: int
    request: Request
    budget: float


class Forward(NamedTuple):
    """Send a frame to a worker."""

    worker: int
    kind: int
    call_id: int
    payload: bytes


class Reply(NamedTuple):
    """Send a worker's frame on to a client."""

    client: Any
    kind: int
    call_id: int
    payload: Payload


class Refuse(NamedTuple):
    """Answer a client with an error of the arbiter's own."""

    client: Any
    call_id: int
    fault: Fault


class Kill(NamedTuple):
    """The worker is stuck."""

    worker: int
    why: str


class Worn(NamedTuple):
    """The worker has been given as many calls as it is meant to serve."""

    worker: int
    why: str


Action = Assign | Forward | Reply | Refuse | Kill | Worn


class Queue:
    """The calls that wait for one app, oldest first."""

    def __init__(self) -> None:
        # Not a deque: a call that is cancelled in the middle must not hold its bytes until its turn.
        self._calls: OrderedDict[Call, None] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._calls)

    def put(self, call: Call, *, first: bool = False) -> None:
        call.state = State.QUEUED
        self._calls[call] = None
        if first:
            self._calls.move_to_end(call, last=False)
        self.bytes += len(call.request.payload)

    def remove(self, call: Call) -> None:
        del self._calls[call]
        self.bytes -= len(call.request.payload)

    def head(self) -> Call | None:
        return next(iter(self._calls), None)
