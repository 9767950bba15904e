"""Blocks of a paged cache: who has them, and who finds what they hold."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hfms_engines.blocks import Blocks, Table

SIZE = 4


def filled(blocks: Blocks, tokens: list[int]) -> Table:
    """A table of a sequence that has been read to its end."""
    table = blocks.open(tokens)
    assert blocks.extend(table, len(tokens))
    blocks.publish(table, tokens)
    return table


def test_a_sequence_that_begins_as_another_did_shares_its_full_blocks():
    blocks = Blocks(10, SIZE)
    first = filled(blocks, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    second = blocks.open([1, 2, 3, 4, 5, 6, 7, 8, 0])
    assert second.blocks == first.blocks[:2]
    assert blocks.open([1, 2, 3, 4, 0, 6, 7, 8, 9]).blocks == first.blocks[:1]
    assert blocks.open([0, 2, 3, 4, 5, 6, 7, 8, 9]).blocks == []


def test_the_last_token_is_always_left_to_read():
    blocks = Blocks(10, SIZE)
    first = filled(blocks, [1, 2, 3, 4, 5, 6, 7, 8])
    assert blocks.open([1, 2, 3, 4, 5, 6, 7, 8]).blocks == first.blocks[:1]


def test_the_same_block_at_another_place_is_not_shared():
    blocks = Blocks(10, SIZE)
    filled(blocks, [1, 2, 3, 4, 1, 2, 3, 4, 9])
    assert len(blocks.open([1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4, 9]).blocks) == 2


def test_free_blocks_are_found_until_they_are_needed_and_a_beginning_longer_than_its_end():
    blocks = Blocks(3, SIZE)
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    blocks.close(filled(blocks, tokens))
    assert blocks.free == 3
    other = blocks.open([9] * 8)
    assert blocks.extend(other, 8)  # one was never named, and one is the second of the three
    found = blocks.open(tokens)
    assert len(found.blocks) == 1


def test_without_sharing_nothing_is_found():
    blocks = Blocks(10, SIZE, share=False)
    filled(blocks, [1, 2, 3, 4, 5])
    assert blocks.open([1, 2, 3, 4, 5]).blocks == []


def test_no_more_blocks_are_ever_written_to_than_hold_something():
    """Memory counts once it is written to: what nobody can find is used again before what was never used."""
    for share, most in ((False, 3), (True, 3 + 2 * 5)):  # with names, two full blocks stay of each of five before
        blocks = Blocks(100, SIZE, share=share)
        written: set[int] = set()
        for i in range(6):
            table = filled(blocks, [i] * 9)
            written.update(table.blocks)
            blocks.close(table)
        assert len(written) == most


def test_disowned_blocks_are_not_found_and_only_the_own_ones_are_returned():
    blocks = Blocks(10, SIZE)
    first = filled(blocks, [1, 2, 3, 4, 5])
    second = filled(blocks, [1, 2, 3, 4, 6])
    assert blocks.disown(second) == second.blocks[1:]
    assert blocks.open([1, 2, 3, 4, 5]).blocks == []
    assert first.blocks[0] == second.blocks[0]


def test_too_few_blocks_change_nothing():
    blocks = Blocks(2, SIZE)
    table = blocks.open([1])
    assert not blocks.extend(table, 9)
    assert table.blocks == []
    assert blocks.free == 2


@given(
    st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 1), min_size=1, max_size=14)), max_size=40),
    st.booleans(),
)
def test_no_block_is_written_by_two_and_what_is_found_is_what_was_stored(moves, share):
    """Each move gives one of four seats to a new sequence. What the blocks hold is kept beside them."""
    blocks = Blocks(8, SIZE, share=share)
    seats: dict[int, Table] = {}
    held: dict[int, tuple[int, ...]] = {}
    """Every token up to a block's end: what its keys and values depend on."""
    for seat, tokens in moves:
        if seat in seats:
            blocks.close(seats.pop(seat))
        table = blocks.open(tokens)
        for i, block in enumerate(table.blocks):
            assert held[block] == tuple(tokens[: (i + 1) * SIZE])
        found = len(table.blocks)
        if not blocks.extend(table, len(tokens)):
            blocks.close(table)
            continue
        others = {block for other in seats.values() for block in other.blocks}
        assert not others & set(table.blocks[found:])
        for i, block in enumerate(table.blocks[found:], found):
            held[block] = tuple(tokens[: (i + 1) * SIZE])
        blocks.publish(table, tokens)
        seats[seat] = table
        used = {block for other in seats.values() for block in other.blocks}
        assert blocks.free == blocks.count - len(used)
    for table in seats.values():
        blocks.close(table)
    assert blocks.free == blocks.count
