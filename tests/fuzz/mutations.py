"""Ways to damage a file: by bytes, and along the structure of JSON, protobuf, GGUF and safetensors. Seeded."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

__all__ = ["mutate"]

_NUMBERS = (0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, 1 << 63,
            (1 << 64) - 1)  # fmt: skip
_HEAD_BYTES = 4096  # where headers are: most damage goes there
Random = random.Random


def mutate(name: str, data: bytes, chooser: Random) -> tuple[str, bytes]:
    """What was done, and the damaged content of a file called ``name``."""
    ways = [_bytes, _bytes, *_STRUCTURED.get(name.rpartition(".")[2], [])]
    for _ in range(8):  # a way that finds nothing to change is tried again
        way = chooser.choice(ways)
        try:
            label, changed = way(data, chooser)
        except (ValueError, struct.error, IndexError, KeyError, RecursionError):
            continue
        if changed != data:
            return label, changed
    return "append", data + b"\0"  # as it is for an empty file, and one that nothing fits


# ---- bytes ---------------------------------------------------------------------------------------------------------


def _at(data: bytes, chooser: Random) -> int:
    """A position, in the first or last few kilobytes for the most part."""
    where = chooser.random()
    if where < 0.6:
        return chooser.randrange(min(len(data), _HEAD_BYTES))
    if where < 0.75:
        return max(0, len(data) - 1 - chooser.randrange(min(len(data), _HEAD_BYTES)))
    return chooser.randrange(len(data))


def _bytes(data: bytes, chooser: Random) -> tuple[str, bytes]:
    if not data:
        return "append", chooser.randbytes(9)
    way = chooser.choice(_BYTE_WAYS)
    changed = bytearray(data)
    way(changed, chooser)
    return way.__name__.strip("_"), bytes(changed)


def _flip_bits(data: bytearray, chooser: Random) -> None:
    for _ in range(chooser.randint(1, 8)):
        data[_at(data, chooser)] ^= 1 << chooser.randrange(8)


def _truncate(data: bytearray, chooser: Random) -> None:
    del data[chooser.choice((0, 1, _at(data, chooser), chooser.randrange(len(data)))) :]


def _number(data: bytearray, chooser: Random) -> None:
    width = chooser.choice((1, 2, 4, 8))
    at = _at(data, chooser)
    data[at : at + width] = (chooser.choice(_NUMBERS) & ((1 << 8 * width) - 1)).to_bytes(width, "little")


def _varint(data: bytearray, chooser: Random) -> None:
    at = _at(data, chooser)
    data[at : at + 1] = chooser.choice((b"\xff" * 9 + b"\x01", b"\x80" * 12, b"\xff\xff\xff\xff\x0f", b"\xff" * 40))


def _splice(data: bytearray, chooser: Random) -> None:
    start, to = _at(data, chooser), _at(data, chooser)
    part = bytes(data[start : start + chooser.randint(1, 256)])
    data[to : to + (len(part) if chooser.random() < 0.5 else 0)] = part


def _duplicate(data: bytearray, chooser: Random) -> None:
    start = _at(data, chooser)
    part = bytes(data[start : start + chooser.randint(8, 1024)])
    data[start:start] = part * chooser.choice((1, 1, 2, 50))


def _remove(data: bytearray, chooser: Random) -> None:
    start = _at(data, chooser)
    del data[start : start + chooser.randint(1, 256)]


def _noise(data: bytearray, chooser: Random) -> None:
    at = _at(data, chooser)
    noise = chooser.randbytes(chooser.randint(1, 64))
    data[at : at + (len(noise) if chooser.random() < 0.5 else 0)] = noise


def _blank(data: bytearray, chooser: Random) -> None:
    at, count = _at(data, chooser), chooser.randint(1, 512)
    data[at : at + count] = chooser.choice((b"\0", b"\xff")) * len(data[at : at + count])


_BYTE_WAYS: tuple[Callable[[bytearray, Random], None], ...] = (
    _flip_bits, _flip_bits, _truncate, _number, _number, _varint, _splice, _duplicate, _remove, _noise, _blank,
)  # fmt: skip

# ---- JSON ----------------------------------------------------------------------------------------------------------

_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**200, -(2**63), 0.5, 1e308, -0.0, "", "a" * 5000, "0", "\x00",
    "\ud800", "../../../../etc/passwd", "/etc/passwd", "..", ".", "a/../../b", "C:\\x", [], {}, [[]], [None], {"a": {}},
    [0] * 3000, {"__class__": "x"}, "{{ 1/0 }}",
)  # fmt: skip


def _json(data: bytes, chooser: Random) -> tuple[str, bytes]:
    document = json.loads(data)
    places = list(_places(document))
    if not places or chooser.random() < 0.05:
        return "json root", json.dumps(chooser.choice(_VALUES)).encode()
    for _ in range(chooser.choice((1, 1, 1, 2, 3))):
        holder, key = chooser.choice(places)
        way = chooser.randrange(10)
        if way < 6:
            holder[key] = chooser.choice(_VALUES)
        elif way == 6:
            holder[key] = _copy(chooser.choice(places))
        elif way == 7 and isinstance(holder, dict):
            holder.pop(key, None)
            return "json key lost", _dump(document)
        elif way == 8 and isinstance(holder, dict):
            holder[chooser.choice(("", "__proto__", "x" * 3000, "schema_version", "auto_map"))] = holder[key]
        elif isinstance(holder, list):
            holder.extend(holder[:1] * chooser.choice((1, 1000)))
        else:
            holder[key] = float(chooser.choice(("nan", "inf", "-inf")))
    return "json value", _dump(document)


def _deep(data: bytes, chooser: Random) -> tuple[str, bytes]:
    depth = chooser.choice((100, 990, 5000, 200_000))
    opener, closer = chooser.choice(((b"[", b"]"), (b'{"a":', b"}")))
    nest = opener * depth + (b"1" + closer * depth if chooser.random() < 0.7 else b"")
    colon = data.find(b":", chooser.randrange(max(1, len(data))))
    return "deep nesting", nest if colon < 0 else data[: colon + 1] + nest + b"," + data[colon + 1 :]


def _copy(place: tuple[Any, Any]) -> Any:
    return json.loads(json.dumps(place[0][place[1]], default=str))


def _dump(document: Any) -> bytes:
    return json.dumps(document).encode()


def _places(value: Any) -> Any:
    """(holder, key) of every value inside; of a long list (a vocabulary) only the ends."""
    if isinstance(value, dict):
        keys: list[Any] = list(value)[:40]
    elif isinstance(value, list):
        keys = list(range(min(len(value), 8)))
    else:
        return
    for key in keys:
        yield value, key
        yield from _places(value[key])


# ---- protobuf ------------------------------------------------------------------------------------------------------


def _protobuf(data: bytes, chooser: Random) -> tuple[str, bytes]:
    """Change one field somewhere inside, with the lengths around it mended, so that readers get past the surface."""
    return "protobuf", _protobuf_level(data, chooser, 0)


def _protobuf_level(data: bytes, chooser: Random, depth: int) -> bytes:
    fields = _fields(data)
    inner = [index for index, (key, _) in enumerate(fields) if key & 7 == 2]
    if inner and depth < 8 and chooser.random() < 0.85:
        for index in chooser.sample(inner, min(4, len(inner))):
            key, content = fields[index]
            try:
                fields[index] = (key, _protobuf_level(content, chooser, depth + 1))
            except ValueError:
                continue
            return _encode(fields)
    index = chooser.randrange(len(fields))
    key, content = fields[index]
    match chooser.randrange(8):
        case 0:
            del fields[index]
        case 1:
            fields.insert(index, (key, content))
        case 2:
            fields[index:index] = [(key, content)] * 40
        case 3:
            other = chooser.randrange(len(fields))
            fields[index], fields[other] = fields[other], fields[index]
        case 4:
            fields[index] = ((chooser.randint(1, 30) << 3) | (key & 7), content)
        case _ if key & 7 == 0:
            fields[index] = (key, _encode_varint(chooser.choice(_NUMBERS)))
        case _ if key & 7 == 2:
            text = (b"", b"x" * 3000, b"../../../etc/passwd", b"/etc/passwd", b"\xff\xfe", content + content,
                    content[: len(content) // 2], b"MatMul", b"@model_path/../../../etc/passwd")  # fmt: skip
            fields[index] = (key, chooser.choice(text))
        case _:
            fields[index] = (key, chooser.randbytes(len(content)))
    return _encode(fields)


def _fields(data: bytes) -> list[tuple[int, bytes]]:
    found, at = [], 0
    while at < len(data):
        key, at = _decode_varint(data, at)
        if not 0 < key >> 3 < 10_000:
            raise ValueError("no message")
        match key & 7:
            case 0:
                start = at
                _, at = _decode_varint(data, at)
                content = data[start:at]
            case 1 | 5:
                size = 8 if key & 7 == 1 else 4
                content, at = data[at : at + size], at + size
            case 2:
                size, at = _decode_varint(data, at)
                content, at = data[at : at + size], at + size
            case _:
                raise ValueError("no message")
        if at > len(data):
            raise ValueError("no message")
        found.append((key, content))
    if not found:
        raise ValueError("no message")
    return found


def _encode(fields: list[tuple[int, bytes]]) -> bytes:
    parts = []
    for key, content in fields:
        parts.append(_encode_varint(key) + (_encode_varint(len(content)) if key & 7 == 2 else b"") + content)
    return b"".join(parts)


def _decode_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("no number")


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


# ---- GGUF, safetensors ---------------------------------------------------------------------------------------------


def _gguf(data: bytes, chooser: Random) -> tuple[str, bytes]:
    """Another value for one of the header's numbers: counts, lengths, types, dimensions, offsets."""
    spots = _gguf_numbers(data)
    changed = bytearray(data)
    for _ in range(chooser.choice((1, 1, 2))):
        at, width = chooser.choice(spots)
        old = int.from_bytes(data[at : at + width], "little")
        new = chooser.choice((*_NUMBERS, old + 1, old - 1, old * 2, old + 32)) & ((1 << 8 * width) - 1)
        changed[at : at + width] = new.to_bytes(width, "little")
    return "gguf number", bytes(changed)


def _gguf_numbers(data: bytes) -> list[tuple[int, int]]:
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    spots: list[tuple[int, int]] = []
    at = 4

    def take(width: int) -> int:
        nonlocal at
        value = int.from_bytes(data[at : at + width], "little")
        spots.append((at, width))
        at += width
        return value

    def text() -> None:
        nonlocal at
        at += take(8)

    def value(kind: int) -> None:
        nonlocal at
        if kind == 8:
            text()
        elif kind == 9:
            item, count = take(4), take(8)
            if item == 8:
                keep = len(spots)
                for _ in range(count):
                    text()
                del spots[keep + 6 :]  # a vocabulary has thousands of lengths
            else:
                at += sizes[item] * count
        else:
            take(sizes[kind])

    take(4)
    tensors, pairs = take(8), take(8)
    for _ in range(pairs):
        text()
        value(take(4))
    for _ in range(tensors):
        text()
        for _ in range(take(4)):
            take(8)
        take(4)
        take(8)
    return spots


def _safetensors(data: bytes, chooser: Random) -> tuple[str, bytes]:
    """Damage the JSON header and mend its length."""
    size = int.from_bytes(data[:8], "little")
    label, header = chooser.choice((_json, _json, _json, _deep))(data[8 : 8 + size], chooser)
    return f"safetensors {label}", len(header).to_bytes(8, "little") + header + data[8 + size :]


_STRUCTURED: dict[str, list[Callable[[bytes, Random], tuple[str, bytes]]]] = {
    "json": [_json, _json, _json, _deep],
    "onnx": [_protobuf] * 4,
    "mlmodel": [_protobuf] * 4,
    "gguf": [_gguf] * 3,
    "safetensors": [_safetensors] * 3,
}
