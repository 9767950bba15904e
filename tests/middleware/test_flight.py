"""One answer for all who ask at the same time: who leaves, and who does not notice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from hfms_cli import Chunk, EngineFault, Unavailable
from hfms_middleware.cache.flight import Flight


class Source:
    """An engine's answer, a chunk at a time when the test says so."""

    def __init__(self, *, fails: bool = False) -> None:
        self.more = asyncio.Semaphore(0)
        self.ended = False
        self.fails = fails

    async def chunks(self) -> AsyncIterator[Chunk]:
        try:
            for text in "abc":
                await self.more.acquire()
                yield Chunk(text=text)
            if self.fails:
                raise EngineFault("it broke")
        finally:
            self.ended = True

    def go(self, count: int = 1) -> None:
        for _ in range(count):
            self.more.release()


async def text(flight: Flight) -> str:
    return "".join([chunk.text async for chunk in flight.read()])


async def test_all_readers_get_the_whole_answer_whenever_they_came():
    source = Source()
    flight = Flight(source.chunks())
    first = asyncio.create_task(text(flight))
    source.go(2)
    async with aclosing(flight.read()) as chunks:
        assert (await anext(chunks)).text == "a"
        second = asyncio.create_task(text(flight))
        source.go()
        assert await asyncio.gather(first, second) == ["abc", "abc"]
    assert flight.whole
    assert await text(flight) == "abc"


async def test_a_reader_that_leaves_costs_the_others_nothing():
    source = Source()
    flight = Flight(source.chunks())
    leaves, stays = asyncio.create_task(text(flight)), asyncio.create_task(text(flight))
    source.go()
    await asyncio.sleep(0)
    leaves.cancel()
    await asyncio.wait([leaves])
    source.go(2)
    assert await stays == "abc"


async def test_the_engine_stops_when_nobody_reads_any_more_and_the_flight_cannot_be_joined():
    source = Source()
    flight = Flight(source.chunks())
    source.go()
    async with aclosing(flight.read()) as chunks:
        await anext(chunks)
    await flight.landed()
    assert source.ended
    assert flight.abandoned
    assert not flight.whole


async def test_all_readers_get_the_error_that_ended_it():
    source = Source(fails=True)
    flight = Flight(source.chunks())
    readers = [asyncio.create_task(text(flight)) for _ in range(3)]
    source.go(3)
    outcomes = await asyncio.gather(*readers, return_exceptions=True)
    assert [type(o) for o in outcomes] == [EngineFault] * 3
    assert not flight.whole


async def test_who_waits_for_the_landing_and_is_cancelled_ends_it_and_readers_are_told():
    source = Source()
    flight = Flight(source.chunks())
    reader = asyncio.create_task(text(flight))
    waits = asyncio.create_task(flight.landed())
    source.go()
    await asyncio.sleep(0.01)
    waits.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waits
    assert source.ended
    with pytest.raises(Unavailable, match="stopped"):
        await reader
