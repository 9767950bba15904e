"""A file that is being fetched: its bytes in their places, and behind them how far each piece of it is.

    0 ... size      the file's bytes; a hole where none have come yet
    size ...        MAGIC, then for each piece how many of its bytes are here, 8 bytes a piece

The count of a piece is written after its bytes. So a process may be killed between any two instructions: what is
counted is here, and whoever comes next goes on behind it. Pieces are written by one thread each, in any order.

What the bytes are worth only a hash can tell; and after a power cut that alone counts, since nothing is synced.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

PIECE = 16 * 2**20
"""Bytes: large enough that asking for one costs little, small enough that a few connections share a file evenly."""

MAGIC = b"hfms part 1\n" + struct.pack("<I", PIECE)
SUFFIX = ".hfms-part"


class Partial:
    """Use it in a `with`; `finish` makes the file of it, and otherwise it stays for the next try."""

    def __init__(self, path: Path, size: int) -> None:
        """Go on with what is at `path`, or begin there. size: of the whole file, in bytes. Raises OSError."""
        self.path = path
        self.size = size
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._counts = self._read()
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Partial:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    @property
    def pieces(self) -> Sequence[int]:
        """Numbers of all pieces."""
        return range(len(self._counts))

    @property
    def here(self) -> int:
        """Bytes that have come."""
        return sum(self._counts)

    def next(self, piece: int) -> int:
        """Where the first byte of a piece belongs that has not come."""
        return piece * PIECE + self._counts[piece]

    def piece(self, at: int) -> int:
        """The piece that a byte belongs to."""
        return at // PIECE

    def end(self, piece: int) -> int:
        """Where the next piece begins, or the file ends."""
        return piece * PIECE + self._length(piece)

    def left(self, piece: int) -> int:
        """Bytes of a piece that have not come."""
        return self._length(piece) - self._counts[piece]

    def write(self, piece: int, data: bytes) -> None:
        """Add bytes to a piece, behind those that it has; never more than are `left`. Raises OSError."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self._fd, view, self.next(piece))
            self._count(piece, self._counts[piece] + written)
            view = view[written:]

    def read(self, first: int, count: int) -> bytes:
        """Some of the bytes that are here."""
        return os.pread(self._fd, count, first)

    def finish(self, final: Path) -> None:
        """Make it a file of its own, and only that; every byte must have come. Raises OSError."""
        os.ftruncate(self._fd, self.size)
        self.path.replace(final)

    def discard(self) -> None:
        """Delete it: its bytes are wrong."""
        self.path.unlink(missing_ok=True)

    def _length(self, piece: int) -> int:
        return min(PIECE, self.size - piece * PIECE)

    def _count(self, piece: int, count: int) -> None:
        os.pwrite(self._fd, struct.pack("<Q", count), self.size + len(MAGIC) + 8 * piece)
        self._counts[piece] = count

    def _read(self) -> list[int]:
        """The counts, where they can be believed; else none has come."""
        number = -(-self.size // PIECE)
        length = os.fstat(self._fd).st_size
        if number and length == self.size:  # killed within `finish`
            return [min(PIECE, self.size - i * PIECE) for i in range(number)]
        tail = os.pread(self._fd, len(MAGIC) + 8 * number, self.size)
        if length == self.size + len(MAGIC) + 8 * number and tail.startswith(MAGIC):
            counts = list(struct.unpack_from(f"<{number}Q", tail, len(MAGIC)))
            if all(count <= min(PIECE, self.size - i * PIECE) for i, count in enumerate(counts)):
                return counts
        os.ftruncate(self._fd, 0)
        os.ftruncate(self._fd, self.size + len(MAGIC) + 8 * number)
        os.pwrite(self._fd, MAGIC, self.size)
        return [0] * number
