"""Publishing a model: its files, with a signed manifest beside them, under one CID, and that in the signed index.

    <CID>/hfms.json         the manifest: what the model is, and of each file its size, SHA-256 and CID
    <CID>/hfms.json.sig     the same in a signed envelope
    <CID>/config.json ...   the files

The folder is a model for everybody who knows its CID, with or without hfms.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

import msgspec

from hfms_cli.errors import BadRequest, VerifyFailed
from hfms_cli.hookspecs import Progress
from hfms_cli.ipfs import blocks_of_path, parse, root_of
from hfms_cli.models.content import Content, Receipt
from hfms_cli.models.index import Clock, Index, Offer, utc_now
from hfms_cli.models.publications import Publications
from hfms_cli.models.signing import Signer, open_envelope
from hfms_cli.types import Manifest, ModelFile, ModelName
from hfms_cli.version import __version__

__all__ = ["MANIFEST", "MANIFEST_FILE", "SIGNATURE_FILE", "Published", "publish", "read_manifest", "refuse_name"]

MANIFEST = "application/vnd.hfms.manifest+json"
MANIFEST_FILE, SIGNATURE_FILE = "hfms.json", "hfms.json.sig"


class PublishedFile(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    size: int
    sha256: str
    cid: str


class PublishedManifest(msgspec.Struct, frozen=True, kw_only=True):
    """What `hfms.json` says."""

    name: str
    revision: str
    source: str
    """Where the publisher has it from, for people."""
    license: str
    """As the model's own card names it; empty: it names none."""
    files: tuple[PublishedFile, ...]
    publisher: str
    published_at: datetime
    tool: str


class Published(msgspec.Struct, frozen=True, kw_only=True):
    """What was done."""

    manifest: PublishedManifest
    cid: str
    index: Index
    receipt: Receipt


async def publish(
    manifest: Manifest,
    folder: Path,
    content: Content,
    publications: Publications,
    signer: Signer,
    *,
    name: ModelName,
    license: str = "",
    store: str | None = None,
    progress: Progress = lambda done, total: None,
    clock: Clock = utc_now,
) -> Published:
    """Publish a verified model on this disk under a name. store: where its blocks go; None: the first that keeps any.

    Raises BadRequest, or what kept the stores from taking it.
    """
    refuse_name(name)
    files = [f for f in manifest.files if f.path not in (MANIFEST_FILE, SIGNATURE_FILE)]
    total, done = 2 * sum(f.size for f in files), 0  # once to hash them, once to keep them

    def read(size: int) -> None:
        nonlocal done
        done += size
        progress(min(done, total), total)

    hashed = tuple([await asyncio.to_thread(_hashed, f, folder, read) for f in files])
    said = PublishedManifest(
        name=name.rest,
        revision=manifest.revision,
        source=manifest.source if "://" in manifest.source else manifest.storage,
        license=license,
        files=hashed,
        publisher=signer.public,
        published_at=clock(),
        tool=f"hfms {__version__}",
    )
    raw = msgspec.json.format(msgspec.json.encode(said))
    tree: Mapping[str, Path | bytes] = {f.path: folder / f.path for f in files} | {
        MANIFEST_FILE: raw,
        SIGNATURE_FILE: signer.envelope(MANIFEST, raw),
    }
    cid, cids, receipt = await content.add_tree(tree, store=store, progress=read)
    if not {parse(f.cid) for f in hashed} <= {*cids}:
        raise VerifyFailed("A file of the model was changed while it was published; try again.")
    offer = Offer(name=name.rest, revision=manifest.revision, tag=name.revision, cid=cid, size=manifest.size)
    index = await asyncio.to_thread(publications.add, signer, offer, receipt.backend, cids)
    return Published(manifest=said, cid=cid, index=index, receipt=receipt)


def refuse_name(name: ModelName) -> None:
    """Raise BadRequest for names that nobody could ask a neighbour for."""
    if name.scheme or "/" not in name.rest:
        raise BadRequest(f"`{name}` is no name to publish under; give one with --as org/name.", param="name")


def read_manifest(envelope: bytes, offer: Offer, publisher: str) -> PublishedManifest:
    """The manifest of an offer, signed by who made the offer. Raises VerifyFailed."""
    payload, _ = open_envelope(envelope, MANIFEST, {publisher})
    try:
        said = msgspec.json.decode(payload, type=PublishedManifest)
        for file in said.files:
            ModelFile(file.path, file.size).safe_path()
            parse(file.cid)
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError, BadRequest) as exc:
        raise VerifyFailed("Its manifest is signed, and yet none that hfms can read.") from exc
    if (said.name, said.revision, said.publisher) != (offer.name, offer.revision, publisher):
        raise VerifyFailed(f"Its manifest is that of `{said.name[:100]}@{said.revision[:100]}`, or of somebody else.")
    if not said.files or len({f.path for f in said.files}) != len(said.files):
        raise VerifyFailed("Its manifest names no files, or one twice.")
    return said


def _hashed(file: ModelFile, folder: Path, read: Callable[[int], object]) -> PublishedFile:
    path = folder / file.safe_path()
    with path.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    if file.sha256 is not None and file.sha256.lower() != sha256:
        raise VerifyFailed(f"`{file.path}` is not what it was when it was verified.")
    cid = root_of(blocks_of_path(path, read=read))
    return PublishedFile(path=file.path, size=file.size, sha256=sha256, cid=str(cid))
