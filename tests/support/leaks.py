"""What a test may not leave behind: processes, descriptors, greenlets, threads, temporary files."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from .processes import all_processes
from .waiting import gevent_hub, poll

TEMP_PREFIX = "gunicorn-dirty"

# A hub makes these when it first needs them, and keeps them.
HUB_DESCRIPTORS = {"anon_inode:[eventpoll]", "anon_inode:[eventfd]", "anon_inode:[timerfd]"}


class Leak(AssertionError):
    """A test left something behind."""


@dataclass(frozen=True)
class Snapshot:
    had_hub: bool
    children: dict[tuple[int, int], str]
    descriptors: dict[tuple[int, str], str]
    threads: dict[Any, str]
    temp_files: set[str]
    greenlets: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)


def take() -> Snapshot:
    """What there is now."""
    return Snapshot(
        had_hub=gevent_hub() is not None,
        children=child_processes(),
        descriptors=descriptors(),
        threads=threads(),
        temp_files=temp_files(),
        greenlets=weakref.WeakSet(greenlets()),
    )


def new_since(before: Snapshot) -> list[str]:
    """A line for each thing that is there now and was not there before."""
    return [
        *_new_in(child_processes(), before.children),
        *_new_descriptors(before),
        *_new_in(_without_hub_threads(threads(), before.had_hub), before.threads),
        *(f"temporary file {path}" for path in sorted(temp_files() - before.temp_files)),
        *new_greenlets(before.greenlets),
    ]


def new_greenlets(before: weakref.WeakSet[Any]) -> list[str]:
    return [f"greenlet {g!r}{_where(g)}" for g in greenlets() if g not in before]


def check(before: Snapshot, grace: float = 2.0) -> None:
    """Raise `Leak`, naming each, if anything new stays for longer than `grace` seconds."""
    if not new_since(before):
        return
    if not poll(lambda: not _new_after_collecting(before), grace):
        raise Leak(_listed(new_since(before)))


def check_greenlets(before: weakref.WeakSet[Any], grace: float = 2.0) -> None:
    """The same for greenlets alone, while the hub that runs them is still there."""

    def gone() -> bool:
        gc.collect()
        return not new_greenlets(before)

    if not poll(gone, grace):
        raise Leak(_listed(new_greenlets(before)))


def child_processes() -> dict[tuple[int, int], str]:
    """Children of this process, zombies too: one that nobody waited for is a leak."""
    me = os.getpid()
    return {
        (pid, p.started): f"child process {pid} [{p.state}] {p.title or p.comm}"
        for pid, p in all_processes().items()
        # multiprocessing keeps one for the whole life of its process, by design.
        if p.ppid == me and "multiprocessing.resource_tracker" not in p.title
    }


def descriptors() -> dict[tuple[int, str], str]:
    return {(fd, target): f"descriptor {fd} -> {target}" for fd, target in _open_files()}


def threads() -> dict[Any, str]:
    """Python threads, also those that `threading` does not know."""
    known = {t.ident: t for t in threading.enumerate()}
    found: dict[Any, str] = {t: f"thread {t!r}" for t in known.values()}
    for ident, frame in sys._current_frames().items():
        if ident not in known:
            found[ident] = f"thread {ident} in {frame.f_code.co_filename}:{frame.f_lineno}"
    return found


def temp_files() -> set[str]:
    return {str(path) for path in Path(tempfile.gettempdir()).glob(TEMP_PREFIX + "*")}


def greenlets() -> list[Any]:
    """Greenlets that can still run, without hubs and the main greenlet of each thread."""
    module = sys.modules.get("greenlet")
    if module is None:
        return []
    hub_module = sys.modules.get("gevent.hub")
    hub_types = (hub_module.Hub,) if hub_module else ()
    current = module.getcurrent()
    return [
        g
        for g in gc.get_objects()
        if isinstance(g, module.greenlet)
        and not isinstance(g, hub_types)
        and g is not current
        and not g.dead
        and g.parent is not None
    ]


def _listed(leaked: list[str]) -> str:
    return "left behind:\n  " + "\n  ".join(leaked)


def _new_after_collecting(before: Snapshot) -> list[str]:
    gc.collect()
    return new_since(before)


def _new_in(now: dict[Any, str], before: dict[Any, str]) -> list[str]:
    return [text for key, text in now.items() if key not in before]


def _new_descriptors(before: Snapshot) -> list[str]:
    return [
        text
        for (fd, target), text in descriptors().items()
        if (fd, target) not in before.descriptors and not (before.had_hub and target in HUB_DESCRIPTORS)
    ]


def _without_hub_threads(found: dict[Any, str], had_hub: bool) -> dict[Any, str]:
    if not had_hub:
        return found
    return {key: text for key, text in found.items() if "gevent/threadpool" not in text}


def _open_files() -> Iterator[tuple[int, str]]:
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the listing's own descriptor, closed again
        if target != "/dev/urandom":
            yield int(name), target


def _where(g: Any) -> str:
    frame: FrameType | None = g.gr_frame
    return f" at {frame.f_code.co_filename}:{frame.f_lineno}" if frame else " (not started)"
