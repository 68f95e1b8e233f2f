"""How values are encoded for each dialect of the wire. Used by workers, and for the arbiter's errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from gunicorn.dirty.tlv import TLVEncoder

from .core import dialects, large, values, wire
from .core.faults import Fault
from .core.values import UndecodableValue, UnencodableValue
from .core.wire import Blob, Body

Arguments = tuple[Any, dict[str, Any]]


class Codec(NamedTuple):
    """The two directions; they raise `UndecodableValue` and `UnencodableValue`."""

    loads_call: Callable[[memoryview | Blob], Arguments]
    loads: Callable[[bytes], Any]
    dumps: Callable[[Any, str], bytes]
    dumps_body: Callable[[Any, str], Body]  # `dumps`, which may leave large bytes as they are
    dumps_fault: Callable[[Fault], bytes]


_STOCK_TYPES = {
    "DirtyActionNotFoundError": "DirtyAppError",
    "DirtyEncodeError": "DirtyProtocolError",
    "DirtyMessageTooLargeError": "DirtyProtocolError",
    "DirtyOverloadedError": "DirtyNoWorkersAvailableError",
    "DirtyWorkerDiedError": "DirtyWorkerError",
}
"""Our errors under the names that stock clients know: they make a plain DirtyError of any other."""


def _load_message(message: Any) -> Arguments:
    """The arguments of a request as the other dialects write it."""
    if isinstance(message, dict):
        args, kwargs = message.get("args") or [], message.get("kwargs") or {}
        if isinstance(args, list) and isinstance(kwargs, dict):
            return args, kwargs
    raise UndecodableValue('a request has "args", a list, and "kwargs", a dict')


def _inline(body: memoryview | Blob) -> bytes:
    return bytes(body if isinstance(body, memoryview) else body.view())


def _load_tlv(data: bytes) -> Any:
    try:
        return TLVEncoder.decode_full(data)
    except Exception as error:
        raise UndecodableValue(f"broken TLV: {error}") from error


def _load_json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UndecodableValue(f"broken JSON: {error}") from error


def _dump_tlv(value: Any, place: str) -> bytes:
    try:
        encoded: bytes = TLVEncoder.encode(value)
    except Exception as error:
        raise UnencodableValue(
            type(value).__name__, place, f"gunicorn's TLV has no form for it ({error})"
        ) from error
    return encoded


def _dump_json(value: Any, place: str) -> bytes:
    try:
        return json.dumps(value, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UnencodableValue(type(value).__name__, place, f"JSON has no form for it ({error})") from error


def _dump_fault_tlv(fault: Fault) -> bytes:
    name = fault["error_type"]
    details = {key: _utf8(value) for key, value in fault["details"].items()}
    told = {
        "error_type": _STOCK_TYPES.get(name, name),
        "message": _utf8(fault["message"]),
        "details": details,
    }
    return _dump_tlv(told, "error")


def _utf8(value: Any) -> Any:
    """A str that TLV can carry; other values as they are."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


CODECS = {
    wire.CODEC_MSGPACK: Codec(large.loads_call, values.loads, values.dumps, large.dumps, values.dumps),
    dialects.CODEC_TLV: Codec(
        lambda body: _load_message(_load_tlv(_inline(body))),
        _load_tlv,
        _dump_tlv,
        _dump_tlv,
        _dump_fault_tlv,
    ),
    dialects.CODEC_JSON: Codec(
        lambda body: _load_message(_load_json(_inline(body))),
        _load_json,
        _dump_json,
        _dump_json,
        lambda fault: _dump_json(fault, "error"),
    ),
}
"""By the number in a request's envelope."""
