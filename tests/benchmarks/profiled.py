"""Where a row's time goes: the CPU that each process takes for a call, and in which functions.

    python tests/benchmarks/profiled.py [--rows seq,mib] [--seconds 4] [--top 12] [--only ours]

The load is that of ``compare.py``'s rows, repeated. CPU time is the kernel's own count
(``/proc/PID/schedstat``, nanoseconds); the functions are py-spy's samples, 500 a second and native code
included, and the share is of the process's busy samples. Needs py-spy, which is in the ``bench`` extra.
"""

from gevent import monkey

monkey.patch_all()

import argparse  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Callable  # noqa: E402
from contextlib import ExitStack  # noqa: E402
from pathlib import Path  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))

import gevent  # noqa: E402
from contestants import Caller, caller_factory, start  # noqa: E402

Load = Callable[[Caller, float], int]
"""Calls for so many seconds; how many they were."""

MIB = bytes(range(256)) * 4096


def one_by_one(action: str, *values: object) -> Load:
    def load(caller: Caller, seconds: float) -> int:
        count, end = 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            caller.execute(action, *values)
            count += 1
        return count

    return load


def two_hundred(caller: Caller, seconds: float) -> int:
    load = one_by_one("add", 1, 2)
    greenlets = [gevent.spawn(load, caller, seconds) for _ in range(200)]
    gevent.joinall(greenlets, raise_error=True)
    return sum(greenlet.value for greenlet in greenlets)


def twenty_streams(caller: Caller, seconds: float) -> int:
    """Counts chunks; each goes on to a browser, so others get their turn."""
    assert caller.stream is not None
    make, end = caller.stream, time.perf_counter() + seconds

    def read(tag: int) -> int:
        count = 0
        while time.perf_counter() < end:
            for _chunk in make("items", tag, 500, 0):
                count += 1
                gevent.sleep(0)
        return count

    greenlets = [gevent.spawn(read, tag) for tag in range(20)]
    gevent.joinall(greenlets, raise_error=True)
    return sum(greenlet.value for greenlet in greenlets)


LOADS: dict[str, Load] = {
    "seq": one_by_one("add", 1, 2),
    "greenlets": two_hundred,
    "mib": one_by_one("echo", MIB),
    "mib64": one_by_one("echo", bytes(64 << 20)),
    "list": one_by_one("echo", list(range(10_000))),
    "chunks": twenty_streams,
}


def main() -> None:
    options = parse()
    for name in options.only.split(","):
        with ExitStack() as stack:
            path = stack.enter_context(start(name))
            caller = caller_factory(name, path)()
            for row in options.rows.split(","):
                LOADS[row](caller, 0.5)
                show_cpu(f"{name}, {row}", LOADS[row], caller, options.seconds)
                if options.top:
                    show_functions(LOADS[row], caller, options.seconds, options.top)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", default=",".join(LOADS), help=",".join(LOADS))
    parser.add_argument("--only", default="ours", help="contestants")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--top", type=int, default=12, help="functions of each process; 0: no sampling")
    return parser.parse_args()


def show_cpu(title: str, load: Load, caller: Caller, seconds: float) -> None:
    pids = family()
    before = {pid: cpu_ns(pid) for pid in pids}
    began = time.perf_counter()
    count = load(caller, seconds)
    wall = time.perf_counter() - began
    print(f"\n{title}: {count} calls in {wall:.2f} s, {wall / count * 1e6:.1f} us each")
    for pid, name in pids.items():
        used = (cpu_ns(pid) - before[pid]) / 1000
        if used / count > 0.05:
            print(f"  {used / count:9.1f} us CPU a call, {used / wall / 10_000:5.1f} % busy  {name}")


def show_functions(load: Load, caller: Caller, seconds: float, top: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pids = family()
        spies = {pid: spy(pid, Path(folder) / str(pid), seconds) for pid in pids}
        gevent.spawn(load, caller, seconds + 2.0).join()
        for pid, process in spies.items():
            process.wait()
            report = Path(folder) / str(pid)
            if report.exists():
                show_samples(pids[pid], report.read_text(), top)


def spy(pid: int, report: Path, seconds: float) -> subprocess.Popen[bytes]:
    tool = str(Path(sys.executable).with_name("py-spy"))
    options = ["--format", "raw", "--rate", "500", "--duration", str(max(int(seconds), 1))]
    command = [tool, "record", "--pid", str(pid), "--output", str(report), *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


IDLE = ("epoll_wait", "select", "poll", "do_epoll_wait", "ev_run", "run (gevent")


def show_samples(name: str, report: str, top: int) -> None:
    """Folded stacks, one per line with its count at the end."""
    own: Counter[str] = Counter()
    for line in report.splitlines():
        stack, _, count = line.rpartition(" ")
        leaf = re.sub(r":\d+\)$", ")", stack.split(";")[-1])
        if not any(word in leaf for word in IDLE):
            own[leaf] += int(count)
    total = sum(own.values())
    if total > 50:
        print(f"  -- {name}: {total} samples")
        for leaf, count in own.most_common(top):
            print(f"     {count / total:6.1%} {leaf}")


def family() -> dict[int, str]:
    """This process and its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, todo = {os.getpid(): "client"}, [os.getpid()]
    while todo:
        for pid in children.get(todo.pop(), []):
            found[pid] = title(pid)
            todo.append(pid)
    return found


def title(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return "?"
    return b" ".join(words[:4]).decode(errors="replace")[-60:]


def cpu_ns(pid: int) -> int:
    """Of all threads."""
    total = 0
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            total += int((thread / "schedstat").read_text().split()[0])
    except OSError:
        return 0
    return total


if __name__ == "__main__":
    main()
