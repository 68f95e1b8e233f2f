"""What is called, for contestants that are not dirty apps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any


class Bench:
    """The same as ``contestants.TASKS``."""

    def add(self, a: int, b: int) -> int:
        return a + b

    def echo(self, value: Any) -> Any:
        return value

    def sleep(self, seconds: float, value: Any) -> Any:
        time.sleep(seconds)
        return value

    def burn(self, seconds: float, value: Any) -> Any:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass
        return value

    def items(self, tag: Any, count: int, pause: float) -> Iterator[Any]:
        for number in range(count):
            # Also without a pause the server gets its turn: zerorpc's own does nothing for it.
            time.sleep(pause)
            yield [tag, number]


def run(action: str, *args: Any) -> Any:
    return getattr(Bench(), action)(*args)
