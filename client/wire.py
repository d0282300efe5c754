"""Encodes typed messages as msgpack and decodes them: limits are checked first, then the schema.

A message is a frozen dataclass decorated with ``@message("name")``; its annotations are its schema. This file knows
neither which messages exist nor how they are sent.
"""

import struct
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, TypeVar

import msgpack

from euryale.client.rules import MAP, shown

T = TypeVar("T")

PROTOCOL_VERSION = 2
MAX_DEPTH = 8
MAX_ITEMS = 16384  # values and keys in one message; bounds the time of the structure check to milliseconds


class WireError(ValueError):
    """A body that is not a valid message. ``code`` is the error code for its sender."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class Kind:
    """The wire type of a field.

    ``unpack`` checks and converts a value, with a ValueError if it does not fit. ``pack`` inverts it; a field packed as
    None is left out.
    """

    name: str
    unpack: Callable[[Any], Any]
    pack: Callable[[Any], Any] = lambda value: value


def pack_tokens(tokens: Iterable[int] | bytes) -> bytes:
    """Packs token ids as little-endian int32; bytes are returned as they are.

    Raises ValueError if an id is not a 32-bit integer."""
    if isinstance(tokens, bytes):
        return tokens
    tokens = tuple(tokens)
    try:
        return struct.pack(f"<{len(tokens)}i", *tokens)
    except struct.error as error:
        raise ValueError(f"token ids must be 32-bit integers: {error}") from None


def unpack_tokens(packed: Any) -> tuple[int, ...]:
    """Inverts ``pack_tokens``. Raises ValueError unless ``packed`` is bytes of a length divisible by four."""
    check_packed(packed)
    return struct.unpack(f"<{len(packed) // 4}i", packed)


def check_packed(packed: Any) -> bytes:
    """Returns packed token ids unchanged. Raises ValueError unless they are bytes of a length divisible by four."""
    if not isinstance(packed, bytes) or len(packed) % 4:
        raise ValueError(f"must be a byte string of little-endian int32, not {shown(packed)}")
    return packed


_NAMES = {str: "a string", int: "a whole number", float: "a number", bool: "true or false", bytes: "bytes"}


def expect(*allowed: type) -> Callable[[Any], Any]:
    """Returns a check that raises ValueError for values of other types; a bool does not count as an int."""
    names = " or ".join(_NAMES[kind] for kind in allowed)

    def check(value: Any) -> Any:
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise ValueError(f"must be {names}, not {shown(value)}")
        return value

    return check


def _check_map(value: Any) -> dict[str, Any]:
    if not MAP.fits(value):
        raise ValueError(f"must be {MAP.says}, not {shown(value)}")
    return value


def _check_ints(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise ValueError(f"must be a list of whole numbers, not {shown(value)}")
    return tuple(value)


Tokens = Annotated[tuple[int, ...], Kind("packed int32", unpack_tokens, pack_tokens)]
# A prompt has up to a million tokens, so they stay packed where integers are not needed.
PackedTokens = Annotated[bytes, Kind("packed int32", check_packed)]
Ints = Annotated[tuple[int, ...], Kind("list of int", _check_ints, list)]
_KINDS: dict[Any, Kind] = {kind: Kind(kind.__name__, expect(kind)) for kind in (str, int, bool, bytes)}
_KINDS[float] = Kind("float", lambda value: float(expect(float, int)(value)))
_KINDS[dict] = Kind("map", _check_map)


def message(name: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: gives a frozen dataclass its message ``type`` and ``schema`` as attributes."""

    def register(cls: type[T]) -> type[T]:
        hints = typing.get_type_hints(cls, include_extras=True)
        described: Any = cls
        described.type = name
        described.schema = {
            f.name: _field(hints[f.name], f.default is not MISSING or f.default_factory is not MISSING)
            for f in fields(described)
        }
        return cls

    return register


def message_table(*classes: type[Any]) -> dict[str, type[Any]]:
    """Returns the message classes by type name, as ``decode`` takes them."""
    return {cls.type: cls for cls in classes}


def _field(annotation: Any, has_default: bool) -> tuple[Kind, bool]:
    """Returns the kind of a field, and whether it is required."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    if typing.get_origin(annotation) is Annotated:
        return annotation.__metadata__[0], not has_default
    return _KINDS[typing.get_origin(annotation) or annotation], not has_default


def encode(value: Any) -> bytes:
    """Returns the body of a message, without fields that are None. Raises ValueError for unsupported values."""
    body = {"type": value.type, "v": PROTOCOL_VERSION}
    for name, (kind, _) in value.schema.items():
        item = getattr(value, name)
        if item is not None:
            packed = kind.pack(item)
            if packed is not None:
                body[name] = packed
    try:
        packed_body: bytes = msgpack.packb(body)
    except (TypeError, OverflowError, ValueError) as error:
        raise ValueError(f"cannot be sent: {error}") from None
    return packed_body


def decode(body: bytes, table: Mapping[str, type[Any]], *, strict: bool) -> Any:
    """Returns the message in ``body``, one of ``table`` (type name -> class).

    ``strict`` refuses unknown fields, as a server does. A client ignores them, so that servers can add fields.
    Raises WireError with the code malformed, unsupported_version, unknown_verb or invalid_request.
    """
    check_structure(body)
    return build(unpack_map(body), table, strict=strict)


def unpack_map(body: bytes) -> dict[str, Any]:
    """Returns the map in ``body``, with all lengths bounded by the body's. Raises WireError (malformed)."""
    limit = max(len(body), 1)
    try:
        value = msgpack.unpackb(
            body, max_str_len=limit, max_bin_len=limit, max_array_len=limit, max_map_len=limit, max_ext_len=0
        )
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise WireError("malformed", f"not msgpack: {error}") from None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise WireError("malformed", "a message is a map with string keys")
    return value


def build(value: dict[str, Any], table: Mapping[str, type[Any]], *, strict: bool) -> Any:
    """Returns the message of an unpacked map, which is emptied; see ``decode``."""
    version, name = value.pop("v", None), value.pop("type", None)
    if type(version) is not int or not isinstance(name, str):
        raise WireError("malformed", "a message has a field type (string) and a field v (protocol version, integer)")
    if version != PROTOCOL_VERSION:
        raise WireError(
            "unsupported_version", f"protocol version {version} is not supported, only version {PROTOCOL_VERSION}"
        )
    if name not in table:
        raise WireError("unknown_verb", f"unknown message type {name[:40]!r}: use one of {', '.join(table)}")
    cls = table[name]
    arguments = {}
    for key, (kind, required) in cls.schema.items():
        item = value.pop(key, None)
        if item is not None:
            try:
                arguments[key] = kind.unpack(item)
            except ValueError as error:
                raise WireError("invalid_request", f"{name}: field {key} {error}") from None
        elif required:
            raise WireError("invalid_request", f"{name}: field {key} ({kind.name}) is missing")
    if strict and value:
        unknown = ", ".join(repr(key[:40]) for key in list(value)[:5])
        allowed = ", ".join(cls.schema) or "-"
        raise WireError("invalid_request", f"{name}: unknown field {unknown}: allowed fields are {allowed}")
    return cls(**arguments)


# First byte of a msgpack value -> (bytes of its length field, fixed bytes after it, children per unit of length).
_HEADERS: dict[int, tuple[int, int, int]] = {0xC0: (0, 0, 0), 0xC2: (0, 0, 0), 0xC3: (0, 0, 0)}
_HEADERS |= {first: (0, size, 0) for first, size in zip(range(0xCA, 0xD4), (4, 8, 1, 2, 4, 8, 1, 2, 4, 8), strict=True)}
_HEADERS |= {first: (size, 0, 0) for first, size in ((0xC4, 1), (0xC5, 2), (0xC6, 4), (0xD9, 1), (0xDA, 2), (0xDB, 4))}
_HEADERS |= {0xDC: (2, 0, 1), 0xDD: (4, 0, 1), 0xDE: (2, 0, 2), 0xDF: (4, 0, 2)}


def check_structure(body: bytes, *, max_depth: int = MAX_DEPTH, max_items: int = MAX_ITEMS) -> None:
    """Checks the headers of a msgpack body without decoding it.

    A decoder allocates as much as a header announces and recurses as deep as containers nest. Both are bounded here
    first. Raises WireError (malformed) if the body nests too deep, has too many values, is truncated, has excess bytes,
    or has an extension type.
    """
    open_containers = [1]  # values still to come, per open container
    position, items = 0, 0
    while open_containers:
        if not open_containers[-1]:
            open_containers.pop()
            continue
        open_containers[-1] -= 1
        items += 1
        if items > max_items:
            raise WireError("malformed", f"more than {max_items} values in one message")
        if position >= len(body):
            raise WireError("malformed", "the message is truncated")
        position, children = _read_header(body, position)
        if children:
            if len(open_containers) > max_depth:
                raise WireError("malformed", f"nested deeper than {max_depth} levels")
            open_containers.append(children)
    if position != len(body):
        raise WireError("malformed", "the body is not exactly one msgpack value: it is truncated or has bytes after it")


def _read_header(body: bytes, position: int) -> tuple[int, int]:
    """Returns where the next header starts, and how many values the one at ``position`` contains."""
    first = body[position]
    position += 1
    if first < 0x80 or first >= 0xE0:
        return position, 0
    if first < 0x90:
        return position, 2 * (first & 0x0F)
    if first < 0xA0:
        return position, first & 0x0F
    if first < 0xC0:
        return position + (first & 0x1F), 0
    if first not in _HEADERS:
        raise WireError("malformed", f"msgpack byte 0x{first:02x} is not allowed here")
    length_size, fixed, per_unit = _HEADERS[first]
    length = int.from_bytes(body[position : position + length_size], "big")
    position += length_size
    return (position, length * per_unit) if per_unit else (position + fixed + length, 0)
