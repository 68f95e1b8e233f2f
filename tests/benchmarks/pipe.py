"""Print how many seconds it takes to copy SIZE bytes to another process and back, through pipes.

python tests/benchmarks/pipe.py SIZE COUNT
"""

from __future__ import annotations

import os
import sys
import time


def copy(size: int, count: int) -> None:
    theirs, out = os.pipe()
    back, other = os.pipe()
    if os.fork() == 0:
        os.close(out)
        os.close(back)
        while data := read(theirs, size):
            write(other, data)
        os._exit(0)
    value = bytes(size)
    for _ in range(count):
        started = time.perf_counter()
        write(out, value)
        got = read(back, size)
        print(time.perf_counter() - started, flush=True)
        assert len(got) == size
    os.close(out)
    os.wait()


def write(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def read(descriptor: int, size: int) -> bytes:
    parts, left = [], size
    while left and (part := os.read(descriptor, min(left, 1 << 20))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


if __name__ == "__main__":
    copy(int(sys.argv[1]), int(sys.argv[2]))
