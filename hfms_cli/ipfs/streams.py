"""What one source sends of a file in one answer: a CAR, or the file's bytes. Who reads it checks every block."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import suppress

from hfms_cli.errors import FetchFailed, HfmsError, NotFound
from hfms_cli.ipfs.car import CarReader
from hfms_cli.ipfs.cid import MAX_BLOCK, Cid
from hfms_cli.ipfs.lanes import STRIKES, Source

__all__ = ["CarStream", "FileStream"]


class _Stream(ABC):
    _strikes = 0

    async def strike(self, *, over: bool) -> None:
        """Count a fault; the last one, or one that is `over`, ends the stream."""
        self._strikes += 1
        if over or self._strikes >= STRIKES:
            await self.close()

    @abstractmethod
    async def close(self) -> None: ...


class CarStream(_Stream):
    """The CAR of the first source that has the root. One that fails before its first block gives way to the next."""

    def __init__(self, root: Cid, sources: Iterator[Source], patience: float) -> None:
        self.source: Source
        self.unasked = 0
        self.seen: set[bytes] = set()
        self._root = root
        self._patience = patience
        self._left = sources
        self._blocks: AsyncGenerator[tuple[Cid, bytes], None] | None = None
        self._chunks: AsyncIterator[bytes] | None = None
        self._got = 0

    async def ready(self) -> bool:
        """Whether there is something to read."""
        while self._chunks is None and not self._got:
            source = next(self._left, None)
            if source is None:
                return False
            self.source, self._chunks = source, source.car(str(self._root))
            if self._chunks is None and await self._has_root(source):
                self._left = iter(())  # it is asked block by block, and nobody else has to send a stream
        return self._chunks is not None

    async def _has_root(self, source: Source) -> bool:
        try:
            async with asyncio.timeout(self._patience):
                return bool(await source.block_get(str(self._root)))
        except Exception:  # the source is asked again, and then its error is noted
            return False

    async def read(self) -> tuple[Cid, bytes] | None:
        if self._blocks is None:
            assert self._chunks is not None
            reader = CarReader(self._chunks)
            await reader.header()
            self._blocks = reader.blocks()
        found = await anext(self._blocks, None)
        self._got += found is not None
        if found is None and not self._got:
            raise NotFound("It sends a CAR without blocks.")
        if found is None:
            await self.close()
        else:
            self.seen.add(found[0].digest)
        return found

    async def close(self) -> None:
        await _close(self._blocks)
        await _close(self._chunks)
        self._blocks = self._chunks = None


class FileStream(_Stream):
    """A file's bytes from one source, cut into the blocks that they should be by those who know where each begins."""

    def __init__(self, source: Source, chunks: AsyncIterator[bytes]) -> None:
        self.source = source
        self.begun = False
        """It has sent something."""
        self._chunks: AsyncIterator[bytes] | None = chunks
        self._buffer = bytearray()
        self._at = 0
        """Where in the file the buffer begins."""

    @property
    def over(self) -> bool:
        return self._chunks is None

    async def read(self, at: int, size: int) -> bytes | None:
        """So many bytes from there on; None where the stream is beyond that, or no block is so large.

        Raises FetchFailed where it ends before.
        """
        if self.over or at < self._at or size > MAX_BLOCK:
            return None
        while self._at + len(self._buffer) < at + size:
            self._skip(at)
            assert self._chunks is not None
            chunk = await anext(self._chunks, None)
            if chunk is None:
                raise FetchFailed("It ended before the file did.")
            self.begun = True
            self._buffer += chunk
        self._skip(at)
        with memoryview(self._buffer) as view:
            block = bytes(view[:size])
        self._skip(at + size)
        return block

    def _skip(self, to: int) -> None:
        """Drop what is before a place, as far as it has come."""
        count = min(to - self._at, len(self._buffer))
        del self._buffer[:count]
        self._at += count

    async def close(self) -> None:
        await _close(self._chunks)
        self._chunks = None


async def _close(generator: object) -> None:
    if isinstance(generator, AsyncGenerator):
        with suppress(HfmsError, RuntimeError):
            await generator.aclose()
