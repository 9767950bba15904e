"""Models on this disk that have a CID, whole, and those that are on their way.

    <root>/<CID>/manifest.json    <root>/<CID>/files/...
    <root>/.fetch-<CID>/files/    one that is not whole yet, as far as it goes

What was written stays when a fetch ends early, also by `kill -9`: the next one checks each block in its place, and
fetches what is not right.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec

from hfms_cli import shelf
from hfms_cli.errors import BadRequest, FetchFailed, ModelNotFound, VerifyFailed
from hfms_cli.hookspecs import Progress
from hfms_cli.ipfs import Cid, Entry, Fetch, parse, walk
from hfms_cli.types import Leftover, Manifest, ModelFile, ModelName

__all__ = ["Hashed", "Kept"]

Hashed = tuple[Path, os.stat_result, str]
"""A file, how it was when it was hashed, and its SHA-256."""

ABANDONED_AFTER = 24 * 3600
"""Seconds without a change, after which what is not whole is deleted."""


class Kept:
    """The models below one folder, each by the CID that it came by."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._hashed: list[Hashed] = []

    def folder(self, cid: Cid) -> Path:
        return self.root / str(cid)

    def find(self, cid: Cid) -> Manifest | None:
        """What is on this disk, where it is whole."""
        return shelf.kept(self.folder(cid))

    def all(self) -> Iterator[tuple[Cid, Manifest]]:
        for folder in sorted(self.root.iterdir()) if self.root.is_dir() else []:
            if folder.name.startswith("."):
                continue
            try:
                cid = parse(folder.name)
            except BadRequest:
                continue
            if kept := self.find(cid):
                yield cid, kept

    def remove(self, cid: Cid, name: ModelName) -> None:
        folder = self.folder(cid)
        if not folder.is_dir():
            raise ModelNotFound(f"`{name}` is not on this disk.", param="model")
        shelf.delete(self.root, folder)

    async def fetch(
        self, cid: Cid, manifest: Manifest, chosen: Mapping[str, Entry], fetch: Fetch, progress: Progress
    ) -> Path:
        """Write the files of a model, go on where an earlier fetch ended, and answer their folder.

        chosen: the files to take, by path. Each is kept with its SHA-256, which must be that of the manifest, where
        that has one. Raises VerifyFailed, and FetchFailed, of which a full disk is one.
        """
        try:
            async with self._draft(cid) as draft:
                if await asyncio.to_thread(self.find, cid):  # another process was quicker
                    return self.folder(cid) / "files"
                _refuse_what_does_not_fit(chosen, draft)
                files = await _write(fetch, chosen, draft / "files", progress)
                _refuse_other_files(manifest, files, draft)
                whole = msgspec.structs.replace(manifest, files=files)
                (draft / "manifest.json").write_bytes(msgspec.json.encode(whole))
                await asyncio.to_thread(self._put, draft, cid)
                self._hashed += [
                    (path, path.stat(), f.sha256)
                    for f in files
                    if f.sha256 and (path := (self.folder(cid) / "files" / f.path).resolve())
                ]
        except OSError as exc:
            raise FetchFailed(f"The cache of models cannot be written: {exc.strerror}.") from exc
        return self.folder(cid) / "files"

    def hashed(self) -> list[Hashed]:
        """What was hashed while it was written, since this was last asked."""
        taken, self._hashed = self._hashed, []
        return taken

    def leftovers(self, about: str) -> Iterator[Leftover]:
        """What fetches that ended early have left."""
        return shelf.leftovers(self.root, about)

    @asynccontextmanager
    async def _draft(self, cid: Cid) -> AsyncGenerator[Path, None]:
        """The folder of a fetch that is under way, for one process at a time."""
        from filelock import AsyncFileLock

        locks, draft = self.root / ".locks", self.root / f".fetch-{cid}"
        locks.mkdir(parents=True, exist_ok=True)
        async with AsyncFileLock(locks / str(cid)):
            await asyncio.to_thread(self._sweep, draft)
            draft.mkdir(exist_ok=True)
            os.utime(draft)
            yield draft

    def _sweep(self, own: Path) -> None:
        for left in self.root.glob(".fetch-*"):
            with suppress(FileNotFoundError):
                if left != own and time.time() - left.stat().st_mtime > ABANDONED_AFTER:
                    shutil.rmtree(left, ignore_errors=True)

    def _put(self, draft: Path, cid: Cid) -> None:
        folder = self.folder(cid)
        if folder.exists():  # half deleted, or by another program
            shelf.delete(self.root, folder)
        draft.rename(folder)


async def _write(fetch: Fetch, chosen: Mapping[str, Entry], target: Path, progress: Progress) -> tuple[ModelFile, ...]:
    """Write the files, each block checked, and answer them with their hashes, for the checks of later loads."""
    total, done, files = sum(e.size for e in chosen.values()), 0, []

    def wrote(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    progress(0, total)
    for path, entry in chosen.items():
        hashed = hashlib.sha256()
        await walk.write_file(fetch, entry, target / path, wrote, resume=True, hashed=hashed)
        os.utime(target.parent)  # so that nobody takes it for abandoned
        files.append(ModelFile(path, entry.size, hashed.hexdigest()))
    return tuple(files)


def _refuse_other_files(manifest: Manifest, files: Sequence[ModelFile], draft: Path) -> None:
    """Right by their CIDs is not enough where the manifest has hashes of its own."""
    known = {f.path: f.sha256 for f in manifest.files if f.sha256 is not None}
    for file in files:
        if file.sha256 != known.get(file.path, file.sha256):
            shutil.rmtree(draft, ignore_errors=True)
            raise VerifyFailed(f"`{file.path}` has not the SHA-256 that its manifest says.")


def _refuse_what_does_not_fit(chosen: Mapping[str, Entry], draft: Path) -> None:
    here = 0
    for path in chosen:
        with suppress(OSError):
            here += (draft / "files" / path).stat().st_size
    size, free = sum(e.size for e in chosen.values()), shutil.disk_usage(draft).free
    if size - here > free:
        raise FetchFailed(f"The model needs {size - here:,} bytes of disk, and {free:,} are free in the cache.")
