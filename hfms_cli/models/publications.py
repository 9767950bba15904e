"""What this machine publishes, in its state folder: the signed index, and which blocks belong to what was published.

    <state>/published/index.json     the index, in its envelope
    <state>/published/<CID>.json     where the blocks of one publication are, and which they are

A server shares no other blocks than these, however it could get them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from hfms_cli.errors import BadRequest, HfmsError, ModelNotFound, NotFound
from hfms_cli.ipfs import Cid, parse
from hfms_cli.models.index import INDEX, LIFE, Clock, Index, Offer, sign_index, utc_now
from hfms_cli.models.signing import Signer, open_envelope
from hfms_cli.types import ModelName

__all__ = ["Publications", "Shared"]


class Blocks(msgspec.Struct, frozen=True):
    """The blocks of one publication."""

    store: str
    cids: list[str]


class Publications:
    """Changed by `hfms models publish`, read by the server."""

    def __init__(self, state_dir: Path, *, clock: Clock = utc_now) -> None:
        self.folder = state_dir / "published"
        self._state_dir = state_dir
        self._clock = clock

    def add(self, signer: Signer, offer: Offer, store: str, cids: Sequence[Cid]) -> Index:
        """Offer one more; it takes the place of what had its name and revision."""
        with self._changing():
            (self.folder / f"{offer.cid}.json").write_bytes(msgspec.json.encode(Blocks(store, [*map(str, cids)])))
            old = self.index()
            offers = old.offers if old else ()
            same = (offer.name, offer.revision, offer.tag)
            return self._sign(signer, [*(o for o in offers if (o.name, o.revision, o.tag) != same), offer], old)

    def withdraw(self, signer: Signer, name: ModelName) -> tuple[list[Offer], dict[str, str]]:
        """Offer a model no longer; without a revision, none of its revisions. Raises ModelNotFound.

        Answers the offers that are gone, and of each CID that nothing is offered under any more the store that has it.
        """
        with self._changing():
            old = self.index()
            offers = old.offers if old else ()
            gone = [o for o in offers if o.stands_for(name) or (name.revision is None and o.name == name.rest)]
            if not gone:
                raise ModelNotFound.named(str(name), [o.name for o in offers], "It is not published here.")
            left = [o for o in offers if o not in gone]
            unused = {o.cid for o in gone} - {o.cid for o in left}
            stores = {cid: self.blocks(cid).store for cid in unused}
            self._sign(signer, left, old)
            for cid in unused:
                (self.folder / f"{cid}.json").unlink(missing_ok=True)
            return gone, stores

    def raw(self) -> bytes | None:
        """The index in its envelope; signed anew where half of its life is over and the key is here."""
        try:
            raw = (self.folder / "index.json").read_bytes()
        except FileNotFoundError:
            return None
        index = self._read(raw)
        if self._clock() < index.expires_at - LIFE / 2:
            return raw
        with suppress(HfmsError):  # a key that is kept elsewhere: whoever has it publishes again
            signer = Signer.load(self._state_dir)
            with self._changing():
                self._sign(signer, index.offers, index)
            return (self.folder / "index.json").read_bytes()
        return raw

    def index(self) -> Index | None:
        """What is published; None where nothing ever was."""
        try:
            return self._read((self.folder / "index.json").read_bytes())
        except FileNotFoundError:
            return None

    def blocks(self, cid: str) -> Blocks:
        """Raises NotFound."""
        try:
            return msgspec.json.decode((self.folder / f"{parse(cid)}.json").read_bytes(), type=Blocks)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as exc:
            raise NotFound(f"`{cid}` is not published here.", param="cid") from exc

    def _read(self, raw: bytes) -> Index:
        """Our own index: whoever can write it can as well read the key beside it, so any signature will do."""
        payload, _ = open_envelope(raw, INDEX, _Anybody())
        return msgspec.json.decode(payload, type=Index)

    def _sign(self, signer: Signer, offers: Sequence[Offer], old: Index | None) -> Index:
        raw = sign_index(signer, tuple(offers), old.sequence if old else 0, self._clock())
        draft = self.folder / f".index.{os.getpid()}"
        draft.write_bytes(raw)
        draft.replace(self.folder / "index.json")
        return self._read(raw)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """One process at a time. Raises BadRequest where the folder cannot be written."""
        from filelock import FileLock

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".lock"):
                yield
        except OSError as exc:
            raise BadRequest(f"What is published cannot be noted in {self.folder}: {exc.strerror}.") from exc


class _Anybody:
    def __contains__(self, key: object) -> bool:
        return True


class Shared:
    """Which published models a block belongs to. Reads the folder anew when the index there changes."""

    def __init__(self, publications: Publications) -> None:
        self.publications = publications
        self._stamp: tuple[int, int] | None = None
        self._offers: tuple[Offer, ...] = ()
        self._of: dict[bytes, set[int]] = {}
        self._stores: list[str] = []

    def offers(self) -> tuple[Offer, ...]:
        self._refresh()
        return self._offers

    def holding(self, cid: Cid) -> list[tuple[Offer, str]]:
        """The published models that hold a block, each with the store that has it."""
        self._refresh()
        return [(self._offers[i], self._stores[i]) for i in sorted(self._of.get(cid.digest, ()))]

    def _refresh(self) -> None:
        try:
            stat = (self.publications.folder / "index.json").stat()
        except FileNotFoundError:
            self._stamp, self._offers, self._of, self._stores = None, (), {}, []
            return
        if self._stamp == (stamp := (stat.st_mtime_ns, stat.st_ino)):
            return
        index = self.publications.index()
        offers: list[Offer] = []
        stores: list[str] = []
        of: dict[bytes, set[int]] = {}
        for offer in index.offers if index else ():
            with suppress(NotFound):
                blocks = self.publications.blocks(offer.cid)
                for text in blocks.cids:
                    of.setdefault(parse(text).digest, set()).add(len(offers))
                offers.append(offer)
                stores.append(blocks.store)
        self._offers, self._of, self._stores, self._stamp = tuple(offers), of, stores, stamp
