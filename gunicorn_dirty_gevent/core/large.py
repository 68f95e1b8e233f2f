"""`core.values` for what may have large bytes in it: those are neither copied into the encoding nor out of
a decoder's.

The encoding is the same. What `dumps` does not join goes to the socket, or into a memory file, piece by
piece; what `loads` finds first in a memory file it reads from there.
"""

from __future__ import annotations

from typing import Any, TypeGuard

from . import values
from .wire import Blob, Pieces

LARGE = 65536
"""Bytes from which a value of type bytes is handled here. ormsgpack's buffer grows by doubling, which maps
and faults in fresh memory for a large one: 343 us for 1 MiB, against 30."""

Source = bytes | memoryview | Blob

_BIN32 = 5  # MessagePack's header of bytes that are as large: 0xC6 and four bytes of length
_ARRAY_OF_2, _FIXARRAY, _FIXMAP = 0x92, 0x90, 0x80


def dumps(value: object, root: str = "result") -> bytes | Pieces:
    """As `values.dumps`."""
    return Pieces(_pieces(value, root)) if _is_large(value) else values.dumps(value, root)


def dumps_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes | Pieces:
    """As `values.dumps_call`."""
    for value in (*args, *kwargs.values()):
        if _is_large(value) and _is_simple(args, kwargs):
            return Pieces(_pieces_of_call(args, kwargs))
    return values.dumps_call(args, kwargs)


def loads(data: Source) -> Any:
    """As `values.loads`."""
    if isinstance(data, bytes | memoryview):
        return values.loads(data)
    size = _size_of_large(data.read(0, _BIN32))
    if size and size == len(data) - _BIN32:
        return data.read(_BIN32, size)
    return values.loads(data.view())


def loads_call(data: Source) -> tuple[list[Any], dict[str, Any]]:
    """As `values.loads_call`. Large bytes that are the first argument are read by themselves: an image and
    how to scale it, a document and what to look for; most large calls are so."""
    if isinstance(data, bytes | memoryview):
        return values.loads_call(data)
    head = data.read(0, 2 + _BIN32)
    size = _size_of_large(head[2:])
    rest = len(data) - len(head) - size
    if not (size and 0 < rest < LARGE and head[0] == _ARRAY_OF_2 and _FIXARRAY < head[1] <= _FIXARRAY + 15):
        return values.loads_call(data.view())
    others = bytes((_ARRAY_OF_2, head[1] - 1)) + data.read(len(head) + size, rest)
    args, kwargs = values.loads_call(others)
    return [data.read(len(head), size), *args], kwargs


def joined(body: bytes | Pieces) -> bytes:
    return b"".join(body.parts) if isinstance(body, Pieces) else body


def _is_large(value: object) -> TypeGuard[bytes]:
    return type(value) is bytes and LARGE <= len(value) <= 0xFFFFFFFF


def _is_simple(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    # MessagePack's fixarray and fixmap have one byte of header; a str with lone surrogates is none.
    return len(args) <= 15 and len(kwargs) <= 15 and all(map(str.isascii, kwargs))


def _size_of_large(header: bytes) -> int:
    """What the header of large bytes says; 0 for any other."""
    size = int.from_bytes(header[1:], "big")
    return size if header[:1] == b"\xc6" and size >= LARGE else 0


def _pieces(value: object, root: str) -> tuple[bytes, ...]:
    if _is_large(value):
        return b"\xc6" + len(value).to_bytes(4, "big"), value
    return (values.dumps(value, root),)


def _pieces_of_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bytes, ...]:
    pieces = [bytes((_ARRAY_OF_2, _FIXARRAY | len(args)))]
    for place, value in enumerate(args):
        pieces += _pieces(value, f"args[{place}]")
    pieces.append(bytes((_FIXMAP | len(kwargs),)))
    for name, value in kwargs.items():
        pieces.append(values.dumps(name, "kwargs"))
        pieces += _pieces(value, f"kwargs[{name!r}]")
    return tuple(pieces)
