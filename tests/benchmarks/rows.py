"""What is measured. Every row checks each result it gets, and is bounded in count and in time."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gevent
from contestants import Caller, Missing

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


def repeated(
    new: NewCaller, count: int, seconds: float, action: str, value: object, warm: int = 3
) -> list[float]:
    """Times of an action that returns its first argument, one call after the other."""
    caller = new()
    for _ in range(warm):
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


def megabytes(new: NewCaller, scale: Scale) -> Measured:
    _takes_64_mib(scale)
    times = repeated(new, scale.pick(4, 2), 20.0, "echo", bytes(64 << 20), warm=1)
    return {"mib64_p50": statistics.median(times) * 1e3}


def _takes_64_mib(scale: Scale) -> None:
    if scale.slow:
        raise Missing("stock's MAX_MESSAGE_SIZE is 64 MiB with all that stands around the bytes")


def pipe(new: NewCaller, scale: Scale) -> Measured:
    """64 MiB through a pipe to another process and back: what any call of that size is above."""
    program = str(Path(__file__).with_name("pipe.py"))
    command = [sys.executable, program, str(64 << 20), str(scale.pick(4, 2))]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return {"mib64_p50": statistics.median(map(float, done.stdout.split())) * 1e3}


def integers(new: NewCaller, scale: Scale) -> Measured:
    times = repeated(new, scale.pick(150, 40), 1.5, "echo", list(range(10_000)))
    return {"list_p50": statistics.median(times) * 1e3}


def beside(new: NewCaller, scale: Scale) -> Measured:
    return _beside(new, scale, "sleep", "beside")


def beside_burn(new: NewCaller, scale: Scale) -> Measured:
    return _beside(new, scale, "burn", "burn")


def _beside(new: NewCaller, scale: Scale, action: str, name: str) -> Measured:
    """A small call every 10 ms, each in its own greenlet, while one action takes 2 s."""
    long = gevent.spawn(lambda: timed(new(), action, 2.0, "long", wanted="long"))
    gevent.sleep(0.05)
    times = _every_10_ms(new, scale.pick(150, 50))
    gevent.joinall([long], raise_error=True)
    return {f"{name}_p50": statistics.median(times) * 1e3, f"{name}_max": max(times) * 1e3}


def _every_10_ms(new: NewCaller, count: int) -> list[float]:
    calls = []
    started = clock()
    for number in range(count):
        calls.append(gevent.spawn(lambda n=number: timed(new(), "add", n, 1, wanted=n + 1)))
        gevent.sleep(max(0.0, started + (number + 1) * 0.01 - clock()))
    gevent.joinall(calls, raise_error=True)
    return [call.value for call in calls]


def crowded(new: NewCaller, scale: Scale) -> Measured:
    """Small calls while a 64 MiB call and 20 busy streams run, and the same without."""
    _takes_64_mib(scale)
    idle = _every_10_ms(new, scale.pick(150, 50))
    stop = False

    def read(tag: int) -> None:
        while not stop:
            _read_stream(new, tag, 100, 0)

    def copy() -> None:
        value = bytes(64 << 20)
        while not stop:
            expect(len(new().execute("echo", value)), len(value))

    others = [gevent.spawn(copy), *(gevent.spawn(read, tag) for tag in range(20))]
    gevent.sleep(0.05)
    times = _every_10_ms(new, scale.pick(150, 50))
    stop = True
    gevent.joinall(others, raise_error=True)
    return {"idle_p99": quantile(idle, 0.99) * 1e3, "crowded_p99": quantile(times, 0.99) * 1e3}


def gap(new: NewCaller, scale: Scale) -> Measured:
    """The longest time for which the client's hub did not run, in a 1 MiB call while all workers compute."""
    value = bytes(range(256)) * 4096
    caller = new()
    timed(caller, "echo", value, wanted=value)
    longest: list[float] = []
    for _ in range(scale.pick(5, 3)):
        busy = [gevent.spawn(lambda: timed(new(), "burn", 0.2, "b", wanted="b")) for _ in range(2)]
        gevent.sleep(0.02)
        call = gevent.spawn(timed, caller, "echo", value, wanted=value)
        worst, last = 0.0, clock()
        while not call.ready():
            gevent.sleep(0)
            now = clock()
            worst, last = max(worst, now - last), now
        gevent.joinall([call, *busy], raise_error=True)
        longest.append(worst)
    return {"gap": statistics.median(longest) * 1e3}


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
    if stream is None:
        raise Missing("no streams")
    got = []
    for chunk in stream("items", tag, count, pause):
        got.append(chunk)
        gevent.sleep(0)  # a view that yields each chunk to its browser
    return got


class Row(NamedTuple):
    measure: Callable[[NewCaller, Scale], Measured]
    floor: Callable[[NewCaller, Scale], Measured] | None = None  # what the floor can do of it


ROWS = {
    "seq": Row(sequential, sequential),
    "greenlets": Row(greenlets, greenlets),
    "sleeps": Row(sleeps),
    "mib": Row(megabyte, megabyte),
    "mib64": Row(megabytes, pipe),
    "list": Row(integers, integers),
    "beside": Row(beside),
    "burn": Row(beside_burn),
    "streams": Row(streams),
    "chunks": Row(chunks),
    "crowded": Row(crowded),
    "gap": Row(gap),
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
    "mib64_p50": Metric("64 MiB bytes echoed, p50 (floor: through a pipe)", "ms"),
    "list_p50": Metric("10,000-int list echoed, p50", "ms"),
    "beside_p50": Metric("small calls beside a 2 s sleep, p50", "ms"),
    "beside_max": Metric("small calls beside a 2 s sleep, slowest", "ms"),
    "burn_p50": Metric("small calls beside a 2 s burn, p50", "ms"),
    "burn_max": Metric("small calls beside a 2 s burn, slowest", "ms"),
    "idle_p99": Metric("a small call every 10 ms, p99", "ms"),
    "crowded_p99": Metric("... beside 64 MiB calls and 20 streams, p99", "ms"),
    "gap": Metric("longest gap in the client's hub, 1 MiB call", "ms"),
    "streams": Metric("20 streams of 50 items 2 ms apart", "s"),
    "crossed": Metric("... chunks at the wrong reader, of 1,000", ""),
    "chunks": Metric("small chunks over 20 streams", "/s", more_is_better=True),
}


def run(name: str, new: NewCaller, scale: Scale, *, floor: bool = False) -> Measured:
    """Measure one row. Raises `Missing` when the contestant cannot do it."""
    measure = ROWS[name].floor if floor else ROWS[name].measure
    if measure is None:
        raise Missing(name)
    with gevent.Timeout(ROW_SECONDS, Wrong(f"not done after {ROW_SECONDS:g} s")):
        return measure(new, scale)
