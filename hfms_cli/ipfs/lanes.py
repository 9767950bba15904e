"""Blocks from several sources at once: each is asked of the one that will have it first, by what was measured.

A lane is a source with as many questions open as make it faster. A block that is late is asked of one more lane, and
whoever is first wins. A source that sent a wrong block is set aside: it is asked only for what nobody else has.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from hfms_cli.errors import HfmsError, NotFound, VerifyFailed
from hfms_cli.ipfs.cid import Cid, check

__all__ = ["LATE", "Lanes", "Note", "Source", "checked"]

LATE = 1.0
"""Seconds after which a block is late, from a source of which nothing was measured yet."""
LATE_TIMES = 3.0
"""From others: so many times what their blocks take. Not below `LATE_LEAST` seconds, as asking twice costs, too."""
LATE_LEAST = 0.2
FIRST_WINDOW, WIDEST = 2, 16
"""Questions that a lane has open at first, and at most."""
FASTER, SLOWER = 1.1, 0.8
"""By how much a lane's rate must change to count as changed."""
GRACE = 0.25
"""Seconds that the others have, once one source has said that it has a file, until it counts as the only one."""
STRIKES = 3
"""Failures of one source, after which it is set aside."""


class Source(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def here(self) -> bool:
        """Its blocks are on this disk: it is asked before all others, and never at the same time as they."""
        ...

    async def block_get(self, cid: str) -> bytes:
        """A block. Raises NotFound, FetchFailed."""
        ...

    def car(self, cid: str) -> AsyncIterator[bytes] | None:
        """All blocks below a CID as a CAR, depth first; None where the source sends only single blocks."""
        ...

    def file(self, cid: str) -> AsyncIterator[bytes] | None:
        """A file's bytes, in order; None where the source does not send them, or not sooner than a CAR."""
        ...


class Resting(Protocol):
    def resting(self, name: str) -> bool:
        """Whether a source failed lately, and is to be asked after the others."""
        ...


Note = Callable[[str, bytes | Exception, float], HfmsError | None]
"""Told of each answer: the source's name, the checked block or what was raised, and seconds. Answers the error."""


@dataclass
class Lane:
    """A source, and what was measured of it."""

    source: Source
    has: bool | None = None
    """Whether it has what is being fetched; None where nobody knows yet."""
    aside: bool = False
    faults: int = 0
    window: int = FIRST_WINDOW
    open: int = 0
    """Questions that it has not answered."""
    seconds: float = 0.0
    """That a block takes, and that pass between two of them; 0: not measured."""
    pace: float = 0.0
    _bytes: int = 0
    _blocks: int = 0
    _since: float = 0.0
    _rate: float = 0.0

    @property
    def late(self) -> float:
        return max(LATE_LEAST, LATE_TIMES * self.seconds) if self.seconds else LATE

    @property
    def done_in(self) -> float:
        """Seconds until it would have one more block."""
        return self.pace * (self.open + 1)

    def took(self, size: int, seconds: float, now: float) -> None:
        """Note a block, and every `window` blocks whether more open questions made it faster."""
        self.has, self.faults = True, 0
        self.seconds = _smooth(self.seconds, seconds)
        self.pace = _smooth(self.pace, seconds / max(1, self.open))
        if not self._blocks:
            self._since = now - seconds
        self._bytes += size
        self._blocks += 1
        if self._blocks < self.window or self.open < self.window:
            return  # not as busy as it may be: its rate says nothing of its limits
        rate = self._bytes / max(now - self._since, 1e-9)
        if rate > self._rate * FASTER:
            self.window = min(self.window * 2, WIDEST)
        elif rate < self._rate * SLOWER:
            self.window = max(self.window - 1, 1)
        self._rate, self._bytes, self._blocks = rate, 0, 0

    def failed(self, error: HfmsError) -> None:
        self.window = max(self.window // 2, 1)
        self.faults += 1
        if isinstance(error, NotFound) and self.has is None:
            self.has = False
        if isinstance(error, VerifyFailed) or self.faults >= STRIKES:
            self.aside = True


class Lanes:
    """The sources of one fetch that are not on this disk, best first."""

    def __init__(self, sources: Sequence[Source], health: Resting, note: Note, *, patience: float) -> None:
        self._lanes = [Lane(source) for source in sources]
        self._health = health
        self._note = note
        self._patience = patience
        self._room = asyncio.Event()

    @asynccontextmanager
    async def probing(self, root: Cid) -> AsyncGenerator[None, None]:
        """Find out who has a block: all that are well are asked at once. Who answers late joins in late."""
        asked = [self._start(lane, root) for lane in self._lanes if self._rank(lane) == 1]
        left = set(asked)
        try:
            while left and not any(lane.has for lane in self._lanes):
                _, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
            if left:
                await asyncio.wait(left, timeout=GRACE)
            yield
        finally:
            await _cancel(asked)

    def having(self) -> list[Source]:
        """Sources that are known to have what is being fetched, and are well."""
        return [lane.source for lane in self._lanes if self._rank(lane) == 0]

    def likely(self) -> list[Source]:
        """All sources, the likeliest first."""
        return [lane.source for lane in sorted(self._lanes, key=self._rank)]

    async def get(self, cid: Cid, failures: list[HfmsError]) -> bytes | None:
        """A checked block from whoever has it first; None where nobody has, and why in `failures`."""
        left = list(self._lanes)
        asked: dict[asyncio.Task[bytes], Lane] = {}
        try:
            while left or asked:
                lane = self._next(left)
                if lane is not None:
                    left.remove(lane)
                    asked[self._start(lane, cid)] = lane
                elif not asked:
                    self._room.clear()
                    await self._room.wait()
                    continue
                late = max(lane.late for lane in asked.values()) if left else None
                done, _ = await asyncio.wait(asked, timeout=late, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    del asked[task]
                    if (error := task.exception()) is None:
                        return task.result()
                    assert isinstance(error, HfmsError)
                    failures.append(error)
            return None
        finally:
            await _cancel(asked)

    def _next(self, left: Sequence[Lane]) -> Lane | None:
        """Whom to ask of those that were not asked yet; None while the likeliest of them have no room."""
        best = min(map(self._rank, left), default=0)
        free = [lane for lane in left if self._rank(lane) == best and lane.open < lane.window]
        # Of those that have it the quickest; of others the first, as the operator's order has them.
        return min(free, key=lambda lane: lane.done_in if best == 0 else 0.0, default=None)

    def _rank(self, lane: Lane) -> int:
        if lane.aside or self._health.resting(lane.source.name):
            return 3
        return {True: 0, None: 1, False: 2}[lane.has]

    def _start(self, lane: Lane, cid: Cid) -> asyncio.Task[bytes]:
        def ended(_: object) -> None:
            lane.open -= 1
            self._room.set()

        lane.open += 1
        task = asyncio.ensure_future(self._ask(lane, cid))
        task.add_done_callback(ended)
        return task

    async def _ask(self, lane: Lane, cid: Cid) -> bytes:
        """A checked block of one source. Raises HfmsError."""
        start = time.perf_counter()
        try:
            async with asyncio.timeout(self._patience):
                block = await lane.source.block_get(str(cid))
            await checked(cid, block)
        except Exception as exc:
            error = self._note(lane.source.name, exc, time.perf_counter() - start)
            assert error is not None
            lane.failed(error)
            raise error from None
        else:
            now = time.perf_counter()
            self._note(lane.source.name, block, now - start)
            lane.took(len(block), now - start, now)
            return block


async def checked(cid: Cid, block: bytes) -> None:
    """Check a block. Raises VerifyFailed.

    One of the usual size takes a fifth of a millisecond, and to hand it to a thread as long; larger ones go there.
    """
    if len(block) <= 2**19:
        check(cid, block)
    else:
        await asyncio.to_thread(check, cid, block)


def _smooth(old: float, new: float) -> float:
    return new if not old else 0.7 * old + 0.3 * new


async def _cancel(tasks: Iterable[asyncio.Task[bytes]]) -> None:
    """End what nobody waits for any more."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
