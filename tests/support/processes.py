"""Processes as /proc shows them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")


class Process(NamedTuple):
    ppid: int
    title: str
    comm: str
    state: str
    session: int
    started: int

    @property
    def alive(self) -> bool:
        return self.state not in "ZX"


def read_process(pid: int) -> Process | None:
    """One process, or None if there is no such process."""
    try:
        stat = (PROC / str(pid) / "stat").read_text(errors="replace")
        cmdline = (PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return None
    # The command name may itself contain spaces and parentheses.
    comm = stat[stat.index("(") + 1 : stat.rindex(")")]
    fields = stat[stat.rindex(")") + 2 :].split()
    title = cmdline.replace(b"\0", b" ").decode(errors="replace").strip()
    return Process(int(fields[1]), title, comm, fields[0], int(fields[3]), int(fields[19]))


def all_processes() -> dict[int, Process]:
    pids = (int(name) for name in os.listdir(PROC) if name.isdigit())
    found = ((pid, read_process(pid)) for pid in pids)
    return {pid: process for pid, process in found if process is not None}


def with_descendants(roots: Iterable[int], processes: dict[int, Process]) -> set[int]:
    """The roots that exist and everything below them."""
    found = {pid for pid in roots if pid in processes}
    while True:
        more = {pid for pid, p in processes.items() if p.ppid in found} - found
        if not more:
            return found
        found |= more


def format_tree(processes: dict[int, Process]) -> str:
    """One line per process, children under their parents."""
    lines: list[str] = []

    def add(pid: int, depth: int) -> None:
        p = processes[pid]
        lines.append(f"{'  ' * depth}{pid} (parent {p.ppid}) [{p.state}] {p.comm}: {p.title}")
        for child in sorted(c for c, q in processes.items() if q.ppid == pid):
            add(child, depth + 1)

    for pid in sorted(pid for pid, p in processes.items() if p.ppid not in processes):
        add(pid, 0)
    return "\n".join(lines) or "(no process)"
