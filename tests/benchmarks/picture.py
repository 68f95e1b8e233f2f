"""Draw what ``compare.py --json`` wrote: each contestant, row by row, against this library.

python tests/benchmarks/picture.py FILE.json docs/_static/performance.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib import pyplot

STYLES = {
    "stock-shared": ("o", "tab:red"),
    "stock-per-greenlet": ("o", "tab:orange"),
    "executor": ("s", "tab:purple"),
    "zerorpc": ("s", "tab:green"),
    "floor-direct": ("|", "black"),
    "floor-relay": ("|", "gray"),
    "least-direct": ("+", "black"),
    "least-relay": ("+", "gray"),
}
LEFT_OUT = ("crossed",)  # a count of wrong results is no ratio


def main(source: str, target: str) -> None:
    report = json.loads(Path(source).read_text())
    rows = [row for name, row in report["rows"].items() if name not in LEFT_OUT]
    figure, axes = pyplot.subplots(figsize=(9, 0.42 * len(rows) + 1.6), layout="constrained")
    for contestant, (marker, color) in STYLES.items():
        points = [point for place, row in enumerate(rows) if (point := at(row, contestant, place))]
        if points:
            across, down = zip(*points, strict=True)
            axes.plot(across, down, marker, color=color, label=contestant, markersize=9, alpha=0.8)
    axes.axvline(1, color="tab:blue", label="this library")
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="both", alpha=0.3)
    axes.set_xlabel("times worse than this library, in the same run (left of the line: better)")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    pyplot.rcParams["svg.hashsalt"] = "performance"  # the same figures make the same file
    figure.savefig(target, metadata={"Date": None} if target.endswith(".svg") else None)


def at(row: dict[str, Any], contestant: str, place: int) -> tuple[float, int] | None:
    times = row["contestants"].get(contestant, {}).get("times_ours")
    return None if times is None else (times, place)


if __name__ == "__main__":
    main(*sys.argv[1:])
