"""The base of stores: write four methods, and the others come with them, checked.

block_get(cid), put_blocks(blocks), pin(cid), unpin(cid)    and, where there is one, `car(cid)` or `file(cid)`
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path

from hfms_cli.errors import BadRequest, FetchFailed, Unsupported
from hfms_cli.ipfs import walk
from hfms_cli.ipfs.build import CHUNKER, Block, blocks_of_bytes, blocks_of_path
from hfms_cli.ipfs.car import CarReader
from hfms_cli.ipfs.cid import CODECS, MAX_BLOCK, Cid, parse
from hfms_cli.ipfs.fetch import Fetch, Source, checked
from hfms_cli.ipfs.walk import Entry

__all__ = ["BlockStore"]

_BATCH = 4 * 2**20


class BlockStore:
    """Content-addressed verbs over single blocks. What a store does not override, it cannot do, and says so."""

    name: str = ""
    here: bool = False
    """Its blocks are on this disk, so that it is asked before all others."""

    # What a store writes itself.

    async def block_get(self, cid: str) -> bytes:
        """A block; whoever reads it checks it. Raises NotFound, FetchFailed."""
        raise self.cannot("get blocks", "it only keeps them")

    def car(self, cid: str) -> AsyncIterator[bytes] | None:
        """All blocks below a CID as one CAR; None where the store sends only single blocks."""
        return None

    def file(self, cid: str) -> AsyncIterator[bytes] | None:
        """A file's bytes, in order; None where the store does not send them, or not sooner than a CAR."""
        return None

    async def put_blocks(self, blocks: AsyncIterator[Block]) -> None:
        """Keep blocks, whose CIDs were checked."""
        raise self.cannot("keep anything", "it can only be read")

    async def pin(self, cid: str) -> None:
        """Keep everything below a CID until it is unpinned. Raises NotFound where a block is not to be had."""
        raise self.cannot("pin", "it can only be read")

    async def unpin(self, cid: str) -> None:
        """Raises NotFound where it is not pinned."""
        raise self.cannot("unpin", "it can only be read")

    async def close(self) -> None:
        """Let go of connections."""

    @property
    def sources(self) -> Sequence[Source]:
        """Whom to ask for blocks, best first; more than one where a store stands for several servers."""
        return (self,)

    def cannot(self, what: str, because: str) -> Unsupported:
        """The error to raise for what this store cannot do."""
        return Unsupported(f"The backend `{self.name}` cannot {what}, because {because}.")

    # What comes with it.

    async def block_put(self, data: bytes, *, codec: str = "raw") -> str:
        if codec not in CODECS:
            raise BadRequest(f"The codec is one of {', '.join(CODECS)}.", param="codec")
        if len(data) > MAX_BLOCK:
            raise BadRequest(f"A block has at most {MAX_BLOCK:,} bytes.", param="data")
        cid = Cid.of(codec, data)
        await self.put_blocks(_in_turn([(cid, data)]))
        return str(cid)

    async def add_bytes(self, data: bytes, *, pin: bool = True) -> str:
        return await self.add_blocks(blocks_of_bytes(data), pin)

    async def add_path(
        self,
        path: Path,
        *,
        recursive: bool = False,
        pin: bool = True,
        chunker: str = CHUNKER,
        read: Callable[[int], object] | None = None,
    ) -> str:
        """read: told of the bytes that were read."""
        return await self.add_blocks(blocks_of_path(path, recursive=recursive, chunker=chunker, read=read or bool), pin)

    async def cat(self, cid: str) -> bytes:
        async with aclosing(walk.cat(Fetch(self.sources), parse(cid))) as pieces:
            return b"".join([piece async for piece in pieces])

    async def get_to_path(self, cid: str, *, output_path: Path) -> None:
        await walk.save(Fetch(self.sources), parse(cid), output_path)

    async def ls(self, cid: str) -> Sequence[Entry]:
        return await walk.ls(Fetch(self.sources), parse(cid))

    def dag_export(self, cid: str) -> AsyncGenerator[bytes, None]:
        return walk.export(Fetch(self.sources), parse(cid))

    async def dag_import(self, car: AsyncIterator[bytes], *, pin: bool = True) -> list[str]:
        reader = CarReader(car)
        roots = list(dict.fromkeys(map(str, await reader.header())))
        await self.put_blocks(_checked(reader))
        if pin:
            for root in roots:
                await self.pin(root)
        return roots

    async def add_blocks(self, blocks: Iterator[Block], pin: bool) -> str:
        """Keep blocks that hfms has made, the root last; its CID."""
        root: Cid | None = None

        async def passing() -> AsyncGenerator[Block, None]:
            nonlocal root
            async for cid, block in _threaded(blocks):
                root = cid
                yield cid, block

        async with aclosing(passing()) as made:
            await self.put_blocks(made)
        if root is None:
            raise FetchFailed(f"The backend `{self.name}` took nothing of what it was given.")
        if pin:
            await self.pin(str(root))
        return str(root)


async def _in_turn(blocks: Sequence[Block]) -> AsyncGenerator[Block, None]:
    for block in blocks:
        yield block


async def _threaded(blocks: Iterator[Block]) -> AsyncGenerator[Block, None]:
    """Read and hash in a thread, some megabytes at a time."""

    def some() -> list[Block]:
        got, size = [], 0
        for cid, block in blocks:
            got.append((cid, block))
            size += len(block)
            if size >= _BATCH:
                break
        return got

    while got := await asyncio.to_thread(some):
        for made in got:
            yield made


async def _checked(reader: CarReader) -> AsyncGenerator[Block, None]:
    async with aclosing(reader.blocks()) as blocks:
        async for cid, block in blocks:
            await checked(cid, block)
            yield cid, block
