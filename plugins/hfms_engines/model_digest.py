"""What a model's folder holds, as one digest, which is remembered: reading 8 GB takes longer than loading them.

Remembered by what the file system says of the files, as git does: path, device, inode, size and both times. Nobody can
set the second of those, the time of the last change, and what was changed just now is read again: the next change
may fall into the same tick of the clock.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import msgspec

REMEMBERED = "digests.json"
MOST = 1024
"""Digests that are remembered, the latest."""
SETTLED_SECONDS = 2.0
"""A file that has not changed for so long would show it if it did: some file systems have no finer clock."""


def of_model(folder: Path, known_in: Path) -> str:
    """known_in: the folder where digests are remembered."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    before = _state(files)
    key = of_files((), *map(str, files), *map(str, before))
    memory = known_in / REMEMBERED
    known = _read(memory)
    if found := known.get(key):
        return found
    newest = max((changed for *_, changed in before), default=0) / 1e9
    settled = time.time() - newest > SETTLED_SECONDS
    digest = of_files(files)
    if settled and _state(files) == before:
        with suppress(OSError):  # a full disk costs time alone
            _write(memory, dict([*known.items(), (key, digest)][-MOST:]))
    return digest


def of_files(files: Iterable[Path], *more: str) -> str:
    """32 hexadecimal digits, by names and bytes of files, and by other texts."""
    digest = hashlib.sha256("\n".join(more).encode())
    for file in files:
        with file.open("rb") as stream:
            digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:32]


def _state(files: Iterable[Path]) -> list[tuple[int, ...]]:
    """What a change of a file would change; last, the time of that in nanoseconds."""
    found = [file.stat() for file in files]
    return [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in found]


def _read(memory: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode(memory.read_bytes(), type=dict[str, str])
    except (OSError, msgspec.MsgspecError):  # then everything is read anew
        return {}


def _write(memory: Path, known: dict[str, str]) -> None:
    memory.parent.mkdir(parents=True, exist_ok=True)
    draft = memory.with_name(f".{memory.name}.{os.getpid()}")
    draft.write_bytes(msgspec.json.encode(known))
    draft.replace(memory)
