"""What this library costs as work grows, and what it costs when there is none.

    python tests/benchmarks/own.py [--json FILE]

Curves: a small call beside 2 to 64 workers, 10 to 100,000 queued calls, 1 to 1,000 idle connections.
Single figures: boot, memory, CPU when idle, memory of 10,000 calls in flight.
"""

from gevent import monkey

monkey.patch_all()

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import socket  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))

import gevent  # noqa: E402
from contestants import APP, TASKS  # noqa: E402
from support.gunicorn import Gunicorn  # noqa: E402

from gunicorn_dirty_gevent import DirtyClient  # noqa: E402
from gunicorn_dirty_gevent.core import wire  # noqa: E402

TICK = 1 / os.sysconf("SC_CLK_TCK")
IN_FLIGHT = 10_000
IDLE_SECONDS = 10.0

INSTALL = """
import os, time
import gunicorn_dirty_gevent
gunicorn_dirty_gevent.install(queue_size=200_000, calls_per_connection=200_000)

def told(what):
    print("BENCH", what, os.getpid(), time.clock_gettime(time.CLOCK_BOOTTIME), flush=True)

def on_dirty_starting(arbiter):
    told("arbiter")

def dirty_worker_init(worker):
    told("worker")
"""


@contextmanager
def serving(workers: int = 2, threads: int = 200) -> Iterator[tuple[Gunicorn, DirtyClient]]:
    settings = {
        "dirty_apps": [APP],
        "dirty_workers": workers,
        "dirty_threads": threads,
        "dirty_timeout": 120,
    }
    with Gunicorn(tasks_source=TASKS, settings=settings, install=INSTALL) as server:
        server.wait_dirty_workers(workers, 60)
        where = server.wait_log(r"Dirty arbiter listening on (\S+)").group(1)
        client = DirtyClient(where, timeout=120)
        for _ in range(200):
            client.execute(APP, "add", 1, 2)
        yield server, client
        client.close()


def call_p50(client: DirtyClient, count: int = 2000) -> float:
    """Microseconds of a small call, one after the other."""
    times = []
    for number in range(count):
        started = time.perf_counter()
        assert client.execute(APP, "add", number, 1) == number + 1
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e6


def beside_workers() -> dict[int, float]:
    found = {}
    for workers in (2, 4, 8, 16, 32, 64):
        with serving(workers) as (_, client):
            found[workers] = call_p50(client)
    return found


def beside_queued() -> dict[int, float]:
    """One worker of two is kept full and has so many calls queued of another client; the calls that are
    timed are for an app that only the other has."""
    found = {}
    for queued in (10, 100, 1000, 10_000, 100_000):
        with serving(workers=1, threads=1) as (_, client):
            # One slot: what is timed is the arbiter's work from a call's arrival to its refusal.
            calls = [client.submit(APP, "sleep", 60.0, n) for n in range(queued + 1)]
            gevent.sleep(0.5)
            found[queued] = refusal_p50(client)
            for call in calls:
                call.cancel()
    return found


def refusal_p50(client: DirtyClient) -> float:
    times = []
    for _ in range(2000):
        call = client.submit(APP, "add", 1, 2)
        started = time.perf_counter()
        call.cancel()
        try:
            client.execute("tasks:Unknown", "add", 1, 2)
        except Exception:
            times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e6


def beside_connections() -> dict[int, float]:
    found = {}
    with serving() as (_, client):
        idle: list[socket.socket] = []
        for connections in (1, 10, 100, 1000):
            while len(idle) < connections:
                sock = socket.socket(socket.AF_UNIX)
                sock.connect(client.socket_path)
                sock.sendall(wire.pack_hello())
                assert sock.recv(100)
                idle.append(sock)
            found[connections] = call_p50(client)
        for sock in idle:
            sock.close()
    return found


def single_figures() -> dict[str, float]:
    with serving() as (server, client):
        told = re.findall(r"BENCH (\w+) (\d+) ([\d.]+)", server.log_text())
        boots: dict[str, list[float]] = {}
        for what, pid, at in told:
            boots.setdefault(what, []).append(float(at) - started(int(pid)))
        arbiter, workers = server.dirty_arbiter_pid(), server.dirty_worker_pids()
        own = statistics.median(private(pid) for pid in workers) / 1024
        everyone = [arbiter, *workers]
        client.close()
        before = sum(map(cpu, everyone))
        gevent.sleep(IDLE_SECONDS)
        idle = (sum(map(cpu, everyone)) - before) / IDLE_SECONDS * 100
        other = DirtyClient(client.socket_path, timeout=120)
        other.execute(APP, "add", 1, 2)
        memory = private(arbiter)
        calls = [other.submit(APP, "sleep", 2.0, number) for number in range(IN_FLIGHT)]
        gevent.sleep(1.0)
        grown = private(arbiter) - memory
        wrong = sum(call.get(110) != number for number, call in enumerate(calls[:400]))
        for call in calls[400:]:
            call.cancel()
        other.close()
    return {
        "arbiter ready after its fork, s": max(boots["arbiter"]),
        "worker ready after its fork, s": max(boots["worker"]),
        "private memory of a worker with one small app, MiB": own / 1024,
        "CPU of arbiter and 2 workers when idle, % of a core": idle,
        f"memory of the arbiter for each of {IN_FLIGHT} calls in flight, KiB": grown / IN_FLIGHT / 1024,
        "wrong results among the first 400 of them": wrong,
    }


def started(pid: int) -> float:
    """When a process was forked, in seconds since boot; in steps of 0.01 s."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]) * TICK


def cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK


def private(pid: int) -> int:
    """Bytes of memory that a process shares with no other."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(kib) for kib in re.findall(r"^Private_\w+:\s+(\d+) kB", text, re.M)) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for title, measure in (
        ("workers", beside_workers),
        ("queued calls", beside_queued),
        ("idle connections", beside_connections),
        ("single figures", single_figures),
    ):
        found[title] = measure()
        print(f"{title}")
        for key, value in found[title].items():
            print(f"  {key:<60} {value:.3g}" if isinstance(key, str) else f"  {key:>8,} {value:8.0f} us")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
