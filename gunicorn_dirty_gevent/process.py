"""Processes: the one file that forks, kills and reaps.

Measured on gevent 26.9: after ``os.fork()``, and also after ``gevent.reinit()`` alone, the parent's
greenlets run on in the child, on the parent's sockets. ``reinit()`` and then
``get_hub().destroy(destroy_loop=True)`` *from the main greenlet* gives a clean child in which a new
hub, ``monkey.patch_all()``, subprocess and the threadpool work; the same from a spawned greenlet
ends in ``LoopExit``.

This module is loaded in gunicorn's master; what only children need is imported where it is used, so
that the master loads nothing which its own dirty support does not (gunicorn#3482).
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import gevent
from gevent import monkey
from gevent._hub_local import get_hub_if_exists

from .blob import NAME as _BODY_NAME
from .unpatch import unpatch_eventlet

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_PF_FORKNOEXEC = 0x40  # linux/sched.h: forked, but has not executed another program

EXIT_ERROR = 1
"""Exit code after an error. Never 3 or 4: gunicorn's master halts on those."""

EXIT_UNLOADED = 5
"""Exit code of a dirty worker that could load none of its apps."""


def fork(child: Callable[[], object], keep: Iterable[int], release: Callable[[], None]) -> int:
    """Fork; `child()` runs in a clean child process, which then exits. Returns the child's pid.

    To be called from the main greenlet only. `release()` runs first in the child and must let go of
    everything that is tied to the parent's hub (watchers, links); `keep` names the descriptors that
    stay. Raises OSError when there can be no more processes.
    """
    # A signal between the fork and the child's own handlers would run the parent's in the child.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    # What is there now is left alone by the child's collector, which would otherwise write to each object
    # and so copy every page of the parent's memory.
    gc.freeze()
    try:
        pid = int(monkey.get_original("os", "fork")())
        if pid == 0:
            run_child(child, keep, release)
    finally:
        gc.unfreeze()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pid


def run_child(child: Callable[[], object], keep: Iterable[int], release: Callable[[], None]) -> NoReturn:
    """Make this freshly forked process clean, run `child()` in it, and exit without returning."""
    code = EXIT_ERROR
    try:
        reset_signals()
        hub = get_hub_if_exists()
        if hub is not None:
            # First of all: libuv's loop shares its epoll set with the parent until then, and a
            # watcher that is stopped here would be lost there.
            gevent.reinit(hub)
        release()
        if hub is not None:
            hub.destroy(destroy_loop=True)
        unpatch_eventlet()
        release_descriptors(keep)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        child()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else EXIT_ERROR
    except BaseException:
        # Nobody above us in this process may see it: those frames are the parent's.
        logging.getLogger("gunicorn.error").exception("Exception in a dirty process")
    finally:
        leave(code)


def leave(code: int) -> NoReturn:
    """End this process now; atexit handlers and open frames are the parent's, not ours."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:
            pass
    os._exit(EXIT_ERROR if code in (3, 4) else code)


def set_signal(number: int, handler: Any) -> Any:
    """``signal.signal`` as it was before gevent patched it: gevent's own reports SIGCHLD only for
    children that gevent forked."""
    return monkey.get_original("signal", "signal")(number, handler)


def die_of(number: int) -> None:
    """End this process as the signal would without a handler: its parent sees why."""
    set_signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def reset_signals() -> None:
    """Every signal back to its default, except those that are ignored by inheritance."""
    signal.set_wakeup_fd(-1)
    get_signal = monkey.get_original("signal", "getsignal")
    for number in signal.valid_signals():
        try:
            if get_signal(number) not in (signal.SIG_IGN, signal.SIG_DFL, None):
                set_signal(number, signal.SIG_DFL)
        except (OSError, ValueError):  # KILL and STOP, and those reserved for the C library
            pass
    # Python's own start-up setting, which the loop above leaves alone.
    set_signal(signal.SIGPIPE, signal.SIG_IGN)


def release_descriptors(keep: Iterable[int]) -> None:
    """Let go of the parent's sockets, pipes, event descriptors and bodies of calls that are not in `keep`.

    They are replaced by /dev/null, not closed: objects of the parent that are still alive here would
    close their number later, and with it whatever had taken the number by then. Files, standard
    streams and what logging handlers write to stay.
    """
    kept = {0, 1, 2, *keep, *_logging_descriptors()}
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        for name in os.listdir("/proc/self/fd"):
            number = int(name)
            if number not in kept and number != null and _is_channel(number):
                with contextlib.suppress(OSError):  # valgrind's own, which it lets nobody replace
                    os.dup2(null, number, inheritable=False)
    finally:
        os.close(null)


def _is_channel(number: int) -> bool:
    try:
        mode = os.fstat(number).st_mode
        if stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode):
            return True
        return os.readlink(f"/proc/self/fd/{number}").startswith(
            ("anon_inode:[event", f"/memfd:{_BODY_NAME} ")
        )
    except OSError:
        return False


def log_descriptors(log: Any) -> list[int]:
    """What gunicorn's logger uses beside its handlers: statsd's socket."""
    sock = getattr(log, "sock", None)
    return [] if sock is None else [sock.fileno()]


def _logging_descriptors() -> set[int]:
    """Descriptors of the log handlers: files, streams, syslog and statsd sockets."""
    found: set[int] = set()
    loggers = [
        logging.getLogger(),
        *map(logging.getLogger, list(logging.Logger.manager.loggerDict)),
    ]
    for target in [*loggers, *(handler for logger in loggers for handler in logger.handlers)]:
        for attribute in ("stream", "socket", "sock"):
            try:
                found.add(getattr(target, attribute).fileno())
            except Exception:
                continue
    return found


def dump_stacks_on_crash(log: Any) -> None:
    """Have the stacks of all threads written to the error log on SIGSEGV, SIGABRT and the like."""
    import faulthandler

    for handler in log.error_log.handlers:
        try:
            faulthandler.enable(file=handler.stream)
            return
        except (AttributeError, OSError, RuntimeError, ValueError):
            continue
    if sys.__stderr__ is not None:
        faulthandler.enable(file=sys.__stderr__)


def die_with_parent(number: int, parent: int) -> None:
    """Ask the kernel to send us signal `number` when the parent dies.

    To be called after privileges were dropped (changing the user clears the setting), from the main
    thread. If the parent is dead already, the signal is sent at once.
    """
    import ctypes

    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def has_siblings(parent: int) -> bool:
    """Whether `parent` has other live children that it forked, not executed: gunicorn's HTTP workers,
    but not the master that USR2 starts. False where the system does not say."""
    try:
        with open(f"/proc/{parent}/task/{parent}/children", "rb") as file:
            children = {int(pid) for pid in file.read().split()} - {os.getpid()}
    except (OSError, ValueError):
        return False
    return any(_is_forked(pid) for pid in children)


def _is_forked(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # from the third field on, see proc(5)
        return fields[0] not in (b"Z", b"X") and bool(int(fields[6]) & _PF_FORKNOEXEC)
    except (OSError, ValueError, IndexError):
        return False


def keep_freed_memory() -> None:
    """Have the C library keep up to 8 MiB of freed memory in this process, instead of 256 KiB.

    Measured: a worker that echoes 1 MiB spent 0.6 of 1.2 ms on page faults, for glibc gave the heap's
    end back after each call. Its threshold follows the largest block that was freed (mallopt(3),
    M_MMAP_THRESHOLD; giving back starts at twice that), so one block that is never touched sets it.
    """
    block = bytes(4 * 1024 * 1024 - 4096)
    del block


def memory_of(pid: int) -> int:
    """Bytes of a process's resident memory; 0 where the system does not say."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def raise_descriptor_limit(needed: int) -> None:
    """Raise the soft limit of open descriptors to the hard one if it is below `needed`."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            pass


def kill(pid: int, number: int) -> None:
    """Send a signal to a child that has not been reaped; one that has ended is no error."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def reap(pid: int) -> int | None:
    """The wait status of a child if it has ended. Only known pids: others are not ours to take."""
    try:
        reaped, status = monkey.get_original("os", "waitpid")(pid, os.WNOHANG)
    except ChildProcessError:
        return 0
    return int(status) if reaped else None


def ended_by_request(status: int) -> bool:
    """Whether the process ended of a signal that asks for it."""
    asking = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) in asking


def could_load_nothing(status: int) -> bool:
    """Whether a dirty worker that had not booted says so by its end."""
    return os.WIFEXITED(status) and os.WEXITSTATUS(status) == EXIT_UNLOADED


def signal_of(status: int) -> int | None:
    """The number of the signal that ended a process, or None."""
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else None


def describe_signal(number: int) -> str:
    """Its name; for SIGKILL also what most often sends it."""
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return f"{name} (perhaps out of memory)" if number == signal.SIGKILL else name


def describe_status(status: int) -> str:
    """How a process ended, in words that follow its name: "was killed by SIGSEGV"."""
    number = signal_of(status)
    if number is not None:
        return f"was killed by {describe_signal(number)}"
    return f"exited with code {os.WEXITSTATUS(status)}"
