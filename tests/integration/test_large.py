"""Large bodies, which go by descriptor, in a real gunicorn."""

from __future__ import annotations

import array
import contextlib
import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from asking import app_source, ask, asking, wait_ready
from support.gunicorn import OURS, Gunicorn
from support.waiting import wait_until

from gunicorn_dirty_gevent.blob import detach
from gunicorn_dirty_gevent.core import values, wire

APP = "tasks:App"

TASKS = """
import os
import time
import gunicorn_dirty_gevent
from gunicorn.dirty import DirtyApp


class App(DirtyApp):
    def echo(self, value):
        return value

    def blocks(self, n, size):
        for number in range(n):
            yield bytes([number]) * size

    @gunicorn_dirty_gevent.action(idempotent=True)
    def size(self, data, name):
        return self.size_once(data, name)

    def size_once(self, data, name):
        print(f"holding {name} in {os.getpid()}", flush=True)
        while not os.path.exists(f"release-{name}"):
            time.sleep(0.005)
        return len(data)
"""

VIEWS = """
import os

@route("/echo")
def echo(environ, query):
    data = os.urandom(int(query["size"]))
    value = {"data": data, "n": 1} if "inside" in query else data
    answer = get_dirty_client().execute("tasks:App", "echo", value)
    return {"result": [answer == value, type(answer).__name__]}

@route("/blocks")
def blocks(environ, query):
    n, size = int(query["n"]), int(query["size"])
    got = list(get_dirty_client().stream("tasks:App", "blocks", n, size))
    return {"result": got == [bytes([number]) * size for number in range(n)]}

@route("/size")
def size(environ, query):
    data = b"x" * int(query["size"])
    action = query.get("action", "size")
    return {"result": get_dirty_client().execute("tasks:App", action, data, query["name"])}
"""

SETTINGS = {"dirty_apps": [APP], "dirty_workers": 1, "dirty_threads": 4, "dirty_timeout": 30}
BODY = "/memfd:gunicorn-dirty-body"


@contextlib.contextmanager
def started(install: str = OURS, worker_class: str = "gevent", **changed: object) -> Iterator[Gunicorn]:
    settings = SETTINGS | changed
    with Gunicorn(app_source(VIEWS), TASKS, settings, worker_class, install=install) as gunicorn:
        wait_ready(gunicorn, 1)
        yield gunicorn


@pytest.fixture(scope="module")
def pool() -> Iterator[Gunicorn]:
    with started() as gunicorn:
        yield gunicorn


def bodies(pid: int) -> int:
    """How many descriptors of bodies a process has."""
    found = 0
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found += os.readlink(entry.path).startswith(BODY)
    return found


def wait_bodies(gunicorn: Gunicorn, count: int) -> None:
    arbiter = gunicorn.dirty_arbiter_pid()
    wait_until(lambda: bodies(arbiter) == count, 15, f"{count} bodies in the arbiter", gunicorn.evidence)


def wait_none_left(gunicorn: Gunicorn) -> None:
    wait_bodiless(
        gunicorn,
        [gunicorn.dirty_arbiter_pid(), *gunicorn.dirty_worker_pids(), *gunicorn.http_worker_pids()],
    )


def wait_bodiless(gunicorn: Gunicorn, pids: list[int]) -> None:
    for pid in pids:
        wait_until(lambda pid=pid: not bodies(pid), 15, f"{pid} to let go of bodies", gunicorn.evidence)


def peak_memory(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found.group(1)) * 1024


EDGE = wire.DETACH_SIZE


@pytest.mark.parametrize("size", [EDGE - 100, EDGE - 5, EDGE - 4, EDGE, EDGE + 1, 1 << 20, 30 << 20])
def test_large_bytes_come_back_the_same(pool: Gunicorn, size: int) -> None:
    assert pool.get(f"/echo?size={size}").json()["result"] == [True, "bytes"]
    assert pool.get(f"/echo?size={size}&inside=1").json()["result"] == [True, "dict"]
    wait_none_left(pool)


@pytest.mark.parametrize("worker_class", ["gthread", "sync"])
def test_http_workers_without_gevent_send_them_inline(worker_class: str) -> None:
    with started(worker_class=worker_class) as gunicorn:
        assert gunicorn.get(f"/echo?size={2 << 20}").json()["result"] == [True, "bytes"]
        assert gunicorn.get(f"/blocks?n=5&size={1 << 20}").json()["result"] is True


def test_large_chunks_come_in_order(pool: Gunicorn) -> None:
    for answer in pool.get_many([f"/blocks?n=40&size={EDGE + 1000}"] * 8):
        assert answer.json()["result"] is True
    wait_none_left(pool)


def test_the_arbiter_holds_no_copy(pool: Gunicorn) -> None:
    arbiter = pool.dirty_arbiter_pid()
    assert pool.get("/echo?size=1000").json()["result"] == [True, "bytes"]
    before = peak_memory(arbiter)
    assert pool.get(f"/echo?size={60 << 20}").json()["result"] == [True, "bytes"]
    assert peak_memory(arbiter) - before < 6 << 20


def test_bodies_that_wait_are_descriptors_in_the_arbiter_and_leave_with_their_calls() -> None:
    with started() as gunicorn:
        paths = [f"/size?name=many&size={EDGE + n}" for n in range(20)]
        with asking(gunicorn, paths) as calls:
            wait_bodies(gunicorn, 20)  # 4 run, 16 wait
            # The last may just have been sent.
            wait_bodiless(gunicorn, gunicorn.http_worker_pids())
            (gunicorn.dir / "release-many").touch()
            assert [call.result(20) for call in calls] == [EDGE + n for n in range(20)]
        wait_none_left(gunicorn)


def test_the_body_of_a_call_that_runs_once_is_held_by_nobody_while_it_runs() -> None:
    with started() as gunicorn:
        paths = [f"/size?action=size_once&name=once&size={EDGE + n}" for n in range(7)]
        with asking(gunicorn, paths) as calls:
            wait_until(lambda: gunicorn.log_text().count("holding once") == 4, 15, "4 calls")
            wait_bodies(gunicorn, 3)  # of those that wait
            wait_bodiless(gunicorn, gunicorn.dirty_worker_pids() + gunicorn.http_worker_pids())
            (gunicorn.dir / "release-once").touch()
            assert [call.result(20) for call in calls] == [EDGE + n for n in range(7)]
        wait_none_left(gunicorn)


def test_a_worker_that_is_forked_meanwhile_holds_none_and_runs_them() -> None:
    with started() as gunicorn:
        paths = [f"/size?name=again&size={EDGE + n}" for n in range(12)]
        with asking(gunicorn, paths) as calls:
            wait_bodies(gunicorn, 12)
            (first,) = gunicorn.dirty_worker_pids()
            mark = gunicorn.mark()
            gunicorn.kill(first, signal.SIGKILL)
            gunicorn.wait_log("Dirty worker ready", since=mark)
            (second,) = gunicorn.dirty_worker_pids()
            # What waits has not been left to it by the fork, and what runs has been read.
            wait_until(
                lambda: gunicorn.log_since(mark).count(f"holding again in {second}") == 4,
                15,
                "4 running calls",
            )
            wait_bodiless(gunicorn, [second])
            (gunicorn.dir / "release-again").touch()
            assert [call.result(20) for call in calls] == [EDGE + n for n in range(12)]
        wait_none_left(gunicorn)


FEW_DESCRIPTORS = OURS + "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (150, 150))\n"


def test_where_descriptors_run_out_bodies_are_read_into_memory() -> None:
    with started(FEW_DESCRIPTORS) as gunicorn:
        paths = [f"/size?name=few&size={EDGE + n}" for n in range(100)]
        with asking(gunicorn, paths) as calls:
            arbiter = gunicorn.dirty_arbiter_pid()
            wait_until(lambda: len(re.findall("holding few", gunicorn.log_text())) == 4, 15, "4 calls")
            (gunicorn.dir / "release-few").touch()
            assert [call.result(30) for call in calls] == [EDGE + n for n in range(100)]
            assert gunicorn.dirty_arbiter_pid() == arbiter
        wait_none_left(gunicorn)


NO_FILES = """
import errno, os
def refused(name, flags=0, made=os.memfd_create):
    if name == "gunicorn-dirty-body":
        raise OSError(errno.EPERM, "seccomp")
    return made(name, flags)
os.memfd_create = refused
"""


def test_where_memory_files_are_forbidden_bodies_go_inline() -> None:
    with started(OURS + NO_FILES) as gunicorn:
        assert gunicorn.get(f"/echo?size={3 << 20}").json()["result"] == [True, "bytes"]
        assert gunicorn.get(f"/blocks?n=5&size={1 << 20}").json()["result"] is True


# Hostile clients.


def connect(gunicorn: Gunicorn) -> socket.socket:
    where = gunicorn.wait_log(r"Dirty arbiter listening on (\S+)").group(1)
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(where)
    sock.sendall(wire.pack_hello())
    return sock


def ended(sock: socket.socket) -> bool:
    with contextlib.suppress(ConnectionResetError):
        while sock.recv(262144):
            pass
    return True


def unsealed(size: int) -> int:
    descriptor = os.memfd_create("hostile", os.MFD_ALLOW_SEALING)
    os.truncate(descriptor, size)
    return descriptor


def request(blob: object) -> bytes:
    names = wire.pack_envelope(wire.pack_names(APP, "echo"), 10.0, wire.FLAG_DETACH)
    (part,) = wire.pack_detached(wire.REQUEST, 1, names, blob)  # type: ignore[arg-type]
    assert isinstance(part, wire.Detached)
    return part.inline


def descriptors(kind: str) -> list[int]:
    if kind == "none":
        return []
    if kind == "a pipe":
        return list(os.pipe())
    if kind == "itself":
        return [unsealed(EDGE) for _ in range(5)]
    return [unsealed(EDGE)]


@pytest.mark.parametrize("kind", ["none", "not sealed", "a pipe", "itself"])
def test_descriptors_that_are_no_bodies_cost_one_connection(pool: Gunicorn, kind: str) -> None:
    mark = pool.mark()
    arbiter = pool.dirty_arbiter_pid()
    assert ask(pool, APP, "echo", 4) == 4  # its HTTP worker is connected from here on
    open_before = len(os.listdir(f"/proc/{arbiter}/fd"))
    given = descriptors(kind)
    with connect(pool) as sock:
        socket.send_fds(sock, [request(b"")], given) if given else sock.sendall(request(b""))
        assert ended(sock)
    for descriptor in given:
        os.close(descriptor)
    pool.wait_log(r"Dropped a dirty client \(pid: \d+\): protocol error: .*descriptor", since=mark)
    assert ask(pool, APP, "echo", 5) == 5
    wait_until(lambda: len(os.listdir(f"/proc/{arbiter}/fd")) <= open_before, 10, "descriptors to be closed")


def test_a_body_that_is_no_message_is_an_error_of_its_call(pool: Gunicorn) -> None:
    with connect(pool) as sock:
        blob = detach(b"\xc1" * EDGE)
        assert blob is not None
        rights = array.array("i", [blob.descriptor])
        sock.sendmsg([request(blob)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        decoder = wire.FrameDecoder()
        frames: list[wire.Frame] = []
        while not any(frame.kind == wire.ERROR for frame in frames):
            data = sock.recv(65536)
            assert data, pool.log_tail()
            decoder.receive_data(data)
            frames += decoder.frames()
        fault = values.loads(wire.inline_bytes(frames[-1].payload))
        assert "cannot be decoded" in fault["message"]
        assert fault["details"]["may_have_run"] is False
    assert ask(pool, APP, "echo", 5) == 5
