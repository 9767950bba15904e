"""Blocks from several sources: a bad one costs itself and no more, and who failed is asked last for a while."""

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfms_cli.errors import FetchFailed, NotFound, Unavailable, VerifyFailed
from hfms_cli.ipfs import Cid, Fetch, Health, blocks_of_bytes, walk
from hfms_cli.ipfs.streams import FileStream
from tests.ipfs.blocks import Blocks

DATA = random.Random(3).randbytes(20_000)
MADE = list(blocks_of_bytes(DATA, chunker="size-500"))
ROOT = MADE[-1][0]
PARTS = dict(MADE[:-1])
"""What a source has that has the file's blocks and not its root: nobody asks it for a stream."""


def wrong(*indexes: int) -> dict[Cid, bytes]:
    """The file's blocks, some of them with a wrong byte."""
    return dict(MADE) | {MADE[i][0]: b"\xff" + MADE[i][1][1:] + b"!" for i in indexes}


async def read(fetch: Fetch) -> bytes:
    return b"".join([piece async for piece in walk.cat(fetch, ROOT)])


async def test_only_the_bad_block_of_a_stream_is_fetched_elsewhere():
    liar, honest = Blocks(wrong(3), "liar", streams=True), Blocks(PARTS, "honest")
    fetch = Fetch([liar, honest], Health(clock=lambda: 0.0))
    assert await read(fetch) == DATA
    assert set(honest.asked) == {ROOT, MADE[3][0]}  # a stream goes on after a bad block
    assert "are not those of" in fetch.tried["liar"]
    assert fetch.served["honest"] == 1
    assert fetch.served_bytes == {"liar": 20_000 - 500 + 2 * len(MADE[-1][1]), "honest": 500}


async def test_a_source_that_lied_is_asked_last_from_then_on():
    liar, honest = Blocks(wrong(0), "liar"), Blocks(dict(MADE), "honest")
    fetch = Fetch([liar, honest], Health(clock=lambda: 0.0))
    await fetch.get(MADE[0][0])
    await fetch.get(MADE[1][0])
    assert (liar.asked, honest.asked) == ([MADE[0][0]], [MADE[0][0], MADE[1][0]])


async def test_a_stream_with_many_bad_blocks_is_given_up():
    liar, honest = Blocks(wrong(*range(len(MADE) - 1)), "liar", streams=True), Blocks(PARTS, "honest")
    assert await read(Fetch([liar, honest])) == DATA
    assert set(honest.asked) == {cid for cid, _ in MADE}


async def test_a_stream_that_breaks_off_is_finished_by_others():
    cut, whole = Blocks(dict(MADE), "cut", streams=True, cut=10), Blocks(PARTS, "whole")
    health = Health(clock=lambda: 0.0)
    fetch = Fetch([cut, whole], health)
    assert await read(fetch) == DATA
    assert len(set(whole.asked) - {ROOT}) == len(MADE) - 10
    assert fetch.served["cut"] == 11  # ten of the stream, and the root before it
    assert "cut off" in fetch.tried["cut"]


async def test_a_source_without_the_file_leaves_the_stream_to_the_next():
    empty = Blocks({}, "empty", streams=True)
    full = Blocks(dict(MADE), "full", streams=True)
    assert await read(Fetch([empty, full])) == DATA
    assert full.asked == [ROOT]


async def test_a_files_bytes_are_cut_into_its_blocks_and_each_is_checked():
    source = Blocks(dict(MADE), "source", streams=True, whole=[DATA[:777], DATA[777:]])
    fetch = Fetch([source])
    assert await read(fetch) == DATA
    assert source.asked == [ROOT]
    assert fetch.served_bytes == {"source": 20_000 + len(MADE[-1][1])}


async def test_only_the_bad_block_of_a_files_bytes_is_fetched_elsewhere():
    liar = Blocks(dict(MADE), "liar", whole=[DATA[:1600] + b"wrong" + DATA[1605:]])
    honest = Blocks(PARTS, "honest")
    fetch = Fetch([liar, honest], Health(clock=lambda: 0.0))
    assert await read(fetch) == DATA
    assert set(honest.asked) == {ROOT, MADE[3][0]}
    assert "are not those of" in fetch.tried["liar"]


@pytest.mark.parametrize("whole", [[DATA[:5100]], [DATA[:5100], b"?" * 20_000], [b"?" * 20_000]])
async def test_a_files_bytes_that_end_early_or_are_wrong_are_finished_by_others(whole):
    bad = Blocks({ROOT: dict(MADE)[ROOT]}, "bad", whole=whole)
    honest = Blocks(PARTS, "honest")
    assert await read(Fetch([bad, honest])) == DATA


async def test_a_source_that_cannot_send_a_files_bytes_leaves_them_to_the_next_ones_stream():
    class Node(Blocks):
        async def _file(self, chunks):
            raise FetchFailed("It does not know that command.")
            yield b""

    node, other = Node(dict(MADE), "node", whole=[]), Blocks(PARTS, "other", streams=True)
    other.depth_first = lambda root: PARTS  # it streams what it has, though it has not the root
    fetch = Fetch([node, other])
    assert await read(fetch) == DATA
    assert fetch.tried["node"] == "It does not know that command."
    assert fetch.served["other"] == len(PARTS)


async def test_blocks_that_a_file_holds_many_times_keep_their_places_in_its_bytes():
    data = bytes(3000) + DATA[:700] + bytes(2000) + DATA[:700]
    made = list(blocks_of_bytes(data, chunker="size-500"))
    source = Blocks({made[-1][0]: made[-1][1]}, "source", whole=[data[i : i + 64] for i in range(0, len(data), 64)])
    assert b"".join([piece async for piece in walk.cat(Fetch([source]), made[-1][0])]) == data
    assert set(source.asked) == {made[-1][0]}


@given(st.lists(st.integers(1, 9)), st.lists(st.tuples(st.integers(0, 5), st.integers(1, 20))))
async def test_a_files_bytes_are_read_from_any_place_on_however_they_come(chunks, wanted):
    async def coming():
        at = 0
        for size in [*chunks, 10**6]:
            yield DATA[at : at + size]
            at += size

    stream, at = FileStream(Blocks({}), coming()), 0
    for skip, size in wanted:
        at += skip
        assert await stream.read(at, size) == DATA[at : at + size]
        at += size
        assert await stream.read(at - 1, 1) is None  # it has gone by
    assert await stream.read(at, 2**40) is None
    with pytest.raises(FetchFailed):
        await stream.read(len(DATA), 1)


async def test_what_is_on_this_disk_is_asked_of_nobody_else():
    here, there = Blocks(dict(MADE), "here", here=True), Blocks(dict(MADE), "there", streams=True)
    fetch = Fetch([there, here])
    assert await read(fetch) == DATA
    assert (dict(fetch.served), there.asked) == ({"here": len(MADE)}, [])


async def test_only_what_is_missing_on_this_disk_is_fetched():
    here, there = Blocks(dict(MADE), "here", here=True), Blocks(dict(MADE), "there", streams=True)
    lost = {cid: here.blocks.pop(cid) for cid, _ in MADE[5:8]}
    fetch = Fetch([here, there])
    assert await read(fetch) == DATA
    assert set(there.asked) == lost.keys()


async def test_a_stream_of_blocks_that_nobody_asked_for_ends():
    class Endless(Blocks):
        async def _car(self, root):
            from hfms_cli.ipfs import car_header, car_section

            yield car_header([root])
            for i in range(10**9):
                block = i.to_bytes(4, "big") * 2**18
                yield car_section(Cid.of("raw", block), block)

    endless, honest = Endless(dict(MADE), "endless", streams=True), Blocks(PARTS, "honest")
    fetch = Fetch([endless, honest])
    assert await read(fetch) == DATA
    assert fetch.tried["endless"] == "`endless` sends what nobody asked for."


@pytest.mark.parametrize("streams", [True, False])
async def test_a_source_that_is_silent_is_left_after_its_time(streams):
    class Silent(Blocks):
        async def block_get(self, cid):
            await asyncio.Event().wait()

        async def _car(self, root):
            await asyncio.Event().wait()
            yield b""

    fetch = Fetch([Silent({}, "silent", streams=streams), Blocks(dict(MADE), "honest")], patience=0.05)
    assert await read(fetch) == DATA
    assert fetch.tried["silent"] == "`silent` did not answer within 0.05 seconds."


async def test_a_source_with_a_fault_of_its_own_is_left_and_its_text_hidden():
    broken = Blocks({}, "broken", error=ValueError("/home/me/secret"), streams=True)
    fetch = Fetch([broken, Blocks(dict(MADE), "honest")])
    assert await read(fetch) == DATA
    assert fetch.tried == {"broken": "`broken` failed (ValueError)."}


async def test_the_error_says_what_each_source_said():
    sources = [Blocks({}, "empty"), Blocks(wrong(0), "liar"), Blocks({}, "down", error=FetchFailed("It is down."))]
    with pytest.raises(VerifyFailed) as failed:
        await Fetch(sources).get(MADE[0][0])
    for said in ("empty: It has no such block", "liar: The bytes that came are not those of", "down: It is down"):
        assert said in failed.value.message
    with pytest.raises(NotFound):
        await Fetch(sources[:1]).get(MADE[0][0])


async def test_a_block_within_its_cid_is_asked_of_nobody():
    source = Blocks({})
    assert await Fetch([source]).get(Cid(1, 0x55, 0, b"inline")) == b"inline"
    assert source.asked == []


def test_pauses_double_and_end_when_a_source_is_well_again():
    now, seen = [0.0], []
    health = Health(clock=lambda: now[0], observe=lambda *said: seen.append(said[:3]))
    a, b = Blocks({}, "a"), Blocks({}, "b")
    for failures, pause in ((1, 2), (2, 4), (3, 8)):
        health.note("a", "block_get", Unavailable("It is down."), 0.1)
        assert (health.of("a").failures, health.of("a").error) == (failures, "It is down.")
        assert [s.name for s in health.order([a, b])] == ["b", "a"]
        now[0] += pause
        assert [s.name for s in health.order([a, b])] == ["a", "b"]
    for _ in range(20):
        health.note("a", "block_get", Unavailable("It is down."), 0.1)
    now[0] += 60
    assert [s.name for s in health.order([a, b])] == ["a", "b"]
    health.note("a", "block_get", NotFound("It is not here."), 0.1)
    assert health.of("a").failures == 0
    assert seen[0] == ("a", "block_get", "error")
    assert seen[-1] == ("a", "block_get", "missing")
