"""One call inside a dirty worker: a greenlet that runs the action and sends what comes of it."""

from __future__ import annotations

import itertools
import math
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import gevent
from gevent.event import Event

from . import app as apps
from .blob import apart, detach
from .codecs import CODECS, Arguments
from .core import faults, values, wire
from .core.calls import ActionTraits, AppTraits
from .core.faults import Fault
from .core.wire import Body, Request
from .coroutines import Coroutines
from .lane import Sender
from .runner import Runner

Answer = Body | wire.Detached
"""What is sent of a task: what was encoded, or the memory file that it has been written into."""


class Host(Protocol):
    """What a task needs of its worker."""

    log: Any
    apps: dict[str, Any]
    traits: dict[str, AppTraits]
    coroutines: Coroutines
    max_message: int
    pid: int | str

    def send(self, kind: int, call_id: int, payload: Answer) -> None: ...

    def reply(self, task: Task, kind: int, payload: Answer) -> None: ...

    def ended(self, task: Task) -> None: ...


PACE = 0.1
"""Seconds after which the arbiter, which does not see the chunks, is told again that a stream goes on, or
that it waits for its reader. Far below the time by which it is patient with a call that is over its limit
(`calls.KILL_GRACE`)."""

_END = object()

_NO_TIMEOUT = gevent.Timeout(None)


class _Refused(Exception):
    """The call ends with this fault."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault


class Task:
    """Runs one request; whatever happens, sends exactly one last frame for it."""

    def __init__(
        self,
        host: Host,
        call_id: int,
        request: Request,
        client_id: int | None = None,
        lane: Sender | None = None,
    ) -> None:
        """With a `client_id` the arbiter does not count what is answered, and is told of its pace."""
        self.call_id = call_id
        self.client_id = client_id
        self.lane = lane
        self.request = request
        self._host = host
        self._codec = CODECS.get(request.codec, CODECS[wire.CODEC_MSGPACK])
        self._deadline = time.monotonic() + request.budget
        self._runner: Runner | None = None
        self._cancelled = False
        self._cut_off = False
        self._credit = wire.STREAM_WINDOW
        self._credit_came: Event | None = None
        self._paced = (False, -math.inf)  # what was last told of that, and when
        self._timeout: gevent.Timeout = _NO_TIMEOUT
        self._limit = math.inf
        self._whose = ""  # where that was set
        self._due = math.inf  # when the running timeout is due
        self._exposed = False  # the app's code is running
        self._spent: list[object] = []
        """What is freed with the task, after its answer: of 10,000 integers that takes 40 us."""
        self._interrupted = False

    # What the worker tells it, from the hub.

    def cancel(self) -> None:
        """The caller has gone away: end the action; its `finally` blocks run."""
        # The runner has waited by now (else the hub would not run), so it takes no other task.
        self._cancelled = True
        if self._runner is not None:
            self._runner.kill(block=False)

    def cut_off(self) -> None:
        """The worker quits, and is going to kill all its runners: the caller waits for an answer."""
        self._cut_off = True

    def add_credit(self, amount: int) -> None:
        # Never more than the window, whatever the reader says: it bounds what is kept for it.
        self._credit = min(self._credit + amount, wire.STREAM_WINDOW)
        if self._credit_came is not None:
            self._credit_came.set()

    # What the watchdog asks and does, from a signal handler in this greenlet.

    def overdue(self, now: float) -> float:
        """For how many seconds the app's code has run past its time; negative if it has not."""
        return now - self._due if self._exposed and not self._interrupted else -math.inf

    def tell_blocked(self) -> None:
        """Tell the arbiter that this task keeps the hub from running."""
        if self._exposed:
            self._host.send(wire.BLOCKED, self.call_id, b"")

    def interrupt(self) -> None:
        """Raise the task's timeout right here. Once: the app's code may swallow it, and then it is
        for the arbiter to end the worker."""
        self._interrupted = True
        raise self._timeout

    # In the runner.

    def run(self, runner: Runner) -> tuple[int, Answer]:
        """Run the request to its end; the last frame. Raises nothing."""
        self._runner = runner
        try:
            kind, payload = self._perform()
        except _Refused as refused:
            kind, payload = wire.ERROR, self._encode_fault(refused.fault)
        except gevent.GreenletExit as left:
            kind, payload = wire.END, b""
            if not self._cancelled:
                kind, payload = wire.ERROR, self._encode_fault(self._left(left))
        except BaseException as error:  # a timeout that fired while an error was written up
            fault = faults.protocol(f"the call ended with {type(error).__name__}", may_have_run=True)
            kind, payload = wire.ERROR, self._encode_fault(fault)
        finally:
            self._host.ended(self)
        return kind, payload

    def answer(self, kind: int, payload: Answer) -> None:
        """Send the last frame."""
        if self._cancelled:
            self.lane = None  # only the arbiter waits for it
        self._host.reply(self, kind, payload)

    def _perform(self) -> tuple[int, Answer]:
        """Run the action under its time limits; the last frame."""
        try:
            self._limit, _, self._whose = self._find_traits()
            self._start_timeout()
            result = self._call()
            while hasattr(result, "__await__"):
                self._spent.clear()
                result = self._host.coroutines.result(result, *self._known_as())
            if isinstance(result, Iterator) or hasattr(result, "__aiter__"):
                self._spent.clear()
                return self._iterate(result)
            self._spent.append(result)
            return wire.RESPONSE, self._encode(result, "result")
        except gevent.Timeout as fired:
            # One that the action made itself and let escape is an error of the action's.
            ours = fired is self._timeout
            fault = self._timed_out(fired.seconds) if ours else self._app_error(fired)
            raise _Refused(fault) from fired
        except (gevent.GreenletExit, _Refused):
            raise
        except BaseException as error:
            # SystemExit and KeyboardInterrupt too: an action must not be able to end the worker by
            # leaving politely.
            raise _Refused(self._app_error(error)) from error
        finally:
            self._timeout.close()

    def _start_timeout(self) -> None:
        """Start the clock: for what the caller still waits, or for what an action may take."""
        seconds = min(self._limit, max(self._remaining(), 0.001))
        self._timeout = gevent.Timeout(None if math.isinf(seconds) else seconds)
        self._due = time.monotonic() + seconds
        self._timeout.start()

    def _find_traits(self) -> ActionTraits:
        traits = self._host.traits.get(self.request.app)
        if traits is None:
            raise _Refused(faults.app_unknown(self.request.app, list(self._host.apps)))
        return traits.actions.get(self.request.action, traits.default)

    def _expose(self, code: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call the app's code; only in here may the watchdog interrupt."""
        try:
            self._exposed = True
            return code(*args, **kwargs)
        finally:
            self._exposed = False

    def _remaining(self) -> float:
        return self._deadline - time.monotonic()

    def _call(self) -> Any:
        action = self.request.action
        app = self._host.apps[self.request.app]
        problem = apps.unknown_action(app, action)
        if problem is not None:
            raise _Refused(faults.action_unknown(self.request.app, action, problem))
        args, kwargs = self._arguments()
        try:
            result = self._expose(app, action, *args, **kwargs)
            self._spent += (args, kwargs)
            return result
        except TypeError as error:
            advice = apps.misfit(error, app, action, (args, kwargs))
            if advice is None:
                raise
            fault = self._app_error(error, f"; it has not run{advice}")
            fault["details"]["may_have_run"] = False
            raise _Refused(fault) from error

    def _arguments(self) -> Arguments:
        request = self.request
        try:
            args, kwargs = self._codec.loads_call(request.body)
        except values.UndecodableValue as error:
            message = f"the arguments of {request.name} cannot be decoded: {error}"
            raise _Refused(faults.protocol(message, may_have_run=False)) from error
        if isinstance(request.payload, wire.Detached):
            # Its memory is not to be held while the action runs.
            self.request = request._replace(payload=b"", body_at=0)
        return args, kwargs

    def _known_as(self) -> tuple[str, Callable[[], None]]:
        """For `Coroutines`: the name, and how to say that it keeps the others from running."""
        name = self.request.name
        return name, lambda: self._host.send(wire.BLOCKED, self.call_id, b"")

    # Streams.

    def _iterate(self, result: Any) -> tuple[int, Answer]:
        chunks: Iterator[Any] = result
        if hasattr(result, "__aiter__"):
            chunks = self._host.coroutines.iterate(aiter(result), *self._known_as())
        try:
            if not self.request.stream:
                message = (
                    f"{self.request.name} returned {type(result).__name__}, an "
                    "iterator: call it with client.stream()"
                )
                raise _Refused(faults.protocol(message, may_have_run=True))
            self._send_chunks(chunks)
            return wire.END, b""
        finally:
            # Also when the caller has gone: its `finally` blocks run now, not at some collection.
            close = getattr(chunks, "close", None)
            if close is not None:
                close()

    def _send_chunks(self, chunks: Iterator[Any]) -> None:
        # `dirty_timeout` is for each chunk, the caller's time for the whole stream. Where the first
        # is not the shorter one, the clock that runs is right for the whole stream.
        per_chunk = self._limit < self._remaining()
        runner = self._runner
        assert runner is not None
        for number in itertools.count():
            chunk = self._expose(next, chunks, _END)
            if chunk is _END:
                return
            payload = self._encode(chunk, f"chunk {number}")
            self._host.reply(self, wire.CHUNK, payload)
            self._credit -= wire.chunk_cost(payload)
            if self.client_id is not None:
                self._tell_pace(waits=False)
            if per_chunk:
                self._timeout.close()
            if self._credit <= 0:
                self._wait_for_credit()
            else:
                # The hub gets its turn, and what was sent leaves, even if the generator never waits.
                runner.yield_turn()
            if per_chunk:
                self._start_timeout()

    def _tell_pace(self, *, waits: bool) -> None:
        now = time.monotonic()
        told, told_at = self._paced
        if waits != told or now - told_at > PACE:
            self._paced = waits, now
            self._host.send(wire.PACE, self.call_id, wire.pack_pace(waits))

    def _wait_for_credit(self) -> None:
        if self._credit_came is None:
            self._credit_came = Event()
        # A reader that keeps up gives more in a moment: its stream is said to wait only after that.
        patience = math.inf if self.client_id is None else PACE
        while self._credit <= 0:
            self._credit_came.clear()
            remaining = self._remaining()
            seconds = min(remaining, patience)
            if self._credit_came.wait(None if math.isinf(seconds) else max(seconds, 0.0)):
                continue
            if remaining <= patience:
                raise _Refused(self._callers_time_over(self.request.budget))
            self._tell_pace(waits=True)
            patience = math.inf
        if patience == math.inf and self.client_id is not None:
            self._tell_pace(waits=False)

    # What is sent.

    def _encode(self, value: Any, place: str) -> Answer:
        """A result or chunk as it is sent. Before the task ends: copying much may take a wait."""
        body = self._dump(value, place)
        if len(body) >= wire.DETACH_SIZE and self.request.flags & wire.FLAG_DETACH:
            blob = apart(len(body), detach, body)
            if blob is not None:
                return wire.Detached(b"", blob)
        return body

    def _dump(self, value: Any, place: str) -> Body:
        request = self.request
        if type(value) is types.CoroutineType:
            value.close()
        try:
            payload = self._codec.dumps_body(value, place)
        except values.UnencodableValue as error:
            message = f"{request.name} ran, but its answer was not sent: {error}"
            raise _Refused(faults.unencodable(message, request.app, request.action)) from error
        if len(payload) > self._host.max_message:
            what = f"the {place} of {request.name}"
            limit = self._host.max_message
            raise _Refused(faults.message_too_large(what, len(payload), limit, ran=True))
        return payload

    def _encode_fault(self, fault: Fault) -> bytes:
        try:
            return self._codec.dumps_fault(fault)
        except Exception as error:
            message = f"the call failed, and its error cannot be sent: {type(error).__name__}"
            return self._codec.dumps_fault(faults.protocol(message, may_have_run=True))

    def _app_error(self, error: BaseException, advice: str = "") -> Fault:
        request = self.request
        fault = apps.error_fault(error, request.app, request.action)
        fault["message"] += advice
        text = fault["details"]["traceback"]
        self._host.log.error(
            "Error executing %s.%s: %s\n%s", request.app, request.action, fault["message"], text
        )
        return fault

    def _left(self, error: gevent.GreenletExit) -> Fault:
        if not self._cut_off:  # it came from the app's own code
            return self._app_error(error)
        return faults.cut_off(self.request.app, self.request.action, int(self._host.pid))

    def _timed_out(self, seconds: float | None) -> Fault:
        request = self.request
        if seconds is None or seconds < self._limit:
            return self._callers_time_over(math.inf if seconds is None else seconds)
        message = "Execution timeout for %s.%s after %gs"
        self._host.log.warning(message, request.app, request.action, seconds)
        return self._stopped(seconds, self._whose)

    def _callers_time_over(self, seconds: float) -> Fault:
        return self._stopped(seconds, faults.CALLERS_TIME)

    def _stopped(self, seconds: float, whose: str) -> Fault:
        request = self.request
        pid = int(self._host.pid)
        return faults.stopped_by_timeout(request.app, request.action, seconds, pid, whose)
