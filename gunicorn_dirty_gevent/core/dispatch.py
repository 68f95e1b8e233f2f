"""Which call runs where: calls x workers, with queues, slots, deadlines and losses.

Every method takes what happened (and `now`, seconds of one monotonic clock) and returns the actions
to carry out, in order. No clock, no socket: the arbiter owns those.

See `calls` for the states of a call.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from . import faults, wire
from .calls import (
    BLOCKED_GRACE,
    Action,
    AppTraits,
    Assign,
    Call,
    Forward,
    Kill,
    Limits,
    Refuse,
    Reply,
    State,
    Worker,
    Worn,
)
from .crew import Crew
from .deadlines import Deadlines
from .faults import Fault
from .queues import Queue
from .wire import Payload, Request

REPLY_GRACE = 0.25
"""Seconds after a call's deadline until its caller is answered without its worker's word. The worker
ends the call exactly at the deadline; this covers a worker whose hub is blocked for a moment."""

KEPT = 4096
"""Bytes of the largest request that is kept while its call runs, though the call will not run again: more
than most have. Letting go costs 0.8 us."""

MOST_NAMED = 2
"""Of workers whose hubs do not run, so many are named to a caller; one line is to say it."""

LANE_WORD = 0.005
"""Seconds (at least; it is looked at in slices) that a call for which there is no place waits to be refused,
while answers go by lanes: its caller may have one already whose worker's word, by which the slot gets free,
is still on its way here."""


class Dispatcher:
    """See the module's text. Clients are any hashable keys; workers are known by an int."""

    def __init__(self, apps: Iterable[str], limits: Limits) -> None:
        self.limits = limits
        self.late_frames = 0
        """Frames for calls that had ended: dropped, counted."""
        self._queues: dict[str, Queue] = {app: Queue(limits) for app in apps}
        self._faults: dict[str, Fault] = {}
        self._unready: dict[str, str] = {}
        self._clients: dict[Any, dict[int, Call]] = {}
        self._takes_lanes: set[Any] = set()
        self._crew = Crew()
        self._deadlines: Deadlines[Call] = Deadlines()
        self._stopped = ""  # why, once nothing runs any more

    # What the shell may look at.

    @property
    def running(self) -> int:
        return sum(len(worker.running) for worker in self._crew)

    @property
    def queued(self) -> int:
        return sum(len(queue.waiting()) for queue in self._queues.values())

    @property
    def idle(self) -> bool:
        """No caller waits for anything."""
        return not any(self._clients.values())

    def running_on(self, worker: int, *, awaited: bool = False) -> list[tuple[str, str]]:
        """App and action of what a worker is running; `awaited`: of that which a caller waits for."""
        known = self._crew.get(worker)
        calls = known.running.values() if known else ()
        wanted = [call.request for call in calls if not awaited or call.state is State.RUNNING]
        return [(request.app, request.action) for request in wanted]

    # Events from clients.

    def submit(self, client: Any, call_id: int, request: Request, now: float) -> list[Action]:
        """A client's request has arrived."""
        calls = self._clients.setdefault(client, {})
        if call_id in calls:
            raise wire.WireError(f"call id {call_id} is already in use on this connection")
        queue = self._queues.get(request.app)
        if queue is None:
            return [Refuse(client, call_id, faults.app_unknown(request.app, list(self._queues)))]
        refusal = self._refusal(client, request, len(calls))
        if refusal is not None:
            return [Refuse(client, call_id, refusal)]
        call = Call(client, call_id, request, now)
        calls[call_id] = call
        pings: list[Action] = []
        if not queue:
            worker, asked = self._crew.choose(request.app, now)
            pings = [self._ask(other, now) for other in asked]
            if worker is not None:
                return [*pings, *self._assign(call, worker, now)]
        full = queue.full_for(call)
        if full and (queue.overflow or queue.full_for(call, self._crew.room(request.app))):
            return [*pings, *self._overflow(call, queue, full, now)]
        queue.put(call)
        self._deadlines.set(call, call.deadline)
        return pings

    def takes_lanes(self, client: Any) -> None:
        """The client takes answers by lanes."""
        self._takes_lanes.add(client)

    def _refusal(self, client: Any, request: Request, others: int) -> Fault | None:
        if self._stopped:
            return faults.stopping(request.app, request.action, self._stopped, False)
        if request.budget <= 0:
            why = "its time was over when it arrived"
            return faults.queue_timeout(request.app, request.action, 0.0, why)
        if request.app in self._faults:
            return self._faults[request.app]
        most = self.limits.calls_per_client
        if others >= most and client in self._takes_lanes:
            most += self._crew.untold()
        if others >= most:
            return faults.overloaded(
                request.app, f"this client has {others} calls in flight (calls_per_connection)"
            )
        return None

    def _overflow(self, call: Call, queue: Queue, why: str, now: float) -> list[Action]:
        """There is no place for the call, as far as is known here: see `LANE_WORD`."""
        fault = faults.overloaded(call.request.app, why)
        if not queue.put_over(call, fault, self._crew.untold(call.request.app)):
            return [self._end(call, fault)]
        self._deadlines.set(call, min(call.deadline, now + LANE_WORD))
        return []

    def _settle(self, call: Call) -> list[Action]:
        """The workers have had time to tell of ended calls: has it got a place?"""
        fault = self._queues[call.request.app].overflow.get(call)
        if fault is not None:
            return [self._end(call, fault)]
        self._deadlines.set(call, call.deadline)
        return []

    def cancel(self, client: Any, call_id: int, now: float) -> list[Action]:
        """The caller has gone away."""
        call = self._clients.get(client, {}).pop(call_id, None)
        if call is None:
            return []
        if call.state is State.QUEUED:
            self._leave_queue(call, State.ENDED)
            return []
        return self._abandon(call, now)

    def credit(self, client: Any, call_id: int, payload: Payload, now: float) -> list[Action]:
        """The reader of a stream took chunks (`payload` of its CREDIT frame)."""
        amount = wire.unpack_credit(payload)
        call = self._clients.get(client, {}).get(call_id)
        if call is None or call.worker is None:
            return []
        if not call.laned:  # else the worker counts, and says when it waits
            # Never more than the window, whatever the reader says: it bounds what is kept for it here.
            amount = min(amount, wire.STREAM_WINDOW - call.credit)
            paused = call.credit <= 0
            call.credit += amount
            if paused and call.credit > 0:
                call.progress = now
                self._watch(call)
        if amount <= 0:
            return []
        credit = wire.pack_credit_payload(amount)
        return [Forward(call.worker.key, wire.CREDIT, call.worker_id, credit)]

    def client_lost(self, client: Any, now: float) -> list[Action]:
        """The connection has ended: so have its calls."""
        actions: list[Action] = []
        for call_id in list(self._clients.get(client, ())):
            actions += self.cancel(client, call_id, now)
        self._clients.pop(client, None)
        self._takes_lanes.discard(client)
        return actions

    # Events from workers.

    def worker_ready(
        self,
        worker: int,
        pid: int,
        apps: dict[str, AppTraits],
        slots: int,
        now: float,
        max_calls: int = 0,
    ) -> list[Action]:
        """A worker takes calls for `apps`, `slots` at once, and is `Worn` after `max_calls` (0: never)."""
        ready = Worker(worker, pid, apps, slots, max_calls)
        self._crew.add(ready)
        for app in apps:
            self._faults.pop(app, None)
            self._unready.pop(app, None)
        return self._fill(ready, now)

    def app_failed(self, app: str, fault: Fault) -> list[Action]:
        """A worker could not load the app. If no other has it, its callers get the app's own error,
        now and until a worker loads it."""
        if self._crew.of(app):
            return []
        self._faults[app] = fault
        calls = self._queues[app].waiting()
        return [self._end(call, faults.ran_before(fault) if call.attempts else fault) for call in calls]

    def not_ready(self, apps: Iterable[str], why: str) -> None:
        """A worker ended before it could serve these apps; what is told of calls that wait in vain."""
        for app in apps:
            if not self._crew.of(app):
                self._unready[app] = why

    def worker_draining(self, worker: int) -> None:
        """Give the worker nothing new; it is going to stop when its calls have ended."""
        known = self._crew.get(worker)
        if known is not None:
            known.draining = True

    def frame_from_worker(
        self, worker: int, kind: int, call_id: int, payload: Payload, now: float
    ) -> list[Action]:
        """A CHUNK, or a last frame (RESPONSE, ERROR, END), or DONE: the last has gone by a lane."""
        known = self._crew.get(worker)
        call = known.running.get(call_id) if known else None
        if known is None or call is None:
            self.late_frames += 1
            return []
        known.heard = now
        wanted = call.state is State.RUNNING
        if kind == wire.CHUNK:
            if not wanted:
                self.late_frames += 1
                return []
            call.progress = now
            if not call.laned:
                call.credit -= wire.chunk_cost(payload)
            call.answered = True
            return [Reply(call.client, kind, call.client_id, payload)]
        del known.running[call_id]
        if (kind == wire.ERROR or not wanted) and not known.running:
            # Of busy ones the cold end comes first, so there it is not sent.
            self._crew.least_wanted(known)
        self._deadlines.drop(call)
        call.state = State.ENDED
        actions: list[Action] = []
        if wanted:
            del self._clients[call.client][call.client_id]
            if kind != wire.DONE:
                actions.append(Reply(call.client, kind, call.client_id, payload))
        return actions + self._fill(known, now)

    def not_by_lane(self, worker: int, call_id: int) -> None:
        """For a call that was assigned there is no lane."""
        known = self._crew.get(worker)
        if known is not None:
            known.running[call_id].laned = False

    def worker_paced(self, worker: int, call_id: int, waits: bool, now: float) -> None:
        """A worker says that chunks of a stream have gone by its lane; does it wait for its reader?"""
        known = self._crew.get(worker)
        call = known.running.get(call_id) if known else None
        if known is None or call is None:
            return
        known.heard = now
        if call.state is not State.RUNNING:
            return
        call.progress = now
        call.answered = True
        call.credit = 0 if waits else wire.STREAM_WINDOW
        self._watch(call)

    def undelivered(self, worker: int, call_id: int, request: Request, now: float) -> list[Action]:
        """A call that was assigned has certainly not reached its worker, which is gone: its end will
        be told. The call, of this request, goes elsewhere."""
        known = self._crew.get(worker)
        if known is not None:
            known.draining = True
        call = known.running.pop(call_id, None) if known else None
        if call is None:
            return []
        self._deadlines.drop(call)
        if call.state is not State.RUNNING:
            call.state = State.ENDED
            return []
        call.attempts -= 1
        call.request = request
        self._requeue(call)
        return self._fill_all(now)

    def worker_heard(self, worker: int, now: float) -> None:
        """A worker has said, without being asked, that its hub runs. Calls that wait are not given to it now:
        it has been asked then, and says so before each answer."""
        known = self._crew.get(worker)
        if known is not None:
            known.heard = now

    def worker_answered(self, worker: int, now: float) -> list[Action]:
        """A worker's hub has come to the PING."""
        known = self._crew.get(worker)
        return self._fill(known, now, self._crew.answered(known, now)) if known is not None else []

    def worker_blocked(self, worker: int, call_id: int, now: float) -> None:
        """A worker says that this call keeps its hub from running."""
        known = self._crew.get(worker)
        if known is not None:
            known.blocked_by, known.blocked_at = call_id, now

    def worker_lost(self, worker: int, how: str, now: float) -> list[Action]:
        """The worker is dead; `how` in words ("was killed by SIGKILL")."""
        lost = self._crew.remove(worker)
        if lost is None:
            return []
        actions: list[Action] = []
        for call in reversed(list(lost.running.values())):
            self._deadlines.drop(call)
            if call.state is not State.RUNNING:
                call.state = State.ENDED
            elif self._may_run_again(call, now):
                self._requeue(call)
            else:
                request = call.request
                fault = faults.worker_died(request.app, request.action, lost.pid, how)
                actions.append(self._end(call, fault))
        return actions + self._fill_all(now)

    def _may_run_again(self, call: Call, now: float) -> bool:
        """Once, and not when chunks have gone out, which would come again."""
        first = call.attempts < 2 and not call.answered
        return call.traits.idempotent and first and call.deadline > now and not self._stopped

    def _requeue(self, call: Call) -> None:
        call.worker = None
        call.credit = wire.STREAM_WINDOW
        call.laned = False
        self._queues[call.request.app].put(call, first=True)
        self._deadlines.set(call, call.deadline)

    def stop(self, why: str) -> list[Action]:
        """Nothing will run any more: end every call, and those that still come."""
        self._stopped = why
        actions: list[Action] = []
        for calls in list(self._clients.values()):
            for call in list(calls.values()):
                runs = call.state is State.RUNNING
                request = call.request
                fault = faults.stopping(request.app, request.action, why, call.attempts > 0)
                actions.append(self._answer(call, fault) if runs else self._end(call, fault))
        return actions

    # Time.

    def next_deadline(self) -> float | None:
        """When `tick` is worth calling next."""
        return self._deadlines.next()

    def tick(self, now: float) -> list[Action]:
        """Time has passed."""
        actions: list[Action] = []
        for call in self._deadlines.due(now):
            if call.state is not State.QUEUED:
                actions += self._overdue(call, now)
            elif call.deadline <= now:
                actions.append(self._end(call, self._queue_timeout(call, now)))
            else:
                actions += self._settle(call)
        return actions

    def _queue_timeout(self, call: Call, now: float) -> Fault:
        request = call.request
        holders = self._crew.of(request.app)
        silent = [worker for worker in holders if worker.has_room and self._crew.silent(worker, now)]
        if silent:
            silent.sort(key=lambda worker: worker.blocker(now) is None)
            hubs = ", ".join(self._kept_hub(worker, now) for worker in silent[:MOST_NAMED])
            count = len(silent)
            why = f"of {len(holders)} workers {count} had a free slot, but their hubs did not run ({hubs})"
        elif holders:
            slots = sum(worker.slots for worker in holders)
            why = f"all {slots} slots of {len(holders)} workers were busy (dirty_workers, dirty_threads)"
        else:
            reason = self._unready.get(request.app, "gunicorn's log says more")
            why = f"no dirty worker was ready with this app ({reason})"
        waited = now - call.enqueued
        return faults.queue_timeout(request.app, request.action, waited, why, ran=call.attempts > 0)

    @staticmethod
    def _kept_hub(worker: Worker, now: float) -> str:
        blocker = worker.blocker(now)
        if blocker is None:
            return f"dirty worker {worker.pid} said nothing"
        return f"{blocker.request.name} keeps the hub of dirty worker {worker.pid}"

    def _overdue(self, call: Call, now: float) -> list[Action]:
        """A call at a worker has passed the caller's deadline, its own time limit, or both."""
        worker, request = call.worker, call.request
        assert worker is not None
        if call.stuck_at <= now:
            return self._stuck(call, worker, now)
        if call.state is State.RUNNING and call.deadline + REPLY_GRACE <= now:
            first = None if call.answered else worker.blocker(now)
            name = first.request.name if first is not None and first is not call else None
            late = faults.run_timeout(request.app, request.action, now - call.enqueued, worker.pid, name)
            return [self._answer(call, late), *self._abandon(call, now)]
        self._watch(call)
        return []

    def _stuck(self, call: Call, worker: Worker, now: float) -> list[Action]:
        """It has passed its own limit, and nothing gentler has stopped it."""
        app, action = call.request.app, call.request.action
        timeout, _, limit = call.traits
        waits = call.state is State.RUNNING
        actions: list[Action] = []
        first = worker.blocker(now)
        if first is not None and first.stuck_at > now:
            # Killing the worker now would cost a call that is within its own limit.
            if waits:
                fault = faults.held_up(app, action, timeout, worker.pid, limit, first.request.name)
                actions = [self._answer(call, fault), *self._abandon(call, now)]
            self._deadlines.set(call, now + BLOCKED_GRACE)
            return actions
        worker.draining = True
        if waits:
            actions.append(self._answer(call, faults.stuck(app, action, timeout, worker.pid, limit)))
        why = f"{call.request.name} ran past its limit of {timeout:.6g} s and could not be stopped"
        return [*actions, Kill(worker.key, why)]

    def _answer(self, call: Call, fault: Fault) -> Refuse:
        """Answer the caller of a call that still holds its slot."""
        del self._clients[call.client][call.client_id]
        call.state = State.ABANDONED
        return Refuse(call.client, call.client_id, fault)

    def _watch(self, call: Call) -> None:
        when = call.stuck_at
        if call.state is State.RUNNING:
            when = min(when, call.deadline + REPLY_GRACE)
        self._deadlines.set(call, when)

    # Placing calls.

    @staticmethod
    def _ask(worker: Worker, now: float, grant: int = 1) -> Forward:
        """Whether its hub runs."""
        worker.asked_at, worker.grant = now, grant
        return Forward(worker.key, wire.PING, 0, b"")

    def _assign(self, call: Call, worker: Worker, now: float) -> list[Action]:
        request = call.request
        app = worker.apps[request.app]
        call.traits = app.actions.get(request.action, app.default)
        call.state = State.RUNNING
        call.worker = worker
        call.progress = now
        call.attempts += 1
        worker.last_id += 1
        call.worker_id = worker.last_id
        if not worker.running:
            worker.heard = now
        worker.running[call.worker_id] = call
        self._watch(call)
        assign = Assign(worker.key, call.worker_id, request, call.deadline - now)
        # What a stream that may run again has sent must be known here.
        if call.client in self._takes_lanes and not (request.stream and call.traits.idempotent):
            call.laned = worker.laned = True
            assign = assign._replace(client=call.client, client_id=call.client_id)
        if len(request.payload) > KEPT and not call.traits.idempotent:
            # Its memory, and perhaps a descriptor, is not to be held while the action runs.
            call.request = request._replace(payload=b"", body_at=0)
        if worker.last_id != worker.max_calls:
            return [assign]
        return [assign, Worn(worker.key, f"it has served max_requests ({worker.max_calls})")]

    def _fill(self, worker: Worker, now: float, least: int = 1) -> list[Action]:
        """Give a worker that has just been heard of those calls that have waited longest: `least`, and more
        while no other has less to do. For these may keep its hub, and others may be heard of in a moment; if
        not, it gets the next when it has answered once more."""
        actions: list[Action] = []
        given = 0
        while worker.has_room:
            call = self._oldest(worker)
            if call is None:
                break
            if call.deadline <= now:
                actions.append(self._end(call, self._queue_timeout(call, now)))
                continue
            if given >= least and not self._crew.least_loaded(worker, call.request.app):
                if worker.asked_at is None:
                    actions.append(self._ask(worker, now, 2 * given))
                break
            given += 1
            self._leave_queue(call, State.RUNNING)
            actions += self._assign(call, worker, now)
        return actions

    def _fill_all(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for worker in self._crew:
            call = self._oldest(worker)
            if call is None or not worker.has_room:
                continue
            if not self._crew.must_ask(worker, call.request.app, now):
                actions += self._fill(worker, now)
            elif worker.asked_at is None:
                actions.append(self._ask(worker, now))
        return actions

    def _oldest(self, worker: Worker) -> Call | None:
        best: Call | None = None
        for app in worker.apps:
            queue = self._queues.get(app)
            call = queue.head() if queue else None
            if call is not None and (best is None or call.enqueued < best.enqueued):
                best = call
        return best

    def _leave_queue(self, call: Call, state: State) -> None:
        call.state = state
        queue = self._queues[call.request.app]
        queue.remove(call)
        if queue.overflow:
            queue.promote(self._crew.room(call.request.app))
        self._deadlines.drop(call)

    def _abandon(self, call: Call, now: float) -> list[Action]:
        """Nobody waits for a call that is at a worker: ask the worker to stop it."""
        assert call.worker is not None
        if call.credit <= 0:
            call.progress = now  # the time it was paused is not its own
        call.state = State.ABANDONED
        self._watch(call)
        return [Forward(call.worker.key, wire.CANCEL, call.worker_id, b"")]

    def _end(self, call: Call, fault: Fault) -> Refuse:
        """End a call that is at no worker with an error."""
        if call.state is State.QUEUED:
            self._leave_queue(call, State.ENDED)
        call.state = State.ENDED
        del self._clients[call.client][call.client_id]
        return Refuse(call.client, call.client_id, fault)
