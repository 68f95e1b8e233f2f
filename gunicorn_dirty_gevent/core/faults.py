"""Errors as they travel: what failed, whose fault, whether the call may have run, what to do.

A fault is the dict that gunicorn's ``DirtyError.to_dict()`` makes (``error_type``, ``message``,
``details``), so each dialect of the wire can carry it. ``details["may_have_run"]`` is the answer to
"can I safely call again?". The exception classes live in `gunicorn_dirty_gevent.errors`.
"""

from __future__ import annotations

from typing import Any

Fault = dict[str, Any]

CANCELLED = "DirtyCancelledError"


def fault(error_type: str, message: str, *, may_have_run: bool, **details: Any) -> Fault:
    """A fault; details that are None are left out."""
    kept = {name: value for name, value in details.items() if value is not None}
    kept["may_have_run"] = may_have_run
    return {"error_type": error_type, "message": message, "details": kept}


def app_unknown(app: str, known: list[str]) -> Fault:
    return fault(
        "DirtyAppNotFoundError",
        f"Dirty app not found: {app}; dirty_apps has {', '.join(known) or 'none'}",
        may_have_run=False,
        app_path=app,
    )


def action_unknown(app: str, action: str, message: str) -> Fault:
    return fault("DirtyActionNotFoundError", message, may_have_run=False, app_path=app, action=action)


def ran_before(told: Fault) -> Fault:
    """The same fault, for a call whose first run was lost with its worker."""
    return {**told, "details": {**told["details"], "may_have_run": True}}


def protocol(message: str, *, may_have_run: bool) -> Fault:
    return fault("DirtyProtocolError", message, may_have_run=may_have_run)


def unencodable(message: str, app: str, action: str) -> Fault:
    return fault("DirtyEncodeError", message, may_have_run=True, app_path=app, action=action)


def overloaded(app: str, what: str) -> Fault:
    return fault(
        "DirtyOverloadedError",
        f"{app}: {what}; the call has not run, try again later or raise the limit with install()",
        may_have_run=False,
        app_path=app,
    )


def message_too_large(what: str, size: int, limit: int, *, ran: bool) -> Fault:
    told = "the call has run" if ran else "nothing was sent"
    parts = "send it in parts (a stream's chunks count one by one)" if ran else "send less at a time"
    return fault(
        "DirtyMessageTooLargeError",
        f"{what}: {size} bytes encoded, and max_message_size is {limit}; {told}. Raise it with "
        f"install(max_message_size=...) or {parts}",
        may_have_run=ran,
        size=size,
        limit=limit,
    )


def queue_timeout(app: str, action: str, waited: float, why: str, *, ran: bool = False) -> Fault:
    """`ran`: a first run was lost with its worker."""
    start, told = ("again ", "its first run was lost") if ran else ("", "it has not run")
    return fault(
        "DirtyTimeoutError",
        f"{app}.{action} was not started {start}within {waited:.3g} s: {why}; {told}",
        may_have_run=ran,
        timeout=waited,
        app_path=app,
        action=action,
    )


CALLERS_TIME = "the time its caller gave it"
"""Whose limit it was, where it was none of the action's own."""


def stopped_by_timeout(app: str, action: str, limit: float, pid: int, whose: str) -> Fault:
    return fault(
        "DirtyTimeoutError",
        f"{app}.{action} was stopped after {limit:.3g} s in dirty worker {pid} ({whose}); it has run in part",
        may_have_run=True,
        timeout=limit,
        app_path=app,
        action=action,
        worker_id=pid,
    )


def no_answer(app: str, action: str, timeout: float | None, socket_path: str, *, sent: bool) -> Fault:
    if sent:
        told = "the request was sent, so the call may have run; the dirty arbiter did not answer"
    else:
        told = (
            f"there was no connection to the dirty arbiter at {socket_path}, so the call has not run; "
            "gunicorn's log says what became of it"
        )
    return fault(
        "DirtyTimeoutError",
        f"{app}.{action} did not end within {timeout:.6g} s: {told}",
        may_have_run=sent,
        timeout=timeout,
        socket_path=socket_path,
        app_path=app,
        action=action,
    )


def idle_stream(app: str, action: str, idle: float, *, sent: bool, option: str) -> Fault:
    told = "it is told to stop" if sent else "it has not run"
    return fault(
        "DirtyTimeoutError",
        f"no chunk from {app}.{action} for {idle:.3g} s ({option}); {told}",
        may_have_run=sent,
        timeout=idle,
        app_path=app,
        action=action,
    )


def not_yet(app: str, action: str, timeout: float | None) -> Fault:
    return fault(
        "DirtyTimeoutError",
        f"{app}.{action} has not ended after {timeout} s; it goes on",
        may_have_run=True,
        timeout=timeout,
        app_path=app,
        action=action,
    )


def cancelled(app: str, action: str, *, sent: bool) -> Fault:
    return fault(
        CANCELLED,
        f"{app}.{action} was cancelled by its caller",
        may_have_run=sent,
        app_path=app,
        action=action,
    )


def run_timeout(app: str, action: str, ran: float, pid: int, first: str | None) -> Fault:
    if first is None:
        told = f"dirty worker {pid} has not confirmed that it stopped it after {ran:.3g} s"
    else:
        told = f"it was probably not started: {first} keeps the hub of dirty worker {pid} from running"
    return fault(
        "DirtyTimeoutError",
        f"{app}.{action} did not end within {CALLERS_TIME}; {told}",
        may_have_run=True,
        timeout=ran,
        app_path=app,
        action=action,
        worker_id=pid,
    )


def held_up(app: str, action: str, limit: float, pid: int, whose: str, first: str) -> Fault:
    return fault(
        "DirtyTimeoutError",
        f"{app}.{action} did not end within {limit:.3g} s ({whose}); it was probably not started: "
        f"{first} keeps the hub of dirty worker {pid} from running",
        may_have_run=True,
        timeout=limit,
        app_path=app,
        action=action,
        worker_id=pid,
    )


def stuck(app: str, action: str, limit: float, pid: int, whose: str) -> Fault:
    return fault(
        "DirtyTimeoutError",
        f"{app}.{action} ran past its limit of {limit:.6g} s ({whose}) and could not be stopped: "
        f"dirty worker {pid} is killed; it has run in part",
        may_have_run=True,
        timeout=limit,
        app_path=app,
        action=action,
        worker_id=pid,
    )


def worker_died(app: str, action: str, pid: int, how: str) -> Fault:
    return fault(
        "DirtyWorkerDiedError",
        f"dirty worker {pid} {how} while it ran {app}.{action}; the call may have run, in part or "
        "whole; gunicorn's log says more",
        may_have_run=True,
        app_path=app,
        action=action,
        worker_id=pid,
    )


def stopping(app: str, action: str, why: str, may_have_run: bool) -> Fault:
    ran = "it was cut off while it ran" if may_have_run else "it has not run"
    return fault(
        "DirtyWorkerError",
        f"{app}.{action}: the dirty arbiter stopped before the call ended ({why}); {ran}",
        may_have_run=may_have_run,
        app_path=app,
        action=action,
    )


def cut_off(app: str, action: str, pid: int) -> Fault:
    return fault(
        "DirtyWorkerError",
        f"{app}.{action}: dirty worker {pid} was told to quit at once; it was cut off while it ran",
        may_have_run=True,
        app_path=app,
        action=action,
        worker_id=pid,
    )


def answer_dropped(size: int, limit: int) -> Fault:
    return fault(
        "DirtyOverloadedError",
        f"the action ran, but its answer of {size} bytes was dropped: this process leaves more than "
        f"{limit} bytes of answers unread (unread_bytes): its hub may be blocked, or the limit, which "
        "install() sets, too low",
        may_have_run=True,
    )


def connection_lost(app: str, action: str, reason: str, sent: bool, socket_path: str) -> Fault:
    if sent:
        told = "the request had been sent, so the call may have run"
    else:
        told = "the request had not been sent, so the call has not run"
    return fault(
        "DirtyConnectionError",
        f"lost the dirty arbiter during {app}.{action} ({reason}); {told}",
        may_have_run=sent,
        socket_path=socket_path,
        app_path=app,
        action=action,
    )
