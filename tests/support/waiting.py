"""Waits that end: every one has a deadline, and a missed deadline shows where everything stood."""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

POLL_SECONDS = 0.01


class Deadline(AssertionError):
    """Something that should have happened by now has not."""


def gevent_hub() -> Any | None:
    """This thread's hub if gevent is imported and has one; never creates one."""
    hub_local = sys.modules.get("gevent._hub_local")
    return hub_local.get_hub_if_exists() if hub_local else None


def dump_stacks() -> None:
    """Write the stacks of all threads (and greenlets, under a hub) to stderr."""
    sys.stderr.flush()
    # The descriptor, not sys.stderr: pytest may have put an object without one there.
    faulthandler.dump_traceback(file=2, all_threads=True)
    if gevent_hub() is not None:
        from gevent.util import print_run_info

        print_run_info(file=sys.stderr)


def pause(seconds: float = POLL_SECONDS) -> None:
    """Let others run for a moment; under a hub its greenlets run too."""
    if gevent_hub() is not None:
        import gevent

        gevent.sleep(seconds)
    else:
        threading.Event().wait(seconds)


def poll(predicate: Callable[[], T], seconds: float) -> T:
    """The first true value of `predicate`, or its last one when `seconds` are over.

    The one place in the tests that polls.
    """
    end = time.monotonic() + seconds
    while not (value := predicate()) and time.monotonic() < end:
        pause()
    return value


def wait_until(
    predicate: Callable[[], T],
    deadline: float,
    what: str,
    evidence: Callable[[], str] | None = None,
) -> T:
    """Return the first true value of `predicate`; raise `Deadline` after `deadline` seconds.

    `evidence` adds to the message and is asked only on failure.
    """
    value = poll(predicate, deadline)
    if not value:
        raise missed(what, deadline, evidence)
    return value


def missed(what: str, seconds: float, evidence: Callable[[], str] | None = None) -> Deadline:
    """Dump all stacks and build the error for a wait that ended without its event."""
    dump_stacks()
    message = f"not within {seconds:g} s: {what}"
    return Deadline(f"{message}\n{evidence()}" if evidence else message)


@contextlib.contextmanager
def deadline(seconds: float, what: str = "the block to finish") -> Iterator[None]:
    """Raise `Deadline` if the block takes longer than `seconds`.

    Under a gevent hub the block is interrupted where it waits. A block that stands in a native
    wait cannot be interrupted without signals: its stacks are dumped on time, the error comes
    when the wait returns, and the hard deadline of the test ends it if it never does.
    """
    # A native timer, so that the stacks also appear when the hub itself is stuck. It is not
    # faulthandler's: there is only one of those, and it holds the test's hard deadline.
    watchdog = threading.Timer(seconds, dump_stacks)
    watchdog.daemon = True
    started = time.monotonic()
    watchdog.start()
    try:
        with _interrupt_greenlet(seconds, what):
            yield
    finally:
        watchdog.cancel()
        watchdog.join(5)
    if time.monotonic() - started > seconds:
        raise Deadline(f"not within {seconds:g} s: {what}")


def _interrupt_greenlet(seconds: float, what: str) -> contextlib.AbstractContextManager[Any]:
    if gevent_hub() is None:
        return contextlib.nullcontext()
    import gevent

    return gevent.Timeout(seconds, Deadline(f"not within {seconds:g} s: {what}"))
