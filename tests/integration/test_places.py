"""Where a gunicorn runs: as which user, in which directory, under which limits and surroundings."""

from __future__ import annotations

import contextlib
import fcntl
import grp
import os
import pwd
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from asking import app_source, ask, ask_many, asking, collect, failure, path, wait_ready
from support.gunicorn import OURS, Gunicorn
from support.waiting import wait_until

APP = "tasks:App"
PREFIX = "gunicorn-dirty-"

TASKS = """
import os
import resource
import time
from gunicorn.dirty import DirtyApp

IMPORTED_AS = [*os.getresuid(), *os.getresgid()]


class App(DirtyApp):
    def init(self):
        self.loaded_at = time.monotonic()

    def imported_as(self):
        return IMPORTED_AS

    def double(self, number):
        return number * 2

    def count(self, n):
        yield from range(n)

    def state(self):
        return [os.getpid(), self.loaded_at]

    def spin(self):
        while True:
            pass

    def hold(self, name):
        # Until the test makes the file.
        print(f"holding {name} in {os.getpid()}", flush=True)
        while not os.path.exists(f"release-{name}"):
            time.sleep(0.005)
        return name

    def held_state(self, name, release):
        print(f"holding {name} in {os.getpid()}", flush=True)
        while not os.path.exists(f"release-{release}"):
            time.sleep(0.005)
        return self.state()

    def open_files(self, n):
        files = [open(os.devnull) for _ in range(n)]
        for file in files:
            file.close()
        return len(files)
"""

EARLY_PATCH = "from gevent import monkey\nmonkey.patch_all()\n"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")


def settings(**changed: object) -> dict[str, object]:
    base = {"dirty_workers": 1, "dirty_threads": 10, "dirty_timeout": 30, "dirty_apps": [APP]}
    return base | changed


def gunicorn_with(views: str = "", **options: object) -> Gunicorn:
    changed = options.pop("settings", {})
    assert isinstance(changed, dict)
    return Gunicorn(app_source(views), TASKS, settings(**changed), **options)  # type: ignore[arg-type]


def socket_path(gunicorn: Gunicorn) -> Path:
    return Path(gunicorn.wait_log(r"Dirty arbiter listening on (\S+)").group(1))


def dirty_pids(gunicorn: Gunicorn, workers: int = 1) -> list[int]:
    return [gunicorn.dirty_arbiter_pid(), *wait_ready(gunicorn, workers)]


def status(pid: int, field: str) -> list[str]:
    """A line of /proc/PID/status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return value.split()
    raise AssertionError(f"no {field} for {pid}")


def check_works(gunicorn: Gunicorn) -> None:
    assert ask(gunicorn, APP, "double", 21) == 42
    assert collect(gunicorn, APP, "count", 50) == list(range(50))
    many = ask_many(gunicorn, [path(APP, "double", n) for n in range(20)], concurrency=10)
    assert many == [2 * n for n in range(20)]


def check_new_arbiter(gunicorn: Gunicorn, workers: int = 1) -> None:
    """Calls work after the arbiter was killed, through the same HTTP worker."""
    http, arbiter = gunicorn.http_worker_pids(), gunicorn.dirty_arbiter_pid()
    gunicorn.kill(arbiter, signal.SIGKILL)
    gunicorn.wait_gone(arbiter)
    check_works(gunicorn)
    assert gunicorn.dirty_arbiter_pid() != arbiter
    wait_ready(gunicorn, workers)
    assert gunicorn.http_worker_pids() == http


def kill_worker(gunicorn: Gunicorn, workers: int) -> None:
    """Kill a dirty worker and wait for another in its place."""
    first = wait_ready(gunicorn, workers)[0]
    gunicorn.kill(first, signal.SIGKILL)
    gunicorn.wait_gone(first)
    assert first not in wait_ready(gunicorn, workers)


def check_stops(gunicorn: Gunicorn) -> None:
    place = socket_path(gunicorn).parent
    report = gunicorn.stop()
    assert (report.exit_code, report.left) == (0, [])
    assert not place.exists()
    gunicorn.assert_clean()


# As another user.


def nobody() -> tuple[int, int]:
    entry = pwd.getpwnam("nobody")
    return entry.pw_uid, entry.pw_gid


def hidden_from_others() -> dict[str, list[str]]:
    """The directories that keep another user from this Python and library, and what of them is needed."""
    repository = str(Path(__file__).parents[2])
    needed = {os.path.realpath(p) for p in (sys.prefix, sys.base_prefix, sys.base_exec_prefix, repository)}
    hidden: dict[str, list[str]] = {}
    for place in sorted(needed):
        for parent in reversed(Path(place).parents):
            if not parent.stat().st_mode & stat.S_IXOTH:
                hidden.setdefault(str(parent), []).append(place)
                break
    return hidden


# A view of the file system of gunicorn's own, in which every user can read them.
REACHABLE = """
import ctypes, os, subprocess

def _make_reachable(hidden):
    if ctypes.CDLL(None, use_errno=True).unshare(0x20000):  # CLONE_NEWNS
        raise OSError(ctypes.get_errno(), "unshare")
    mount = lambda *how: subprocess.run(["mount", *how], check=True)
    mount("--make-rprivate", "/")
    for number, (parent, places) in enumerate(hidden.items()):
        for at, place in enumerate(places):
            os.makedirs(f"mounts/{number}-{at}")
            mount("--bind", place, f"mounts/{number}-{at}")
        mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", parent)
        for at, place in enumerate(places):
            os.makedirs(place)
            mount("--bind", f"mounts/{number}-{at}", place)

"""


def reachable() -> str:
    """Configuration by which other users can run this Python; skips where there is none."""
    hidden = hidden_from_others()
    if not hidden:
        return ""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip(f"other users cannot read {', '.join(hidden)}")
    return f"{REACHABLE}\n_make_reachable({hidden!r})\n"


@pytest.fixture
def public_temp() -> Iterator[None]:
    """Others may enter the directory in which gunicorns of these tests have theirs."""
    base = Path(tempfile.gettempdir())
    before = stat.S_IMODE(base.stat().st_mode)
    base.chmod(before | 0o011)
    try:
        yield
    finally:
        base.chmod(before)


def let_in(gunicorn: Gunicorn, tmp_mode: int = 0o1777) -> Gunicorn:
    gunicorn.dir.chmod(0o755)
    gunicorn.tmp.chmod(tmp_mode)
    return gunicorn


def gunicorn_for_nobody(**options: object) -> Gunicorn:
    uid, gid = nobody()
    changed = options.pop("settings", {})
    assert isinstance(changed, dict)
    user = {"user": pwd.getpwuid(uid).pw_name, "group": grp.getgrgid(gid).gr_name}
    install = str(options.pop("install", reachable() + OURS))
    return let_in(gunicorn_with(settings=user | changed, install=install, **options))


@needs_root
@pytest.mark.usefixtures("public_temp")
def test_master_as_root_with_user_and_group() -> None:
    uid, gid = nobody()
    with gunicorn_for_nobody(settings={"dirty_workers": 2}) as gunicorn:
        check_works(gunicorn)
        assert ask(gunicorn, APP, "imported_as") == [uid, uid, uid, gid, gid, gid]
        check_owner(dirty_pids(gunicorn, 2), uid, gid)
        check_place(socket_path(gunicorn), uid, gid)
        check_new_arbiter(gunicorn, 2)
        check_owner(dirty_pids(gunicorn, 2), uid, gid)
        kill_worker(gunicorn, 2)
        check_owner(dirty_pids(gunicorn, 2), uid, gid)
        check_works(gunicorn)
        check_stops(gunicorn)


def check_owner(pids: list[int], uid: int, gid: int) -> None:
    for pid in pids:
        assert status(pid, "Uid") == [str(uid)] * 4
        assert status(pid, "Gid") == [str(gid)] * 4


def check_place(sock: Path, uid: int, gid: int) -> None:
    for place, mode in ((sock, 0o600), (sock.parent, 0o700)):
        found = place.lstat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (mode, uid, gid), place


@needs_root
@pytest.mark.usefixtures("public_temp")
@pytest.mark.parametrize("initgroups", [False, True])
def test_groups_are_those_of_an_http_worker(initgroups: bool) -> None:
    # A group that only root's own session has.
    install = "import os\nos.setgroups([4])\n" + reachable() + OURS
    with gunicorn_for_nobody(settings={"initgroups": initgroups}, install=install) as gunicorn:
        (http,) = gunicorn.http_worker_pids()
        for pid in dirty_pids(gunicorn):
            for field in ("Uid", "Gid", "Groups"):
                assert status(pid, field) == status(http, field), field
        uid, gid = nobody()
        own = sorted(str(group) for group in os.getgrouplist(pwd.getpwuid(uid).pw_name, gid))
        assert sorted(status(http, "Groups")) == (own if initgroups else ["4"])
        assert ask(gunicorn, APP, "double", 4) == 8


@needs_root
@pytest.mark.usefixtures("public_temp")
def test_nothing_is_left_when_a_root_master_with_user_is_killed() -> None:
    with gunicorn_for_nobody() as gunicorn:
        check_works(gunicorn)
        place = socket_path(gunicorn).parent
        gunicorn.kill(gunicorn.master_pid, signal.SIGKILL)
        gunicorn.wait_gone(gunicorn.master_pid)
        wait_until(lambda: not place.exists(), 5, f"{place} to be removed", gunicorn.evidence)
        gunicorn.assert_clean(grace=5)


# The place of the socket.


def test_the_socket_is_in_a_private_unpredictable_place() -> None:
    places = []
    for _ in range(2):
        # Were the process's umask used, the modes would be others.
        with gunicorn_with(install="import os\nos.umask(0o027)\n" + OURS) as gunicorn:
            sock = socket_path(gunicorn)
            check_place(sock, os.getuid(), os.getgid())
            assert sock.parent.parent == gunicorn.tmp
            assert all(str(pid) not in sock.parent.name for pid in gunicorn.pids())
            places.append(sock.parent.name)
            pids = [gunicorn.master_pid, *gunicorn.http_worker_pids(), *dirty_pids(gunicorn)]
            assert [status(pid, "Umask") for pid in pids] == [["0027"]] * len(pids)
    assert places[0] != places[1]
    assert all(name.startswith(PREFIX) and len(name) >= len(PREFIX) + 8 for name in places)


@pytest.mark.parametrize("kind", ["long", "missing"])
def test_an_unfit_tmpdir_is_replaced(kind: str) -> None:
    gunicorn = gunicorn_with()
    unfit = gunicorn.dir / ("x" * 110 if kind == "long" else "unfit")
    if kind == "long":
        unfit.mkdir()
    gunicorn._env["TMPDIR"] = str(unfit)
    with gunicorn:
        sock = socket_path(gunicorn)
        assert gunicorn.dir not in sock.parents
        assert len(os.fsencode(sock)) <= 107
        check_place(sock, os.getuid(), os.getgid())
        check_works(gunicorn)
        check_new_arbiter(gunicorn)
        if kind == "long":
            # gunicorn's own files of the workers are unlinked at once.
            assert list(unfit.iterdir()) == []
        check_stops(gunicorn)


@needs_root
@pytest.mark.usefixtures("public_temp")
def test_a_tmpdir_that_the_master_may_not_write_is_replaced() -> None:
    uid, gid = nobody()
    become = f"import os\nos.setgroups([])\nos.setgid({gid})\nos.setuid({uid})\n"
    # gunicorn has read who it is before.
    user = {"user": uid, "group": gid}
    made = gunicorn_with(settings=user, install=reachable() + become + OURS)
    gunicorn = let_in(made, tmp_mode=0o755)
    gunicorn.dir.chmod(0o777)  # for its log
    with gunicorn:
        sock = socket_path(gunicorn)
        assert gunicorn.dir not in sock.parents
        check_place(sock, uid, gid)
        check_works(gunicorn)
        assert list(gunicorn.tmp.iterdir()) == []
        check_stops(gunicorn)


# What dead runs have left.


class Place:
    """A directory as a master makes it."""

    def __init__(self, base: Path, name: str) -> None:
        self.path = base / (PREFIX + name)
        self.path.mkdir(mode=0o700)
        self.lock = self.path / "lock"
        self.lock.touch(0o600)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(self.path / "arbiter.sock"))

    def age(self, seconds: float = 3600.0) -> None:
        when = time.time() - seconds
        for file in (*self.path.iterdir(), self.path):
            os.utime(file, (when, when), follow_symlinks=False)


def test_stale_directories_are_cleaned_and_no_others() -> None:
    gunicorn = gunicorn_with()
    names = ["dead", "held", "foreign", "young", "other", "no-lock"]
    places = {name: Place(gunicorn.tmp, name) for name in names}
    (places["foreign"].path / "precious").write_text("data")
    places["no-lock"].lock.unlink()
    for name in names:
        if name != "young":
            places[name].age()
    if os.geteuid() == 0:
        os.chown(places["other"].path, *nobody())
    elsewhere = Place(gunicorn.dir, "elsewhere")
    elsewhere.age()
    link = gunicorn.tmp / f"{PREFIX}link"
    link.symlink_to(elsewhere.path)
    with places["held"].lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with gunicorn:
            check_works(gunicorn)
            kept = {name for name in names if (places[name].path / "arbiter.sock").exists()}
            assert kept == set(names) - {"dead"} - ({"other"} if os.geteuid() else set())
            assert not places["dead"].path.exists()
            assert link.is_symlink()
            assert (elsewhere.path / "lock").exists()
            assert (places["foreign"].path / "precious").read_text() == "data"
            check_stops_beside(gunicorn, names, places, link)
            shutil.rmtree(elsewhere.path)


def check_stops_beside(gunicorn: Gunicorn, names: list[str], places: dict[str, Place], link: Path) -> None:
    gunicorn.stop()
    assert places["held"].path.exists()
    for name in names:
        shutil.rmtree(places[name].path, ignore_errors=True)
    link.unlink()


def kill_whole(gunicorn: Gunicorn) -> None:
    """All at once, so that none can clean up after another."""
    pids = list(gunicorn.pids())
    for sig in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sig)
    for pid in pids:
        gunicorn.wait_gone(pid)


def check_cleaned_by_the_next(dead: Gunicorn, following: Gunicorn) -> None:
    with dead:
        old = socket_path(dead).parent
        wait_ready(dead, 1)
        kill_whole(dead)
        assert {file.name for file in old.iterdir()} == {"lock", "arbiter.sock"}
        when = time.time() - 3600
        os.utime(old, (when, when))
        following._env["TMPDIR"] = str(dead.tmp)
        with following:
            check_works(following)
            left = old.exists()
        shutil.rmtree(old, ignore_errors=True)  # or `dead` would fail for it
    assert not left


def test_the_directory_of_a_run_that_was_killed_whole_is_cleaned_by_the_next() -> None:
    check_cleaned_by_the_next(gunicorn_with(), gunicorn_with())


@needs_root
@pytest.mark.usefixtures("public_temp")
def test_the_same_with_a_user() -> None:
    check_cleaned_by_the_next(gunicorn_for_nobody(), gunicorn_for_nobody())


def test_a_living_run_is_not_cleaned_by_another() -> None:
    with gunicorn_with() as first:
        place = socket_path(first).parent
        when = time.time() - 3600
        os.utime(place, (when, when))
        second = gunicorn_with()
        second._env["TMPDIR"] = str(first.tmp)
        with second:
            check_works(second)
            assert place.exists()
        check_works(first)
        check_new_arbiter(first)


# As PID 1.


class Contained(Gunicorn):
    """A gunicorn that is the first process of its pid namespace. Pids in its log are those inside."""

    def _launch(self) -> None:
        command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
        command += [sys.executable, "-m", "gunicorn", "-c", "gunicorn.conf.py", "app:app"]
        with (self.dir / "stderr.log").open("ab") as output:
            self._process = subprocess.Popen(
                command,
                cwd=self.dir,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def inside(self) -> dict[int, int]:
        """Pids inside, and what they are here."""
        found = {}
        for pid in self.pids():
            with contextlib.suppress(OSError):
                numbers = status(pid, "NSpid")
                if len(numbers) > 1:
                    found[int(numbers[-1])] = pid
        return found


def can_contain() -> bool:
    command = ["unshare", "--pid", "--fork", "--mount-proc", "true"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def test_as_pid_1_of_a_container() -> None:
    if not can_contain():
        pytest.skip("unshare --pid does not work here")
    with Contained(app_source(), TASKS, settings(), ready=None) as gunicorn:
        gunicorn.wait_log(r"Listening at: \S+ \(1\)")
        gunicorn.wait_log(r"HTTP worker ready")
        check_works(gunicorn)
        place = socket_path(gunicorn).parent
        arbiter = int(gunicorn.wait_log(r"Spawned dirty arbiter \(pid: (\d+)\)").group(1))
        worker = int(gunicorn.wait_log(r"Dirty worker ready \(pid: (\d+)\)").group(1))
        before = gunicorn.inside()
        with asking(gunicorn, [path(APP, "hold", "it")]) as (held,):
            gunicorn.wait_log("holding it")
            os.kill(before[arbiter], signal.SIGKILL)
            failure(held.result(10), "DirtyConnectionError")
        check_works(gunicorn)
        # The orphaned worker has become the master's child, and must be gone without a trace.
        gone = {before[arbiter], before[worker]}
        wait_until(lambda: not gone & set(gunicorn.pids()), 5, "orphans to be gone", gunicorn.evidence)
        os.kill(gunicorn.inside()[1], signal.SIGTERM)
        assert gunicorn._master().wait(10) == 0
        assert not place.exists()
        gunicorn.assert_clean()


# Masters that are not plain.


def test_preload_in_a_master_that_was_patched_early() -> None:
    with gunicorn_with(settings={"preload_app": True}, install=EARLY_PATCH + OURS) as gunicorn:
        check_works(gunicorn)
        kill_worker(gunicorn, 1)
        check_new_arbiter(gunicorn)
        kill_worker(gunicorn, 1)
        check_works(gunicorn)
        with asking(gunicorn, [path(APP, "hold", "it")]) as (held,):
            gunicorn.wait_log("holding it")
            gunicorn.kill(gunicorn.master_pid, signal.SIGTERM)
            gunicorn.wait_log("Handling signal: term")
            gunicorn.write("release-it", "")
            assert held.result(10) == "it"
        check_stops(gunicorn)


PRELOADED = """
def at_import():
    try:
        return get_dirty_client()
    except Exception as error:
        return error

MADE = at_import()

@route("/at-import")
def client_at_import(environ, query):
    client = get_dirty_client() if isinstance(MADE, Exception) else MADE
    numbers = [client.execute("tasks:App", "double", n) for n in range(20)]
    return {"result": [type(MADE).__name__, numbers, list(client.stream("tasks:App", "count", 5))]}
"""


@pytest.mark.parametrize("early", ["", EARLY_PATCH], ids=["plain", "patched early"])
def test_preloaded_app_that_makes_a_client_at_import(early: str) -> None:
    with gunicorn_with(
        PRELOADED, settings={"preload_app": True, "workers": 2}, install=early + OURS
    ) as gunicorn:
        for response in gunicorn.get_many(["/at-import"] * 12, concurrency=4):
            kind, numbers, chunks = response.json()["result"]
            # The master loads the app before there is a socket to name; gunicorn says so as well.
            assert kind == "DirtyError"
            assert (numbers, chunks) == ([n * 2 for n in range(20)], list(range(5)))
        check_new_arbiter(gunicorn)
        assert gunicorn.get("/at-import").json()["result"][1] == [n * 2 for n in range(20)]
        check_stops(gunicorn)


FORKING = """
import os

@route("/fork")
def fork(environ, query):
    child = os.fork()
    if child == 0:
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return {"result": [status, get_dirty_client().execute("tasks:App", "double", 21)]}
"""


def gunicorn_on_libuv() -> Gunicorn:
    pytest.importorskip("cffi")  # gevent's libuv loop is made with it
    say = "import gevent\nprint('loop:', gevent.config.loop, flush=True)\n"
    pool = {"dirty_timeout": 1, "dirty_workers": 3}
    env = {"GEVENT_LOOP": "libuv"}
    ready = "loop: .*libuv"
    return gunicorn_with(FORKING, settings=pool, env=env, install=say + OURS, ready_log=ready)


def all_states(gunicorn: Gunicorn, when: str) -> list[list[float]]:
    """`state` of three workers: each is asked while those before it are busy, for calls that come one by one
    go to the same."""
    names = [f"{when}{n}" for n in range(3)]
    with contextlib.ExitStack() as stack:
        stack.callback(gunicorn.write, f"release-{when}", "")
        calls = []
        for name in names:
            calls += stack.enter_context(asking(gunicorn, [path(APP, "held_state", name, when)]))
            gunicorn.wait_log(f"holding {name} in")
        gunicorn.write(f"release-{when}", "")
        states = sorted(call.result(10) for call in calls)
    assert len({pid for pid, _ in states}) == 3
    return states


def test_on_libuv() -> None:
    with gunicorn_on_libuv() as gunicorn:
        # A forked child shares its parent's epoll: that it lets go of a descriptor must not make the
        # parent deaf. So once all workers have been forked.
        wait_ready(gunicorn, 3)
        check_works(gunicorn)
        states = all_states(gunicorn, "before")
        said = failure(ask(gunicorn, APP, "spin"), "DirtyTimeoutError")
        assert 0.9 < said.elapsed < 2.5
        # The same processes, with what they had loaded.
        assert all_states(gunicorn, "after") == states
        blocked = re.findall(r"blocked the hub for ([\d.]+) s", gunicorn.log_text())
        assert all(0.9 < float(seconds) < 3 for seconds in blocked), blocked
        kill_worker(gunicorn, 3)
        check_new_arbiter(gunicorn, 3)
        check_stops(gunicorn)


def test_a_view_that_forks_on_libuv_keeps_its_connection() -> None:
    with gunicorn_on_libuv() as gunicorn:
        wait_ready(gunicorn, 3)
        assert ask(gunicorn, APP, "double", 21) == 42
        for _ in range(3):
            assert gunicorn.get("/fork", timeout=5).json() == {"result": [0, 42]}


# Descriptors.


def channels(pid: int) -> set[str]:
    """A process's sockets and pipes."""
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/{pid}/fd/{name}")
            if target.startswith(("socket:", "pipe:")):
                found.add(target)
    return found


def listening(port: int) -> str:
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1].endswith(f":{port:04X}") and fields[3] == "0A":
            return f"socket:[{fields[9]}]"
    raise AssertionError(f"nobody listens on {port}")


def test_no_channel_of_another_process_is_open_in_a_dirty_one() -> None:
    with gunicorn_with(settings={"dirty_workers": 3, "workers": 2}) as gunicorn:
        (first, *_) = wait_ready(gunicorn, 3)
        # A worker that is forked while clients are connected.
        with asking(gunicorn, [path(APP, "hold", "it") for _ in range(6)]) as held:
            wait_until(lambda: gunicorn.log_text().count("holding it in") == 6, 10, "6 calls")
            lost = len(re.findall(rf"holding it in {first}\b", gunicorn.log_text()))
            gunicorn.kill(first, signal.SIGKILL)
            gunicorn.wait_gone(first)
            workers = wait_ready(gunicorn, 3)
            arbiter = gunicorn.dirty_arbiter_pid()
            check_channels(gunicorn, arbiter, workers)
            gunicorn.write("release-it", "")
            assert sum(call.result(10) == "it" for call in held) == 6 - lost


def check_channels(gunicorn: Gunicorn, arbiter: int, workers: list[int]) -> None:
    others = {pid: channels(pid) for pid in gunicorn.pids()}
    http = listening(gunicorn.port)
    assert http in others[gunicorn.master_pid]
    assert http not in others[arbiter]
    for worker in workers:
        mine = others.pop(worker)
        # Its ends of the socket pairs to the arbiter and, if it has had calls of them, to the HTTP workers.
        assert 1 <= len([c for c in mine if c.startswith("socket:")]) <= 1 + 2
        for pid, theirs in others.items():
            assert not mine & theirs, f"{pid} shares {mine & theirs} with {worker}"
        others[worker] = mine
    # The arbiter has its listener in common with the master, and nothing else.
    assert len(others[arbiter] & others[gunicorn.master_pid]) == 1


def test_the_descriptor_limit_is_raised_where_the_pool_needs_it() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < 2000:
        pytest.skip(f"the hard limit is {hard}")
    lower = f"import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (128, {hard}))\n"
    with gunicorn_with(settings={"dirty_threads": 200}, install=lower + OURS) as gunicorn:
        for pid in dirty_pids(gunicorn):
            assert resource.prlimit(pid, resource.RLIMIT_NOFILE)[0] >= 200 * 4, pid
        assert resource.prlimit(gunicorn.master_pid, resource.RLIMIT_NOFILE)[0] == 128
        assert ask(gunicorn, APP, "open_files", 600) == 600
        with contextlib.ExitStack() as connected:
            for _ in range(300):
                client = connected.enter_context(socket.socket(socket.AF_UNIX))
                client.connect(str(socket_path(gunicorn)))
            check_works(gunicorn)
        assert "Cannot accept" not in gunicorn.log_text()


def test_a_low_limit_that_is_enough_is_left_alone() -> None:
    lower = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (512, 4096))\n"
    with gunicorn_with(settings={"dirty_threads": 1}, install=lower + OURS) as gunicorn:
        for pid in dirty_pids(gunicorn):
            assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (512, 4096)
        check_works(gunicorn)
