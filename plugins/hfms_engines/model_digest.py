"""What a model's folder holds, as one digest. The hash of a file is remembered until it changes: reading 8 GB takes
longer than loading them."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from hfms_cli import Receipts

REMEMBERED = "digests.json"
SETTLED_SECONDS = 2.0
"""A file that has not changed for so long would show it if it did: some file systems have no finer clock."""


def of_model(folder: Path, known_in: Path) -> str:
    """known_in: the folder where hashes are remembered."""
    receipts = Receipts(known_in / REMEMBERED)
    hashed: list[tuple[Path, os.stat_result, str]] = []

    def sha256(file: Path) -> str:
        with file.open("rb") as stream:
            stat = os.fstat(stream.fileno())
            if known := receipts.digest(file, stat):
                return known
            found = hashlib.file_digest(stream, "sha256").hexdigest()
            settled = time.time() - stat.st_ctime > SETTLED_SECONDS
            if settled and os.fstat(stream.fileno()).st_ctime_ns == stat.st_ctime_ns:
                hashed.append((file, stat, found))
        return found

    digest = _digest(sorted(p for p in folder.rglob("*") if p.is_file()), sha256)
    receipts.add(hashed)
    return digest


def of_files(files: Iterable[Path], *more: str) -> str:
    """By names and bytes of files, and by other texts."""
    return _digest(files, lambda file: hashlib.sha256(file.read_bytes()).hexdigest(), *more)


def _digest(files: Iterable[Path], sha256: Callable[[Path], str], *more: str) -> str:
    """32 hexadecimal digits."""
    digest = hashlib.sha256("\n".join(more).encode())
    for file in files:
        digest.update(f"{file.name} {sha256(file)}\n".encode())
    return digest.hexdigest()[:32]
