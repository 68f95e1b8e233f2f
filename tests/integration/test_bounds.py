"""Every queue, buffer and message has a bound, and what comes on the socket costs its sender only."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asking import app_source, ask, asking, collect, failure, wait_ready
from support.gunicorn import Gunicorn
from support.waiting import wait_until

from gunicorn_dirty_gevent.core import dialects, values, wire

APP = "tasks:App"
OTHER = "tasks:Other"

TASKS = """
import os
import time
from gunicorn.dirty import DirtyApp


class App(DirtyApp):
    def init(self):
        self.made = {}

    def echo(self, value):
        return value

    def size(self, data):
        return len(data)

    def big(self, size):
        return b"x" * size

    def nap(self, value, seconds):
        time.sleep(seconds)
        return value

    def hold(self, name, data=b""):
        # Until the test makes the file.
        print(f"holding {name}", flush=True)
        while not os.path.exists(f"release-{name}"):
            time.sleep(0.005)
        return name

    def numbers(self, name, n):
        try:
            for number in range(n):
                self.made[name] = number + 1
                yield number
        finally:
            print(f"closed {name}", flush=True)

    def blocks(self, n, size):
        for _ in range(n):
            yield b"x" * size

    def growing(self, sizes):
        for size in sizes:
            yield b"x" * size

    def progress(self, name):
        return self.made.get(name, 0)


class Other(App):
    pass
"""

VIEWS = '''
import time

@route("/many")
def many(environ, query):
    """n calls at once from one HTTP worker."""
    client = get_dirty_client()
    n, seconds = int(query["n"]), float(query["seconds"])
    calls = [gevent.spawn(client.execute, "tasks:App", "nap", k, seconds) for k in range(n)]
    answers = gevent.joinall(calls, timeout=25)
    return {"result": [len(answers), sum(call.value == k for k, call in enumerate(calls))]}


@route("/large")
def large(environ, query):
    """A large argument there and back, and the longest of the small calls beside it."""
    client, size = get_dirty_client(), int(query["size"])
    data = os.urandom(1 << 20) * (size >> 20)
    large = gevent.spawn(client.execute, "tasks:App", "echo", data)
    longest = done = 0
    while not large.ready():
        started = time.monotonic()
        assert client.execute("tasks:App", "echo", done) == done
        longest = max(longest, time.monotonic() - started)
        done += 1
    return {"result": [large.get() == data, done, longest]}


@route("/argument")
def argument(environ, query):
    client = get_dirty_client()
    try:
        return {"result": client.execute("tasks:App", "size", b"x" * int(query["size"]))}
    except Exception as error:
        return caught(error)

import os
'''

MAX_MESSAGE = 400_000
QUEUE_SIZE = 30
QUEUE_BYTES = 1_000_000
PER_CONNECTION = 20
UNREAD = 1_000_000

SMALL = f"""
import gunicorn_dirty_gevent
gunicorn_dirty_gevent.install(
    queue_size={QUEUE_SIZE}, queue_bytes={QUEUE_BYTES}, calls_per_connection={PER_CONNECTION},
    unread_bytes={UNREAD}, max_message_size={MAX_MESSAGE},
)
"""


def settings(**changed: object) -> dict[str, object]:
    base = {"dirty_workers": 1, "dirty_threads": 10, "dirty_timeout": 30}
    return base | {"dirty_apps": [APP, OTHER]} | changed


@pytest.fixture(scope="module")
def small() -> Iterator[Gunicorn]:
    """With small bounds. Tests leave it idle."""
    with Gunicorn(app_source(VIEWS), TASKS, settings(), install=SMALL) as gunicorn:
        wait_ready(gunicorn, 1)
        yield gunicorn


@pytest.fixture(scope="module")
def plain() -> Iterator[Gunicorn]:
    """With the bounds that a user gets."""
    with Gunicorn(app_source(VIEWS), TASKS, settings(dirty_threads=2)) as gunicorn:
        wait_ready(gunicorn, 1)
        yield gunicorn


class Raw:
    """A client that is nothing but a socket."""

    def __init__(self, gunicorn: Gunicorn, hello: bool = True) -> None:
        where = gunicorn.wait_log(r"Dirty arbiter listening on (\S+)").group(1)
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(where)
        self._decoder = wire.FrameDecoder()
        self._frames: list[wire.Frame] = []
        self._ended: dict[int, Any] = {}
        if hello:
            self.send(wire.pack_hello())
            assert self.frame().kind == wire.HELLO

    def send(self, *parts: bytes | memoryview) -> None:
        for part in parts:
            self.sock.sendall(part)

    def request(self, call_id: int, app: str, action: str, *args: Any, stream: bool = False) -> None:
        self.send(*request(call_id, app, action, *args, stream=stream))

    def frame(self) -> wire.Frame:
        while not self._frames:
            data = self.sock.recv(262144)
            if not data:
                raise EOFError
            self._decoder.receive_data(data)
            self._frames += self._decoder.frames()
        return self._frames.pop(0)

    def last_frames(self, n: int) -> dict[int, Any]:
        """The results or faults of the next n calls to end."""
        while len(self._ended) < n:
            self._read_last()
        return {call_id: self._ended.pop(call_id) for call_id in list(self._ended)[:n]}

    def ask(self, app: str, action: str, *args: Any) -> Any:
        self.request(999_999, app, action, *args)
        while 999_999 not in self._ended:
            self._read_last()
        return self._ended.pop(999_999)

    def _read_last(self) -> None:
        frame = self.frame()
        if frame.kind in (wire.RESPONSE, wire.ERROR, wire.END):
            self._ended[frame.call_id] = values.loads(frame.payload) if frame.payload else None

    def ended(self) -> bool:
        """Whether the arbiter closes the connection (what it sends before is skipped)."""
        with contextlib.suppress(ConnectionResetError):
            while self.sock.recv(262144):
                pass
        return True

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *error: object) -> None:
        self.sock.close()


def request(
    call_id: int, app: str, action: str, *args: Any, stream: bool = False, budget: float = 30.0
) -> wire.Parts:
    flags = wire.FLAG_STREAM if stream else 0
    envelope = wire.pack_envelope(wire.pack_names(app, action), budget, flags)
    return wire.pack_request(call_id, envelope, values.dumps_call(args, {}))


def overloaded(said: Any, why: str) -> bool:
    if not isinstance(said, dict) or said.get("error_type") != "DirtyOverloadedError":
        return False
    assert why in said["message"]
    assert said["details"]["may_have_run"] is False
    return True


def holding(gunicorn: Gunicorn, name: str, n: int) -> None:
    wait_until(
        lambda: len(re.findall(f"^holding {name}$", gunicorn.log_text(), re.MULTILINE)) == n,
        10,
        f"{n} calls to hold {name}",
        gunicorn.evidence,
    )


def memory(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors(gunicorn: Gunicorn) -> int:
    return len(os.listdir(f"/proc/{gunicorn.dirty_arbiter_pid()}/fd"))


def settled(gunicorn: Gunicorn) -> int:
    """The same, with the HTTP worker connected, and none that is just being closed.

    The arbiter has seen the end of a connection of before when it has gone to a worker and back for this one.
    It has passed on the HTTP worker's lane then too, though that one's answer may have been quicker.
    """
    assert ask(gunicorn, APP, "echo", 0) == 0
    with Raw(gunicorn) as last:
        assert last.ask(APP, "echo", 0) == 0
        return descriptors(gunicorn) - 1


# Queues.


def test_a_full_queue_refuses_the_next_calls_at_once(small: Gunicorn) -> None:
    with contextlib.ExitStack() as connected:
        # Bound by the queue, not by the connection: 10 run, 30 wait, the rest has no place.
        clients = [connected.enter_context(Raw(small)) for _ in range(3)]
        for n in range(45):
            clients[n // 15].request(n, APP, "hold", "queue")
            if n == 9:
                holding(small, "queue", 10)
            if n % 15 == 14:  # in order over the connections
                assert clients[n // 15].ask("no:App", "here")["error_type"] == "DirtyAppNotFoundError"
        refused = clients[2].last_frames(5)  # while none of the others has ended
        assert all(overloaded(said, "queue_size") for said in refused.values())
        said = failure(ask(small, APP, "echo", 1), "DirtyOverloadedError")
        assert said.elapsed < 2
        assert not said.may_have_run
        # An app's queue is its own; but here the slots are all taken.
        with Raw(small) as other:
            other.request(1, OTHER, "echo", "other")
            small.write("release-queue", "")
            assert other.last_frames(1) == {1: "other"}
        ended = [clients[0].last_frames(15), clients[1].last_frames(15), clients[2].last_frames(10)]
        assert all(said == "queue" for answers in ended for said in answers.values())
    assert ask(small, APP, "echo", 2) == 2


def test_queued_bytes_are_bounded(small: Gunicorn) -> None:
    data = b"x" * (QUEUE_BYTES // 3 - 1000)
    with Raw(small) as client, Raw(small) as late:
        for n in range(10):
            client.request(n, APP, "hold", "bytes")
        holding(small, "bytes", 10)
        for n in range(10, 14):
            client.request(n, APP, "size", data)
        ((refused, said),) = client.last_frames(1).items()
        assert refused == 13
        assert overloaded(said, "queue_bytes")
        late.request(1, APP, "echo", "small")  # there is room for a small one
        small.write("release-bytes", "")
        ended = client.last_frames(13)
        assert ended == {n: "bytes" if n < 10 else len(data) for n in range(13)}
        assert late.last_frames(1) == {1: "small"}


def test_calls_per_connection_are_bounded(small: Gunicorn) -> None:
    with Raw(small) as greedy, Raw(small) as modest:
        for n in range(PER_CONNECTION + 5):
            greedy.request(n, APP, "hold", "greedy")
        refused = greedy.last_frames(5)
        assert sorted(refused) == list(range(PER_CONNECTION, PER_CONNECTION + 5))
        assert all(overloaded(said, "calls_per_connection") for said in refused.values())
        modest.request(1, APP, "echo", "modest")
        greedy.send(wire.pack_frame(wire.CANCEL, 0))  # one that runs: a place, and a slot
        assert modest.ask("no:App", "here")["error_type"] == "DirtyAppNotFoundError"
        greedy.request(100, APP, "echo", "again")
        small.write("release-greedy", "")
        ended = greedy.last_frames(PER_CONNECTION)
        assert ended == dict.fromkeys(range(1, PER_CONNECTION), "greedy") | {100: "again"}
        assert modest.last_frames(1) == {1: "modest"}


# Messages.


def test_message_size_is_bounded_in_both_directions(small: Gunicorn) -> None:
    fits = MAX_MESSAGE - 1000
    assert small.get(f"/argument?size={fits}").json() == {"result": fits}
    said = small.get(f"/argument?size={MAX_MESSAGE}").json()
    assert (said["error"], said["attrs"]["may_have_run"]) == ("DirtyMessageTooLargeError", False)
    assert "max_message_size" in said["message"]
    assert ask(small, APP, "size", "x" * 10) == 10
    said = failure(ask(small, APP, "big", MAX_MESSAGE), "DirtyMessageTooLargeError")
    assert said.may_have_run
    assert "max_message_size" in said.message
    said = failure(collect(small, APP, "growing", [0, 0, MAX_MESSAGE, 0]), "DirtyMessageTooLargeError")
    assert len(said.chunks) == 2
    assert ask(small, APP, "echo", 3) == 3


def test_a_frame_over_the_limit_costs_its_connection(small: Gunicorn) -> None:
    mark = small.mark()
    with Raw(small) as good, Raw(small) as bad:
        header = request(1, APP, "size", b"x" * MAX_MESSAGE)[0][: wire.HEADER_SIZE]
        bad.send(header)  # not a byte of it has to come
        assert bad.ended()
        assert good.ask(APP, "echo", 1) == 1
    small.wait_log(rf"Dropped a dirty client \(pid: \d+\): .*{MAX_MESSAGE} may be sent", since=mark)


def test_64_mib_go_through_and_others_go_on(plain: Gunicorn) -> None:
    with Raw(plain) as beside:
        with asking(plain, ["/large?size=67108864"]) as (large,):
            longest = 0.0
            while not large.done():
                started = time.monotonic()
                assert beside.ask(APP, "echo", "small") == "small"
                longest = max(longest, time.monotonic() - started)
        right, calls, longest_inside = large.result(0)
    print(
        f"64 MiB: {calls} calls beside it, longest {longest_inside:.3f} s; of another client {longest:.3f} s"
    )
    assert right
    assert calls >= 1
    assert longest_inside < 3
    assert longest < 3


def test_more_than_the_limit_is_refused_before_it_is_sent(plain: Gunicorn) -> None:
    sent = settled(plain), memory(plain.dirty_arbiter_pid())
    said = plain.get(f"/argument?size={129 * 1024 * 1024}").json()
    assert (said["error"], said["attrs"]["may_have_run"]) == ("DirtyMessageTooLargeError", False)
    assert settled(plain) == sent[0]
    assert memory(plain.dirty_arbiter_pid()) - sent[1] < 32 * 1024 * 1024
    assert ask(plain, APP, "echo", 1) == 1


def test_1500_calls_through_2_slots(plain: Gunicorn) -> None:
    answer = plain.get("/many?n=1500&seconds=0.002", timeout=30)
    assert answer.json() == {"result": [1500, 1500]}
    assert ask(plain, APP, "echo", 1) == 1


# Readers that do not read.


def test_answers_that_nobody_reads_are_bounded(small: Gunicorn) -> None:
    size, rounds = 100_000, 10
    arbiter = small.dirty_arbiter_pid()
    before = memory(arbiter)
    with Raw(small) as lazy, Raw(small) as other:
        for turn in range(rounds):
            for n in range(PER_CONNECTION):
                lazy.request(turn * PER_CONNECTION + n, APP, "big", size)
            # The same worker's queue is served in order: what comes now is answered after those.
            answers = [other.ask(APP, "echo", n) for n in range(30)]
            assert answers == list(range(30))
            wait_until(lambda: other.ask(APP, "echo", 0) == 0, 5, "an answer")
        assert memory(arbiter) - before < 3 * UNREAD + 8_000_000
        said = lazy.last_frames(PER_CONNECTION * rounds)
    whole = [s for s in said.values() if isinstance(s, bytes)]
    lost = [s for s in said.values() if not isinstance(s, bytes)]
    assert len(whole) >= UNREAD // size
    assert len(lost) >= PER_CONNECTION * rounds // 2
    assert {s["error_type"] for s in lost} == {"DirtyOverloadedError"}
    dropped = [s for s in lost if "unread_bytes" in s["message"]]
    assert dropped
    assert all(s["details"]["may_have_run"] for s in dropped)


def test_a_stream_that_nobody_reads_pauses_its_generator(small: Gunicorn) -> None:
    window = wire.STREAM_WINDOW // wire.MIN_CHUNK_COST
    with Raw(small) as lazy, Raw(small) as other:
        lazy.request(1, APP, "numbers", "window", 100_000, stream=True)
        wait_until(lambda: other.ask(APP, "progress", "window") >= window, 10, "the window to fill")
        # Were it not paused, each of these would give it a turn.
        seen = {other.ask(APP, "progress", "window") for _ in range(50)}
        assert seen <= {window, window + 1}
        lazy.send(wire.pack_credit(1, 10 * wire.MIN_CHUNK_COST))
        wait_until(lambda: other.ask(APP, "progress", "window") >= window + 10, 10, "ten more chunks")
        seen = {other.ask(APP, "progress", "window") for _ in range(50)}
        assert seen <= {window + 10, window + 11}
        chunks = [lazy.frame() for _ in range(window + 10)]
        assert [values.loads(chunk.payload) for chunk in chunks] == list(range(window + 10))
        mark = small.mark()
    small.wait_log("closed window", since=mark)


def test_many_streams_that_nobody_reads_are_bounded_together(small: Gunicorn) -> None:
    arbiter = small.dirty_arbiter_pid()
    before = memory(arbiter)
    with Raw(small) as lazy, Raw(small) as other:
        for n in range(5):
            lazy.request(n, APP, "blocks", 1000, 50_000, stream=True)
        assert [other.ask(APP, "echo", n) for n in range(50)] == list(range(50))
        assert memory(arbiter) - before < 5 * 2 * wire.STREAM_WINDOW + 8_000_000
    assert ask(small, APP, "echo", 1) == 1


# What no client of ours would send.


def frame(kind: int, payload: bytes = b"", call_id: int = 1) -> bytes:
    return wire.pack_frame(kind, call_id, payload)


def envelope(budget: float, app_size: int, action_size: int, rest: bytes = b"") -> bytes:
    return struct.pack(">dBBHH", budget, 0, 0, app_size, action_size) + rest


HEADER = struct.Struct(">2sBBIQ")
HOLD = b"".join(request(7, APP, "hold", "hostile"))

HOSTILE: dict[str, bytes] = {
    "garbage": bytes(range(255, 0, -1)) * 40,
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "zeros": bytes(4096),
    "garbage after GD": wire.pack_hello() + b"GD" + b"\xff" * 200,
    "unknown version": HEADER.pack(b"GD", 9, wire.REQUEST, 0, 1),
    "unknown kind": frame(0x7F),
    "huge length": HEADER.pack(b"GD", 2, wire.REQUEST, 0xFFFFFFFF, 1),
    "huge length, JSON": struct.pack(">I", 0x00FFFFFF) + b"{",
    "broken TLV": wire.pack_frame(wire.REQUEST, 1, b"\x21\xff\xff\xff\xff\x11", version=1),
    "response": wire.pack_hello() + frame(wire.RESPONSE),
    "error": wire.pack_hello() + frame(wire.ERROR),
    "chunk": wire.pack_hello() + frame(wire.CHUNK),
    "end": wire.pack_hello() + frame(wire.END),
    "ready": wire.pack_hello() + frame(wire.READY, values.dumps({"apps": {}, "failed": {}, "slots": 9})),
    "classes": wire.pack_hello() + frame(wire.CLASSES, values.dumps({})),
    "stop": wire.pack_hello() + frame(wire.STOP),
    "empty request": wire.pack_hello() + frame(wire.REQUEST),
    "names beyond the frame": wire.pack_hello() + frame(wire.REQUEST, envelope(1.0, 60000, 60000)),
    "names not UTF-8": wire.pack_hello() + frame(wire.REQUEST, envelope(1.0, 1, 1, b"\xff\xfe")),
    "budget is no number": wire.pack_hello() + frame(wire.REQUEST, envelope(math.nan, 1, 1, b"ab")),
    "the same id twice": wire.pack_hello() + HOLD + HOLD,
    "credit of the wrong size": wire.pack_hello() + frame(wire.CREDIT, b"\0"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_bytes_cost_their_connection_only(small: Gunicorn, what: str) -> None:
    with Raw(small) as good:
        good.request(1, APP, "hold", f"beside-{len(what)}")
        before, mark = settled(small), small.mark()
        with Raw(small, hello=False) as bad:
            bad.sock.settimeout(3)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                bad.send(HOSTILE[what])
            assert bad.ended()
        assert good.ask(APP, "echo", what) == what
        small.wait_log(rf"Dropped a dirty client \(pid: {os.getpid()}\): ", since=mark)
        wait_until(lambda: descriptors(small) == before, 5, "its descriptor to be closed", small.evidence)
        small.write(f"release-beside-{len(what)}", "")
        assert good.last_frames(1) == {1: f"beside-{len(what)}"}
        log = small.log_since(mark)
        assert log.count("Dropped a dirty client ") == 1
        assert "Traceback" not in log


REFUSED: dict[str, tuple[wire.Parts, str]] = {
    "time is over": (request(1, APP, "echo", 1, budget=-5.0), "DirtyTimeoutError"),
    "unknown app": (request(1, "tasks:\0Nope", "echo"), "DirtyAppNotFoundError"),
    "private action": (request(1, APP, "__init__"), "DirtyActionNotFoundError"),
    "arguments are garbage": (
        (frame(wire.REQUEST, envelope(9.0, len(APP), 4, APP.encode() + b"echo\xc1\xff\x00")),),
        "DirtyProtocolError",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_request_that_makes_no_sense_costs_its_sender_an_error(small: Gunicorn, what: str) -> None:
    parts, error = REFUSED[what]
    with Raw(small) as client:
        client.send(*parts)
        said = client.last_frames(1)[1]
        assert said["error_type"] == error
        assert said["details"]["may_have_run"] is False
        assert client.ask(APP, "echo", "on the same connection") == "on the same connection"


@pytest.mark.parametrize("budget", [1e300, math.inf, 1e-300])
def test_any_number_is_a_time(small: Gunicorn, budget: float) -> None:
    with Raw(small) as client:
        client.send(*request(1, APP, "echo", "in time", budget=budget))
        said = client.last_frames(1)[1]
        assert said == "in time" or (budget < 1 and said["error_type"] == "DirtyTimeoutError")
        assert client.ask(APP, "echo", 1) == 1


def test_a_second_hello_and_frames_for_unknown_calls_do_no_harm(small: Gunicorn) -> None:
    mark = small.mark()
    with Raw(small) as client, Raw(small) as good:
        for kind, payload in ((wire.CANCEL, b""), (wire.CREDIT, b"\0\0\0\1"), (wire.GOAWAY, b"")):
            client.send(frame(kind, payload, call_id=12345))
        client.send(wire.pack_hello())
        # Answered or dropped; either way only this connection.
        with contextlib.suppress(OSError, EOFError):
            assert client.frame().kind == wire.HELLO
            assert client.ask(APP, "echo", 5) == 5
        assert good.ask(APP, "echo", 6) == 6
    assert "Traceback" not in small.log_since(mark)


def test_half_a_frame_and_gone(small: Gunicorn) -> None:
    before, mark = settled(small), small.mark()
    whole = b"".join(bytes(part) for part in request(1, APP, "size", b"x" * 300_000))
    for cut in (1, wire.HEADER_SIZE - 1, wire.HEADER_SIZE, 100_000):
        with Raw(small) as client:
            client.send(whole[:cut])
    wait_until(lambda: descriptors(small) == before, 5, "descriptors to be closed", small.evidence)
    assert ask(small, APP, "echo", 1) == 1
    assert "Traceback" not in small.log_since(mark)


def test_200_connections_come_and_go(small: Gunicorn) -> None:
    before, mark = settled(small), small.mark()
    with contextlib.ExitStack() as connected:
        for n in range(200):
            client = connected.enter_context(Raw(small, hello=False))
            if n % 2:
                client.send(wire.pack_hello())
        with Raw(small) as other:
            assert other.ask(APP, "echo", 1) == 1
        assert ask(small, APP, "echo", 2) == 2
    wait_until(lambda: descriptors(small) == before, 5, "descriptors to be closed", small.evidence)
    assert ask(small, APP, "echo", 3) == 3
    log = small.log_since(mark)
    assert "Traceback" not in log
    assert "Dropped" not in log


def grown(gunicorn: Gunicorn, client: Raw, data: bytes, times: int) -> int:
    """What the arbiter's memory grows by when a client that never reads sends data so often."""
    arbiter = gunicorn.dirty_arbiter_pid()
    before = memory(arbiter)
    client.sock.settimeout(2)
    with contextlib.suppress(OSError):  # it may be cut off, or not be read any more
        for _ in range(times):
            client.send(data)
    with Raw(gunicorn) as other:
        assert other.ask(APP, "echo", 1) == 1
    return memory(arbiter) - before


def json_call(app: str) -> bytes:
    text = json.dumps({"id": "1", "app_path": app, "action": "x"}).encode()
    return struct.pack(">I", len(text)) + text


FLOODS = {
    "errors": b"".join(b"".join(request(n, "no:App", "x")) for n in range(1000)),
    "hellos": wire.pack_hello() * 5000,
    "JSON errors": json_call("no:App") * 1000,
    "status": wire.pack_frame(dialects.STATUS, 1, version=1) * 1000,
}


@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_of_answers_that_nobody_reads_is_bounded(small: Gunicorn, flood: str) -> None:
    with Raw(small, hello=False) as client:
        assert grown(small, client, FLOODS[flood], 150) < 3 * UNREAD + 8_000_000
    assert ask(small, APP, "echo", 1) == 1


def test_a_reader_that_gives_itself_credit_is_bounded(small: Gunicorn) -> None:
    arbiter = small.dirty_arbiter_pid()
    before = memory(arbiter)
    with Raw(small) as client, Raw(small) as other:
        client.request(1, APP, "blocks", 800, 100_000, stream=True)
        client.send(wire.pack_credit(1, 0xFFFFFFFF))
        peak = 0
        for n in range(400):
            assert other.ask(APP, "echo", n) == n
            peak = max(peak, memory(arbiter) - before)
        assert peak < 3 * UNREAD + 8_000_000
