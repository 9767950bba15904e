"""Is what lies on the disk what the manifest says? Asked after every fetch, and before every load."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import msgspec

from hfms_cli.errors import VerifyFailed
from hfms_cli.hookspecs import Progress
from hfms_cli.types import Manifest, ModelFile

__all__ = ["RECEIPTS", "Receipts", "examine", "verify"]

RECEIPTS = "verified.json"
"""The file of receipts, in the folder of what hfms knows between runs."""

AT_ONCE = 4
_CHUNK = 2**20


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


async def verify(manifest: Manifest, folder: Path, *, receipts: Receipts | None = None, force: bool = False) -> None:
    """Check that each file of the manifest is in the folder, with its size and, where there is one, its hash.

    receipts: hashes of earlier runs. force: hash again what has a receipt.
    Raises VerifyFailed, which names the first bad file and what differs.
    """
    for bad in (await examine(manifest, folder, receipts=receipts, force=force)).values():
        raise bad


async def examine(
    manifest: Manifest,
    folder: Path,
    *,
    receipts: Receipts | None = None,
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> dict[str, VerifyFailed]:
    """The files that are not as the manifest says, and what is wrong with each; as `verify`."""
    receipts = receipts or Receipts()
    gate, stop = asyncio.Semaphore(AT_ONCE), threading.Event()
    done = 0

    async def check(file: ModelFile) -> tuple[Path, os.stat_result, str] | None:
        nonlocal done
        async with gate:
            try:
                return await asyncio.to_thread(_check, file, folder, receipts, force, stop)
            finally:
                done += file.size
                progress(done, manifest.size)

    progress(0, manifest.size)
    try:
        checked = await asyncio.gather(*map(check, manifest.files), return_exceptions=True)
    finally:
        stop.set()  # a thread cannot be cancelled, only asked
    await asyncio.to_thread(receipts.add, [c for c in checked if isinstance(c, tuple)])
    bad: dict[str, VerifyFailed] = {}
    for file, outcome in zip(manifest.files, checked, strict=True):
        if isinstance(outcome, VerifyFailed):
            bad[file.path] = outcome
        elif isinstance(outcome, BaseException):
            raise outcome
    return bad


def _check(
    file: ModelFile, folder: Path, receipts: Receipts, force: bool, stop: threading.Event
) -> tuple[Path, os.stat_result, str] | None:
    """What was hashed, where anything had to be. Runs in a thread."""
    try:
        path = _inside(folder, file)
        with path.open("rb") as opened:
            stat = os.fstat(opened.fileno())
            if stat.st_size != file.size:
                raise VerifyFailed(_bad(file, f"has {stat.st_size:,} bytes and should have {file.size:,}"))
            wanted = (file.sha256 or file.oid or "").lower()
            if not wanted:
                return None
            known = None if force else receipts.digest(path, stat)
            digest = known or _hash(opened, file, stop)
            unchanged = Stamp.of(os.fstat(opened.fileno())) == Stamp.of(stat)
    except OSError as exc:
        raise VerifyFailed(_bad(file, f"cannot be read: {exc.strerror}")) from exc
    if digest != wanted:
        kind = "SHA-256" if file.sha256 else "git hash"
        raise VerifyFailed(_bad(file, f"has the {kind} {digest[:12]}… and should have {wanted[:12]}…"))
    return (path, stat, digest) if known is None and unchanged else None


def _hash(opened: BinaryIO, file: ModelFile, stop: threading.Event) -> str:
    """The SHA-256 of a file or, where the manifest knows only that one, git's SHA-1."""
    digest = hashlib.sha256()
    if not file.sha256:
        digest = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    while (chunk := opened.read(_CHUNK)) and not stop.is_set():
        digest.update(chunk)
    return digest.hexdigest()


def _inside(folder: Path, file: ModelFile) -> Path:
    """The file's real path. Links may lead within the folder, and from a hub snapshot into its cache's blobs."""
    try:
        path = (folder / file.safe_path()).resolve(strict=True)
    except ValueError as exc:
        raise VerifyFailed(f"The model lists an {exc}.") from exc
    except RuntimeError as exc:
        raise VerifyFailed(_bad(file, "is a link to itself")) from exc
    home = folder.resolve()
    roots = [home]
    if home.parent.name == "snapshots" and home.parents[1].name.startswith(
        "models--"
    ):  # <cache>/models--org--name/snapshots/<commit>
        roots += [home.parents[1] / "blobs", home.parents[2] / "blobs"]
    if not any(path.is_relative_to(root) for root in roots):
        raise VerifyFailed(_bad(file, "is a link that leads out of the model's folder"))
    if not path.is_file():
        raise VerifyFailed(_bad(file, "is no regular file"))
    return path


def _bad(file: ModelFile, why: str) -> str:
    return f"`{file.path}` {why}. Fetch what is bad again: `hfms models verify --repair`."
