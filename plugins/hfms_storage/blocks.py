"""Blocks in a folder: content-addressed storage without any node.

    <root>/blocks/<two characters>/<CID>     one file a block, named by the CID that hfms makes of the bytes
    <root>/pins/<CID>                        an empty file

Kept beside the Hugging Face cache, as a part of the storage `hf_cache`. What no pin holds goes with `hfms ipfs gc`.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from hfms_cli import FetchFailed, HfmsError, NotFound
from hfms_cli.ipfs import Block, BlockStore, Cid, below, check, parse

_BATCH = 4 * 2**20


class BlockFolder(BlockStore):
    """A store in `blocks_root`, which is made when something is kept for the first time."""

    here = True

    @property
    def blocks_root(self) -> Path:
        raise NotImplementedError

    async def block_get(self, cid: str) -> bytes:
        return await asyncio.to_thread(self._read, parse(cid))

    async def put_blocks(self, blocks: AsyncIterator[Block]) -> None:
        held, size = [], 0
        async for cid, block in blocks:
            held.append((cid, block))
            size += len(block)
            if size >= _BATCH:
                await asyncio.to_thread(self._write, held)
                held, size = [], 0
        await asyncio.to_thread(self._write, held)

    async def pin(self, cid: str) -> None:
        await asyncio.to_thread(self._pin, parse(cid))

    async def unpin(self, cid: str) -> None:
        await asyncio.to_thread(self._unpin, parse(cid))

    async def gc(self) -> int:
        """Delete what no pin holds, and answer how many bytes that were. Raises where a pinned block is missing."""
        return await asyncio.to_thread(self._gc)

    def _file(self, cid: Cid) -> Path:
        # By the hash alone, as the same bytes may be asked for under either version of a CID.
        name = str(Cid(1, cid.codec, cid.hash, cid.digest))
        return self.blocks_root / "blocks" / name[-3:-1] / name

    def _read(self, cid: Cid) -> bytes:
        try:
            block = self._file(cid).read_bytes()
        except FileNotFoundError:
            raise NotFound(f"The block `{cid}` is not on this disk.", param="cid") from None
        except OSError as exc:
            raise FetchFailed(f"The block `{cid}` cannot be read: {exc.strerror}.") from exc
        try:
            check(cid, block)
        except HfmsError:
            self._file(cid).unlink(missing_ok=True)  # so that a good one can take its place
            raise
        return block

    def _write(self, blocks: Sequence[Block]) -> None:
        for cid, block in blocks:
            path = self._file(cid)
            if cid.inline is not None or path.exists():
                continue
            draft = path.with_name(f".{secrets.token_hex(8)}")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                draft.write_bytes(block)
                draft.replace(path)
            except OSError as exc:
                draft.unlink(missing_ok=True)
                raise FetchFailed(f"The folder of blocks cannot be written: {exc.strerror}.") from exc

    def _pin(self, cid: Cid) -> None:
        self._all_below([cid])
        pins = self.blocks_root / "pins"
        try:
            pins.mkdir(parents=True, exist_ok=True)
            (pins / str(cid)).touch()
        except OSError as exc:
            raise FetchFailed(f"The folder of pins cannot be written: {exc.strerror}.") from exc

    def _unpin(self, cid: Cid) -> None:
        # One that was pinned under the other version of its CID is the same.
        same = [p for p in self._pins() if p.same_block(cid)]
        if not same:
            raise NotFound(f"`{cid}` is not pinned here.", param="cid")
        for pin in same:
            (self.blocks_root / "pins" / str(pin)).unlink(missing_ok=True)

    def _pins(self) -> list[Cid]:
        folder = self.blocks_root / "pins"
        return [parse(p.name) for p in folder.iterdir()] if folder.is_dir() else []

    def _all_below(self, roots: Sequence[Cid]) -> set[Path]:
        """Files of all blocks below some CIDs. Raises NotFound where one is missing."""
        files: set[Path] = set()
        left = list(roots)
        while left:
            cid = left.pop()
            file = self._file(cid)
            if cid.inline is not None or file in files:
                continue
            files.add(file)
            if not file.is_file():
                raise NotFound(f"The block `{cid}` is not on this disk.", param="cid")
            if cid.codec != 0x55:  # a raw block has nothing below
                left += below(cid, self._read(cid))
        return files

    def _gc(self) -> int:
        kept, freed = self._all_below(self._pins()), 0
        for file in (self.blocks_root / "blocks").glob("*/*"):
            if file not in kept:
                freed += file.stat().st_size
                file.unlink(missing_ok=True)
        return freed


def beside(cache: Path) -> Path:
    """Where blocks are kept: beside the Hub's cache."""
    return Path(os.path.normpath(cache)).parent / "ipfs"
