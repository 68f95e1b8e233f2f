"""Loading dirty apps and reading what their classes declare. Runs in dirty workers only."""

from __future__ import annotations

import importlib
import math
import traceback
from typing import Any

from gunicorn.dirty.app import DirtyApp, load_dirty_app

from .core.faults import Fault, fault

TRACEBACK_LIMIT = 65536
"""Characters of a traceback that travel with an error: its end, where the cause stands. A recursion
error's has megabytes."""


def describe_class(path: str) -> dict[str, Any]:
    """Import an app's class and return what it declares; the error of the import is the caller's."""
    module_name, _, class_name = path.partition(":")
    cls = getattr(importlib.import_module(module_name), class_name)
    workers = getattr(cls, "workers", None)
    return {"workers": workers if isinstance(workers, int) and workers > 0 else None}


def load(path: str) -> DirtyApp:
    """Instantiate an app and run its `init()`. Raises whatever goes wrong, with its real cause."""
    module_name = path.partition(":")[0]
    # gunicorn's loader reports any ImportError as "app not found"; imported first, a missing
    # dependency of the module is reported by its own name.
    importlib.import_module(module_name)
    app = load_dirty_app(path)
    app.init()
    return app


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
    try:
        message = str(error) or type(error).__name__
    except Exception:
        message = f"{type(error).__name__} (its str() fails)"
    return fault(
        error_type,
        message,
        may_have_run=action is not None,
        app_path=app,
        action=action,
        traceback=format_traceback(error),
        exception=f"{type(error).__module__}.{type(error).__qualname__}",
    )


def format_traceback(error: BaseException) -> str:
    try:
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    except Exception:
        text = f"(the traceback of {type(error).__name__} cannot be formatted)"
    return text if len(text) <= TRACEBACK_LIMIT else "[...]\n" + text[-TRACEBACK_LIMIT:]


def task_limit(cfg: Any) -> float:
    """Seconds an action may run: `dirty_timeout`, where 0 is no limit."""
    return float(cfg.dirty_timeout) if cfg.dirty_timeout else math.inf
