"""One answer on its way to all who asked for the same: the engine works once, and nobody's leaving stops the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

from hfms_cli import Chunk, Unavailable


class Flight:
    """Begins at once, in a task of its own; ends with the answer, or when nobody reads it any more."""

    def __init__(self, source: AsyncIterator[Chunk]) -> None:
        self.chunks: list[Chunk] = []
        self.abandoned = False
        """Nobody read it any more before it was whole; it cannot be joined."""
        self._readers = 0
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._fly(source))
        self._task.add_done_callback(lambda task: self._tell())

    @property
    def whole(self) -> bool:
        """The answer came to its proper end."""
        return self._task.done() and not self._task.cancelled() and self._task.exception() is None

    async def read(self) -> AsyncGenerator[Chunk, None]:
        """The answer from its beginning, as it comes. Raises what ended it early."""
        self._readers += 1
        try:
            told = 0
            while told < len(self.chunks) or not self._task.done():
                news = self._news  # taken before the chunks are, so that none falls in between
                while told < len(self.chunks):
                    yield self.chunks[told]
                    told += 1
                if not self._task.done():
                    await news.wait()
        finally:
            self._readers -= 1
            if not self._readers and not self._task.done():
                self.abandoned = True
                self._task.cancel()
        if self._task.cancelled():
            raise Unavailable("The server stopped before the answer was complete.")
        if error := self._task.exception():
            raise error

    async def landed(self) -> None:
        """Wait for the end. Who is cancelled meanwhile ends the flight before going on."""
        try:
            await asyncio.wait([self._task])
        finally:
            if not self._task.done():
                self._task.cancel()
                await asyncio.wait([self._task])

    async def _fly(self, source: AsyncIterator[Chunk]) -> None:
        async for chunk in source:
            self.chunks.append(chunk)
            self._tell()

    def _tell(self) -> None:
        """All that wait wake; whoever waits next waits for the next news."""
        self._news.set()
        self._news = asyncio.Event()
