"""CIDs: names that are made of what they name, so that nobody has to be believed.

    cid = parse("bafkrei...")           any form that people write; raises BadRequest
    cid = Cid.of("raw", data)           the name of a block
    check(cid, data)                    raises VerifyFailed where the block is not the one named

A CID prints as version 1 in base32, or as `Qm...` where it is of version 0. What is printed is made from the bytes and
never from what somebody wrote, so it is safe as a file's name and as an argument of a program.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass

from hfms_cli.errors import BadRequest, VerifyFailed

__all__ = ["CODECS", "MAX_BLOCK", "Cid", "check", "parse", "read_varint", "varint"]

CODECS = {"raw": 0x55, "dag-pb": 0x70, "dag-cbor": 0x71}
MAX_BLOCK = 2 * 2**20
"""Bytes of the largest block that nodes pass on (bitswap's limit)."""

LONGEST = 256
SHA2_256, IDENTITY = 0x12, 0x00
_HASHES: dict[int, Callable[[bytes], bytes]] = {
    SHA2_256: lambda data: hashlib.sha256(data).digest(),
    0x13: lambda data: hashlib.sha512(data).digest(),
    0x16: lambda data: hashlib.sha3_256(data).digest(),
    0xB220: lambda data: hashlib.blake2b(data, digest_size=32).digest(),
    IDENTITY: bytes,
}
_LENGTHS = {SHA2_256: 32, 0x13: 64, 0x16: 32, 0xB220: 32}
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_BASE36 = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class Cid:
    """Version, codec (0x55 raw, 0x70 dag-pb), kind of hash, and the hash."""

    version: int
    codec: int
    hash: int
    digest: bytes

    @classmethod
    def of(cls, codec: str, data: bytes) -> Cid:
        """The CID of a block. codec: a name of `CODECS`."""
        return cls(1, CODECS[codec], SHA2_256, hashlib.sha256(data).digest())

    def __bytes__(self) -> bytes:
        multihash = varint(self.hash) + varint(len(self.digest)) + self.digest
        return multihash if self.version == 0 else b"\x01" + varint(self.codec) + multihash

    def __str__(self) -> str:
        if self.version == 0:
            return _to_digits(bytes(self), _BASE58)
        return "b" + base64.b32encode(bytes(self)).decode().lower().rstrip("=")

    @property
    def inline(self) -> bytes | None:
        """The block itself, where the CID holds it instead of a hash."""
        return self.digest if self.hash == IDENTITY else None

    def same_block(self, other: Cid) -> bool:
        """Whether both name the same bytes, read in the same way."""
        return (self.codec, self.hash, self.digest) == (other.codec, other.hash, other.digest)


def parse(text: str) -> Cid:
    """Read a CID in base58, base32, base36 or base16. Raises BadRequest (`param` is `cid`)."""
    try:
        if len(text) > LONGEST or not text.isascii():
            raise ValueError
        old = len(text) == 46 and text.startswith("Qm")
        raw = _from_digits(text, _BASE58) if old else _decode(text)
        cid, end = decode(raw)
        if end != len(raw):
            raise ValueError
        return cid
    except (ValueError, IndexError):
        shown = text if len(text) <= 64 else text[:64] + "…"
        raise BadRequest(f"{shown!r} is no CID that hfms can check.", param="cid", code="invalid_cid") from None


def decode(raw: bytes, start: int = 0) -> tuple[Cid, int]:
    """A CID in binary, and where it ends. Raises ValueError."""
    if raw[start : start + 2] == b"\x12\x20":
        end = start + 34
        if len(raw) < end:
            raise ValueError("the CID is cut off")
        return Cid(0, CODECS["dag-pb"], SHA2_256, bytes(raw[start + 2 : end])), end
    version, at = read_varint(raw, start)
    if version != 1:
        raise ValueError("no CID of version 0 or 1")
    codec, at = read_varint(raw, at)
    kind, at = read_varint(raw, at)
    size, at = read_varint(raw, at)
    # What cannot be checked is of no use here; a short hash would be easy to forge.
    if kind not in _HASHES or size != _LENGTHS.get(kind, size) or size > 128 or len(raw) < at + size:
        raise ValueError("a hash of an unknown kind or length")
    return Cid(1, codec, kind, bytes(raw[at : at + size])), at + size


def check(cid: Cid, data: bytes) -> None:
    """Raise VerifyFailed where the bytes are not those that the CID names."""
    if not hmac.compare_digest(_HASHES[cid.hash](data), cid.digest):
        raise VerifyFailed(f"The bytes that came are not those of `{cid}`.")


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def read_varint(raw: bytes, start: int = 0) -> tuple[int, int]:
    """A number of up to 63 bits, and where it ends. Raises ValueError."""
    number = 0
    for i in range(9):
        if start + i >= len(raw):
            break
        byte = raw[start + i]
        number |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return number, start + i + 1
    raise ValueError("a number is cut off or too long")


def _decode(text: str) -> bytes:
    match text[0], text[1:]:
        case "b", rest if rest == rest.lower():
            return base64.b32decode(rest.upper() + "=" * (-len(rest) % 8))
        case "B", rest if rest == rest.upper():
            return base64.b32decode(rest + "=" * (-len(rest) % 8))
        case "z", rest:
            return _from_digits(rest, _BASE58)
        case "k", rest:
            return _from_digits(rest, _BASE36)
        case "f", rest:
            return bytes.fromhex(rest) if rest.isalnum() else b""
    raise ValueError("an unknown base")


def _from_digits(text: str, alphabet: str) -> bytes:
    number = 0
    for character in text:
        number = number * len(alphabet) + alphabet.index(character)
    zeros = len(text) - len(text.lstrip(alphabet[0]))
    return bytes(zeros) + number.to_bytes((number.bit_length() + 7) // 8, "big")


def _to_digits(raw: bytes, alphabet: str) -> str:
    number, digits = int.from_bytes(raw, "big"), ""
    while number:
        number, digit = divmod(number, len(alphabet))
        digits = alphabet[digit] + digits
    return alphabet[0] * (len(raw) - len(raw.lstrip(b"\0"))) + digits
