"""Python values to bytes and back, each with exactly the type it had.

The bytes are MessagePack, written and read by ``ormsgpack``.  These types travel, at any
nesting: None, bool, int of any size, float, complex, str, bytes, bytearray, list, tuple, set,
frozenset, dict (keys of any of these types that can be keys, in order), ``datetime.datetime``,
``date``, ``time`` and ``timedelta``, ``decimal.Decimal`` and ``uuid.UUID``.

* A str with lone surrogates (such as a file name from ``os.listdir``) round-trips.
* A time zone is a ``datetime.timezone`` or a ``zoneinfo.ZoneInfo`` that has a key.  Where the
  zone is not installed, the reader gives a datetime the fixed offset it had.
* Nothing else is converted: a subclass of one of these types, a memoryview, an enum member, a
  dataclass or an exception raises `UnencodableValue`, which says what to send instead.
* `MAX_DEPTH` levels of containers always travel.  Deeper ones are refused, except for plain
  lists and dicts, which may nest as deep as ``ormsgpack`` goes.

Plain data (None, bool, 64-bit int, float, str, bytes, list, dict with str keys) is one call of
``ormsgpack``; the other types are MessagePack extensions.  Nothing is ever pickled.
"""

from __future__ import annotations

import sys
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from itertools import compress
from types import FunctionType
from uuid import UUID

import ormsgpack
from ormsgpack import Ext, packb, unpackb

TYPE_CHECKING = False  # ``typing`` itself is not needed at run time
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

__all__ = [
    "MAX_DEPTH",
    "UndecodableValue",
    "UnencodableValue",
    "dumps",
    "dumps_call",
    "loads",
    "loads_call",
]

MAX_DEPTH = 64

# How many extensions may hold one another while ormsgpack is left to recurse by itself.  Each one
# costs up to 1023 of its C frames in reading (about 0.7 KiB each), so this bounds the C stack.
_FREE_DEPTH = 3

# Wire codes: one is never given a second meaning.
_INT, _TEXT, _BYTEARRAY, _TUPLE, _SET, _FROZENSET, _DICT = range(1, 8)
_DATETIME, _DATE, _TIME, _TIMEDELTA, _DECIMAL, _UUID, _COMPLEX = range(8, 15)

_OPTIONS = (
    ormsgpack.OPT_PASSTHROUGH_BIG_INT
    | ormsgpack.OPT_PASSTHROUGH_DATACLASS
    | ormsgpack.OPT_PASSTHROUGH_DATETIME
    | ormsgpack.OPT_PASSTHROUGH_ENUM
    | ormsgpack.OPT_PASSTHROUGH_SUBCLASS
    | ormsgpack.OPT_PASSTHROUGH_TUPLE
    | ormsgpack.OPT_PASSTHROUGH_UUID
)


class UnencodableValue(TypeError):
    """A value, or something inside it, is of a type that does not travel.

    ``type_name`` is the offending type ('module.Class', built-in ones without module) and
    ``path`` its place, such as ``args[0]['users'][3]`` or ``key <Point> of args[0]``.
    """

    def __init__(self, type_name: str, path: str, hint: str) -> None:
        super().__init__(type_name, path, hint)
        self.type_name = type_name
        self.path = path
        self.hint = hint

    def __str__(self) -> str:
        return f"cannot encode {self.type_name} at {self.path}: {self.hint}"


class UndecodableValue(ValueError):
    """The bytes are not what `dumps` or `dumps_call` writes: truncated, damaged or foreign."""


def dumps(value: object, root: str = "result") -> bytes:
    """Return `value` as bytes.

    `root` is what error messages call the value.  Raises `UnencodableValue` for a type that does
    not travel, and for containers that nest too deep or contain themselves.
    """
    packed = _fast(value)
    return _seal(_Walk(root).visit(value)) if packed is None else packed


def loads(data: bytes | memoryview) -> Any:
    """Return the value that `dumps` wrote.

    Raises `UndecodableValue`, and nothing else, whatever the bytes are.  Bytes after a complete
    value are not looked at.
    """
    reader = _Reader()
    try:
        return _unpack(data, ext_hook=reader.hook)
    except Exception as exc:
        # ormsgpack swallows what its hook raised, a KeyboardInterrupt included.
        cause = reader.failure or exc
        if not isinstance(cause, Exception):
            raise cause from None
        raise UndecodableValue(f"not an encoded value: {_say(cause)}") from cause


def dumps_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """Return the arguments of a call as bytes.

    Raises `UnencodableValue`, whose path starts ``args[0]`` or ``kwargs['name']``.
    """
    call = [list(args), kwargs]
    packed = _fast(call)
    if packed is None:
        packed = _seal([_Walk("args").visit(call[0]), _Walk("kwargs").visit(kwargs)])
    return packed


def loads_call(data: bytes | memoryview) -> tuple[list[Any], dict[str, Any]]:
    """Return the positional and keyword arguments that `dumps_call` wrote.

    Raises `UndecodableValue` for anything that is not such a call.
    """
    call = loads(data)
    if type(call) is list and len(call) == 2:
        args, kwargs = call
        if type(args) is list and type(kwargs) is dict and all(type(k) is str for k in kwargs):
            return args, kwargs
    raise UndecodableValue("not an encoded call: it is no pair of a list and a dict of names")


# --- writing, the fast way: ormsgpack walks, and calls back for what it does not know ----------


class _NotFast(Exception):
    """Only the walk can encode this, or say what is wrong with it."""


class _Packer:
    __slots__ = ("depth", "interrupt")

    def __init__(self) -> None:
        self.depth = 0
        self.interrupt: BaseException | None = None

    def pack(self, value: object) -> bytes:
        packed = packb(value, self.default, _OPTIONS)
        # ormsgpack writes a bytearray or a memoryview as bytes, and no option stops it.  Only
        # output with one of these bytes in it can hold such a value.
        if (0xC4 in packed or 0xC5 in packed or 0xC6 in packed) and _holds_buffer(value):
            raise _NotFast
        return packed

    def default(self, value: Any) -> Ext:
        try:
            kind = type(value)
            code = _SEQUENCES.get(kind)
            if code is None:
                encode = _scalar(kind)
                if encode is None:
                    raise _NotFast
                return encode(value)
            if self.depth == _FREE_DEPTH:
                raise _NotFast
            self.depth += 1
            data = self.pack(list(value))
            self.depth -= 1
            return Ext(code, data)
        except BaseException as exc:
            if not isinstance(exc, Exception):
                self.interrupt = exc
            raise


def _fast(value: object) -> bytes | None:
    packer = _Packer()
    try:
        return packer.pack(value)
    except Exception:
        # ormsgpack swallows what `default` raised: a signal handler's exit is not to be lost.
        if packer.interrupt is not None:
            raise packer.interrupt from None
        return None


def _holds_buffer(value: object) -> bool:
    level: list[Any] = [value]
    while True:
        notable = list(compress(level, map(_NOTABLE.__contains__, map(type, level))))
        if not _NESTS.issuperset(map(type, notable)):
            return True
        if not notable:
            return False
        level = []
        for node in notable:
            if type(node) is dict:
                level += node.values()
            elif len(node) < 50 or not _adds_up(node):
                level += node


def _adds_up(items: list[Any]) -> bool:
    # Numbers do not add to a buffer or to a container, and this is the quickest way to know that
    # a list has none of them.
    if type(items[0]) not in _NUMBERS:
        return False
    try:
        sum(items)
    except Exception:
        return False
    return True


# --- writing, the sure way: a walk that knows where it is --------------------------------------


class _Walk:
    """Turns a value into one that `_seal` packs without recursion through a callback."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.steps: list[tuple[str, Any]] = []

    def visit(self, value: Any) -> Any:
        kind = type(value)
        if kind in _ATOMS:
            return value
        if kind is str:
            return _text(value)
        if kind is list:
            return value if _ATOMS.issuperset(map(type, value)) else self.items(value, "")
        if kind is dict:
            return self.mapping(value)
        code = _SEQUENCES.get(kind)
        if code is not None:
            return Ext(code, _seal(self.items(value, "" if kind is tuple else "member")))
        encode = _scalar(kind)
        if encode is None:
            raise self.refusal(value)
        try:
            return encode(value)
        except _BadZone as exc:
            raise self.refusal(exc.zone, ".tzinfo") from None
        except Exception as exc:
            raise self.refusal(value, hint=_say(exc)) from exc

    def enter(self, value: object) -> None:
        if len(self.steps) == MAX_DEPTH:
            hint = f"nested deeper than {MAX_DEPTH} levels (or contains itself)"
            raise self.refusal(value, hint=hint)
        self.steps.append(("", None))

    def items(self, value: Iterable[Any], step: str) -> list[Any]:
        self.enter(value)
        out = []
        for index, item in enumerate(value):
            self.steps[-1] = (step, item if step else index)
            out.append(self.visit(item))
        self.steps.pop()
        return out

    def mapping(self, value: dict[Any, Any]) -> Any:
        self.enter(value)
        flat: list[Any] = []
        plain = True
        for key, item in value.items():
            self.steps[-1] = ("key", key)
            flat.append(self.visit(key))
            plain = plain and type(flat[-1]) is str
            self.steps[-1] = ("", key)
            flat.append(self.visit(item))
        self.steps.pop()
        if plain:
            return dict(zip(flat[::2], flat[1::2], strict=True))
        return Ext(_DICT, _seal(flat))

    def refusal(self, culprit: object, suffix: str = "", hint: str = "") -> UnencodableValue:
        path, inside = self.root, False
        for step, label in self.steps:
            shown = _show(label)
            if step:
                path = f"{step} {shown} of {path}"
            else:
                path = f"({path})[{shown}]" if inside else f"{path}[{shown}]"
            inside = bool(step)
        path += suffix
        if len(path) > 400:
            path = f"{path[:200]}...{path[-200:]}"
        return UnencodableValue(_name(type(culprit)), path, hint or _hint(culprit))


def _seal(value: object) -> bytes:
    # The walk leaves only integers of more than 64 bits for the callback.
    return packb(value, _integer, _OPTIONS)


def _show(label: object) -> str:
    import reprlib

    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 60
    try:
        return short.repr(label)[:80]
    except Exception:
        return f"<{_name(type(label))}>"


def _name(kind: type) -> str:
    module = kind.__module__
    return kind.__qualname__ if module == "builtins" else f"{module}.{kind.__qualname__}"


def _say(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {exc}"


def _hint(value: object) -> str:
    kind = type(value)
    if isinstance(value, tzinfo):
        return "use a datetime.timezone, or a zoneinfo.ZoneInfo that has a key"
    if isinstance(value, (type, FunctionType)):
        return "code does not travel; send a name for it"
    for mark, hint in _HINTS:
        if hasattr(kind, mark):
            return hint
    for base in kind.__mro__[1:]:
        if base in _ATOMS or base in _SCALARS or base in _SEQUENCES or base in _OTHERS:
            return f"only {_name(base)} itself travels, not a subclass; convert it"
    return "send plain data made from it (such as a dict, a list or a str)"


# What a class has, and what to do with its instances: the first that fits.
_HINTS = (
    ("__dataclass_fields__", "send dataclasses.asdict(x)"),
    ("_member_map_", "send x.value"),
    ("_fields", "send tuple(x)"),
    ("model_dump", "send x.model_dump()"),
    ("__traceback__", "send str(x) or repr(x)"),
    ("nbytes", "send bytes(x), x.tobytes() or x.tolist()"),
    ("tobytes", "send x.tobytes() or x.tolist()"),
    ("__fspath__", "send str(x)"),
    ("__next__", "send list(x)"),
)


# --- the types -----------------------------------------------------------------------------------


class _BadZone(Exception):
    def __init__(self, zone: object) -> None:
        super().__init__(zone)
        self.zone = zone


def _integer(value: int) -> Ext:
    size = value.bit_length() // 8 + 1
    return Ext(_INT, value.to_bytes(size, "big", signed=True))


def _text(value: str) -> str | Ext:
    try:
        value.encode()
    except UnicodeEncodeError:
        return Ext(_TEXT, value.encode("utf-8", "surrogatepass"))
    return value


def _moment(value: datetime | time) -> Ext:
    code = _DATETIME if type(value) is datetime else _TIME
    zone, key = value.tzinfo, None
    if not value.fold and (zone is None or zone is timezone.utc):
        return Ext(code, value.isoformat().encode())
    fields: list[object] = [value.replace(tzinfo=None).isoformat(), value.fold]
    if zone is not None:
        if type(zone) is not timezone:
            known = getattr(sys.modules.get("zoneinfo"), "ZoneInfo", None)
            key = getattr(zone, "key", None) if type(zone) is known else None
            if key is None:
                raise _BadZone(zone)
        offset, name = value.utcoffset(), value.tzname()
        if offset is None:
            fields += [None, None, key]
        else:
            named = name != timezone(offset).tzname(None)
            fields += [_parts(offset), name if named else None, key]
    return Ext(code, packb(fields))


def _parts(value: timedelta) -> list[int]:
    return [value.days, value.seconds, value.microseconds]


def _scalar(kind: type) -> Callable[[Any], Ext] | None:
    encode = _SCALARS.get(kind)
    if encode is None and kind is getattr(sys.modules.get("decimal"), "Decimal", None):
        encode = _SCALARS[kind] = lambda value: Ext(_DECIMAL, str(value).encode())
    return encode


_ATOMS = frozenset({type(None), bool, int, float, bytes})
_NUMBERS = frozenset({int, float})
_NESTS = frozenset({list, dict})
# What ormsgpack writes as something else, and where that may be.
_NOTABLE = _NESTS | {bytearray, memoryview}
_OTHERS = frozenset({str, list, dict})
_SEQUENCES: dict[type, int] = {tuple: _TUPLE, set: _SET, frozenset: _FROZENSET}
_SCALARS: dict[type, Callable[[Any], Ext]] = {
    int: _integer,
    bytearray: lambda value: Ext(_BYTEARRAY, bytes(value)),
    datetime: _moment,
    time: _moment,
    date: lambda value: Ext(_DATE, value.isoformat().encode()),
    timedelta: lambda value: Ext(_TIMEDELTA, packb(_parts(value))),
    UUID: lambda value: Ext(_UUID, value.bytes),
    complex: lambda value: Ext(_COMPLEX, packb([value.real, value.imag])),
}


# --- reading -------------------------------------------------------------------------------------


class _Reader:
    __slots__ = ("depth", "failure")

    def __init__(self) -> None:
        self.depth = 0
        self.failure: BaseException | None = None

    def hook(self, code: int, data: bytes) -> Any:
        try:
            build = _BUILDERS.get(code)
            if build is not None:
                return build(data)
            if not _TUPLE <= code <= _DICT:
                raise ValueError(f"unknown extension {code}")
            return self.container(code, self.items(data))
        except BaseException as exc:
            if self.failure is None:
                self.failure = exc
            raise

    def items(self, data: bytes) -> list[Any]:
        self.depth += 1
        if self.depth > _FREE_DEPTH:
            limit = MAX_DEPTH + 1 - self.depth
            if limit < 1 or (len(data) > limit and _unsafe(data, limit)):
                raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
        items = _unpack(data, ext_hook=self.hook)
        self.depth -= 1
        if type(items) is not list:
            raise ValueError("a container without items")
        return items

    @staticmethod
    def container(code: int, items: list[Any]) -> Any:
        if code == _TUPLE:
            return tuple(items)
        if code == _DICT:
            made: Any = dict(zip(items[::2], items[1::2], strict=True))
            size = len(items) // 2
        else:
            made = set(items) if code == _SET else frozenset(items)
            size = len(items)
        if len(made) != size:
            raise ValueError("a key or a member twice")
        return made


def _unsafe(data: bytes, limit: int) -> bool:
    """Whether `data` nests deeper than `limit` or announces more than it has, without recursion."""
    open_, at, end, need = [1], 0, len(data), 1
    while at < end:
        while open_ and not open_[-1]:
            open_.pop()
        if not open_:
            return False
        open_[-1] -= 1
        need -= 1
        head = data[at]
        at += 1
        if head < 0x80 or head >= 0xE0:
            continue
        if head >= 0xC0:
            width = _WIDTH[head - 0xC0]
            size = int.from_bytes(data[at : at + width], "big")
            at += width + _EXTRA[head - 0xC0]
            each = 2 if head >= 0xDE else 1 if head >= 0xDC else 0
        else:
            size = head & (0x1F if head >= 0xA0 else 0x0F)
            each = 0 if head >= 0xA0 else 1 if head >= 0x90 else 2
        if not each:
            at += size
        elif size:
            open_.append(size * each)
            need += size * each
            if len(open_) - 1 > limit or need > end - at:
                return True
    return False


def _checked(data: bytes | memoryview, *, ext_hook: Callable[[int, bytes], Any] | None = None) -> Any:
    data = bytes(data)
    if any(head in data for head in b"\xdc\xdd\xde\xdf") and _unsafe(data, 1023):
        raise ValueError("more announced than there is")
    return unpackb(data, ext_hook=ext_hook)


# Until 1.13.0, ormsgpack makes room for all the items a list or dict announces, and crashes if it cannot.
_OLD = ormsgpack.__version__.startswith(("1.10.", "1.11.", "1.12.", "1.13.0"))
_unpack: Callable[..., Any] = _checked if _OLD else unpackb


# MessagePack heads 0xC0 to 0xDF: how many bytes of length follow, and how many more besides.
_WIDTH = bytes.fromhex("00000000 010204 010204 0000 00000000 00000000 0000000000 010204 0204 0204")
_EXTRA = bytes.fromhex("00000000 000000 010101 0408 01020408 01020408 0203050911 000000 0000 0000")


def _fields(data: bytes) -> list[Any]:
    fields = _unpack(data)
    if type(fields) is not list:
        raise ValueError("fields that are no list")
    return fields


def _read_zone(parts: list[int] | None, name: str | None, key: str | None) -> tzinfo:
    if key is not None:
        from zoneinfo import ZoneInfo

        try:
            return ZoneInfo(key)
        except Exception as exc:
            if parts is None:
                raise ValueError(f"no time zone {key!r} here") from exc
    offset = timedelta(*(parts or ()))
    return timezone(offset) if name is None else timezone(offset, name)


def _read_moment(kind: type[datetime] | type[time], data: bytes) -> datetime | time:
    if data.isascii():
        return kind.fromisoformat(data.decode())
    iso, fold, *zone = _fields(data)
    tz = _read_zone(*zone) if zone else None
    return kind.fromisoformat(iso).replace(fold=fold, tzinfo=tz)


def _read_decimal(data: bytes) -> object:
    from decimal import Decimal

    return Decimal(data.decode("ascii"))


_BUILDERS: dict[int, Callable[[bytes], object]] = {
    _INT: lambda data: int.from_bytes(data, "big", signed=True),
    _TEXT: lambda data: data.decode("utf-8", "surrogatepass"),
    _BYTEARRAY: bytearray,
    _DATETIME: lambda data: _read_moment(datetime, data),
    _TIME: lambda data: _read_moment(time, data),
    _DATE: lambda data: date.fromisoformat(data.decode("ascii")),
    _TIMEDELTA: lambda data: timedelta(*_fields(data)),
    _DECIMAL: _read_decimal,
    _UUID: lambda data: UUID(bytes=data),
    _COMPLEX: lambda data: complex(*_fields(data)),
}
