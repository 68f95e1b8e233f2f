"""A real gunicorn as a subprocess: started, asked, watched, stopped and looked over."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from . import web
from .base_app import BASE_APP, app_with
from .processes import (
    Process,
    all_processes,
    format_tree,
    read_process,
    with_descendants,
)
from .waiting import Deadline, missed, poll, wait_until
from .web import Response, Stream

__all__ = ["BASE_APP", "OURS", "STOCK", "Deadline", "Gunicorn", "Response", "StopReport"]
__all__ += ["Stream", "app_with"]

T = TypeVar("T")

OURS = "import gunicorn_dirty_gevent\ngunicorn_dirty_gevent.install()\n"
STOCK = ""

LISTENING = r"Listening at: http://127\.0\.0\.1:(\d+)"
STOCK_DIRTY_WORKER = r"Dirty worker (\d+) listening"
STOCK_HANGS = sys.version_info >= (3, 12)
"""There the dirty arbiter of stock gunicorn waits for ever when it or one of its workers is to end."""

HTTP_WORKER = r"Booting worker with pid: (\d+)"
HTTP_WORKER_READY = r"HTTP worker ready \(pid: (\d+)\)"
DIRTY_ARBITER = r"Spawned dirty arbiter \(pid: (\d+)\)"
DIRTY_WORKER = r"Spawned dirty worker \(pid: (\d+)\)"

# No process may outlive its parent by more than this.
ORPHAN_SECONDS = 2.0
STOP_SECONDS = 15.0

# If the test process dies, gunicorn is told to stop; an exec keeps that request.
LAUNCH = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""

# gunicorn announces a worker before that worker takes signals; one sent in between is lost.
SAY_READY = """
_post_worker_init = globals().get("post_worker_init", lambda worker: None)

def post_worker_init(worker):
    import os
    _post_worker_init(worker)
    os.write(2, f"HTTP worker ready (pid: {os.getpid()})\\n".encode())
"""

INHERITED_BY_MISTAKE = {
    "GUNICORN_CMD_ARGS",
    "GUNICORN_DIRTY_SOCKET",
    "GUNICORN_FD",
    "GUNICORN_PID",
    "WEB_CONCURRENCY",
}


@dataclass(frozen=True)
class StopReport:
    seconds: float  # until the master had exited
    exit_code: int  # as subprocess has it: negative for a signal
    left: list[str]  # processes still alive ORPHAN_SECONDS after the master


@dataclass(frozen=True)
class LogMark:
    """A place in the logs, to wait for what comes after it."""

    log: int = 0
    stderr: int = 0


class Gunicorn:
    """One gunicorn, from its temporary directory to the last process of its session.

    Use as a context manager: entering starts it, leaving stops it and fails if anything is left
    (a process, a file in its TMPDIR that does not match a pattern of `leftovers`, a socket).
    """

    def __init__(
        self,
        app_source: str = BASE_APP,
        tasks_source: str = "",
        settings: dict[str, object] | None = None,
        worker_class: str = "gevent",
        extra_config: str = "",
        install: str = OURS,
        args: Sequence[str] = (),
        env: dict[str, str] | None = None,
        control_socket: bool = False,
        ready: str | None = "/ready",
        ready_log: str | None = None,
        start_deadline: float = 20.0,
        leftovers: Sequence[str] = (),
    ) -> None:
        self.dir = Path(tempfile.mkdtemp(prefix="gun-"))
        self.tmp = self.dir / "tmp"
        self.control_socket_path = self.dir / "gunicorn.ctl"
        self.port = 0
        self._settings = self._all_settings(worker_class, control_socket, settings or {})
        self._args = list(args)
        self._env = env or {}
        self._ready = ready
        self._ready_log = ready_log
        self._start_deadline = start_deadline
        self._leftovers = list(leftovers)
        self._process: subprocess.Popen[bytes] | None = None
        self._seen: dict[int, int] = {}  # pid -> start time, also of those that left the session
        self.tmp.mkdir()
        self.write("app.py", app_source)
        self.write("tasks.py", tasks_source)
        self.write_config(install, self._settings, extra_config)

    def write_config(self, install: str, settings: dict[str, object], extra_config: str = "") -> None:
        """Write gunicorn.conf.py (again, before a reload)."""
        text = "".join(f"{name} = {value!r}\n" for name, value in settings.items())
        hooks = textwrap.dedent(extra_config) + SAY_READY
        (self.dir / "gunicorn.conf.py").write_text(f"{install}\n{text}\n{hooks}")

    def write(self, name: str, text: str) -> Path:
        """Write (or change) a file beside the app."""
        path = self.dir / name
        path.write_text(textwrap.dedent(text))
        return path

    def _all_settings(
        self, worker_class: str, control_socket: bool, settings: dict[str, object]
    ) -> dict[str, object]:
        # gunicorn ignores names that it does not know, so older ones take these too.
        return {
            "bind": f"{web.HOST}:0",
            "worker_class": worker_class,
            "errorlog": str(self.dir / "error.log"),
            "control_socket": str(self.control_socket_path),
            "control_socket_disable": not control_socket,
            **settings,
        }

    # Start and stop

    def start(self, deadline: float | None = None) -> None:
        """Start, and return when HTTP answers, all workers are up, and `ready_log` is there."""
        end = time.monotonic() + (deadline or self._start_deadline)
        self._launch()
        self.port = int(self.wait_log(LISTENING, _left(end)).group(1))
        if self._ready is not None:
            self._wait(self._answers, _left(end), f"GET {self._ready} to answer 200")
            self.wait_http_workers(int(str(self._settings.get("workers", 1))), _left(end))
        if self._ready_log is not None:
            self.wait_log(self._ready_log, _left(end))

    def _launch(self) -> None:
        command = [sys.executable, "-m", "gunicorn", "-c", "gunicorn.conf.py", *self._args]
        # The kernel sends the parent's death when the starting *thread* ends.
        if threading.current_thread() is threading.main_thread():
            command = [sys.executable, "-c", LAUNCH, *command[1:]]
        with (self.dir / "stderr.log").open("ab") as output:
            self._process = subprocess.Popen(
                [*command, "app:app"],
                cwd=self.dir,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _environment(self) -> dict[str, str]:
        env = {k: v for k, v in os.environ.items() if k not in INHERITED_BY_MISTAKE}
        # A module changed within a second of the last change would be loaded from its old .pyc.
        env |= {"TMPDIR": str(self.tmp), "HOME": str(self.dir), "PYTHONDONTWRITEBYTECODE": "1"}
        # With it, print() writes a line and its end apart, and processes mix them.
        env.pop("PYTHONUNBUFFERED", None)
        return env | self._env

    def _answers(self) -> bool:
        assert self._ready is not None
        try:
            return self.get(self._ready, timeout=2).status == 200
        except (OSError, http.client.HTTPException):
            return False

    def stop(
        self,
        sig: int = signal.SIGTERM,
        deadline: float = STOP_SECONDS,
        grace: float = ORPHAN_SECONDS,
    ) -> StopReport:
        """Send the master `sig`, wait for it, then look for what outlived it by `grace`."""
        master = self._master()
        self.pids()  # remember now who belongs to it
        started = time.monotonic()
        if master.poll() is None:
            master.send_signal(sig)
        wait_until(
            lambda: master.poll() is not None,
            deadline,
            f"the master to exit after {signal.Signals(sig).name}",
            self.evidence,
        )
        seconds = time.monotonic() - started
        left = self._left_after(grace)
        return StopReport(seconds, master.returncode, [f"{pid} {p.title}" for pid, p in left])

    def _left_after(self, grace: float) -> list[tuple[int, Process]]:
        poll(lambda: not self._alive(), grace)
        return self._alive()

    def assert_clean(self, grace: float = ORPHAN_SECONDS) -> None:
        """Fail if a process, a file in TMPDIR or a socket of this gunicorn is left."""
        problems = [
            *(f"process {pid} {p.title}" for pid, p in self._left_after(grace)),
            *(f"temporary file {path}" for path in self._files_left()),
            *(f"socket {path}" for path in self._sockets_left()),
        ]
        if problems:
            listed = "\n  ".join(problems)
            raise AssertionError(f"left by gunicorn:\n  {listed}\n{self.evidence()}")

    def _files_left(self) -> list[str]:
        found = (str(path.relative_to(self.tmp)) for path in sorted(self.tmp.rglob("*")))
        return [name for name in found if not any(Path(name).match(p) for p in self._leftovers)]

    def _sockets_left(self) -> list[str]:
        bound = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()]
        left = [path for path in bound if path.startswith(str(self.dir))]
        left += [str(path) for path in self.dir.glob("*") if path.is_socket()]
        return left + ([f"TCP port {self.port}"] if self.port and _listens(self.port) else [])

    def __enter__(self) -> Gunicorn:
        try:
            self.start()
        except BaseException:
            self._kill_all()
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is not None:
                print(f"gunicorn, when the test failed:\n{self._story()}", file=sys.stderr)
            self._finish()
        except AssertionError as late:
            # The test's own failure says more than what followed from it.
            if error is None:
                raise
            print(late, file=sys.stderr)
        finally:
            self._kill_all()
            self._remove()

    def _finish(self) -> None:
        if self._master().poll() is None:
            if STOCK_HANGS and self._logged(STOCK_DIRTY_WORKER):
                self._end_stock_arbiter()
            self.stop()
        self.assert_clean()

    def _end_stock_arbiter(self) -> None:
        dirty = [self.dirty_arbiter_pid(), *self.dirty_worker_pids()]
        self._master().send_signal(signal.SIGTERM)  # first, so that it does not make another
        self.wait_log("Handling signal: term")
        for pid in dirty:
            _kill(pid, signal.SIGKILL)
        self._leftovers += ["gunicorn-dirty-*", "gunicorn-dirty-*/*"]

    def _kill_all(self) -> None:
        """End what is left, the master first so that it does not replace the others."""
        if self._process is not None and self._process.poll() is None:
            self.pids()
            self._process.kill()
            self._process.wait(10)
        for pid, _ in self._alive():
            _kill(pid, signal.SIGKILL)
        self._wait(lambda: not self._alive(), 5, "killed processes to go away", expect_alive=False)

    def _remove(self) -> None:
        shutil.rmtree(self.dir, ignore_errors=True)

    # Ask

    def get(self, path: str, timeout: float = 10.0) -> Response:
        return self.request(path, timeout)

    def request(
        self,
        path: str,
        timeout: float = 10.0,
        method: str = "GET",
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> Response:
        return web.request(self.port, path, timeout, method, body, headers)

    def open(self, path: str, timeout: float = 10.0) -> Stream:
        """Start a GET and return its response to be read as it comes."""
        return Stream(self.port, path, timeout)

    def get_many(
        self, paths: Iterable[str], concurrency: int | None = None, timeout: float = 20.0
    ) -> list[Response]:
        """GET all, `concurrency` at once (default: all at once); answers in the order of paths."""
        paths = list(paths)
        with ThreadPoolExecutor(concurrency or len(paths) or 1) as pool:
            return list(pool.map(lambda path: self.get(path, timeout), paths))

    # Watch

    def log_text(self) -> str:
        """gunicorn's error log, then what went to stdout and stderr."""
        return self._log() + self._stderr()

    def mark(self) -> LogMark:
        """The present end of the logs."""
        return LogMark(len(self._log()), len(self._stderr()))

    def log_since(self, mark: LogMark | None) -> str:
        """The whole lines after a mark. A line being written is left out: a pid cut short is
        another pid."""
        start = mark or LogMark()
        return _whole_lines(self._log()[start.log :]) + _whole_lines(self._stderr()[start.stderr :])

    def wait_log(self, regex: str, deadline: float = 10.0, since: LogMark | None = None) -> re.Match[str]:
        """The first match of `regex` (MULTILINE), in all logs or after a mark."""
        pattern = re.compile(regex, re.MULTILINE)
        found = self._wait(lambda: pattern.search(self.log_since(since)), deadline, f"log to match {regex!r}")
        assert found is not None
        return found

    def _log(self) -> str:
        return _read(self.dir / "error.log")

    def _stderr(self) -> str:
        return _read(self.dir / "stderr.log")

    @property
    def master_pid(self) -> int:
        return self._master().pid

    def pids(self) -> dict[int, Process]:
        """The processes of this gunicorn: descendants, its session, and once seen ones elsewhere.

        Each as (ppid, title, comm, state, ...). Zombies are shown (state Z).
        """
        now = all_processes()
        master = self._master().pid
        members = {pid for pid, p in now.items() if p.session == master or pid == master}
        members |= {pid for pid, at in self._seen.items() if pid in now and now[pid].started == at}
        members = with_descendants(members, now)
        self._seen = {pid: now[pid].started for pid in members}
        return {pid: now[pid] for pid in sorted(members)}

    def _alive(self) -> list[tuple[int, Process]]:
        if self._process is None:
            return []
        return [(pid, p) for pid, p in self.pids().items() if p.alive]

    def http_worker_pids(self) -> list[int]:
        return self._logged(HTTP_WORKER)

    def wait_http_workers(
        self, count: int, deadline: float = 10.0, since: LogMark | None = None
    ) -> list[int]:
        """`count` living HTTP workers that are up (after a mark), oldest first."""

        def enough() -> list[int] | None:
            pids = self._logged(HTTP_WORKER_READY, since)
            return pids if len(pids) == count else None

        found = self._wait(enough, deadline, f"{count} living HTTP workers")
        assert found is not None
        return found

    def dirty_worker_pids(self) -> list[int]:
        return self._logged(DIRTY_WORKER)

    def dirty_arbiter_pid(self, deadline: float = 10.0) -> int:
        """The living dirty arbiter, waiting for one to be spawned."""
        pids = self._wait(lambda: self._logged(DIRTY_ARBITER), deadline, "a living dirty arbiter")
        return pids[-1]

    def wait_dirty_workers(self, count: int, deadline: float = 10.0) -> list[int]:
        """The living dirty workers, when there are exactly `count`. Spawned need not mean ready."""

        def enough() -> list[int] | None:
            pids = self.dirty_worker_pids()
            return pids if len(pids) == count else None

        found = self._wait(enough, deadline, f"{count} living dirty workers")
        assert found is not None
        return found

    def wait_gone(self, pid: int, deadline: float = 10.0) -> None:
        """Wait until `pid` has ended; a zombie has."""

        def gone() -> bool:
            process = read_process(pid)
            return process is None or not process.alive

        self._wait(gone, deadline, f"process {pid} to end", expect_alive=False)

    def kill(self, pid: int, sig: int = signal.SIGKILL) -> None:
        """Send a signal to one process of this gunicorn, and only of this one."""
        assert pid in self.pids(), f"{pid} is no process of this gunicorn\n{self.tree()}"
        os.kill(pid, sig)

    def _logged(self, regex: str, since: LogMark | None = None) -> list[int]:
        """The pids that the log names in this way and that live, oldest first."""
        alive = dict(self._alive())
        logged = dict.fromkeys(int(m) for m in re.findall(regex, self.log_since(since)))
        return [pid for pid in logged if pid in alive]

    # Evidence

    def tree(self) -> str:
        return format_tree(self.pids()) if self._process is not None else "(not started)"

    def log_tail(self, lines: int = 60) -> str:
        return "\n".join(self.log_text().splitlines()[-lines:])

    def evidence(self) -> str:
        """Process tree, end of the log and, where py-spy is installed, what each process does."""
        return f"{self._story()}\n{self._stacks()}"

    def _story(self) -> str:
        return f"--- processes\n{self.tree()}\n--- log\n{self.log_tail()}"

    def _stacks(self) -> str:
        spy = Path(sys.executable).with_name("py-spy")
        if not spy.exists():
            return ""
        return "\n".join(f"--- stack of {pid}\n{_stack(spy, pid)}" for pid, _ in self._alive())

    def _wait(
        self,
        predicate: Callable[[], T],
        deadline: float,
        what: str,
        expect_alive: bool = True,
    ) -> T:
        def check() -> T:
            # Asked before the predicate: what a dying gunicorn wrote last still counts.
            dead = expect_alive and self._master().poll() is not None
            value = predicate()
            if dead and not value:
                code = self._master().returncode
                raise AssertionError(f"gunicorn exited ({code}) while waiting for {what}\n{self._story()}")
            return value

        if deadline <= 0:
            raise missed(what, 0, self.evidence)
        return wait_until(check, deadline, what, self.evidence)

    def _master(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "gunicorn was not started"
        return self._process


def _left(end: float) -> float:
    return end - time.monotonic()


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""


def _whole_lines(text: str) -> str:
    return text[: text.rfind("\n") + 1]


def _kill(pid: int, sig: int) -> None:
    try:
        os.kill(pid, sig)
    except ProcessLookupError:
        pass


def _listens(port: int) -> bool:
    wanted = f":{port:04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return any(line.split()[1].endswith(wanted) and line.split()[3] == "0A" for line in lines)


def _stack(spy: Path, pid: int) -> str:
    try:
        done = subprocess.run([spy, "dump", "--pid", str(pid)], capture_output=True, text=True, timeout=5)
    except subprocess.TimeoutExpired:
        return "(py-spy did not answer within 5 s)"
    return done.stdout + done.stderr
