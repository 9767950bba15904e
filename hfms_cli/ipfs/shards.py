"""Folders that are too large for one block: a HAMT, as Kubo builds it (256 ways, murmur3 of the names)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hfms_cli.ipfs.cid import Cid
from hfms_cli.ipfs.unixfs import Kind, Link, encode_node

__all__ = ["FANOUT", "MURMUR3", "PREFIX", "shards"]

FANOUT, MURMUR3 = 256, 0x22
PREFIX = 2
"""Characters of the slot's number before each name in a shard."""

_MASK = 2**64 - 1


def shards(entries: Sequence[Link], put: Callable[[bytes], Cid], depth: int = 0) -> tuple[Cid, int]:
    """Write a folder as shards. Answers the top one's CID and the bytes of all blocks below and with it."""
    slots: dict[int, list[Link]] = {}
    for entry in entries:
        slots.setdefault(murmur3(entry.name.encode()).to_bytes(8, "big")[depth], []).append(entry)
    links = []
    for slot in sorted(slots):
        inside = slots[slot]
        if len(inside) == 1:
            links.append(Link(inside[0].cid, f"{slot:02X}{inside[0].name}", inside[0].total))
        else:
            cid, total = shards(inside, put, depth + 1)
            links.append(Link(cid, f"{slot:02X}", total))
    bits = sum(1 << slot for slot in slots)
    data = bits.to_bytes((bits.bit_length() + 7) // 8, "big")
    block = encode_node(Kind.SHARD, data=data, links=links, fanout=FANOUT, hash=MURMUR3)
    return put(block), len(block) + sum(link.total for link in links)


def murmur3(data: bytes) -> int:
    """The first half of MurmurHash3 x64 128, with seed 0."""
    one, two = 0x87C37B91114253D5, 0x4CF5AD432745937F
    h1 = h2 = 0
    whole = len(data) // 16 * 16
    for at in range(0, whole, 16):
        k1, k2 = (int.from_bytes(data[at + i : at + i + 8], "little") for i in (0, 8))
        h1 ^= _rotate(k1 * one, 31) * two & _MASK
        h1 = (_rotate(h1, 27) + h2) * 5 + 0x52DCE729 & _MASK
        h2 ^= _rotate(k2 * two, 33) * one & _MASK
        h2 = (_rotate(h2, 31) + h1) * 5 + 0x38495AB5 & _MASK
    k1, k2 = (int.from_bytes(data[whole + i : whole + i + 8], "little") for i in (0, 8))
    h2 ^= _rotate(k2 * two, 33) * one & _MASK
    h1 ^= _rotate(k1 * one, 31) * two & _MASK
    h1, h2 = h1 ^ len(data), h2 ^ len(data)
    h1 = h1 + h2 & _MASK
    h2 = h2 + h1 & _MASK
    return _mix(h1) + _mix(h2) & _MASK


def _rotate(value: int, by: int) -> int:
    value &= _MASK
    return (value << by | value >> 64 - by) & _MASK


def _mix(k: int) -> int:
    k = (k ^ k >> 33) * 0xFF51AFD7ED558CCD & _MASK
    k = (k ^ k >> 33) * 0xC4CEB9FE1A85EC53 & _MASK
    return k ^ k >> 33
