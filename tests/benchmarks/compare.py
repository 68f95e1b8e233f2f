"""Measure this library beside stock gunicorn and beside the floor, in one run.

    python tests/benchmarks/compare.py [--quick] [--rounds 3] [--rows seq,...] [--only ours,...] [--json FILE]

What is measured: calls from one gevent-patched client process, over each contestant's Unix socket, to
2 worker processes (``rows.py`` says what each row does; every result is checked).

* ours: a real gunicorn -k gevent with this library installed, dirty_threads = 200.
* stock-shared: a real gunicorn without it; all greenlets share one client, which is what
  ``get_dirty_client()`` gives under gevent. stock-per-greenlet: each greenlet makes a client.
* executor: ``concurrent.futures.ProcessPoolExecutor``; zerorpc: one server process for each worker, used
  in turn (``peers.py``).
* floor-direct, floor-relay: what processes on gevent can do at all (``floor.py``): client and one
  server; client, relay and two servers, which is the way of our calls.

How to read it: each cell has the median over the rounds, [lowest-highest], and in how many times ours
it is: x4.0 is four times worse than ours, x0.5 is twice as good, whichever way the row's unit points.
The ratio is the median of the rounds' ratios: in a round the contestants take turns row by row, so a
machine that is busy for a while is so for all of them. Compare ratios; figures differ by machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import select
import signal
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from contestants import CONTESTANTS, child, start
from rows import METRICS, ROWS

Values = dict[str, dict[str, list[float]]]  # metric -> contestant -> one value per round

ROW_SECONDS = 60
"""Three times what the slowest row takes. (The executor's hub may block in a write to a worker that itself
waits for its result to be read.)"""

PACKAGES = ("gunicorn-dirty-gevent", "gunicorn", "gevent", "ormsgpack", "zerorpc")


def main() -> int:
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all that was started ends
    began = time.monotonic()
    with ExitStack() as stack:
        measure = {name: start_client(stack, name, options.quick) for name in options.only}
        values, errors = run_rounds(measure, options)
    print(table(values, options.only))
    print(f"\n{options.rounds} rounds in {time.monotonic() - began:.0f} s on {os.cpu_count()} cores")
    for error in errors:
        print(f"FAILED {error}")
    if options.json:
        Path(options.json).write_text(json.dumps(report(values, errors, options), indent=1) + "\n")
    return 1 if errors else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="smaller counts, shorter times")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=names_of(ROWS), default=list(ROWS), help=",".join(ROWS))
    parser.add_argument("--only", type=names_of(CONTESTANTS), default=list(CONTESTANTS), help="contestants")
    parser.add_argument("--json", metavar="FILE", help="write all values there")
    return parser.parse_args()


def names_of(known: Any) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        wanted = text.split(",")
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {', '.join(known)}")
        return wanted

    return names


def start_client(stack: ExitStack, name: str, quick: bool) -> Callable[[str], dict[str, Any]]:
    """Start a contestant and its client process; a function that measures one row."""
    path = stack.enter_context(start(name))
    program = str(Path(__file__).with_name("client.py"))
    command = [program, name, path, "quick" if quick else "full"]
    clients = [stack.enter_context(child(command))]

    def measure(row: str) -> dict[str, Any]:
        process = clients[-1]
        assert process.stdin is not None and process.stdout is not None
        print(row, file=process.stdin, flush=True)
        if select.select([process.stdout], [], [], ROW_SECONDS)[0]:
            line = process.stdout.readline()
            answer = json.loads(line) if line else {"error": "its client process ended"}
        else:
            process.kill()
            answer = {"error": f"its client process stood still: not done after {ROW_SECONDS} s"}
        if "error" in answer:
            # The client ends with its first error; the next row is measured by another.
            clients.append(stack.enter_context(child(command)))
        return answer

    return measure


def run_rounds(
    measure: dict[str, Callable[[str], dict[str, Any]]], options: argparse.Namespace
) -> tuple[Values, list[str]]:
    values: Values = {}
    errors: list[str] = []
    for number in range(1, options.rounds + 1):
        for row in options.rows:
            for name in measure:
                began = time.monotonic()
                answer = measure[name](row)
                seconds = time.monotonic() - began
                print(f"round {number}: {row}, {name}: {seconds:.1f} s", file=sys.stderr, flush=True)
                if "error" in answer:
                    errors.append(f"round {number}, {row}, {name}: {answer['error']}")
                for metric, value in answer.get("values", {}).items():
                    values.setdefault(metric, {}).setdefault(name, []).append(value)
    return values, errors


# What is shown.


def table(values: Values, names: list[str]) -> str:
    lines = [["", "", *names]]
    for metric, (title, unit, _) in METRICS.items():
        if metric in values:
            lines.append([title, unit, *(cell(values[metric], metric, name) for name in names)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines
    ]
    return "\n".join(line.rstrip() for line in padded)


def cell(of_metric: dict[str, list[float]], metric: str, name: str) -> str:
    measured = of_metric.get(name)
    if not measured:
        return "-"
    text = f"{short(statistics.median(measured))} [{short(min(measured))}-{short(max(measured))}]"
    times = ratio(of_metric, metric, name)
    return text if times is None else f"{text} x{short(times)}"


def ratio(of_metric: dict[str, list[float]], metric: str, name: str) -> float | None:
    """How many times worse than ours, round by round."""
    ours, other = of_metric.get("ours", []), of_metric[name]
    if name == "ours" or len(ours) != len(other) or not all(ours) or not all(other):
        return None
    each = [a / b if METRICS[metric].more_is_better else b / a for a, b in zip(ours, other, strict=True)]
    return statistics.median(each)


def short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 or value == 0 else f"{value:.3g}"


def report(values: Values, errors: list[str], options: argparse.Namespace) -> dict[str, Any]:
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        "packages": {name: version(name) for name in PACKAGES},
        "rounds": options.rounds,
        "rows": {metric: described(of_metric, metric) for metric, of_metric in values.items()},
        "errors": errors,
    }


def described(of_metric: dict[str, list[float]], metric: str) -> dict[str, Any]:
    title, unit, more_is_better = METRICS[metric]
    contestants = {
        name: {
            "median": statistics.median(measured),
            "min": min(measured),
            "max": max(measured),
            "times_ours": ratio(of_metric, metric, name),
            "rounds": measured,
        }
        for name, measured in of_metric.items()
    }
    return {"title": title, "unit": unit, "more_is_better": more_is_better, "contestants": contestants}


if __name__ == "__main__":
    sys.exit(main())
