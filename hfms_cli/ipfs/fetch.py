"""Gets blocks from whoever has them, and believes nobody: a block is its CID's, or it is asked for elsewhere.

Where all of a file is wanted, and several sources have it, its blocks are asked of all of them at once (`lanes`). Where
only one has it, that may send it as one stream (`streams`): the file's bytes, cut here into its blocks, or a CAR. What
is missing or wrong in the stream is fetched block by block, and the rest of the stream is still used.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar

from hfms_cli.errors import BadRequest, FetchFailed, HfmsError, NotFound, VerifyFailed
from hfms_cli.ipfs.cid import Cid
from hfms_cli.ipfs.lanes import Lanes, Source, checked
from hfms_cli.ipfs.streams import CarStream, FileStream

__all__ = ["PATIENCE", "Fetch", "Health", "Observe", "Source", "checked"]

PATIENCE = 30.0
"""Seconds that one block may take."""
KEEP = 32 * 2**20
"""Bytes of blocks that are held: they may come before they are asked for, and be asked for again."""
LONGEST_PAUSE = 60.0


class Observe(Protocol):
    def __call__(self, source: str, operation: str, status: str, seconds: float, size: int = 0) -> None:
        """status: `ok`, `missing` or `error`. size: bytes that came."""
        ...


class HasName(Protocol):
    @property
    def name(self) -> str: ...


Named = TypeVar("Named", bound=HasName)


@dataclass
class Condition:
    """How a source is."""

    failures: int = 0
    """In a row."""
    error: str | None = None
    lied: bool = False
    """It sent wrong bytes."""
    until: float = 0.0
    """When it is asked again before others, by the clock of `Health`."""


class Health:
    """Who failed lately. A source that did is asked after all others, for a time that doubles with each failure."""

    def __init__(self, *, observe: Observe | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._observe = observe
        self._conditions: dict[str, Condition] = {}
        self.blocks: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        """What each source has sent that was right."""

    def order(self, sources: Sequence[Named]) -> list[Named]:
        return sorted(sources, key=lambda s: self.resting(s.name))

    def resting(self, name: str) -> bool:
        """Whether a source failed lately, and is to be asked after the others."""
        return self.of(name).until > self._clock()

    def note(self, name: str, operation: str, error: HfmsError | None, seconds: float, size: int = 0) -> None:
        """Count one answer. A source that does not have something, or cannot do something, is well."""
        well = error is None or isinstance(error, NotFound | BadRequest)
        if self._observe is not None:
            status = "ok" if error is None else "missing" if isinstance(error, NotFound) else "error"
            self._observe(name, operation, status, seconds, size)
        if size:
            self.blocks[name] += 1
            self.bytes[name] += size
        if well:
            if not (self.of(name).lied and self.resting(name)):  # good blocks among wrong ones redeem nobody
                self._conditions.pop(name, None)
            return
        condition = self._conditions.setdefault(name, Condition())
        condition.lied = isinstance(error, VerifyFailed)
        condition.failures += 1
        condition.error = error.message if error else None
        condition.until = self._clock() + min(2.0**condition.failures, LONGEST_PAUSE)

    def of(self, name: str) -> Condition:
        return self._conditions.get(name, _WELL)


_WELL = Condition()


class Fetch:
    """One reading: checked blocks, who served how many, and why others did not.

    sources: best first. patience: seconds that a source may take for one block.
    """

    def __init__(self, sources: Sequence[Source], health: Health | None = None, *, patience: float = PATIENCE) -> None:
        self.served: Counter[str] = Counter()
        self.served_bytes: Counter[str] = Counter()
        self.tried: dict[str, str] = {}
        self._health = health or Health()
        self._patience = patience
        self._here = [source for source in sources if source.here]
        there = self._health.order([source for source in sources if not source.here])
        self._lanes = Lanes(there, self._health, self._note_block, patience=patience)
        self._held: OrderedDict[bytes, bytes] = OrderedDict()
        self._held_size = 0
        self._file: FileStream | None = None
        self._stream: CarStream | None = None
        self._turn = asyncio.Lock()

    async def get(self, cid: Cid, at: int | None = None, size: int | None = None) -> bytes:
        """A block, checked. Raises NotFound, or what kept the sources from delivering it.

        at, size: where its bytes are in the file that `all_of` told of, if it is known that it holds nothing else.
        """
        if cid.inline is not None:
            return cid.inline
        if (block := self._take(cid)) is not None:
            return block
        if self._file is not None or self._stream is not None:
            async with self._turn:
                block = self._take(cid)
                if block is None and self._file is not None and at is not None and size is not None:
                    block = await self._from_file(self._file, cid, at, size)
                if block is None and self._file is None:
                    block = await self._from_stream(cid)
            if block is not None:
                return block
        return await self._ask(cid)

    @asynccontextmanager
    async def all_of(self, cid: Cid, *, ahead: bool = True, stream: bool = True) -> AsyncGenerator[None, None]:
        """Says that blocks below a CID will be asked for, depth first, until the context ends.

        ahead: several at a time; what is asked for one by one comes best as a stream. stream: all of them.
        """
        async with AsyncExitStack() as opened:
            if not await self._is_here(cid):
                if ahead and len(self._lanes.likely()) > 1:
                    await opened.enter_async_context(self._lanes.probing(cid))
                if stream and (not ahead or len(self._lanes.having()) <= 1):
                    sources = self._lanes.likely()
                    # With a CID of version 0, the blocks of a file hold more than its bytes.
                    file = sources[0].file(str(cid)) if ahead and cid.version and sources else None
                    if file is not None:
                        self._file = FileStream(sources.pop(0), file)
                    self._stream = CarStream(cid, iter(sources), self._patience)
                    opened.push_async_callback(self._end_streams)
            yield

    async def _end_streams(self) -> None:
        file, self._file, stream, self._stream = self._file, None, self._stream, None
        for opened in (file, stream):
            if opened is not None:
                await opened.close()

    async def _is_here(self, cid: Cid) -> bool:
        for source in self._here:
            with suppress(HfmsError):
                await source.block_get(str(cid))
                return True
        return False

    async def _ask(self, cid: Cid) -> bytes:
        """From this disk, else from whoever has it first."""
        failures: list[HfmsError] = []
        for source in self._here:
            start = time.perf_counter()
            try:
                block = await source.block_get(str(cid))
                await checked(cid, block)
            except Exception as exc:
                failures.append(self._failed(source.name, "block_get", exc, start))
            else:
                self._worked(source.name, "block_get", start, block)
                self._keep(cid, block)
                return block
        found = await self._lanes.get(cid, failures)
        if found is None:
            raise _worst(cid, failures, self.tried)
        self._keep(cid, found)
        return found

    def _note_block(self, name: str, outcome: bytes | Exception, seconds: float) -> HfmsError | None:
        start = time.perf_counter() - seconds
        if isinstance(outcome, Exception):
            return self._failed(name, "block_get", outcome, start)
        self._worked(name, "block_get", start, outcome)
        return None

    async def _from_file(self, stream: FileStream, cid: Cid, at: int, size: int) -> bytes | None:
        """Cut the block out of the file's bytes; None where it has to be asked for."""
        start = time.perf_counter()
        try:
            async with asyncio.timeout(self._patience):
                block = await stream.read(at, size)
            if block is None:
                return None
            await checked(cid, block)
        except Exception as exc:
            self._failed(stream.source.name, "cat", exc, start)
            await stream.strike(over=not isinstance(exc, VerifyFailed))
            if stream.over:
                self._file = None
                if stream.begun:  # what it has sent, others would send again
                    self._stream = None
            return None
        self._worked(stream.source.name, "cat", start, block)
        self._keep(cid, block)
        return block

    async def _from_stream(self, cid: Cid) -> bytes | None:
        """Read on until the block comes; None where it has to be asked for."""
        stream = self._stream
        # A stream may send each block only once; reading on for one that was there would read to its end.
        while stream is not None and cid.digest not in stream.seen and await stream.ready():
            start = time.perf_counter()
            try:
                async with asyncio.timeout(self._patience):
                    found = await stream.read()
                if found is None:
                    break
                name, block = found
                await checked(name, block)
            except Exception as exc:
                self._failed(stream.source.name, "dag_export", exc, start)
                await stream.strike(over=not isinstance(exc, VerifyFailed))
                if isinstance(exc, VerifyFailed) and name.same_block(cid):
                    break  # the stream has nothing better to say of this one
                continue
            self._worked(stream.source.name, "dag_export", start, block)
            self._keep(name, block)
            if name.same_block(cid):
                stream.unasked = 0
                return block
            stream.unasked += len(block)
            if stream.unasked > KEEP:
                error = FetchFailed(f"`{stream.source.name}` sends what nobody asked for.")
                self._failed(stream.source.name, "dag_export", error, start)
                await stream.strike(over=True)
        return None

    def _keep(self, cid: Cid, block: bytes) -> None:
        self._held_size += len(block) - len(self._held.pop(cid.digest, b""))
        self._held[cid.digest] = block
        while self._held_size > KEEP:
            _, old = self._held.popitem(last=False)
            self._held_size -= len(old)

    def _take(self, cid: Cid) -> bytes | None:
        block = self._held.get(cid.digest)
        if block is not None:
            self._held.move_to_end(cid.digest)
        return block

    def _worked(self, name: str, operation: str, start: float, block: bytes) -> None:
        self.served[name] += 1
        self.served_bytes[name] += len(block)
        self._health.note(name, operation, None, time.perf_counter() - start, len(block))

    def _failed(self, name: str, operation: str, exc: Exception, start: float) -> HfmsError:
        error = told(name, exc, self._patience)
        self.tried[name] = error.message
        self._health.note(name, operation, error, time.perf_counter() - start)
        return error


def told(name: str, exc: Exception, patience: float) -> HfmsError:
    """What a source raised, as an HfmsError; what is none is a fault of the source's, and stays hidden."""
    if isinstance(exc, HfmsError):
        return exc
    if isinstance(exc, TimeoutError):
        return FetchFailed(f"`{name}` did not answer within {patience:g} seconds.")
    return FetchFailed(f"`{name}` failed ({type(exc).__name__}).")


def _worst(cid: Cid, failures: list[HfmsError], tried: dict[str, str]) -> HfmsError:
    """Wrong bytes say more than a source that cannot be reached, and that more than one without the block."""
    why = "; ".join(f"{name}: {reason.rstrip('.')}" for name, reason in tried.items()) or "no storage was asked"
    kinds = (VerifyFailed, FetchFailed)
    kind = next((k for k in kinds if any(isinstance(f, k) for f in failures)), NotFound)
    return kind(f"The block `{cid}` could not be had ({why}).")
