"""As much of CBOR as blocks of dag-cbor and the head of a CAR need: reading, with CIDs as tag 42."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from hfms_cli.ipfs.cid import Cid, decode

__all__ = ["cids_in", "dump_header", "load"]

DEEPEST = 64


def load(raw: bytes) -> Any:
    """One value, with `Cid`s in it. Raises ValueError."""
    value, end = _value(raw, 0, 0)
    if end != len(raw):
        raise ValueError("more than one value")
    return value


def cids_in(value: Any) -> Iterator[Cid]:
    """Every CID in a value, in order."""
    match value:
        case Cid():
            yield value
        case dict():
            for inside in value.values():
                yield from cids_in(inside)
        case list():
            for inside in value:
                yield from cids_in(inside)


def dump_header(roots: list[Cid]) -> bytes:
    """The head of a CAR: {"roots": [...], "version": 1}."""
    told = b"".join(b"\xd8\x2a" + _bytes(b"\0" + bytes(cid)) for cid in roots)
    return b"\xa2\x65roots" + bytes([0x80 + len(roots)]) + told + b"\x67version\x01"


def _bytes(data: bytes) -> bytes:
    """Nodes refuse a length that could have been written shorter."""
    return (bytes([0x40 + len(data)]) if len(data) < 24 else bytes([0x58, len(data)])) + data


def _value(raw: bytes, at: int, depth: int) -> tuple[Any, int]:
    if depth > DEEPEST or at >= len(raw):
        raise ValueError("too deep, or cut off")
    kind, number = raw[at] >> 5, raw[at] & 31
    at += 1
    if 24 <= number <= 27:
        size = 1 << number - 24
        if at + size > len(raw):
            raise ValueError("cut off")
        packed, at = raw[at : at + size], at + size
        if kind == 7:
            return {2: _half, 4: _single, 8: _double}.get(size, _refuse)(packed), at
        number = int.from_bytes(packed, "big")
    elif number > 27:
        raise ValueError("a length that is not given")
    match kind:
        case 0:
            return number, at
        case 1:
            return -1 - number, at
        case 2 | 3:
            if at + number > len(raw):
                raise ValueError("cut off")
            data = bytes(raw[at : at + number])
            return (data if kind == 2 else data.decode()), at + number
        case 4:
            items = []
            for _ in range(number):
                item, at = _value(raw, at, depth + 1)
                items.append(item)
            return items, at
        case 5:
            table = {}
            for _ in range(number):
                key, at = _value(raw, at, depth + 1)
                if not isinstance(key, str):
                    raise ValueError("a key that is no text")
                table[key], at = _value(raw, at, depth + 1)
            return table, at
        case 6:
            inside, at = _value(raw, at, depth + 1)
            if number != 42 or not isinstance(inside, bytes) or inside[:1] != b"\0":
                raise ValueError("an unknown tag")
            cid, end = decode(inside, 1)
            if end != len(inside):
                raise ValueError("a CID with something behind it")
            return cid, at
    return {20: False, 21: True, 22: None}[number] if number in (20, 21, 22) else _refuse(b""), at


def _half(packed: bytes) -> float:
    return float(struct.unpack(">e", packed)[0])


def _single(packed: bytes) -> float:
    return float(struct.unpack(">f", packed)[0])


def _double(packed: bytes) -> float:
    return float(struct.unpack(">d", packed)[0])


def _refuse(packed: bytes) -> float:
    raise ValueError("a simple value that dag-cbor does not have")
