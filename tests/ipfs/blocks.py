"""A source of blocks that are given to it: whole, small, and able to send a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hfms_cli.errors import HfmsError, NotFound
from hfms_cli.ipfs import Cid, below, car_header, car_section, parse


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


@dataclass
class Blocks:
    blocks: dict[Cid, bytes]
    name: str = "blocks"
    streams: bool = False
    here: bool = False
    """It is on this disk."""
    error: Exception | None = None
    """Raised by everything."""
    asked: list[Cid] = field(default_factory=list)
    """Single blocks that it was asked for, in order."""
    cut: int | None = None
    """After how many blocks a stream breaks off."""
    whole: Sequence[bytes] | None = None
    """What it sends as a file's bytes, chunk by chunk."""

    async def block_get(self, cid: str) -> bytes:
        self.asked.append(parse(cid))
        if self.error:
            raise self.error
        if (block := self.blocks.get(parse(cid))) is None:
            raise NotFound("It has no such block.")
        return block

    def car(self, cid: str) -> AsyncIterator[bytes] | None:
        return self._car(parse(cid)) if self.streams else None

    def file(self, cid: str) -> AsyncIterator[bytes] | None:
        return None if self.whole is None else self._file(self.whole)

    async def _file(self, chunks: Sequence[bytes]) -> AsyncIterator[bytes]:
        if self.error:
            raise self.error
        for chunk in chunks:
            yield chunk

    async def _car(self, root: Cid) -> AsyncIterator[bytes]:
        if self.error:
            raise self.error
        yield car_header([root])
        for sent, cid in enumerate(self.depth_first(root)):
            if sent == self.cut:
                yield b"\x55"
                return
            yield car_section(cid, self.blocks[cid])

    def depth_first(self, root: Cid) -> Iterable[Cid]:
        seen, left = set(), [root]
        while left:
            cid = left.pop()
            if cid in seen or cid not in self.blocks:
                continue
            seen.add(cid)
            yield cid
            try:
                left += reversed(below(cid, self.blocks[cid]))
            except HfmsError:
                continue
