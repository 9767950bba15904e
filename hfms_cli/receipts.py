"""What was read of files, for as long as they have not changed since."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import msgspec

__all__ = ["Receipts", "Stamp"]


class Stamp(msgspec.Struct, frozen=True, array_like=True):
    """What changes when a file is written; the time of the last change of the inode cannot be set by hand."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, stat: os.stat_result) -> Stamp:
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


class Receipt(msgspec.Struct, frozen=True):
    stamp: Stamp
    sha256: str
    """Or git's SHA-1, where that is what proves the file; their lengths tell them apart."""


class Receipts:
    """Hashes of files that have not changed since they were read, so that a start does not read them all again.

    Kept in a small JSON file; where two processes write it at once one loses its news, and hashes again.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._known: dict[str, Receipt] = {}
        if path is not None:
            try:
                self._known = msgspec.json.decode(path.read_bytes(), type=dict[str, Receipt])
            except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
                self._known = {}

    def digest(self, file: Path, stat: os.stat_result) -> str | None:
        receipt = self._known.get(str(file))
        return receipt.sha256 if receipt and receipt.stamp == Stamp.of(stat) else None

    def add(self, hashed: Iterable[tuple[Path, os.stat_result, str]]) -> None:
        """Note hashes, and forget files that are gone."""
        news = {str(file): Receipt(Stamp.of(stat), digest) for file, stat, digest in hashed}
        if not news:
            return
        with self._lock:
            self._known = {f: r for f, r in self._known.items() if os.path.exists(f)} | news
            if self._path is not None:
                self._write(self._path)

    def _write(self, path: Path) -> None:
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        with suppress(OSError):  # a disk that is full or read-only costs speed, not safety
            path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(msgspec.json.encode(self._known))
            draft.replace(path)
