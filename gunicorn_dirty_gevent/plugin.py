"""`install`: the one file that knows gunicorn's internals.

gunicorn imports ``gunicorn.dirty`` lazily, when it spawns a dirty arbiter, and takes `DirtyArbiter`
from it; ``get_dirty_client`` looks `DirtyClient` up in ``gunicorn.dirty.client`` at each call, and the
functions of ``gunicorn.dirty.stash`` look up `StashClient` there. So it is enough to put ours in those
places when the package is imported: without dirty settings it never is, and nothing of ours is loaded
either.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import signal
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_TARGET = "gunicorn.dirty"

_EVENTLET = "eventlet.patcher"

_with_arbiter = True
"""Whether `install` puts our arbiter in place too."""


def install(*, arbiter: bool = True, **options: float) -> None:
    """Put this library's dirty arbiter and client in the place of gunicorn's.

    To be called from gunicorn's configuration file. Installing twice does nothing more; options
    given again hold for the next dirty arbiter.

    `arbiter=False` puts only the client in place and leaves the dirty arbiter and its workers to
    gunicorn: greenlets no longer share a socket, and their calls run at once as far as stock's workers do.

    Options (see `gunicorn_dirty_gevent.settings.Settings` for meaning, unit, default and reason):
    `queue_size`, `queue_bytes`, `calls_per_connection`, `unread_bytes`, `max_message_size`,
    `stash_size`, `backlog`, `max_requests`, `max_requests_jitter`, `max_memory`, `hub_blocked_after`.

    Raises `TypeError` for an unknown option, or one that gunicorn's own arbiter would not know,
    `ValueError` for a value out of range, and `RuntimeError` where eventlet has patched the process before.
    """
    global _with_arbiter
    if not arbiter and options.keys() - {"calls_per_connection"}:
        names = ", ".join(sorted(options.keys() - {"calls_per_connection"}))
        raise TypeError(f"install(arbiter=False) leaves the arbiter to gunicorn, which has no {names}")
    if options:
        from . import settings

        unknown = ", ".join(sorted(options.keys() - settings.NAMES))
        if unknown:
            raise TypeError(f"install() has no {unknown}; its options are {', '.join(settings.NAMES)}")
        settings.current = settings.Settings(**options)  # type: ignore[arg-type]
    _with_arbiter = arbiter
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
        client = sys.modules.get("gunicorn.dirty.client")
        if arbiter and getattr(client, "_dirty_socket_path", None) is not None:
            # Set by a master that has spawned its arbiter, so here or in a process that it forked.
            _say_too_late()
        if _EVENTLET in sys.modules:
            _load_gevent(sys.modules[_EVENTLET])
    if _TARGET in sys.modules:
        _replace(sys.modules[_TARGET])


def _say_too_late() -> None:
    import logging

    logging.getLogger("gunicorn.error").warning(
        "gunicorn_dirty_gevent.install() comes too late: gunicorn's own dirty arbiter is running. Call it "
        "at the top of gunicorn.conf.py, and start gunicorn anew"
    )


def _replace(dirty: Any) -> None:
    from .client.client import DirtyClient  # the package may be what is importing gunicorn's just now
    from .client.stash import StashClient, StashTable

    dirty.DirtyClient = DirtyClient
    dirty.client.DirtyClient = DirtyClient
    dirty.StashClient = dirty.stash.StashClient = StashClient
    dirty.StashTable = dirty.stash.StashTable = StashTable
    if not _with_arbiter:
        return
    from .arbiter import DirtyArbiter

    dirty.DirtyArbiter = DirtyArbiter
    gunicorn_arbiter = sys.modules.get("gunicorn.arbiter")
    if gunicorn_arbiter is not None:
        _join_master(gunicorn_arbiter)


def _join_master(module: Any) -> None:
    """Have gunicorn's master tell our arbiter what its signals alone do not say."""
    arbiter = module.Arbiter
    if getattr(arbiter, "_dirty_gevent", False):
        return
    arbiter._dirty_gevent = True
    stop, reload = arbiter.stop, arbiter.reload

    @functools.wraps(stop)
    def stop_announced(self: Any, graceful: bool = True) -> Any:
        if hasattr(self.dirty_arbiter, "master_stops"):
            self.dirty_arbiter.master_stops()
        return stop(self, graceful)

    @functools.wraps(reload)
    def reload_with_settings(self: Any) -> Any:
        before = _dirty_settings(self.cfg)
        result = reload(self)
        if hasattr(self.dirty_arbiter, "master_stops") and _dirty_settings(self.cfg) != before:
            # It has the old settings and no way to the new ones: let the next one take over. (The HUP
            # that follows finds it stopping and changes nothing.)
            self.log.info("Dirty settings have changed: replacing the dirty arbiter")
            self.kill_dirty_arbiter(signal.SIGTERM)
        return result

    arbiter.stop = stop_announced
    arbiter.reload = reload_with_settings


def _dirty_settings(cfg: Any) -> list[Any]:
    """What an arbiter and its workers were made with and cannot change later."""
    from . import settings

    names = ["dirty_apps", "dirty_workers", "dirty_threads", "dirty_timeout", "dirty_graceful_timeout"]
    return [settings.current, *(getattr(cfg, name) for name in names), sorted(cfg.env.items())]


def _load_gevent(patcher: Any = None) -> None:
    """gevent's compiled half keeps what it finds in the standard library when it is loaded. That must not
    be eventlet's, or no dirty process can run gevent any more (see `gunicorn_dirty_gevent.unpatch`)."""
    if "gevent" not in sys.modules and patcher is not None and patcher.already_patched:
        raise RuntimeError(
            "gunicorn_dirty_gevent.install() comes too late: eventlet has already patched this process. "
            "Call it first in gunicorn.conf.py, before eventlet.monkey_patch()"
        )
    for name in ("event", "lock", "queue"):
        importlib.import_module(f"gevent.{name}")


class _Finder(importlib.abc.MetaPathFinder):
    """Finds ``gunicorn.dirty`` as usual, with `_replace` to follow its execution; loads gevent in time."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == _EVENTLET:
            _load_gevent()
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
