"""The storage behind `ipfs://CID`: models that are named by what they are, from all content stores together.

A model is kept as    <cache>/ipfs/<CID>/manifest.json
                      <cache>/ipfs/<CID>/files/
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing, suppress
from pathlib import Path

import msgspec
import structlog

from hfms_cli.errors import BadRequest, FetchFailed, ModelNotFound
from hfms_cli.hookspecs import Progress
from hfms_cli.ipfs import Cid, Entry, Fetch, parse, walk
from hfms_cli.model_files import SeveralModels, choose, gguf_models, no_model
from hfms_cli.models.content import Content
from hfms_cli.types import Leftover, Manifest, ModelFile, ModelName

__all__ = ["IpfsModels", "cache_folder"]

log = structlog.get_logger("hfms.models")

ABANDONED_AFTER = 24 * 3600  # seconds; a fetch that was killed leaves its folder behind
GGUF = "model.gguf"
"""What a GGUF file is called that has a CID and no name."""


class IpfsModels:
    """Models by their CIDs."""

    name = "ipfs"

    def __init__(self, content: Content, root: Path) -> None:
        self.content = content
        self.root = root

    def claims(self, name: ModelName) -> bool:
        return name.scheme == "ipfs"

    async def find(self, name: ModelName) -> Manifest | None:
        fetch = self.content.fetch()
        cid = await self._resolve(fetch, name)
        if kept := await asyncio.to_thread(self._kept, cid):
            return msgspec.structs.replace(kept, name=name)
        chosen = await _choose(fetch, cid, name)
        return Manifest(
            name=name,
            storage=self.name,
            revision=str(cid),
            files=tuple(ModelFile(path, entry.size) for path, entry in chosen.items()),
            source=f"ipfs://{cid}",
        )

    async def fetch(self, manifest: Manifest, progress: Progress) -> Path:
        cid, folder = parse(manifest.revision), self._folder(parse(manifest.revision))
        if kept := await asyncio.to_thread(self._kept, cid):
            progress(kept.size, kept.size)
            return folder / "files"
        fetch = self.content.fetch()
        chosen = await _choose(fetch, cid, manifest.name)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            await asyncio.to_thread(self._sweep)
            _refuse_what_does_not_fit(sum(e.size for e in chosen.values()), self.root)
            with tempfile.TemporaryDirectory(dir=self.root, prefix=".fetch-", ignore_cleanup_errors=True) as temp:
                draft = Path(temp, "new")
                files = await _write(fetch, chosen, draft / "files", progress)
                whole = msgspec.structs.replace(manifest, name=ModelName("ipfs", str(cid)), files=files)
                (draft / "manifest.json").write_bytes(msgspec.json.encode(whole))
                await asyncio.to_thread(self._put, draft, cid)
        except OSError as exc:
            raise FetchFailed(f"The cache of models cannot be written: {exc.strerror}.") from exc
        log.info("model fetched", cid=str(cid), served_bytes=dict(fetch.served_bytes), tried=fetch.tried)
        return folder / "files"

    async def list(self) -> Sequence[Manifest]:
        return await asyncio.to_thread(lambda: list(self._all()))

    async def remove(self, manifest: Manifest) -> None:
        folder = self._folder(parse(manifest.revision))
        if not folder.is_dir():
            raise ModelNotFound(f"`{manifest.name}` is not on this disk.", param="model")
        with tempfile.TemporaryDirectory(dir=self.root, prefix=".fetch-", ignore_cleanup_errors=True) as temp:
            folder.rename(Path(temp, "old"))  # so that it is gone at once, or not at all

    async def _resolve(self, fetch: Fetch, name: ModelName) -> Cid:
        if name.revision:
            raise BadRequest("A CID needs no revision: it always means the same bytes.", param="model")
        return await self.content.resolve(fetch, name.rest)

    def _folder(self, cid: Cid) -> Path:
        return self.root / str(cid)

    def _kept(self, cid: Cid) -> Manifest | None:
        """What is on this disk, where it is whole."""
        folder = self._folder(cid)
        try:
            manifest = msgspec.json.decode((folder / "manifest.json").read_bytes(), type=Manifest)
            sizes = [(folder / "files" / f.safe_path()).stat().st_size for f in manifest.files]
        except (OSError, ValueError, msgspec.MsgspecError):
            return None
        whole = manifest.revision == str(cid) and sizes == [f.size for f in manifest.files]
        return manifest if whole else None

    def _all(self) -> Iterator[Manifest]:
        for folder in sorted(self.root.iterdir()) if self.root.is_dir() else []:
            if folder.name.startswith("."):
                continue
            try:
                kept = self._kept(parse(folder.name))
            except BadRequest:
                continue
            if kept:
                yield kept

    def leftovers(self) -> Iterator[Leftover]:
        """What fetches that were killed have left."""
        for left in self.root.glob(".fetch-*"):
            with suppress(FileNotFoundError):
                yield Leftover(
                    about="a broken pull from IPFS",
                    size=sum(p.stat().st_blocks * 512 for p in left.rglob("*") if p.is_file()),
                    age_seconds=time.time() - left.stat().st_mtime,
                    paths=(str(left),),
                )

    def _sweep(self) -> None:
        for left in self.root.glob(".fetch-*"):
            with suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > ABANDONED_AFTER:
                    shutil.rmtree(left, ignore_errors=True)

    def _put(self, draft: Path, cid: Cid) -> None:
        folder = self._folder(cid)
        if folder.exists() and self._kept(cid):
            return  # another process was quicker
        if folder.exists():
            folder.rename(draft.parent / "old")
        draft.rename(folder)


def cache_folder(configured: str) -> Path:
    """Where models by CID are kept."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hfms"
    return Path(configured or base).expanduser() / "ipfs"


async def _choose(fetch: Fetch, cid: Cid, name: ModelName) -> dict[str, Entry]:
    """The files to take, by their paths. Raises ModelNotFound, BadRequest."""
    found = dict(await walk.files(fetch, cid))
    if [*found] == [""]:
        async with aclosing(walk.cat(fetch, cid)) as pieces:
            if not (await anext(pieces, b"")).startswith(b"GGUF"):
                raise ModelNotFound(f"`{name}` is one file, and no GGUF.", param="model")
        return {GGUF: found[""]}
    for path in found:
        try:
            ModelFile(path, 0).safe_path()
        except ValueError as exc:
            raise BadRequest(f"`{name}` holds an {exc}.", param="model") from exc
    try:
        chosen = choose(found)
    except SeveralModels as exc:
        parts = [gguf_models(found)[m] for m in exc.models]
        models = ", ".join(f"`ipfs://{found[p[0]].cid}` ({p[0]})" for p in parts if len(p) == 1)
        raise BadRequest(f"`{name}` holds several models; name one: {models}.", param="model") from exc
    if not chosen:
        raise ModelNotFound(f"`{name}` {no_model(found)}", param="model")
    return {path: found[path] for path in chosen}


async def _write(fetch: Fetch, chosen: dict[str, Entry], target: Path, progress: Progress) -> tuple[ModelFile, ...]:
    """Write the files, each block checked, and answer them with their hashes, for the checks of later loads."""
    total, done, files = sum(e.size for e in chosen.values()), 0, []

    def wrote(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    progress(0, total)
    for path, entry in chosen.items():
        await walk.write_file(fetch, entry, target / path, wrote)
        files.append(ModelFile(path, entry.size, await asyncio.to_thread(_sha256, target / path)))
    return tuple(files)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _refuse_what_does_not_fit(size: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise FetchFailed(f"The model needs {size:,} bytes of disk, and {free:,} are free in the cache.")
