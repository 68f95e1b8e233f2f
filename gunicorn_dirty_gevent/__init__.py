"""gunicorn dirty arbiters that work under gevent.

One line in ``gunicorn.conf.py``::

    import gunicorn_dirty_gevent
    gunicorn_dirty_gevent.install()

Importing this package imports nothing else: the names below are loaded when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .plugin import install

if TYPE_CHECKING:
    from .app import action
    from .arbiter import DirtyArbiter
    from .client import DirtyClient
    from .errors import (
        DirtyActionNotFoundError,
        DirtyCancelledError,
        DirtyEncodeError,
        DirtyMessageTooLargeError,
        DirtyOverloadedError,
        DirtyWorkerDiedError,
    )

__version__ = "0.1.0"

__all__ = [
    "DirtyActionNotFoundError",
    "DirtyArbiter",
    "DirtyCancelledError",
    "DirtyClient",
    "DirtyEncodeError",
    "DirtyMessageTooLargeError",
    "DirtyOverloadedError",
    "DirtyWorkerDiedError",
    "action",
    "install",
]

_HOME = {"action": ".app", "DirtyArbiter": ".arbiter", "DirtyClient": ".client"}


def __getattr__(name: str) -> Any:
    # auto.py must not be reached this way: only the public names are.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME.get(name, ".errors"), __name__), name)
