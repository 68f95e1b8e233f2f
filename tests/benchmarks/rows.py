"""What is measured. Every row checks each result it gets, and is bounded in count and in time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import gevent
from contestants import Caller

ROW_SECONDS = 45.0
"""After so long a row has failed. The slowest, stock's 200 sleeps, takes 21 s."""

clock = time.perf_counter
NewCaller = Callable[[], Caller]
Measured = dict[str, float]


class Scale(NamedTuple):
    """How much of it: full or quick, and less for what is slow anyway."""

    quick: bool
    slow: bool  # stock

    def pick(self, full: int, quick: int, full_slow: int | None = None, quick_slow: int | None = None) -> int:
        if not self.slow:
            return quick if self.quick else full
        return (quick_slow or quick) if self.quick else (full_slow or full)


class Wrong(Exception):
    """Not the result that belongs to the call."""


def expect(got: object, wanted: object) -> None:
    if got != wanted:
        raise Wrong(f"got {got!r:.60}, wanted {wanted!r:.60}")


def quantile(times: list[float], share: float) -> float:
    return sorted(times)[min(int(len(times) * share), len(times) - 1)]


def timed(caller: Caller, action: str, *args: object, wanted: object) -> float:
    started = clock()
    got = caller.execute(action, *args)
    seconds = clock() - started
    expect(got, wanted)
    return seconds


def repeated(new: NewCaller, count: int, seconds: float, action: str, value: object) -> list[float]:
    """Times of an action that returns its first argument, one call after the other."""
    caller = new()
    for _ in range(3):
        timed(caller, action, value, wanted=value)
    end = clock() + seconds
    times: list[float] = []
    while len(times) < count and clock() < end:
        times.append(timed(caller, action, value, wanted=value))
    return times


# The rows.


def sequential(new: NewCaller, scale: Scale) -> Measured:
    caller = new()
    for number in range(50):
        timed(caller, "add", number, 1, wanted=number + 1)
    end = clock() + 3
    times: list[float] = []
    while len(times) < scale.pick(3000, 1000) and clock() < end:
        number = len(times)
        times.append(timed(caller, "add", number, 1, wanted=number + 1))
    return {"seq_p50": statistics.median(times) * 1e6, "seq_p99": quantile(times, 0.99) * 1e6}


def greenlets(new: NewCaller, scale: Scale) -> Measured:
    """200 greenlets, each one call after the other. Counted from when all have a connection."""
    seconds = 0.7 if scale.quick else 1.5
    counts = [0] * 200
    callers: list[Caller] = []
    stop = False

    def work(index: int) -> None:
        caller = new()
        callers.append(caller)
        while not stop:
            number = counts[index]
            expect(caller.execute("add", index, number), index + number)
            counts[index] += 1

    workers = [gevent.spawn(work, index) for index in range(200)]
    while len(callers) < len(workers) and not any(worker.ready() for worker in workers):
        gevent.sleep(0.01)
    before, started = sum(counts), clock()
    gevent.joinall(workers, timeout=seconds, raise_error=True)
    rate = (sum(counts) - before) / (clock() - started)
    stop = True
    gevent.joinall(workers, raise_error=True)
    return {"greenlets": rate}


def sleeps(new: NewCaller, scale: Scale) -> Measured:
    count = scale.pick(200, 200, quick_slow=20)
    started = clock()
    calls = [gevent.spawn(lambda n=n: timed(new(), "sleep", 0.1, n, wanted=n)) for n in range(count)]
    gevent.joinall(calls, raise_error=True)
    return {f"sleeps_{count}": clock() - started}


def megabyte(new: NewCaller, scale: Scale) -> Measured:
    value = bytes(range(256)) * 4096
    times = repeated(new, scale.pick(150, 40), 1.5, "echo", value)
    return {"mib_p50": statistics.median(times) * 1e3}


def integers(new: NewCaller, scale: Scale) -> Measured:
    times = repeated(new, scale.pick(150, 40), 1.5, "echo", list(range(10_000)))
    return {"list_p50": statistics.median(times) * 1e3}


def beside(new: NewCaller, scale: Scale) -> Measured:
    """A small call every 10 ms, each in its own greenlet, while one action sleeps 2 s."""
    count = scale.pick(150, 50)
    long = gevent.spawn(lambda: timed(new(), "sleep", 2.0, "long", wanted="long"))
    gevent.sleep(0.05)
    calls = []
    started = clock()
    for number in range(count):
        calls.append(gevent.spawn(lambda n=number: timed(new(), "add", n, 1, wanted=n + 1)))
        gevent.sleep(max(0.0, started + (number + 1) * 0.01 - clock()))
    gevent.joinall([long, *calls], raise_error=True)
    times = [call.value for call in calls]
    return {"beside_p50": statistics.median(times) * 1e3, "beside_max": max(times) * 1e3}


def streams(new: NewCaller, scale: Scale) -> Measured:
    """20 streams of 50 items 2 ms apart, as 20 browsers read them."""
    started = clock()
    crossed = _read_streams(new, 50, 0.002)
    return {"streams": clock() - started, "crossed": crossed}


def chunks(new: NewCaller, scale: Scale) -> Measured:
    count = scale.pick(1000, 500, 100, 50)
    started = clock()
    # Crossed chunks are counted in the row above; here they are only fewer or more.
    _read_streams(new, count, 0)
    return {"chunks": 20 * count / (clock() - started)}


def _read_streams(new: NewCaller, count: int, pause: float) -> int:
    """Read 20 streams at once; how many chunks came to the wrong reader, or in the wrong order."""
    readers = [gevent.spawn(_read_stream, new, tag, count, pause) for tag in range(20)]
    gevent.joinall(readers, raise_error=True)
    got = [reader.value for reader in readers]
    expect(sum(len(chunks) for chunks in got), 20 * count)
    return sum(chunk != [tag, place] for tag, chunks in enumerate(got) for place, chunk in enumerate(chunks))


def _read_stream(new: NewCaller, tag: int, count: int, pause: float) -> list[object]:
    stream = new().stream
    assert stream is not None
    got = []
    for chunk in stream("items", tag, count, pause):
        got.append(chunk)
        gevent.sleep(0)  # a view that yields each chunk to its browser
    return got


class Row(NamedTuple):
    measure: Callable[[NewCaller, Scale], Measured]
    floor: bool = True  # the floor can do it too


ROWS = {
    "seq": Row(sequential),
    "greenlets": Row(greenlets),
    "sleeps": Row(sleeps, floor=False),
    "mib": Row(megabyte),
    "list": Row(integers),
    "beside": Row(beside, floor=False),
    "streams": Row(streams, floor=False),
    "chunks": Row(chunks, floor=False),
}


class Metric(NamedTuple):
    title: str
    unit: str
    more_is_better: bool = False


METRICS = {
    "seq_p50": Metric("sequential small call, p50", "us"),
    "seq_p99": Metric("sequential small call, p99", "us"),
    "greenlets": Metric("200 greenlets of small calls", "/s", more_is_better=True),
    "sleeps_200": Metric("200 actions of 0.1 s at once", "s"),
    "sleeps_20": Metric("20 actions of 0.1 s at once", "s"),
    "mib_p50": Metric("1 MiB bytes echoed, p50", "ms"),
    "list_p50": Metric("10,000-int list echoed, p50", "ms"),
    "beside_p50": Metric("small calls beside a 2 s sleep, p50", "ms"),
    "beside_max": Metric("small calls beside a 2 s sleep, slowest", "ms"),
    "streams": Metric("20 streams of 50 items 2 ms apart", "s"),
    "crossed": Metric("... chunks at the wrong reader, of 1,000", ""),
    "chunks": Metric("small chunks over 20 streams", "/s", more_is_better=True),
}


def run(name: str, new: NewCaller, scale: Scale) -> Measured:
    """Measure one row."""
    with gevent.Timeout(ROW_SECONDS, Wrong(f"not done after {ROW_SECONDS:g} s")):
        return ROWS[name].measure(new, scale)
