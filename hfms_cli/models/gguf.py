"""The header of a GGUF file, read with every length and count checked against the file before it is believed.

The layout: magic, version, number of tensors, number of values; then the values (key, type, value); then the tensors
(name, shape, type, offset); then their data. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import struct
from collections import Counter
from pathlib import Path
from typing import BinaryIO, NamedTuple

from hfms_cli.errors import LoadFailed

__all__ = ["GgufHeader", "NeedsMore", "read_gguf"]

# Vocabularies are the longest thing in a header: a quarter of a million tokens take 10 MB.
LONGEST_HEADER = 128 * 2**20
LONGEST_TEXT = 65_535
_READ = 2**20

# Value types of one size, as `struct` calls them; 8 is a string and 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# Tensor types: name, weights in a block, bytes of a block. Type 31 to 33 and 36 to 38 are gone from ggml.
# fmt: off
TENSOR_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}
# fmt: on


class NeedsMore(Exception):
    """The header goes on behind what is known of the file."""


class GgufHeader(NamedTuple):
    """What a GGUF file says of itself. Arrays, and texts of more than 64 KB, are left out of `values`."""

    values: dict[str, str | int | float | bool]
    tensors: int
    parameters: int
    data_bytes: int
    dtype: str
    """The type that most of the parameters have."""

    @property
    def architecture(self) -> str:
        return self.text("general.architecture")

    def text(self, key: str) -> str:
        found = self.values.get(key)
        return found if isinstance(found, str) else ""

    def number(self, key: str) -> int:
        """0 where there is none."""
        found = self.values.get(key)
        return found if isinstance(found, int) and found > 0 else 0


def read_gguf(path: Path, *, known: int | None = None) -> GgufHeader:
    """Read the header and nothing else. Raises LoadFailed where the file is none, is torn, or lies.

    known: how many of its bytes are there, the rest being holes; NeedsMore is raised where the header goes on there.
    """
    try:
        with path.open("rb") as file:
            return _Reader(file, path.name, known).header()
    except OSError as exc:
        raise LoadFailed(f"`{path.name}` cannot be read: {exc.strerror}.") from exc


class _Reader:
    def __init__(self, file: BinaryIO, name: str, known: int | None) -> None:
        self.file = file
        self.name = name
        self.size = os.fstat(file.fileno()).st_size
        self.end = min(self.size, LONGEST_HEADER)
        self.known = self.size if known is None else known
        self.seen = bytearray()
        self.at = 0

    def torn(self, why: str) -> LoadFailed:
        return LoadFailed(f"`{self.name}` is no whole GGUF file: {why}. Fetch it again.")

    def need(self, count: int) -> int:
        """Go on by `count` bytes, and answer where they begin."""
        start, self.at = self.at, self.at + count
        if self.at > self.end:
            raise self.torn("it ends within its header" if self.end == self.size else "its header is too long")
        if self.at > self.known:
            raise NeedsMore
        while len(self.seen) < self.at:
            more = self.file.read(min(max(_READ, self.at - len(self.seen)), self.end - len(self.seen)))
            if not more:
                raise self.torn("it ends within its header")
            self.seen += more
        return start

    def scalar(self, code: str) -> int | float | bool:
        value: int | float | bool = struct.unpack_from("<" + code, self.seen, self.need(struct.calcsize("<" + code)))[0]
        return value

    def count(self, least: int) -> int:
        """A number of things of which each takes `least` bytes or more."""
        (number,) = struct.unpack_from("<Q", self.seen, self.need(8))
        if number * least > self.end - self.at:
            raise self.torn("it counts more than it holds")
        return int(number)

    def text(self) -> str | None:
        length = self.count(1)
        start = self.need(length)
        if length > LONGEST_TEXT:
            return None
        return bytes(self.seen[start : start + length]).decode("utf-8", "replace")

    def value(self) -> str | int | float | bool | None:
        kind = self.scalar("I")
        if kind in _SCALARS:
            return self.scalar(_SCALARS[int(kind)])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise self.torn(f"it has a value of the unknown type {kind}")
        inner = self.scalar("I")
        if inner in _SCALARS:
            width = struct.calcsize("<" + _SCALARS[int(inner)])
            self.need(self.count(width) * width)
        elif inner == _STRING:
            for _ in range(self.count(8)):
                self.need(self.count(1))
        else:
            raise self.torn(f"it has an array of the type {inner}")
        return None

    def header(self) -> GgufHeader:
        start = self.need(4)
        if self.seen[start : self.at] != b"GGUF":
            raise self.torn("it does not begin as one")
        version = self.scalar("I")
        if version not in (2, 3):
            raise self.torn(f"its version is {version}, and only 2 and 3 in little-endian order can be read")
        tensors = self.count(24)
        values = {}
        for _ in range(self.count(13)):
            key = self.text() or ""
            value = self.value()
            if value is not None:
                values[key] = value
        return self.tensors(tensors, values)

    def tensors(self, number: int, values: dict[str, str | int | float | bool]) -> GgufHeader:
        parameters: Counter[str] = Counter()
        data = 0
        for _ in range(number):
            self.text()
            dimensions = int(self.scalar("I"))
            if dimensions > 8:
                raise self.torn(f"a tensor has {dimensions} dimensions")
            elements = math.prod(int(self.scalar("Q")) for _ in range(dimensions))
            kind, offset = int(self.scalar("I")), int(self.scalar("Q"))
            name, block, width = TENSOR_TYPES.get(kind, (f"type {kind}", 1, 0))
            if elements > 8 * self.size:
                raise self.torn("a tensor is larger than the file")
            parameters[name] += elements
            data = max(data, offset + elements // block * width)
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise self.torn(f"its alignment is {alignment}")
        start = -(-self.at // alignment) * alignment
        if start + data > self.size:
            raise self.torn(f"it has {self.size:,} bytes of {start + data:,}")
        dtype = parameters.most_common(1)[0][0] if parameters else ""
        return GgufHeader(values, number, parameters.total(), max(self.size - start, 0), dtype)
