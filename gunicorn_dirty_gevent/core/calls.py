"""What the dispatcher deals with: calls, workers, and the actions that it returns.

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
from typing import Any, NamedTuple

from . import wire
from .faults import Fault
from .wire import Payload, Request

KILL_GRACE = 1.0
"""Seconds past an action's own time limit (`dirty_timeout`) until its worker counts as stuck and is
killed: the gentler ways to stop the action, the last after about 0.65 s, have failed by then."""

BLOCKED_GRACE = 1.0
"""Seconds for which a worker's word counts that a call blocks its hub; it says so four times a second."""


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
        "laned",
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
        self.laned = False  # its answer goes by a lane: only what the worker tells of it is known here
        self.traits = ActionTraits(math.inf)

    @property
    def stuck_at(self) -> float:
        """When its worker counts as stuck. A stream's limit counts from its last chunk, and stands still
        while its reader has given it no credit."""
        if self.credit <= 0 and self.state is State.RUNNING:
            return math.inf
        return self.progress + self.traits.timeout + KILL_GRACE


class Worker:
    """A dirty worker that is ready for calls."""

    __slots__ = (
        "apps",
        "asked_at",
        "blocked_at",
        "blocked_by",
        "draining",
        "grant",
        "heard",
        "key",
        "laned",
        "last_id",
        "max_calls",
        "pid",
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
        self.laned = False  # it has calls, or had, whose answers go by lanes
        self.blocked_by = 0  # the call that it last said blocks its hub, see `blocker`
        self.blocked_at = -math.inf
        self.heard = -math.inf  # when it last showed that its hub runs, or was given its only call
        self.asked_at: float | None = None  # whether its hub runs; not answered yet
        self.grant = 1  # calls that it gets with a prompt answer, though others have less to do

    @property
    def has_room(self) -> bool:
        return len(self.running) < self.slots and not self.draining

    def blocker(self, now: float) -> Call | None:
        """The call that keeps the hub from running, and perhaps others from starting, if the worker has
        just said so. (Code stuck in C says nothing.)"""
        fresh = now - self.blocked_at <= BLOCKED_GRACE
        return self.running.get(self.blocked_by) if fresh else None


class AppTraits(NamedTuple):
    """What a worker said of an app it has loaded."""

    default: ActionTraits
    actions: dict[str, ActionTraits]


class Assign(NamedTuple):
    """Send the call to its worker under `call_id`; `budget` is what is left of its time. With a client, it
    may be answered by a lane, under the client's id."""

    worker: int
    call_id: int
    request: Request
    budget: float
    client: Any = None
    client_id: int = 0


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
