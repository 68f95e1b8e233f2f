"""`install`: the one file that knows gunicorn's internals.

gunicorn imports ``gunicorn.dirty`` lazily, when it spawns a dirty arbiter, and takes `DirtyArbiter`
from it; ``get_dirty_client`` looks `DirtyClient` up in ``gunicorn.dirty.client`` at each call. So it
is enough to put ours in those places when the package is imported: without dirty settings it never
is, and nothing of ours is loaded either.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_TARGET = "gunicorn.dirty"


def install(**options: float) -> None:
    """Put this library's dirty arbiter and client in the place of gunicorn's.

    To be called from gunicorn's configuration file. Installing twice does nothing more; options
    given again hold for the next dirty arbiter.

    Options (see `gunicorn_dirty_gevent.settings.Settings` for meaning, unit, default and reason):
    `queue_size`, `queue_bytes`, `calls_per_connection`, `unread_bytes`, `max_message_size`,
    `backlog`, `hub_blocked_after`.

    Raises `TypeError` for an unknown option and `ValueError` for a value out of range.
    """
    if options:
        from . import settings

        settings.current = settings.Settings(**options)  # type: ignore[arg-type]
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    if _TARGET in sys.modules:
        _replace(sys.modules[_TARGET])


def _replace(dirty: Any) -> None:
    from .arbiter import DirtyArbiter
    from .client import DirtyClient

    dirty.DirtyArbiter = DirtyArbiter
    dirty.DirtyClient = DirtyClient
    dirty.client.DirtyClient = DirtyClient
    gunicorn_arbiter = sys.modules.get("gunicorn.arbiter")
    if gunicorn_arbiter is not None:
        _announce_stop(gunicorn_arbiter)


def _announce_stop(module: Any) -> None:
    """Have gunicorn's master tell our arbiter before it stops it."""
    stop = module.Arbiter.stop
    if getattr(stop, "announces", False):
        return

    @functools.wraps(stop)
    def announced_stop(self: Any, graceful: bool = True) -> Any:
        announce = getattr(self.dirty_arbiter, "master_stops", None)
        if announce is not None:
            announce()
        return stop(self, graceful)

    announced_stop.announces = True  # type: ignore[attr-defined]
    module.Arbiter.stop = announced_stop


class _Finder(importlib.abc.MetaPathFinder):
    """Finds ``gunicorn.dirty`` as usual, with `_replace` to follow its execution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TARGET:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """The package's own loader, and `_replace` after it."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _replace(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
