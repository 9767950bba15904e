"""What has a CID: asks the stores in the operator's order, falls back at every step, and says who did what.

Nobody is believed: what is read is checked block by block (`hfms_cli.ipfs.fetch`), and what is written must come back
under the CID that hfms gives it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import structlog

from hfms_cli.errors import BadRequest, FetchFailed, HfmsError, NotFound, Unsupported, VerifyFailed
from hfms_cli.hookspecs import ContentStore
from hfms_cli.ipfs import (
    CHUNKER,
    Block,
    BlockStore,
    Cid,
    Fetch,
    Health,
    Source,
    blocks_of_bytes,
    blocks_of_path,
    blocks_of_tree,
    parse,
    root_of,
    walk,
)
from hfms_cli.ipfs.fetch import PATIENCE, Observe, told

__all__ = ["Content", "Receipt", "is_content_store"]

log = structlog.get_logger("hfms.ipfs")

T = TypeVar("T")


@dataclass(frozen=True)
class Receipt:
    """Who did it, and who was asked before and why they did not."""

    backend: str
    tried: dict[str, str] = field(default_factory=dict)


class Content:
    """The content-addressed verbs over all stores together."""

    def __init__(
        self,
        stores: Sequence[ContentStore],
        *,
        patience: float = PATIENCE,
        observe: Observe | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """patience: seconds that a store may take for one block. observe: told of every operation."""
        self.stores = tuple(stores)
        self._patience = patience
        self._health = Health(observe=observe, clock=clock)

    # Reading: `fetch()` gives blocks to the functions of `hfms_cli.ipfs.walk`, and afterwards says who served them.

    def fetch(self) -> Fetch:
        return Fetch([s for store in self.stores for s in _sources(store)], self._health, patience=self._patience)

    async def resolve(self, fetch: Fetch, text: str) -> Cid:
        """What `CID`, `CID/path/in/it` or `ipfs://CID` stands for. Raises BadRequest, NotFound."""
        head, *path = text.removeprefix("ipfs://").removeprefix("/ipfs/").split("/")
        return await walk.resolve(fetch, parse(head), [part for part in path if part])

    # Writing: the first store that can.

    async def add_bytes(self, data: bytes, *, pin: bool = True) -> tuple[str, Receipt]:
        expected = root_of(blocks_of_bytes(data))
        return await self._named(expected, "add_bytes", lambda store: store.add_bytes(data, pin=pin))

    async def add_path(
        self,
        path: Path,
        *,
        recursive: bool = False,
        pin: bool = True,
        chunker: str = CHUNKER,
        progress: Callable[[int], object] | None = None,
    ) -> tuple[str, Receipt]:
        """Keep a file or a folder. progress: told of the bytes that a store has taken, where it says so."""

        async def add(store: ContentStore) -> str:
            if isinstance(store, BlockStore):  # it takes the blocks that hfms makes, and so their CIDs
                return await store.add_path(path, recursive=recursive, pin=pin, chunker=chunker, read=progress)
            expected = root_of(blocks_of_path(path, recursive=recursive, chunker=chunker))
            return _same(expected, await store.add_path(path, recursive=recursive, pin=pin, chunker=chunker))

        return await self._first("add_path", add)

    async def add_tree(
        self,
        files: Mapping[str, Path | bytes],
        *,
        store: str | None = None,
        progress: Callable[[int], object] = bool,
    ) -> tuple[str, Sequence[Cid], Receipt]:
        """Keep files as one folder, pinned: its CID and those of all its blocks. store: this one, and no other."""
        cids: list[Cid] = []

        def noted() -> Iterator[Block]:
            cids.clear()
            for cid, block in blocks_of_tree(files, read=progress):
                cids.append(cid)
                yield cid, block

        async def add(chosen: ContentStore) -> str:
            if not isinstance(chosen, BlockStore):
                raise Unsupported(f"The backend `{chosen.name}` takes no folders block by block.")
            return await chosen.add_blocks(noted(), pin=True)

        cid, receipt = await self._first("add_tree", add, [self.named(store)] if store else None)
        return cid, list(dict.fromkeys(cids)), receipt

    def named(self, name: str) -> ContentStore:
        """A store by its name. Raises BadRequest."""
        for store in self.stores:
            if store.name == name:
                return store
        there = ", ".join(store.name for store in self.stores) or "none"
        raise BadRequest(f"No storage `{name}` that keeps what has a CID is in use; there are: {there}.", param="store")

    async def block_put(self, data: bytes, *, codec: str = "raw") -> tuple[str, Receipt]:
        return await self._named(Cid.of(codec, data), "block_put", lambda s: s.block_put(data, codec=codec))

    async def pin(self, cid: str) -> Receipt:
        name = str(parse(cid))
        return (await self._first("pin", lambda store: store.pin(name)))[1]

    async def unpin(self, cid: str) -> Receipt:
        name = str(parse(cid))
        return (await self._first("unpin", lambda store: store.unpin(name)))[1]

    async def dag_import(
        self, car: Callable[[], AsyncIterator[bytes]], *, pin: bool = True
    ) -> tuple[Sequence[str], Receipt]:
        """Keep what a CAR holds. car: opens it anew for each store that is tried."""
        return await self._first("dag_import", lambda store: store.dag_import(car(), pin=pin))

    def status(self) -> list[dict[str, Any]]:
        """How each source is, and what it has sent since the start."""
        found = []
        for source in (s for store in self.stores for s in _sources(store)):
            condition = self._health.of(source.name)
            found.append(
                {
                    "name": source.name,
                    "failures": condition.failures,
                    "error": condition.error,
                    "served_blocks": self._health.blocks[source.name],
                    "served_bytes": self._health.bytes[source.name],
                }
            )
        return found

    async def close(self) -> None:
        for store in self.stores:
            if isinstance(store, BlockStore):
                await store.close()

    async def _named(
        self, expected: Cid, operation: str, attempt: Callable[[ContentStore], Awaitable[str]]
    ) -> tuple[str, Receipt]:
        async def checked(store: ContentStore) -> str:
            return _same(expected, await attempt(store))

        return await self._first(operation, checked)

    async def _first(
        self,
        operation: str,
        attempt: Callable[[ContentStore], Awaitable[T]],
        stores: Sequence[ContentStore] | None = None,
    ) -> tuple[T, Receipt]:
        """The first store that can. Stores that failed lately are asked after the others."""
        failures: dict[str, HfmsError] = {}
        for store in self._health.order(self.stores if stores is None else stores):
            start = time.perf_counter()
            try:
                result = await attempt(store)
            except Exception as exc:
                error = told(store.name, exc, self._patience)
                if error.param == "path":  # the fault is the caller's, and no store's
                    raise error from None
                if error is not exc:
                    log.warning("storage failed", storage=store.name, operation=operation, exc_info=exc)
                failures[store.name] = error
                self._health.note(store.name, operation, error, time.perf_counter() - start)
                continue
            self._health.note(store.name, operation, None, time.perf_counter() - start)
            tried = {name: error.message for name, error in failures.items()}
            log.debug("stored", operation=operation, backend=store.name, tried=tried)
            return result, Receipt(store.name, tried)
        raise _worst(operation, failures)


@dataclass(frozen=True)
class _Foreign:
    """The blocks of a store that is no BlockStore."""

    store: ContentStore
    here: bool = False

    @property
    def name(self) -> str:
        return self.store.name

    async def block_get(self, cid: str) -> bytes:
        return await self.store.block_get(cid)

    def car(self, cid: str) -> AsyncIterator[bytes]:
        return self.store.dag_export(cid)

    def file(self, cid: str) -> None:
        return None


def is_content_store(storage: object) -> bool:
    """Whether a storage has the content-addressed verbs."""
    return hasattr(storage, "block_get")


def _sources(store: ContentStore) -> Sequence[Source]:
    return store.sources if isinstance(store, BlockStore) else [_Foreign(store)]


def _same(expected: Cid, answered: str) -> str:
    """The CID that hfms gives, where the store gave the same. Raises VerifyFailed."""
    try:
        same = parse(answered).same_block(expected)
    except BadRequest:
        same = False
    if not same:
        raise VerifyFailed(f"It answered with a CID that is not `{expected}`.")
    return str(expected)


def _worst(operation: str, failures: dict[str, HfmsError]) -> HfmsError:
    """The error of the store that says most, with what the others said."""
    if not failures:
        return Unsupported("No storage that keeps what has a CID is in use: see `[storage] order`.")
    why = "; ".join(f"{name}: {error.message.rstrip('.')}" for name, error in failures.items())
    order = (VerifyFailed, FetchFailed, NotFound, BadRequest)
    errors = list(failures.values())
    chosen = next((e for kind in order for e in errors if isinstance(e, kind)), errors[0])
    if len(failures) == 1:
        return chosen
    return type(chosen)(f"No backend could do `{operation}` ({why}).", param=chosen.param, code=chosen.code)
