"""Taking eventlet's monkey patching back in a dirty process.

gunicorn's eventlet worker class patches the *master* (its module does so when it is imported), and with
it all that is forked from there. A dirty arbiter and its workers run gevent, whose own locks, threads
and system calls would then wait in eventlet's hub, which nothing runs there.

Only `eventlet.patcher` knows what it has patched, so its private tables are read here. They have been
the same for ten years, and gunicorn 25.3 is the last that has the worker class.
"""

from __future__ import annotations

import gc
import sys
import types
from typing import Any

_MODULES = {
    # In this order: the later ones hold things of the earlier ones.
    "thread": "_green_thread_modules",
    "time": "_green_time_modules",
    "os": "_green_os_modules",
    "select": "_green_select_modules",
    "socket": "_green_socket_modules",
    "subprocess": "_green_subprocess_modules",
    "builtins": "_green_builtins",
    "MySQLdb": "_green_MySQLdb",
}


def unpatch_eventlet() -> bool:
    """In a freshly forked process with one thread: put back what eventlet has patched in the modules of
    the standard library, and wherever else it was imported from there. Returns whether there was anything.

    Locks that were made under eventlet stay what they are, except the reentrant ones (as logging's).
    """
    patcher: Any = sys.modules.get("eventlet.patcher")
    if patcher is None or not patcher.already_patched:
        return False
    pairs = [
        pair
        for name, modules in _MODULES.items()
        if patcher.already_patched.get(name)
        for pair in getattr(patcher, modules)()
    ]
    back: dict[int, tuple[Any, Any]] = {}
    for name, green in pairs:
        _restore(sys.modules[name], green, patcher.original(name), back)
    if patcher.already_patched.get("thread"):
        _restore_threading(patcher.original("threading"))
    for name, _ in pairs:
        _rebind(patcher.original(name))
    if patcher.already_patched.get("psycopg"):
        sys.modules["psycopg2.extensions"].set_wait_callback(None)
    patcher.already_patched.clear()
    _replace_imported(back)
    return True


def _restore(module: Any, green: Any, original: Any, back: dict[int, tuple[Any, Any]]) -> None:
    for name in [*green.__patched__, *getattr(green, "__deleted__", ())]:
        if not hasattr(original, name):  # a later Python's, which eventlet adds
            vars(module).pop(name, None)
            continue
        old, new = getattr(module, name, None), _at_home(getattr(original, name), module)
        if old is not None and old is not new:
            back[id(old)] = (old, new)
        setattr(module, name, new)


def _at_home(function: Any, module: Any) -> Any:
    """The same function, with the globals of the module that everybody has (and gevent patches)."""
    if not isinstance(function, types.FunctionType) or function.__module__ != module.__name__:
        return function
    moved = types.FunctionType(
        function.__code__, vars(module), function.__name__, function.__defaults__, function.__closure__
    )
    moved.__kwdefaults__ = function.__kwdefaults__
    return moved


def _restore_threading(original: Any) -> None:
    import _queue
    import _thread
    import queue
    import threading

    module: Any = threading
    module.RLock = _at_home(original.RLock, module)
    module._active = {_thread.get_ident(): threading.main_thread()}
    module._limbo = {}
    module._after_fork.__code__ = original._after_fork.__code__
    queue.SimpleQueue = _queue.SimpleQueue  # type: ignore[misc]
    for lock in gc.get_objects():
        if type(lock) is module._PyRLock and not isinstance(lock._block, _thread.LockType):
            lock._block = _thread.allocate_lock()
            lock._owner, lock._count = None, 0


def _rebind(original: Any) -> None:
    """Classes of `original` that are in use again must see the modules that everybody has."""
    for name, value in list(vars(original).items()):
        if isinstance(value, types.ModuleType) and value.__name__ in sys.modules:
            setattr(original, name, sys.modules[value.__name__])


def _replace_imported(back: dict[int, tuple[Any, Any]]) -> None:
    """``from time import sleep`` took what was there at that time."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "eventlet" or name.startswith(("__original_module", "__patched_module")):
            continue
        try:
            attributes = list(vars(module).items())
        except TypeError:  # not every entry is a module
            continue
        for attribute, value in attributes:
            known = back.get(id(value))
            if known is not None and known[0] is value:
                setattr(module, attribute, known[1])
