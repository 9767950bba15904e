"""Is what lies on the disk what the manifest says? Asked after every fetch, and before every load."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from pathlib import Path
from typing import BinaryIO

from hfms_cli.errors import VerifyFailed
from hfms_cli.hookspecs import Progress
from hfms_cli.receipts import Receipts, Stamp
from hfms_cli.types import Manifest, ModelFile

__all__ = ["RECEIPTS", "examine", "verify"]

RECEIPTS = "verified.json"
"""The file of receipts, in the folder of what hfms knows between runs."""

AT_ONCE = 4
_CHUNK = 2**20


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
