"""One file from several sources at once: shared by speed, late blocks asked twice, liars set aside, no wrong byte."""

import asyncio
import random
from contextlib import aclosing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfms_cli.errors import FetchFailed, NotFound, VerifyFailed
from hfms_cli.ipfs import Fetch, Health, blocks_of_bytes, lanes, walk
from tests.ipfs.blocks import Blocks, run

DATA = random.Random(11).randbytes(60_000)
MADE = list(blocks_of_bytes(DATA, chunker="size-500"))
ROOT = MADE[-1][0]
LEAVES = [cid for cid, _ in MADE[:-1]]


async def read(fetch: Fetch) -> bytes:
    async with aclosing(walk.cat(fetch, ROOT)) as pieces:
        return b"".join([piece async for piece in pieces])


class Answering(Blocks):
    """A source that does something before it answers."""

    def __init__(self, name, before, blocks=MADE):
        super().__init__(dict(blocks), name)
        self.before = before

    async def block_get(self, cid):
        block = await super().block_get(cid)
        await self.before(self.asked[-1])
        return block


def after(seconds):
    return lambda cid: asyncio.sleep(seconds)


async def test_the_quicker_source_serves_more_and_the_slower_helps():
    quick, slow = Answering("quick", after(0.001)), Answering("slow", after(0.02))
    fetch = Fetch([slow, quick])
    assert await read(fetch) == DATA
    assert fetch.served["quick"] > 2 * fetch.served["slow"] > 2
    assert sum(fetch.served_bytes.values()) >= len(DATA)


async def test_a_source_that_gets_faster_by_more_questions_is_asked_more_at_once():
    most = 0

    async def count(cid):
        nonlocal most
        most = max(most, source.open + 1)
        source.open += 1
        await asyncio.sleep(0.005)
        source.open -= 1

    source, other = Answering("far", count), Answering("other", count, [MADE[-1]])
    source.open = 0
    await read(Fetch([source, other]))
    assert lanes.FIRST_WINDOW < most <= lanes.WIDEST


async def test_a_late_block_is_asked_of_another_and_the_late_answer_is_not_waited_for():
    left = asyncio.Event()

    async def stalls(cid):
        if cid == LEAVES[0]:
            try:
                await asyncio.Event().wait()
            finally:
                left.set()

    stalling = Answering("stalling", stalls)
    other = Answering("other", after(0))
    fetch = Fetch([stalling, other])
    await fetch.get(LEAVES[1])  # the first of the order is known to be quick
    async with fetch.all_of(ROOT):
        assert await fetch.get(LEAVES[0]) == DATA[:500]
    if LEAVES[0] in stalling.asked:
        assert left.is_set()
    assert other.asked


async def test_a_source_that_sent_a_wrong_block_is_asked_no_more_and_only_that_block_comes_twice():
    bad = LEAVES[0]
    liar = Blocks(dict(MADE) | {bad: b"wrong"}, "liar")
    honest = Answering("honest", after(0.001))
    health = Health(clock=lambda: 0.0)
    fetch = Fetch([liar, honest], health)
    assert await fetch.get(bad) == DATA[:500]
    assert await read(fetch) == DATA
    assert liar.asked == [bad]
    assert health.of("liar").failures == 1
    assert len(honest.asked) - honest.asked.count(ROOT) == len(LEAVES)


async def test_a_source_that_was_set_aside_is_still_asked_for_what_nobody_else_has():
    liar = Blocks(dict(MADE) | {LEAVES[0]: b"wrong"}, "liar")
    other = Blocks({LEAVES[0]: MADE[0][1]}, "other")
    fetch = Fetch([liar, other])
    assert await read(fetch) == DATA
    assert fetch.served["other"] == 1
    assert "are not those of" in fetch.tried["liar"]


async def test_a_source_without_the_file_is_asked_for_its_root_and_no_more():
    empty, full, also = Blocks({}, "empty"), Answering("full", after(0.001)), Answering("also", after(0.001))
    assert await read(Fetch([empty, full, also])) == DATA
    assert set(empty.asked) == {ROOT}


async def test_who_leaves_a_reading_leaves_no_question_open():
    left = 0

    async def waits(cid):
        nonlocal left
        if cid != ROOT:
            left += 1
            try:
                await asyncio.Event().wait()
            finally:
                left -= 1

    fetch = Fetch([Answering("a", waits), Answering("b", waits)])
    reading = asyncio.ensure_future(read(fetch))
    while left < 2:
        await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert left == 0


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_whoever_lies_lacks_or_fails_the_file_is_right_or_an_error(data):
    """Three sources, each with every block right, wrong, missing or failing, as may be."""
    made = list(blocks_of_bytes(DATA[:3000], chunker="size-500"))

    class Mixed(Blocks):
        async def block_get(self, cid):
            block = await super().block_get(cid)
            if block == b"fails":
                raise FetchFailed("It failed.")
            return block

    sources = [Mixed({}, name) for name in ("a", "b", "c")]
    possible = True
    for cid, block in made:
        kinds = data.draw(st.tuples(*[st.sampled_from(["right", "wrong", "missing", "fails"])] * 3))
        possible &= "right" in kinds
        for source, kind in zip(sources, kinds, strict=True):
            if kind != "missing":
                source.blocks[cid] = {"right": block, "wrong": block + b"!", "fails": b"fails"}[kind]

    async def work():
        return b"".join([piece async for piece in walk.cat(Fetch(sources), made[-1][0])])

    if possible:
        assert run(work()) == DATA[:3000]
    else:
        with pytest.raises((VerifyFailed, FetchFailed, NotFound)):
            run(work())
