"""Files and folders as blocks: the formats dag-pb (a node with links) and UnixFS (what the node means).

Both are small protobuf messages; a library for that would be larger than this. See
https://ipld.io/specs/codecs/dag-pb/spec/ and https://specs.ipfs.tech/unixfs/.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from hfms_cli.errors import BadRequest, VerifyFailed
from hfms_cli.ipfs.cid import CODECS, Cid, decode, read_varint, varint

__all__ = ["Kind", "Link", "Node", "encode_node", "parse_node"]


class Kind(IntEnum):
    """What a node is."""

    RAW = 0
    FOLDER = 1
    FILE = 2
    METADATA = 3
    SYMLINK = 4
    SHARD = 5
    """Of a folder that is too large for one block (a HAMT)."""


@dataclass(frozen=True, slots=True)
class Link:
    cid: Cid
    name: str = ""
    total: int = 0
    """Bytes of all blocks below, for people: nobody checks it."""


@dataclass(frozen=True, slots=True)
class Node:
    """One block, understood. A raw block is a file without links."""

    kind: Kind
    data: bytes = b""
    links: Sequence[Link] = ()
    size: int = 0
    """Of a file: bytes in all."""
    parts: Sequence[int] = ()
    """Of a file: bytes below each link."""
    fanout: int = 0
    hash: int = 0


def encode_node(
    kind: Kind,
    *,
    data: bytes = b"",
    links: Sequence[Link] = (),
    parts: Sequence[int] | None = None,
    fanout: int = 0,
    hash: int = 0,
) -> bytes:
    """A dag-pb block. parts: of a file, bytes below each link; None for what is no file."""
    meaning = [_number(1, kind)]
    if data:
        meaning.append(_bytes(2, data))
    if parts is not None:
        meaning.append(_number(3, len(data) + sum(parts)))
        meaning += [_number(4, part) for part in parts]
    if fanout:
        meaning += [_number(5, hash), _number(6, fanout)]
    told = [
        _bytes(2, _bytes(1, bytes(link.cid)) + _bytes(2, link.name.encode()) + _number(3, link.total)) for link in links
    ]
    return b"".join([*told, _bytes(1, b"".join(meaning))])


def parse_node(cid: Cid, block: bytes) -> Node:
    """Read a block that was checked. Raises VerifyFailed where it makes no sense, BadRequest where it is no file."""
    if cid.codec == CODECS["raw"]:
        return Node(Kind.FILE, block, size=len(block))
    if cid.codec != CODECS["dag-pb"]:
        raise BadRequest(f"`{cid}` is data of another kind, neither a file nor a folder.", param="cid")
    try:
        return _parse(block)
    except (ValueError, IndexError, TypeError) as exc:
        raise VerifyFailed(f"The block `{cid}` is broken: it cannot be read as a part of a file or folder.") from exc


def links_of(block: bytes) -> list[Link]:
    """The links of a dag-pb block. Raises ValueError."""
    return [_link(value) for field, value in _fields(block) if field == 2 and isinstance(value, bytes)]


def _parse(block: bytes) -> Node:
    links = links_of(block)
    (meaning,) = [value for field, value in _fields(block) if field == 1]
    if not isinstance(meaning, bytes):
        raise ValueError
    found: dict[int, int | bytes] = {}
    parts: list[int] = []
    for field, value in _fields(meaning):
        if field == 4 and isinstance(value, bytes):  # packed, as some writers do
            at = 0
            while at < len(value):
                part, at = read_varint(value, at)
                parts.append(part)
        elif field == 4 and isinstance(value, int):
            parts.append(value)
        else:
            found[field] = value
    kind, data, size = Kind(found[1]), found.get(2, b""), found.get(3)  # type: ignore[arg-type]
    fanout, hash = found.get(6, 0), found.get(5, 0)
    if not isinstance(data, bytes) or isinstance(fanout, bytes) or isinstance(hash, bytes) or isinstance(size, bytes):
        raise ValueError
    if kind in (Kind.FILE, Kind.RAW):
        whole = len(data) + sum(parts)
        if len(parts) != len(links) or size not in (None, whole):
            raise ValueError
        size = whole
    return Node(kind, data, links, size or 0, parts, fanout, hash)


def _link(raw: bytes) -> Link:
    found = dict(_fields(raw))
    address, name, total = found[1], found.get(2, b""), found.get(3, 0)
    if not isinstance(address, bytes) or not isinstance(name, bytes) or not isinstance(total, int):
        raise ValueError
    cid, end = decode(address)
    if end != len(address):
        raise ValueError
    return Link(cid, name.decode(), total)


def _number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(value)) + value


def _fields(raw: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Fields of a protobuf message, in order. Raises ValueError."""
    at = 0
    while at < len(raw):
        key, at = read_varint(raw, at)
        value, at = read_varint(raw, at)
        if key & 7 == 0:
            yield key >> 3, value
        elif key & 7 == 2 and at + value <= len(raw):
            yield key >> 3, raw[at : at + value]
            at += value
        else:
            raise ValueError("a field of an unknown type, or cut off")
