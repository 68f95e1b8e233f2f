"""The errors that a caller sees.

They are gunicorn's own (``gunicorn.dirty.errors``) or subclasses of the nearest one, so an ``except``
clause written for gunicorn works unchanged. Each that comes from a call also has ``may_have_run``:
False means that the action has certainly not been started, so calling again is safe.
"""

from __future__ import annotations

from gunicorn.dirty.errors import (
    DirtyAppError,
    DirtyAppNotFoundError,
    DirtyConnectionError,
    DirtyError,
    DirtyNoWorkersAvailableError,
    DirtyProtocolError,
    DirtyTimeoutError,
    DirtyWorkerError,
)

from .core.faults import Fault

__all__ = [
    "DirtyActionNotFoundError",
    "DirtyAppError",
    "DirtyAppNotFoundError",
    "DirtyCancelledError",
    "DirtyConnectionError",
    "DirtyEncodeError",
    "DirtyError",
    "DirtyMessageTooLargeError",
    "DirtyNoWorkersAvailableError",
    "DirtyOverloadedError",
    "DirtyProtocolError",
    "DirtyTimeoutError",
    "DirtyWorkerDiedError",
    "DirtyWorkerError",
    "error_from_fault",
]


class DirtyActionNotFoundError(DirtyAppError):  # type: ignore[misc]
    """The app has no such action. Nothing has run."""


class DirtyOverloadedError(DirtyNoWorkersAvailableError):  # type: ignore[misc]
    """A bound has been reached (queue, calls per connection, unread answers). Try again later."""


class DirtyWorkerDiedError(DirtyWorkerError):  # type: ignore[misc]
    """The dirty worker ended while it ran the call; the message says how."""


class DirtyCancelledError(DirtyError):  # type: ignore[misc]
    """The caller itself cancelled the call (`DirtyFuture.cancel`)."""


class DirtyEncodeError(DirtyProtocolError):  # type: ignore[misc]
    """A value cannot be sent; the message names its type and its place. The connection stays usable."""


class DirtyMessageTooLargeError(DirtyProtocolError):  # type: ignore[misc]
    """A message is over ``max_message_size``. It was not sent."""


_CLASSES: dict[str, type[DirtyError]] = {
    cls.__name__: cls
    for cls in (
        DirtyActionNotFoundError,
        DirtyAppError,
        DirtyAppNotFoundError,
        DirtyCancelledError,
        DirtyConnectionError,
        DirtyEncodeError,
        DirtyMessageTooLargeError,
        DirtyNoWorkersAvailableError,
        DirtyOverloadedError,
        DirtyProtocolError,
        DirtyTimeoutError,
        DirtyWorkerDiedError,
        DirtyWorkerError,
    )
}

_ATTRIBUTES = ("timeout", "socket_path", "worker_id", "app_path", "action", "traceback")
"""What gunicorn's classes carry as attributes beside `message` and `details`."""


def error_from_fault(fault: Fault) -> DirtyError:
    """The exception for a fault, of the class it names."""
    cls = _CLASSES.get(str(fault.get("error_type")), DirtyError)
    error: DirtyError = Exception.__new__(cls)
    error.message = str(fault.get("message", "Unknown error"))
    details = fault.get("details")
    error.details = details if isinstance(details, dict) else {}
    Exception.__init__(error, error.message)
    for name in _ATTRIBUTES:
        setattr(error, name, error.details.get(name))
    error.may_have_run = bool(error.details.get("may_have_run", True))
    return error
