"""The client under gevent where greenlets, threads and forks race: an arbiter that waits for its test."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent.pool import Group
from support.calls import APP, LARGE, LONG, SOON
from support.fake_arbiter import FakeArbiter, no_descriptor_left

from gunicorn_dirty_gevent.client import DirtyClient, stock
from gunicorn_dirty_gevent.core import wire
from gunicorn_dirty_gevent.errors import DirtyCancelledError, DirtyConnectionError


@pytest.fixture
def greenlets(gevent_hub: Any) -> Iterator[Group]:
    """Where a test's greenlets are ended with it."""
    group = Group()
    yield group
    group.kill(timeout=5)


@contextmanager
def client_of(arbiter: FakeArbiter, timeout: float = LONG) -> Iterator[DirtyClient]:
    client = DirtyClient(arbiter.path, timeout=timeout)
    try:
        yield client
    finally:
        client.close()


def outcome(what: Callable[..., Any], *args: Any) -> Any:
    """What it returns, or raises."""
    try:
        return what(*args)
    except Exception as error:
        return error


def first_value(client: DirtyClient, kind: str, action: str, value: object) -> Any:
    """Of a call, or a stream."""
    if kind == "execute":
        return client.execute(APP, action, value)
    return next(client.stream(APP, action, value))


def turns() -> None:
    """Let all greenlets go as far as they can without news."""
    for _ in range(20):
        gevent.sleep(0)


def ended(greenlet: Any) -> Any:
    """The outcome of a greenlet that has no more to wait for."""
    greenlet.join(SOON)
    assert greenlet.ready(), "it still waits"
    return greenlet.value


def until_all_closed(arbiter: FakeArbiter) -> None:
    arbiter.wait(lambda: not arbiter.open, "the client to close all connections")


# Forks. The parent stands still until its child has ended, so what the child could take, it takes.


@contextmanager
def script(code: str, *args: str) -> Iterator[subprocess.Popen[str]]:
    """A process that runs code; each line it prints is in JSON."""
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT + code, *args]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )
    assert process.stdin and process.stdout
    with process.stdin, process.stdout:
        try:
            yield process
        finally:
            process.kill()
            process.wait(10)


def line(process: subprocess.Popen[str]) -> Any:
    assert process.stdout
    said = process.stdout.readline()
    try:
        return json.loads(said)
    except ValueError:
        pytest.fail(said + process.stdout.read())


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()


def taken(said: list[Any]) -> list[Any]:
    """How copies of a parent's calls may not end: with anything but nothing, or a lost connection."""
    return [value for value in said if value and not value.startswith("error DirtyConnectionError(")]


SCRIPT = f"""
import json, os, signal, sys
import gevent, gevent.os
from gevent.socket import wait_read
from gunicorn_dirty_gevent.client import DirtyClient

def say(what):
    print(json.dumps(what), flush=True)

def wait_told():
    wait_read(0)  # the hub goes on
    os.read(0, 1)

def outcome(action, value):
    try:
        return client.execute("{APP}", action, value)
    except Exception as error:
        return f"error {{error!r}}"

def in_child():
    signal.alarm(30)  # a parent's does not hold here

signal.alarm(30)
gevent.get_hub()
client = DirtyClient(sys.argv[1], timeout={LONG})
"""

FORK_AMONG_CALLS = """
outcome("echo", "so that a connection is kept")
calls = [gevent.spawn(outcome, "hold", f"answer {number}") for number in range(8)]
say("calling")
wait_told()  # all calls are with the arbiter
child = FORK()
if child == 0:
    in_child()
    say("forked")
    wait_told()  # all have been answered
    gevent.joinall(calls, timeout=0.5)
    say([call.value for call in calls])
    os._exit(0)
os.waitpid(child, 0)
gevent.joinall(calls)
say([call.value for call in calls])
"""


@pytest.mark.parametrize("fork", ["os.fork", "gevent.os.fork"])
def test_no_child_reads_what_a_stock_arbiter_answers_its_parent(theirs: FakeArbiter, fork: str) -> None:
    with script(FORK_AMONG_CALLS.replace("FORK", fork), theirs.path) as process:
        assert line(process) == "calling"
        theirs.wait(lambda: theirs.ran("hold") == 8, "8 calls")
        go_on(process)
        assert line(process) == "forked"
        theirs.release()
        theirs.settle()
        go_on(process)
        assert taken(line(process)) == []
        assert line(process) == [f"answer {number}" for number in range(8)]
    assert theirs.ran("hold") == 8 and not theirs.broken


FORK_IN_A_STREAM = """
seen, child = [], None
try:
    with client.stream("APP", "later", 5) as stream:
        for number in stream:
            seen.append(number)
            if child is None:
                child = os.fork()
                if child == 0:
                    in_child()
                    break
                say(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
except Exception as error:
    seen.append(f"error {error!r}")
if child == 0:
    os._exit(len(seen) - 1)
say(seen)
""".replace("APP", APP)


def test_a_child_that_leaves_a_stream_does_not_end_its_parents(theirs: FakeArbiter) -> None:
    with script(FORK_IN_A_STREAM, theirs.path) as process:
        assert line(process) == 0
        theirs.release()
        assert line(process) == [0, 1, 2, 3, 4]


FORK_WHILE_ONE_CONNECTS = """
call = gevent.spawn(outcome, "echo", "once")
for _ in range(20):
    gevent.sleep(0)
child = os.fork()
if child == 0:
    in_child()
    say("forked")
    wait_told()  # there is room
    call.join(0.5)
    say([call.value])
    os._exit(0)
os.waitpid(child, 0)
call.join()
say([call.value])
"""


def test_a_call_that_waits_for_a_connection_is_not_made_by_a_child_too(tmp_path: Path) -> None:
    with (
        closing(FakeArbiter(str(tmp_path / "arbiter"), accepts=False, backlog=0)) as arbiter,
        socket.socket(socket.AF_UNIX) as other,
    ):
        other.connect(arbiter.path)  # and now its backlog is full
        with script(FORK_WHILE_ONE_CONNECTS, arbiter.path) as process:
            assert line(process) == "forked"
            arbiter.accept()
            go_on(process)
            assert taken(line(process)) == []
            assert line(process) == ["once"]
            assert process.wait(10) == 0
        with socket.socket(socket.AF_UNIX) as last:
            last.settimeout(SOON)
            last.connect(arbiter.path)
            last.sendall(wire.pack_hello())
            assert last.recv(100)  # so those before it have been accepted
        other.close()
        until_all_closed(arbiter)
        assert arbiter.ran("echo") == 1


# Calls and streams that end while somebody waits for them.


def test_a_stream_that_is_closed_beside_its_reader_ends_there(arbiter: FakeArbiter, greenlets: Group) -> None:
    with client_of(arbiter) as client:
        stream = client.stream(APP, "first", "one")
        assert next(stream) == "one"
        reader = greenlets.spawn(outcome, next, stream)
        turns()
        stream.close()
        # A reader that looked again and again, and let nobody else run, would end with its time.
        assert isinstance(ended(reader), StopIteration)
        if arbiter.stock:
            until_all_closed(arbiter)
        else:
            arbiter.wait(lambda: arbiter.cancelled, "the arbiter to hear of it")


def test_a_stream_that_is_closed_before_its_first_chunk_ends(arbiter: FakeArbiter, greenlets: Group) -> None:
    with client_of(arbiter) as client:
        stream = client.stream(APP, "hold", "none")
        reader = greenlets.spawn(outcome, next, stream)
        arbiter.wait(lambda: arbiter.ran("hold"), "the call")
        stream.close()
        assert isinstance(ended(reader), StopIteration)


def test_without_descriptors_no_connection_is_made_and_that_is_said(
    ours: FakeArbiter, greenlets: Group, capsys: pytest.CaptureFixture[str]
) -> None:
    with client_of(ours, timeout=3) as client:
        with no_descriptor_left():
            executed = outcome(client.execute, APP, "echo", 1)
            submitted = outcome(lambda: client.submit(APP, "echo", 2).get())
        for error in (executed, submitted):
            assert isinstance(error, DirtyConnectionError) and error.may_have_run is False
        assert client.execute(APP, "echo", 3) == 3
        assert [run.args for run in ours.runs] == [[3]]
    assert capsys.readouterr().err == ""


def test_a_client_closed_by_another_thread_wakes_the_greenlets_that_wait(ours: FakeArbiter) -> None:
    outcomes: list[Any] = []

    def wait_in_a_hub() -> None:
        calls = [gevent.spawn(outcome, client.execute, APP, "hold", number) for number in range(3)]
        gevent.joinall(calls)
        outcomes.extend(call.value for call in calls)
        gevent.get_hub().destroy(destroy_loop=True)

    with client_of(ours) as client:
        thread = threading.Thread(target=wait_in_a_hub)
        thread.start()
        try:
            ours.wait(lambda: ours.ran("hold") == 3, "3 calls")
            client.close()
            thread.join(SOON)
            assert not thread.is_alive()
        finally:
            thread.join(2 * LONG)
    assert [(type(error), error.may_have_run) for error in outcomes] == [(DirtyConnectionError, True)] * 3


@pytest.mark.parametrize("kind", ["stock", "ours"])
def test_the_connections_of_a_thread_that_has_ended_are_closed(tmp_path: Path, kind: str) -> None:
    """By `close()`, though that thread's loop, which nobody destroyed, takes callbacks still."""
    hubs: list[Any] = []
    with closing(FakeArbiter(str(tmp_path / "arbiter"), stock=kind == "stock")) as arbiter:
        with client_of(arbiter) as client:

            def call_in_a_hub() -> None:
                hubs.append(gevent.get_hub())
                client.execute(APP, "echo", 1)

            for number in range(3):
                thread = threading.Thread(target=call_in_a_hub)
                thread.start()
                thread.join()
                arbiter.wait(lambda: arbiter.open <= 1, f"{number} others to be closed")
        until_all_closed(arbiter)
    for hub in hubs:
        hub.loop.destroy()


def test_a_handle_used_after_its_close_holds_the_connection_again(
    ours: FakeArbiter, greenlets: Group
) -> None:
    with client_of(ours) as one, client_of(ours) as other:
        assert (one.execute(APP, "echo", 1), other.execute(APP, "echo", 2)) == (1, 2)
        one.close()
        call = greenlets.spawn(outcome, one.execute, APP, "hold", "kept")
        ours.wait(lambda: ours.ran("hold"), "the call")
        other.close()
        ours.release()
        assert ended(call) == "kept"
        assert ours.opened == [1] and ours.open
        one.close()
        until_all_closed(ours)


class Mine(Exception):
    """A user's."""


@pytest.mark.parametrize("error", [Mine, TimeoutError, ConnectionError])
@pytest.mark.parametrize("kind", ["execute", "stream"])
def test_a_users_timeout_comes_out_as_it_is(
    theirs: FakeArbiter, greenlets: Group, kind: str, error: type[Exception]
) -> None:
    with client_of(theirs) as client:
        assert client.execute(APP, "echo", 1) == 1
        mine = error("my own")
        with pytest.raises(error) as raised, gevent.Timeout(0.2, mine):
            first_value(client, kind, "hold", 2)
        assert raised.value is mine
        until_all_closed(theirs)
        assert client.execute(APP, "echo", 3) == 3


# A stock arbiter: a connection for each call.


@pytest.mark.parametrize("kind", ["execute", "stream"])
def test_a_first_caller_killed_while_it_sends_leaves_no_connection(
    theirs: FakeArbiter, greenlets: Group, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(stock, "MAX_OPEN", 1)  # and no place
    theirs.greets = False
    with client_of(theirs) as client:
        call = greenlets.spawn(first_value, client, kind, "echo", LARGE)
        theirs.wait(lambda: theirs.asked, "the client to ask what arbiter this is")
        theirs.read(False)
        before = len(theirs.opened)
        theirs.greet()
        theirs.wait(lambda: len(theirs.opened) > before, "the call's own connection")
        turns()
        assert not call.ready()
        call.kill()
        theirs.read(True)
        until_all_closed(theirs)
        assert theirs.ran("echo") == 0
        assert client.execute(APP, "echo", "there is place") == "there is place"


def test_close_ends_the_calls_of_all_that_found_a_stock_arbiter_at_once(
    theirs: FakeArbiter, greenlets: Group
) -> None:
    theirs.greets = False
    with client_of(theirs) as client:
        calls = [greenlets.spawn(outcome, client.execute, APP, "hold", number) for number in range(20)]
        theirs.wait(lambda: theirs.asked, "the client to ask what arbiter this is")
        turns()  # whoever wants to ask has asked
        theirs.greet()
        theirs.wait(lambda: theirs.ran("hold") == 20, "20 calls")
        client.close()
        assert {type(ended(call)) for call in calls} == {DirtyConnectionError}
        until_all_closed(theirs)


def test_cancel_ends_the_calls_of_all_that_found_a_stock_arbiter_at_once(
    theirs: FakeArbiter, greenlets: Group
) -> None:
    theirs.greets = False
    with client_of(theirs) as client:
        futures = [client.submit(APP, "hold", number) for number in range(5)]
        theirs.wait(lambda: theirs.asked, "the client to ask what arbiter this is")
        turns()
        theirs.greet()
        theirs.wait(lambda: theirs.ran("hold") == 5, "5 calls")
        assert [future.cancel() for future in futures] == [True] * 5
        until_all_closed(theirs)
        assert {type(outcome(future.get)) for future in futures} == {DirtyCancelledError}


@pytest.mark.parametrize("end", ["close", "cancel"])
def test_calls_go_on_and_can_be_ended_when_another_has_lost_its_connection(
    theirs: FakeArbiter, greenlets: Group, end: str
) -> None:
    with client_of(theirs) as client:
        assert client.execute(APP, "echo", 1) == 1
        future = client.submit(APP, "hold", 2)
        theirs.wait(lambda: theirs.ran("hold"), "the call")
        with pytest.raises(DirtyConnectionError):
            client.execute(APP, "hang_up")
        waiting = greenlets.spawn(outcome, future.get)
        turns()
        assert not waiting.ready()
        if end == "close":
            client.close()
            assert isinstance(ended(waiting), DirtyConnectionError)
        else:
            assert future.cancel()
            assert isinstance(ended(waiting), DirtyCancelledError)
        until_all_closed(theirs)


# Imports.


def test_the_client_can_be_the_first_that_imports_gunicorns_package(tmp_path: Path) -> None:
    code = """
import gunicorn_dirty_gevent
gunicorn_dirty_gevent.install()
from gunicorn_dirty_gevent.client import DirtyClient
import gunicorn.dirty
print(gunicorn.dirty.DirtyClient is gunicorn.dirty.client.DirtyClient is DirtyClient)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=30
    )
    assert (done.stdout, done.stderr) == ("True\n", "")
