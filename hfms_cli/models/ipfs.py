"""The storage behind `ipfs://CID`: models that are named by what they are, from all content stores together."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from pathlib import Path

import msgspec
import structlog

from hfms_cli.errors import BadRequest, ModelNotFound
from hfms_cli.hookspecs import Progress
from hfms_cli.ipfs import Cid, Entry, Fetch, parse, walk
from hfms_cli.model_files import SeveralModels, choose, gguf_models, no_model
from hfms_cli.models.content import Content
from hfms_cli.models.kept import Hashed, Kept
from hfms_cli.types import Leftover, Manifest, ModelFile, ModelName

__all__ = ["IpfsModels", "cache_folder"]

log = structlog.get_logger("hfms.models")

GGUF = "model.gguf"
"""What a GGUF file is called that has a CID and no name."""


class IpfsModels:
    """Models by their CIDs."""

    name = "ipfs"

    def __init__(self, content: Content, root: Path) -> None:
        self.content = content
        self.root = root
        self._models = Kept(root)

    def claims(self, name: ModelName) -> bool:
        return name.scheme == "ipfs"

    async def find(self, name: ModelName) -> Manifest | None:
        fetch = self.content.fetch()
        cid = await self._resolve(fetch, name)
        if kept := await asyncio.to_thread(self._models.find, cid):
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
        cid = parse(manifest.revision)
        if kept := await asyncio.to_thread(self._models.find, cid):
            progress(kept.size, kept.size)
            return self._models.folder(cid) / "files"
        fetch = self.content.fetch()
        chosen = await _choose(fetch, cid, manifest.name)
        named = msgspec.structs.replace(manifest, name=ModelName("ipfs", str(cid)))
        folder = await self._models.fetch(cid, named, chosen, fetch, progress)
        log.info("model fetched", cid=str(cid), served_bytes=dict(fetch.served_bytes), tried=fetch.tried)
        return folder

    async def list(self) -> Sequence[Manifest]:
        return await asyncio.to_thread(lambda: [manifest for _, manifest in self._models.all()])

    async def remove(self, manifest: Manifest) -> None:
        self._models.remove(parse(manifest.revision), manifest.name)

    def hashed(self) -> Iterable[Hashed]:
        return self._models.hashed()

    def leftovers(self) -> Iterable[Leftover]:
        return self._models.leftovers("a broken pull from IPFS")

    async def _resolve(self, fetch: Fetch, name: ModelName) -> Cid:
        if name.revision:
            raise BadRequest("A CID needs no revision: it always means the same bytes.", param="model")
        return await self.content.resolve(fetch, name.rest)


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
