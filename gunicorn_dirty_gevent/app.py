"""Loading dirty apps and reading what their classes declare. Runs in dirty workers only."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import gevent
from gunicorn.dirty.app import DirtyApp, load_dirty_app
from gunicorn.dirty.errors import DirtyAppError, DirtyError

from .codecs import Arguments
from .core.calls import ActionTraits, AppTraits
from .core.faults import Fault, fault

_HERE = os.path.dirname(__file__)
_GUNICORN_APP = sys.modules[DirtyApp.__module__].__file__

TRACEBACK_LIMIT = 65536
"""Characters of a traceback that travel with an error: its end, where the cause stands. A recursion
error's has megabytes."""


def describe_class(path: str) -> dict[str, Any]:
    """Import an app's class and return what it declares; the error of the import is the caller's."""
    module_name, _, class_name = path.partition(":")
    cls = getattr(importlib.import_module(module_name), class_name)
    workers = getattr(cls, "workers", None)
    stashes = getattr(cls, "stashes", ())
    if isinstance(stashes, str) or not all(isinstance(name, str) for name in stashes):
        raise TypeError(f"{path}: stashes is a list of names of tables, not {stashes!r}")
    return {
        "workers": workers if isinstance(workers, int) and workers > 0 else None,
        "stashes": [str(name) for name in stashes],
    }


def load(path: str) -> DirtyApp:
    """Import and instantiate an app. Raises whatever goes wrong, with its real cause."""
    module_name = path.partition(":")[0]
    # gunicorn's loader reports any ImportError as "app not found"; imported first, a missing
    # dependency of the module is reported by its own name.
    module = importlib.import_module(module_name)
    try:
        return load_dirty_app(path)
    except DirtyAppError as error:
        cls = getattr(module, path.partition(":")[2], None)
        if not isinstance(cls, type) or issubclass(cls, DirtyApp):
            raise
        raise DirtyAppError(f"{error.message}; does it inherit from DirtyApp?", path) from error


def unknown_action(app: DirtyApp, action: str) -> str | None:
    """Why the app has no such action, or None when it may have one.

    An app with a `__call__` of its own decides that itself.
    """
    if type(app).__call__ is not DirtyApp.__call__:
        return None
    if not action.startswith("_") and callable(getattr(app, action, None)):
        return None
    names = [name for name in dir(type(app)) if _is_action(app, name)]
    return f"Unknown action: {action}; the app has {', '.join(names) or 'none'}"


def _is_action(app: DirtyApp, name: str) -> bool:
    if name.startswith("_") or name in ("init", "close"):
        return False
    return callable(getattr(type(app), name, None))


def error_fault(
    error: BaseException, app: str, action: str | None, *, error_type: str = "DirtyAppError"
) -> Fault:
    """An exception of the app's code as a fault, with its traceback."""
    return fault(
        error_type,
        describe_error(error),
        may_have_run=action is not None,
        app_path=app,
        action=action,
        traceback=format_traceback(error),
        exception=f"{type(error).__module__}.{type(error).__qualname__}",
    )


def describe_error(error: BaseException) -> str:
    """Its text, as gunicorn has it; with its type's name where the text alone says nothing."""
    name = type(error).__name__
    try:
        # Joined: exactly a str, where a subclass (Django's SafeString) could not be sent.
        # And without gunicorn's details, which travel by themselves.
        text = "".join((error.message if isinstance(error, DirtyError) else str(error), ""))
    except Exception:
        return f"{name} (its str() fails)"
    if isinstance(error, (KeyError, SystemExit, gevent.Timeout)):  # a key, a code, "5 seconds"
        return f"{name}: {text}"
    return text or name


def misfit(error: TypeError, app: DirtyApp, action: str, arguments: Arguments) -> str | None:
    """Advice, perhaps empty, when an action could not be called with these arguments; None when it may
    have begun to run."""
    # Two witnesses: the app's own code, a decorator included, has frames; a function written in C has none.
    frames = traceback.walk_tb(error.__traceback__)
    if not all(is_ours(frame.f_code.co_filename) for frame, _ in frames):
        return None
    args, kwargs = arguments
    method: Any = getattr(app, action, None)
    if _fits(method, args, kwargs):
        return None
    rest = {name: value for name, value in kwargs.items() if name != "timeout"}
    if len(rest) < len(kwargs) and _fits(method, args, rest):
        return ". A call's own limit is given with client.options(timeout=...)"
    return ""


def _fits(method: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):  # it has none
        return True
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def format_traceback(error: BaseException) -> str:
    """The traceback from the app's first frame on: ours above it say nothing."""
    start = error.__traceback__
    while start is not None and start.tb_next is not None and is_ours(start.tb_frame.f_code.co_filename):
        start = start.tb_next
    try:
        text = "".join(traceback.format_exception(type(error), error, start))
    except Exception:
        text = f"(the traceback of {type(error).__name__} cannot be formatted)"
    return text if len(text) <= TRACEBACK_LIMIT else "[...]\n" + text[-TRACEBACK_LIMIT:]


def is_ours(file: str) -> bool:
    """Whether a frame of this file is between gunicorn and the app's code."""
    return file.startswith((_HERE, "<frozen importlib")) or file == _GUNICORN_APP


def task_limit(cfg: Any) -> float:
    """Seconds an action may run: gunicorn's `dirty_timeout`, where 0 is no limit."""
    return float(cfg.dirty_timeout) if cfg.dirty_timeout else math.inf


F = TypeVar("F", bound=Callable[..., Any])

_MARK = "_dirty_action"


def action(*positional: NoReturn, timeout: float | None = None, idempotent: bool = False) -> Callable[[F], F]:
    """Declare how an action of a dirty app is to be run::

        class ImageApp(DirtyApp):
            dirty_timeout = 60          # for all actions of this app

            @action(timeout=5, idempotent=True)
            def thumbnail(self, data): ...

    `timeout`: seconds it may run (a stream: until its next chunk), in place of the app's
    `dirty_timeout` and gunicorn's setting of that name; a caller with less time wins. None takes
    theirs. `idempotent`: running it twice does no harm, so when its worker dies it is run once more
    elsewhere instead of failing.

    Raises ValueError for a timeout that is not a positive number, TypeError where its parentheses or names
    are left out.
    """
    if positional:
        raise TypeError("action is written with parentheses and names: @action(timeout=5)")
    if timeout is not None:
        _checked_timeout("action(timeout=...)", timeout)

    def mark(method: F) -> F:
        setattr(method, _MARK, (timeout, idempotent))
        return method

    return mark


def traits(cls: type, limit: float) -> AppTraits:
    """What a class declares of its actions; `limit` holds where it says nothing."""
    own, whose = getattr(cls, "dirty_timeout", None), "gunicorn's dirty_timeout"
    if own is not None:
        whose = f"{cls.__qualname__}.dirty_timeout"
        limit = _checked_timeout(whose, own)
    actions = {}
    for name in dir(cls):
        declared = getattr(getattr(cls, name, None), _MARK, None)
        if declared is not None:
            timeout, idempotent = declared
            if timeout is None:
                actions[name] = ActionTraits(limit, idempotent, whose)
            else:
                actions[name] = ActionTraits(float(timeout), idempotent, f"@action(timeout={timeout:g})")
    return AppTraits(ActionTraits(limit, limit=whose), actions)


def _checked_timeout(what: str, seconds: float) -> float:
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
        raise ValueError(f"{what} is a positive number of seconds, not {seconds!r}")
    return float(seconds)
