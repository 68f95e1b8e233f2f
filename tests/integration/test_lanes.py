"""Answers that go past the arbiter, in a real gunicorn: they need it for nothing, and lose nothing by it."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from asking import answer, app_source, ask, ask_many, asking, collect, path, wait_ready
from support.gunicorn import Gunicorn
from support.waiting import wait_until

from gunicorn_dirty_gevent.blob import RESERVE
from gunicorn_dirty_gevent.core import values, wire

APP = "tasks:App"

TASKS = """
import os
import resource
import time
import gevent
from gunicorn.dirty import DirtyApp


class App(DirtyApp):
    def echo(self, value):
        return value

    def hold(self, name, size=0):
        print(f"holding {name}", flush=True)
        while not os.path.exists("release"):
            time.sleep(0.005)
        # That greenlet runs when this one has ended, and its answer has been sent.
        gevent.spawn(print, f"answered {name}", flush=True)
        return [name, "x" * size]

    def gated(self, name, count):
        print(f"holding {name}", flush=True)
        while not os.path.exists("release"):
            time.sleep(0.005)
        for number in range(count):
            yield [name, number]
        gevent.spawn(print, f"answered {name}", flush=True)

    def fill_descriptors(self, left):
        return fill(left)

    def size(self, value):
        return len(value)

    def sizes(self, *sizes):
        for size in sizes:
            yield bytes(size)

    def fail(self):
        raise ValueError("on purpose")

    def tick(self, count, pause):
        for number in range(count):
            yield number
            time.sleep(pause)

    def spin(self, seconds):
        print("spinning", flush=True)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass


kept = []


def fill(left):
    # Use up this process's descriptors but for so many.
    for _ in range(resource.getrlimit(resource.RLIMIT_NOFILE)[0]):
        try:
            kept.append(os.dup(0))
        except OSError:
            break
    for _ in range(left):
        os.close(kept.pop())
    return len(kept)
"""

VIEWS = """
import os
import resource
import time
from gunicorn_dirty_gevent.client import channels


@route("/limit")
def limit(environ, query):
    highest = max(map(int, os.listdir("/proc/self/fd")))
    limits = highest + int(query["left"]), resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    return {"result": highest}


@route("/size")
def size(environ, query):
    try:
        return {"result": get_dirty_client().execute("tasks:App", "size", bytes(int(query["size"])))}
    except Exception as error:
        return caught(error)


@route("/lanes")
def lanes(environ, query):
    return {"result": sum(len(shared.channel._lanes) for shared in channels._channels.values())}


@route("/slowly")
def slowly(environ, query):
    # The sizes of a stream's chunks, with a pause after the first two.
    got = []
    for chunk in get_dirty_client().stream("tasks:App", "sizes", 100_000, 100_000, 1_000_000, 5):
        got.append(len(chunk))
        gevent.sleep({1: 0.5, 2: 3}.get(len(got), 0))
    return {"result": got}


@route("/beside")
def beside(environ, query):
    # How many of five calls failed while a stream was still read.
    client = get_dirty_client()
    chunks = client.stream("tasks:App", "tick", 15_000, 0)  # 15 s at least, if nobody ends it
    next(chunks)
    failed = []

    def read():
        for _ in chunks:
            end = time.monotonic() + 0.001
            while time.monotonic() < end:
                pass
            if len(failed) == 5:
                return

    reader = gevent.spawn(read)
    while len(failed) < 5:
        try:
            client.execute("tasks:App", "fail")
        except Exception:
            failed.append(not reader.dead)
    reader.join()
    chunks.close()
    return {"result": sum(failed)}


@route("/sequence")
def sequence(environ, query):
    # What became of calls one after the other.
    client, said = get_dirty_client(), []
    for n in range(int(query["count"])):
        try:
            said.append(client.execute("tasks:App", "echo", n) == n)
        except Exception as error:
            said.append([type(error).__name__, error.may_have_run])
    return {"result": said}
"""


def gunicorn_with(install: str = "", **changed: object) -> Gunicorn:
    base = {"dirty_apps": [APP], "dirty_workers": 1, "dirty_threads": 200, "dirty_timeout": 60}
    options = {"install": install} if install else {}
    return Gunicorn(app_source(VIEWS), TASKS, base | changed, **options)


@pytest.fixture
def pool() -> Iterator[Gunicorn]:
    """One HTTP worker and one dirty worker, with a lane between them."""
    with gunicorn_with() as gunicorn:
        wait_ready(gunicorn, 1)
        assert ask(gunicorn, APP, "echo", 1) == 1
        yield gunicorn


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """Processes that do not run (SIGSTOP)."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        for pid in pids:
            stat = Path(f"/proc/{pid}/stat")
            wait_until(lambda stat=stat: stat.read_text().rsplit(")", 1)[1].split()[0] == "T", 10, "a stop")
        yield
    finally:
        for pid in pids:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGCONT)


def sockets(pid: int) -> int:
    found = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found += os.readlink(entry).startswith("socket:")
        except FileNotFoundError:
            pass
    return found


def wait_held(gunicorn: Gunicorn, *names: str) -> None:
    for name in names:
        gunicorn.wait_log(rf"^holding {name}$")


def wait_answered(gunicorn: Gunicorn, *names: str) -> None:
    gunicorn.write("release", "")
    for name in names:
        gunicorn.wait_log(rf"^answered {name}$")


def http_worker(gunicorn: Gunicorn) -> int:
    (pid,) = gunicorn.http_worker_pids()
    return pid


def test_an_answer_and_a_stream_do_not_wait_for_the_arbiter(pool: Gunicorn) -> None:
    with asking(pool, [path(APP, "hold", "it"), path(APP, "gated", "s", 15, route="/collect")]) as calls:
        wait_held(pool, "it", "s")
        with stopped(pool.dirty_arbiter_pid()):
            pool.write("release", "")
            assert calls[0].result(10) == ["it", ""]
            assert calls[1].result(10) == [["s", number] for number in range(15)]
    assert ask_many(pool, [path(APP, "echo", n) for n in range(20)], 5) == list(range(20))


def test_a_worker_that_dies_when_it_has_answered_costs_nothing(pool: Gunicorn) -> None:
    (worker,) = wait_ready(pool, 1)
    with asking(pool, [path(APP, "hold", "it"), path(APP, "gated", "s", 15, route="/collect")]) as calls:
        wait_held(pool, "it", "s")
        with stopped(http_worker(pool)):
            with stopped(pool.dirty_arbiter_pid()):
                wait_answered(pool, "it", "s")
                pool.kill(worker, signal.SIGKILL)
            pool.wait_log(rf"Dirty worker \(pid:{worker}\) killed by signal 9")
            wait_ready(pool, 1)
        assert calls[0].result(10) == ["it", ""]
        assert calls[1].result(10) == [["s", number] for number in range(15)]
    assert ask(pool, APP, "echo", 2) == 2


def test_an_arbiter_that_dies_takes_no_answer_with_it(pool: Gunicorn) -> None:
    arbiter = pool.dirty_arbiter_pid()
    with asking(pool, [path(APP, "hold", "it")]) as calls:
        wait_held(pool, "it")
        with stopped(http_worker(pool)):
            wait_answered(pool, "it")
            pool.kill(arbiter, signal.SIGKILL)
            pool.wait_gone(arbiter)
        assert calls[0].result(10) == ["it", ""]
    assert ask(pool, APP, "echo", 2) == 2


def test_a_client_that_does_not_read_gets_everything_when_it_does(pool: Gunicorn) -> None:
    """More than a lane holds: the rest has gone by the arbiter."""
    names = [f"n{number:03}" for number in range(100)]
    with asking(pool, [path(APP, "hold", name, 30_000) for name in names]) as calls:
        wait_held(pool, *names)
        with stopped(http_worker(pool)):
            wait_answered(pool, *names)
        assert [call.result(10) for call in calls] == [[name, "x" * 30_000] for name in names]


@pytest.mark.parametrize("left", [20, 0])
def test_a_worker_without_descriptors_answers_new_clients_by_the_arbiter(pool: Gunicorn, left: int) -> None:
    (worker,) = wait_ready(pool, 1)
    assert ask(pool, APP, "fill_descriptors", left) > 100
    old = http_worker(pool)
    pool.kill(old, signal.SIGKILL)
    pool.wait_gone(old)
    pool.wait_http_workers(1)
    pool.write("release", "")
    assert ask(pool, APP, "echo", 3) == 3
    assert collect(pool, APP, "gated", "s", 40) == [["s", number] for number in range(40)]
    assert wait_ready(pool, 1) == [worker]


def test_a_slot_whose_end_the_arbiter_has_not_heard_of_is_no_error_but_an_overload() -> None:
    """Two callers, one slot, one place in the queue. There is always room for both, but the arbiter may hear
    of it late: how long it waits for that word is tested in core/test_dispatch_lanes.py."""
    install = "import gunicorn_dirty_gevent\ngunicorn_dirty_gevent.install(queue_size=1)\n"
    with gunicorn_with(install, dirty_threads=1) as gunicorn:
        wait_ready(gunicorn, 1)
        got = ask_many(gunicorn, ["/sequence?count=500"] * 2, 2)
    print(f"measured: refused: {[said.count(['DirtyOverloadedError', False]) for said in got]}")
    for said in got:
        assert len(said) == 500
        assert all(one in (True, ["DirtyOverloadedError", False]) for one in said), said


def test_the_largest_request_that_is_taken_fits_its_worker_too() -> None:
    """On its last way it is longer by the route of its answer."""
    most = 600_000
    install = f"import gunicorn_dirty_gevent\ngunicorn_dirty_gevent.install(max_message_size={most})\n"
    with gunicorn_with(install) as gunicorn:
        (worker,) = wait_ready(gunicorn, 1)
        taken = []
        for size in range(most - 80, most):
            said = gunicorn.get(f"/size?size={size}").json()
            assert said == {"result": size} or said["error"] == "DirtyMessageTooLargeError", said
            taken.append("result" in said)
        assert taken == sorted(taken, reverse=True) and True in taken and False in taken
        assert wait_ready(gunicorn, 1) == [worker]


def test_a_stream_whose_reader_is_slow_is_not_stuck() -> None:
    """Credit comes while the worker waits for more of it."""
    with gunicorn_with(dirty_timeout=1) as gunicorn:
        (worker,) = wait_ready(gunicorn, 1)
        got = answer(gunicorn.get("/slowly", timeout=20))
        assert got == [100_000, 100_000, 1_000_000, 5]
        assert wait_ready(gunicorn, 1) == [worker]


def test_reading_lanes_first_does_not_keep_the_hub(pool: Gunicorn) -> None:
    """While the stream's worker sends what its reader takes, there would be always more."""
    assert answer(pool.get("/beside", timeout=40)) == 5


def test_a_client_without_descriptors_is_answered_by_the_arbiter(pool: Gunicorn) -> None:
    (worker,) = wait_ready(pool, 1)
    # Not by using them up: what had a low number and is closed then leaves that to the lane.
    assert answer(pool.get("/limit?left=20")) < RESERVE - 20
    pool.kill(worker, signal.SIGKILL)
    pool.wait_gone(worker)
    with asking(pool, [path(APP, "hold", name) for name in "abc"]) as calls:
        wait_held(pool, *"abc")
        wait_answered(pool, *"abc")
        assert [call.result(10) for call in calls] == [[name, ""] for name in "abc"]
    (worker,) = wait_ready(pool, 1)
    wait_until(lambda: sockets(worker) == 1, 10, "the lane to go")
    assert collect(pool, APP, "gated", "s", 40) == [["s", number] for number in range(40)]
    assert answer(pool.get("/lanes")) == 0


def test_lanes_end_with_their_workers(pool: Gunicorn) -> None:
    for _ in range(3):
        (worker,) = wait_ready(pool, 1)
        assert ask(pool, APP, "echo", 1) == 1
        assert answer(pool.get("/lanes")) == 1
        pool.kill(worker, signal.SIGKILL)
        pool.wait_gone(worker)
    wait_until(lambda: answer(pool.get("/lanes")) == 0, 10, "the lane to go")


# Clients of another kind.


class Raw:
    """A client that takes lanes, by hand."""

    def __init__(self, gunicorn: Gunicorn) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(gunicorn.wait_log(r"Dirty arbiter listening on (\S+)").group(1))
        self.decoder = wire.FrameDecoder()
        self.frames: list[wire.Frame] = []
        self.lane: socket.socket | None = None
        self.sock.sendall(wire.pack_hello(0, wire.HELLO_LANES))
        assert self.next().kind == wire.HELLO

    def next(self) -> wire.Frame:
        while not self.frames:
            data, descriptors, _, _ = socket.recv_fds(self.sock, 65536, 1)
            assert data, "the arbiter hung up"
            if descriptors:
                self.lane = socket.socket(fileno=descriptors[0])
                self.lane.settimeout(10)
                self.decoder.receive_blob(b"")
            self.decoder.receive_data(data)
            self.frames += self.decoder.frames()
        return self.frames.pop(0)

    def stream(self, call_id: int, action: str, *args: object) -> None:
        envelope = wire.pack_envelope(wire.pack_names(APP, action), 60.0, wire.FLAG_STREAM)
        (data,) = wire.pack_request(call_id, envelope, values.dumps_call(args, {}))
        self.sock.sendall(data)

    def close(self) -> None:
        self.sock.close()
        if self.lane is not None:
            self.lane.close()


@contextmanager
def raw(gunicorn: Gunicorn) -> Iterator[Raw]:
    client = Raw(gunicorn)
    try:
        yield client
    finally:
        client.close()


def test_any_id_will_do() -> None:
    """0 too: of its stream the arbiter is told that it goes on."""
    with gunicorn_with(dirty_timeout=1) as gunicorn, raw(gunicorn) as client:
        (worker,) = wait_ready(gunicorn, 1)
        client.stream(0, "tick", 30, 0.1)
        assert client.next().kind == wire.LANE
        assert client.lane is not None
        decoder = wire.FrameDecoder()
        got: list[wire.Frame] = []
        while not got or got[-1].kind != wire.END:
            decoder.receive_data(client.lane.recv(65536))
            got += decoder.frames()
        assert [frame.call_id for frame in got] == 31 * [0]
        assert wait_ready(gunicorn, 1) == [worker]


def test_credit_that_a_busy_worker_does_not_read_is_summed_up(pool: Gunicorn) -> None:
    arbiter = pool.dirty_arbiter_pid()
    with raw(pool) as client, asking(pool, [path(APP, "spin", 2)]):
        client.stream(1, "tick", 5, 60)
        assert client.next().kind == wire.LANE
        pool.wait_log("^spinning$")
        before = memory(arbiter)
        credit = 2000 * wire.pack_credit(1, 1)
        for _ in range(300):
            client.sock.sendall(credit)
        assert memory(arbiter) - before < 20_000_000
    assert ask(pool, APP, "echo", 2) == 2


def memory(pid: int) -> int:
    """Resident bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_lanes_end_with_their_clients() -> None:
    with gunicorn_with(workers=2) as gunicorn:
        (worker,) = wait_ready(gunicorn, 1)
        assert sockets(worker) == 1  # to the arbiter
        old = gunicorn.wait_http_workers(2)
        wait_until(lambda: ask(gunicorn, APP, "echo", 1) and sockets(worker) == 3, 10, "both to call")
        gunicorn.kill(old[0], signal.SIGKILL)
        gunicorn.wait_gone(old[0])
        gunicorn.wait_http_workers(2)
        wait_until(lambda: sockets(worker) == 2, 10, "one lane to go")
        assert ask(gunicorn, APP, "echo", 1) == 1
