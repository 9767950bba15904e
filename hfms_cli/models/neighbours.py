"""The storage `neighbours`: models by their names from other hfms servers, where a trusted publisher signed for them.

A neighbour is not believed, only its publisher is: the index says which CID a name has, the manifest under that CID
says which files, every block is checked against its CID and every file against its SHA-256. What is not signed as it
should be is refused, and another storage is asked; nothing makes hfms take it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Protocol

import msgspec
import structlog

from hfms_cli.errors import FetchFailed, HfmsError, VerifyFailed
from hfms_cli.hookspecs import Progress
from hfms_cli.ipfs import Entry, parse, walk
from hfms_cli.models.content import Content
from hfms_cli.models.index import Clock, Offer, Seen, read_index, utc_now
from hfms_cli.models.kept import Hashed, Kept
from hfms_cli.models.publish import SIGNATURE_FILE, PublishedManifest, read_manifest
from hfms_cli.models.trust import Trust
from hfms_cli.types import Leftover, Manifest, ModelFile, ModelName

__all__ = ["Neighbours", "Offering"]

log = structlog.get_logger("hfms.models")

LONGEST_MANIFEST = 4 * 2**20


class Offering(Protocol):
    """A content store that knows what neighbours offer."""

    async def indexes(self) -> Sequence[tuple[str, bytes | HfmsError]]:
        """Of each neighbour its name and its signed index, or why there is none."""
        ...


class Neighbours:
    """Models that neighbours have."""

    name = "neighbours"

    def __init__(
        self,
        offering: Offering,
        content: Content,
        trust: Trust,
        root: Path,
        *,
        seen: Seen | None = None,
        clock: Clock = utc_now,
    ) -> None:
        self.root = root
        self._offering = offering
        self._content = content
        self._trust = trust
        self._models = Kept(root)
        self._seen = seen or Seen()
        self._clock = clock
        self._signed: dict[str, PublishedManifest] = {}

    def claims(self, name: ModelName) -> bool:
        return name.scheme == ""

    async def find(self, name: ModelName) -> Manifest | None:
        """What a trusted publisher has signed for. Raises VerifyFailed where there were only others."""
        refused: dict[str, str] = {}
        silent: dict[str, str] = {}
        for neighbour, raw in await self._offering.indexes():
            if isinstance(raw, HfmsError):
                silent[neighbour] = raw.message
                continue
            try:
                if found := await self._offered(raw, name):
                    return found
            except HfmsError as exc:
                refused[neighbour] = exc.message
                log.warning("a neighbour's offer is refused", neighbour=neighbour, model=str(name), why=exc.message)
        if refused:
            raise VerifyFailed(f"What neighbours offer is refused. {_told(refused)}", param="model")
        if kept := await asyncio.to_thread(self._kept, name):
            return kept
        if silent:
            raise FetchFailed(f"Neighbours did not answer. {_told(silent)}", param="model")
        return None

    async def fetch(self, manifest: Manifest, progress: Progress) -> Path:
        cid = parse(manifest.source.removeprefix("ipfs://"))
        if kept := await asyncio.to_thread(self._models.find, cid):
            progress(kept.size, kept.size)
            return self._models.folder(cid) / "files"
        signed = self._signed.get(manifest.source)
        if signed is None:
            raise FetchFailed(f"`{manifest.name}` was never found, and so nobody has signed for it.")
        # The files as their publisher has signed for them, whatever else is in the folder.
        chosen = {f.path: Entry(f.path, f.cid, "file", f.size) for f in signed.files}
        fetch = self._content.fetch()
        folder = await self._models.fetch(cid, manifest, chosen, fetch, progress)
        log.info(
            "model fetched",
            model=str(manifest.name),
            cid=str(cid),
            served_bytes=dict(fetch.served_bytes),
            tried=fetch.tried,
        )
        return folder

    async def list(self) -> Sequence[Manifest]:
        return await asyncio.to_thread(lambda: [manifest for _, manifest in self._models.all()])

    async def remove(self, manifest: Manifest) -> None:
        self._models.remove(parse(manifest.source.removeprefix("ipfs://")), manifest.name)

    def hashed(self) -> Iterable[Hashed]:
        return self._models.hashed()

    def leftovers(self) -> Iterable[Leftover]:
        return self._models.leftovers("a broken pull from a neighbour")

    async def _offered(self, raw: bytes, name: ModelName) -> Manifest | None:
        """What an index has for a name; None where it has nothing. Raises VerifyFailed, FetchFailed, NotFound."""
        index = await asyncio.to_thread(read_index, raw, self._trust, self._seen, self._clock())
        offer = index.find(name)
        if offer is None:
            return None
        if not self._trust.speaks_for(index.publisher, offer.name):
            raise VerifyFailed(f"`{index.publisher}` is trusted, but not to speak for `{offer.name}`.")
        said = await self._manifest(offer, index.publisher)
        source = f"ipfs://{parse(offer.cid)}"
        self._signed[source] = said
        return Manifest(
            name=name,
            storage=self.name,
            revision=said.revision,
            files=tuple(ModelFile(f.path, f.size, f.sha256) for f in said.files),
            source=source,
        )

    async def _manifest(self, offer: Offer, publisher: str) -> PublishedManifest:
        fetch = self._content.fetch()
        cid = await walk.resolve(fetch, parse(offer.cid), [SIGNATURE_FILE])
        taken = bytearray()
        async with aclosing(walk.cat(fetch, cid)) as pieces:
            async for piece in pieces:
                taken += piece
                if len(taken) > LONGEST_MANIFEST:
                    raise VerifyFailed("Its manifest is too long to be read.")
        return await asyncio.to_thread(read_manifest, bytes(taken), offer, publisher)

    def _kept(self, name: ModelName) -> Manifest | None:
        """What was fetched from neighbours before, and last of what the name may mean."""
        found = [
            (self._models.folder(cid).stat().st_mtime, kept)
            for cid, kept in self._models.all()
            if kept.name.rest == name.rest and name.revision in (kept.name.revision, kept.revision)
        ]
        if not found:
            return None
        return msgspec.structs.replace(max(found, key=lambda f: f[0])[1], name=name)


def _told(whys: dict[str, str]) -> str:
    return " ".join(f"{neighbour}: {why}" for neighbour, why in whys.items())
