"""`execute()` from views of a real gunicorn with gevent HTTP workers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from urllib.parse import urlencode

import pytest
from asking import app_source, ask, ask_many, asking, failure, path, wait_ready
from support.gunicorn import STOCK, Gunicorn, app_with

APP = "tasks:App"

TASKS = """
import gevent
import os
import threading
import time
from gunicorn.dirty import DirtyApp


class Unknown:
    pass


def exactly(value):
    kind = type(value).__name__
    if isinstance(value, dict):
        return kind, [(exactly(k), exactly(v)) for k, v in value.items()]
    if isinstance(value, (set, frozenset)):
        return kind, sorted((exactly(v) for v in value), key=repr)
    if isinstance(value, (list, tuple)):
        return kind, [exactly(v) for v in value]
    return kind, repr(value)


class App(DirtyApp):
    def init(self):
        self.inside = self.most = self.entered = 0

    def echo(self, value):
        return value

    def describe(self, value):
        return repr(exactly(value))

    def nap(self, value, seconds):
        time.sleep(seconds)
        return [value, os.getpid()]

    def hold(self, name):
        # Until the test makes the file.
        print(f"holding {name} in {os.getpid()}", flush=True)
        try:
            while not os.path.exists(f"release-{name}"):
                time.sleep(0.005)
            return name
        finally:
            print(f"left {name}", flush=True)

    def overlap(self, seconds):
        self.inside += 1
        self.entered += 1
        self.most = max(self.most, self.inside)
        time.sleep(seconds)
        self.inside -= 1

    def overlapped(self):
        return [self.entered, self.most]

    def spin(self, seconds):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pass

    def stubborn(self, value, seconds):
        # Answers, whatever the worker does to stop it.
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                time.sleep(until - time.monotonic())
            except BaseException:
                pass
        return value

    def wrong(self, key):
        return {}[key]

    def unknown_value(self):
        return {"list": [1, Unknown()]}

    def big(self, size):
        return b"x" * size

    def size(self, data):
        return len(data)

    def named(self, **kwargs):
        return kwargs

    def _secret(self):
        return "secret"
"""

VIEWS = '''
import time
from datetime import date, datetime, time as clock, timedelta, timezone
from decimal import Decimal
from uuid import UUID

APP = "tasks:App"
gaps = []
spawned = {}


def tick():
    last = time.monotonic()
    while True:
        gevent.sleep(0.001)
        now = time.monotonic()
        gaps.append(now - last)
        last = now


@route("/tick")
def start_ticking(environ, query):
    gaps.clear()
    spawned["ticker"] = gevent.spawn(tick)
    return "ticking"


@route("/gap")
def longest_gap(environ, query):
    spawned.pop("ticker").kill()
    return {"longest": max(gaps), "ticks": len(gaps)}


@route("/big-echo")
def big_echo(environ, query):
    data = bytes([int(query["fill"])]) * int(query["size"])
    return {"result": get_dirty_client().execute(APP, "echo", data) == data}


@route("/sized")
def sized(environ, query):
    size = int(query["size"])
    try:
        return {"result": len(get_dirty_client().execute(APP, "echo", b"x" * size)) == size}
    except Exception as error:
        return caught(error)


def exactly(value):
    # The same as in the dirty app.
    kind = type(value).__name__
    if isinstance(value, dict):
        return kind, [(exactly(k), exactly(v)) for k, v in value.items()]
    if isinstance(value, (set, frozenset)):
        return kind, sorted((exactly(v) for v in value), key=repr)
    if isinstance(value, (list, tuple)):
        return kind, [exactly(v) for v in value]
    return kind, repr(value)


VALUES = [
    None, True, False, 0, -1, 2**31, 2**63, 2**64, -(2**200), 0.0, -0.0, 1.5, 1e308, float("inf"),
    "", "plain", "käse \\N{SNOWMAN} \\N{PILE OF POO}", "a\\0b", "\\udcff", b"", b"\\x00\\xff" * 100,
    bytearray(b"mutable"), [], [1, [2, [3, []]]], (), (1,), (1, (2, ("three",))), [(1, 2), [3, 4]],
    set(), {1, 2, 3}, frozenset({"a", b"a"}), {(1, 2), frozenset({3})},
    {}, {"a": {"b": {"c": [1, 2]}}}, {1: "int", None: "none", (1, 2): "tuple", b"k": "bytes"},
    {True: "bool"}, {1.5: 2}, datetime(2024, 2, 29, 12, 30, 1, 999999),
    datetime(2024, 2, 29, tzinfo=timezone.utc),
    datetime(2024, 2, 29, tzinfo=timezone(timedelta(hours=-3, minutes=-30))),
    date(1, 1, 1), clock(23, 59, 59), timedelta(days=-1, microseconds=1), Decimal("1.10"),
    Decimal("-0E-7"), UUID(int=7), 1 + 2j, list(range(1000)),
    {"mixed": [(1, {2}), {"when": date(2024, 1, 1), "how much": Decimal("0.1")}]},
]


@route("/types")
def types(environ, query):
    client = get_dirty_client()
    wrong = []
    for value in [*VALUES, VALUES]:
        if exactly(client.execute(APP, "echo", value)) != exactly(value):
            wrong.append(f"back: {value!r}")
        if client.execute(APP, "describe", value=value) != repr(exactly(value)):
            wrong.append(f"there: {value!r}")
    return "; ".join(wrong) or f"{len(VALUES)} ok"


class Point:
    pass


UNENCODABLE = {
    "object": (([1, {"deep": (0, Point())}],), {}),
    "lambda": ((), {"value": {"f": lambda: 0}}),
    "loop": (([],), {}),
}
UNENCODABLE["loop"][0][0].append(UNENCODABLE["loop"][0][0])


@route("/unencodable")
def unencodable(environ, query):
    client = get_dirty_client()
    args, kwargs = UNENCODABLE[query["which"]]
    try:
        return {"result": client.execute(APP, "echo", *args, **kwargs)}
    except Exception as error:
        after = [client.execute(APP, "echo", n) for n in range(20)]
        return caught(error) | {"chunks": after}


@route("/timeouts")
def timeouts(environ, query):
    """Calls that end by gevent.Timeout, whose late answers must not reach those that follow."""
    client = get_dirty_client()
    fired, wrong = 0, []
    for n in range(20):
        with gevent.Timeout(0.03) as timeout:
            try:
                client.execute(APP, "stubborn", f"late {n}", 0.06)
            except gevent.Timeout as caught_timeout:
                assert caught_timeout is timeout
                fired += 1
        got = client.execute(APP, "nap", n, 0.01)[0]
        if got != n:
            wrong.append([n, got])
    return {"result": [fired, wrong]}


@route("/spawn")
def spawn(environ, query):
    spawned["call"] = gevent.spawn(get_dirty_client().execute, APP, "hold", query["name"])
    return "spawned"


@route("/kill")
def kill(environ, query):
    greenlet = spawned.pop("call")
    greenlet.kill(timeout=5)
    return {"dead": greenlet.dead, "value": greenlet.value}


@route("/options")
def options(environ, query):
    client = get_dirty_client()
    other = client.options(timeout=0.2)
    try:
        other.execute(APP, "hold", "options")
    except Exception as error:
        return caught(error) | {"chunks": [client.timeout, other.timeout, client.execute(APP, "echo", 1)]}


@route("/client")
def client_type(environ, query):
    import gunicorn_dirty_gevent
    return {"ours": isinstance(get_dirty_client(), gunicorn_dirty_gevent.DirtyClient)}


'''

DIRTY = {"dirty_apps": [APP], "dirty_workers": 2, "dirty_threads": 200, "dirty_timeout": 30}


def gunicorn_with(settings: dict[str, object], **options: object) -> Gunicorn:
    return Gunicorn(app_source(VIEWS), TASKS, settings, **options)


@pytest.fixture(scope="module")
def busy() -> Iterator[Gunicorn]:
    """Two dirty workers with 200 greenlets each."""
    with gunicorn_with(DIRTY) as gunicorn:
        wait_ready(gunicorn, 2)
        yield gunicorn


@pytest.fixture(scope="module")
def serial() -> Iterator[Gunicorn]:
    """One dirty worker with gunicorn's default of one call at a time, and small messages."""
    install = "import gunicorn_dirty_gevent\ngunicorn_dirty_gevent.install(max_message_size=100_000)\n"
    settings = {"dirty_apps": [APP], "dirty_workers": 1, "dirty_timeout": 30}
    with gunicorn_with(settings, install=install) as gunicorn:
        yield gunicorn


def check_service(gunicorn: Gunicorn) -> None:
    paths = [path(APP, "echo", f"after {n}") for n in range(20)]
    assert ask_many(gunicorn, paths, 10) == [f"after {n}" for n in range(20)]


def release(gunicorn: Gunicorn, name: str) -> None:
    gunicorn.write(f"release-{name}", "")


# At once


def test_two_hundred_calls_of_half_a_second_run_at_once(busy: Gunicorn) -> None:
    started = time.monotonic()
    answers = ask_many(busy, [path(APP, "nap", f"own {n}", 0.5) for n in range(200)])
    seconds = time.monotonic() - started
    assert [value for value, _ in answers] == [f"own {n}" for n in range(200)]
    assert {pid for _, pid in answers} == set(busy.dirty_worker_pids())
    assert seconds < 20  # 50 s one by one in each of two workers


def test_a_worker_with_one_thread_runs_one_call_at_a_time(serial: Gunicorn, busy: Gunicorn) -> None:
    calls = [path(APP, "overlap", 0.02)] * 30
    ask_many(serial, calls)
    assert ask(serial, APP, "overlapped") == [30, 1]
    # What would have been seen otherwise.
    ask_many(busy, calls)
    entered, most = ask(busy, APP, "overlapped")
    assert entered > 1 and most > 1


def test_quick_calls_do_not_wait_for_slow_ones(busy: Gunicorn) -> None:
    with asking(busy, [path(APP, "hold", f"slow{n}") for n in range(2)]) as slow:
        try:
            pids = {busy.wait_log(rf"holding slow{n} in (\d+)").group(1) for n in range(2)}
            assert len(pids) == 2, "the slow calls are in both workers"
            seconds = sorted(busy.get(path(APP, "echo", n)).elapsed for n in range(50))
            assert not any(call.done() for call in slow)
        finally:
            for n in range(2):
                release(busy, f"slow{n}")
        assert [call.result() for call in slow] == ["slow0", "slow1"]
    assert seconds[25] < 0.5


def test_the_hub_of_the_http_worker_is_never_blocked(busy: Gunicorn) -> None:
    assert busy.get("/tick").text == "ticking"
    slow = [path(APP, "nap", n, 3) for n in range(20)] + [path(APP, "spin", 3)]
    big = [f"/big-echo?size={8 << 20}&fill={n}" for n in range(4)]
    answers = ask_many(busy, slow + big)
    gap = busy.get("/gap").json()
    assert answers[-4:] == [True] * 4
    assert gap["ticks"] > 50
    assert gap["longest"] < 1.5  # for as long as the hub waits for a single call itself, it is 3


@pytest.mark.deadline(90)
def test_three_thousand_echoes_at_fifty_connections(busy: Gunicorn) -> None:
    started = time.monotonic()
    answers = ask_many(busy, [path(APP, "echo", f"{n} " + "x" * (n % 500)) for n in range(3000)], 50)
    assert answers == [f"{n} " + "x" * (n % 500) for n in range(3000)]
    assert time.monotonic() - started < 40


# Values


def test_values_keep_their_types_both_ways(busy: Gunicorn) -> None:
    assert busy.get("/types").text == "49 ok"


@pytest.mark.parametrize(
    ("which", "named", "place"),
    [
        ("object", "Point", "args[0][1]['deep'][1]"),
        ("lambda", "function", "kwargs['value']['f']"),
        ("loop", "list", "args[0]"),
    ],
)
def test_what_cannot_be_sent_raises_in_the_caller(busy: Gunicorn, which: str, named: str, place: str) -> None:
    said = failure(ask(busy, APP, "", route="/unencodable", options={"which": which}), "DirtyEncodeError")
    assert "DirtyProtocolError" in said.bases
    assert named in said.message
    assert place in said.message
    assert said.may_have_run is False
    assert said.chunks == list(range(20))


def test_a_result_that_cannot_be_sent_is_the_callers_error(busy: Gunicorn) -> None:
    said = failure(ask(busy, APP, "unknown_value"), "DirtyEncodeError")
    assert "Unknown" in said.message
    assert "result['list'][1]" in said.message
    assert said.may_have_run is True
    check_service(busy)


def test_oversized_messages_are_refused_both_ways(serial: Gunicorn) -> None:
    said = failure(ask_size(serial, 100_001), "DirtyMessageTooLargeError")
    assert "DirtyProtocolError" in said.bases
    assert said.may_have_run is False
    assert "100000" in said.message
    check_service(serial)
    said = failure(ask(serial, APP, "big", 100_001), "DirtyMessageTooLargeError")
    assert said.may_have_run is True
    assert "100000" in said.message
    check_service(serial)
    assert ask_size(serial, 90_000) is True


def ask_size(gunicorn: Gunicorn, size: int) -> object:
    return ask(gunicorn, APP, "", route="/sized", options={"size": str(size)})


# Errors


def test_an_error_of_the_action_reaches_the_caller(busy: Gunicorn) -> None:
    said = failure(ask(busy, APP, "wrong", "no such key"), "DirtyAppError")
    assert "no such key" in said.message
    assert said.attrs["app_path"] == APP
    assert said.attrs["action"] == "wrong"
    assert "return {}[key]" in said.attrs["traceback"]
    assert "KeyError: 'no such key'" in said.attrs["traceback"]
    assert said.may_have_run is True
    check_service(busy)


@pytest.mark.parametrize(
    ("app", "action", "error"),
    [
        ("tasks:Nobody", "echo", "DirtyAppNotFoundError"),
        (APP, "nothing", "DirtyActionNotFoundError"),
        (APP, "_secret", "DirtyActionNotFoundError"),
    ],
)
def test_unknown_apps_and_actions_are_named(busy: Gunicorn, app: str, action: str, error: str) -> None:
    said = failure(ask(busy, app, action), error)
    assert (action if app == APP else app) in said.message
    assert said.may_have_run is False
    assert said.attrs["app_path"] == app
    check_service(busy)


# Options, timeouts and callers that go away


def test_keywords_of_an_action_are_its_own(busy: Gunicorn) -> None:
    kwargs = {"timeout": 0.001, "idle_timeout": 1, "app": "a", "client": 2, "stream": True, "deadline": 0}
    url = path("", "") + "&" + urlencode({"app": APP, "action": "named", "kwargs": json.dumps(kwargs)})
    assert busy.get(url).json() == {"result": kwargs}


def test_options_hold_for_their_own_client_only(busy: Gunicorn) -> None:
    mark = busy.mark()
    said = failure(ask(busy, APP, "", route="/options"), "DirtyTimeoutError")
    assert 0.2 <= said.elapsed < 5
    before, given, after = said.chunks
    assert (given, after) == (0.2, 1)
    assert before != 0.2
    assert said.may_have_run is True
    busy.wait_log("left options", since=mark)


def test_a_gevent_timeout_ends_its_own_call_only(busy: Gunicorn) -> None:
    assert busy.get("/timeouts", timeout=30).json() == {"result": [20, []]}
    check_service(busy)


def test_a_killed_greenlet_cancels_its_call(busy: Gunicorn) -> None:
    busy.get("/spawn?name=killed")
    busy.wait_log("holding killed in")
    assert busy.get("/kill").json()["dead"] is True
    busy.wait_log("left killed")
    check_service(busy)


# install()


EARLY = """
from gunicorn.dirty import get_dirty_client
import gunicorn_dirty_gevent
gunicorn_dirty_gevent.install()
gunicorn_dirty_gevent.install()

def post_fork(server, worker):
    import builtins
    builtins.early_get_dirty_client = get_dirty_client
"""

EARLY_VIEW = """
@route("/early")
def early(environ, query):
    import builtins
    import gunicorn_dirty_gevent
    client = builtins.early_get_dirty_client()
    ours = isinstance(client, gunicorn_dirty_gevent.DirtyClient)
    return {"ours": ours, "result": client.execute(APP, "echo", "early")}
"""


def test_installs_under_code_that_imported_the_client_before() -> None:
    with Gunicorn(app_source(VIEWS + EARLY_VIEW), TASKS, DIRTY, install=EARLY) as gunicorn:
        assert gunicorn.get("/early").json() == {"ours": True, "result": "early"}
        started = time.monotonic()
        answers = ask_many(gunicorn, [path(APP, "nap", n, 0.3) for n in range(40)])
        assert [value for value, _ in answers] == list(range(40))
        assert time.monotonic() - started < 4


def test_installs_from_the_command_line_alone() -> None:
    args = ["-c", "python:gunicorn_dirty_gevent.auto", "-k", "gevent", "-b", "127.0.0.1:0"]
    args += ["--dirty-app", APP, "--dirty-workers", "2", "--dirty-threads", "50"]
    args += ["--no-control-socket"]
    # The harness's own configuration file is not read, so nothing says that the worker is up.
    with gunicorn_with({}, args=args, ready=None) as gunicorn:
        wait_ready(gunicorn, 2)
        answers = ask_many(gunicorn, [path(APP, "nap", n, 0.3) for n in range(40)])
        assert [value for value, _ in answers] == list(range(40))
        assert len({pid for _, pid in answers}) == 2
        assert gunicorn.get("/client").json() == {"ours": True}


def test_does_nothing_without_dirty_settings() -> None:
    view = """
    @route("/modules")
    def modules(environ, query):
        ours = ("gunicorn.dirty", "gunicorn_dirty_gevent", "asyncio", "ormsgpack")
        return [name for name in sys.modules if name.startswith(ours)]
    """
    loaded = []
    for install in (STOCK, "import gunicorn_dirty_gevent\ngunicorn_dirty_gevent.install()\n"):
        with Gunicorn(app_with(view), install=install) as gunicorn:
            loaded.append(set(gunicorn.get("/modules").json()))
            assert set(gunicorn.pids()) == {gunicorn.master_pid, *gunicorn.http_worker_pids()}
    stock, ours = loaded
    assert not any(name.startswith("gunicorn.dirty") for name in ours)
    assert ours - stock == {"gunicorn_dirty_gevent", "gunicorn_dirty_gevent.plugin"}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("queue_sise=5", r"TypeError.*queue_sise"),
        ("queue_size=0", r"ValueError.*queue_size.* not 0"),
    ],
)
def test_a_wrong_option_stops_the_start_and_is_named(option: str, message: str) -> None:
    install = f"import gunicorn_dirty_gevent\ngunicorn_dirty_gevent.install({option})\n"
    why = pytest.raises(AssertionError, match=rf"exited \(1\)(.*\n)*.*{message}")
    with why, gunicorn_with(DIRTY, install=install):
        pytest.fail("started")


def test_is_run_by_the_gevent_worker(busy: Gunicorn) -> None:
    (worker,) = busy.http_worker_pids()
    assert worker == busy.get("/pid").json()["pid"] != os.getpid()
