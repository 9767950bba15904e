"""CARs: what is written is read, in chunks of any size, and nonsense ends in an error of ours."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfms_cli.errors import BadRequest, FetchFailed, HfmsError
from hfms_cli.ipfs import CarReader, Cid, car_header, car_section
from hfms_cli.ipfs.cid import varint
from tests.ipfs.blocks import run

BLOCKS = [(Cid.of("raw", data), data) for data in (b"", b"one", b"2" * 5000)]
CAR = car_header([BLOCKS[0][0]]) + b"".join(car_section(*block) for block in BLOCKS)


async def cut(raw: bytes, size: int):
    for at in range(0, len(raw), size):
        yield raw[at : at + size]


async def read(raw: bytes, size: int = 1000):
    reader = CarReader(cut(raw, size))
    return await reader.header(), [block async for block in reader.blocks()]


@pytest.mark.parametrize("size", [1, 7, 1000, 10**6])
def test_what_is_written_is_read(size):
    assert run(read(CAR, size)) == ([BLOCKS[0][0]], BLOCKS)


@given(st.integers(0, len(CAR) - 1))
@settings(deadline=None)
def test_a_car_that_is_cut_off_is_noticed_unless_it_ends_between_blocks(at):
    ends = [len(car_header([BLOCKS[0][0]]))]
    ends += [ends[0] + sum(len(car_section(*b)) for b in BLOCKS[: i + 1]) for i in range(len(BLOCKS))]
    if at in ends:
        assert len(run(read(CAR[:at]))[1]) == ends.index(at)
    else:
        with pytest.raises(FetchFailed):
            run(read(CAR[:at]))


@given(st.binary(max_size=200), st.booleans())
@settings(max_examples=200, deadline=None)
def test_nonsense_raises_nothing_but_our_errors(raw, with_header):
    try:
        _, blocks = run(read((car_header([BLOCKS[0][0]]) if with_header else b"") + raw))
    except HfmsError as exc:
        assert exc.message  # noqa: PT017
    else:
        assert all(isinstance(cid, Cid) for cid, _ in blocks)


def test_a_block_that_says_it_is_endless_is_refused_before_it_is_read():
    with pytest.raises(FetchFailed, match="too large"):
        run(read(car_header([BLOCKS[0][0]]) + varint(2**40) + b"x" * 1000))


def test_a_car_of_version_2_is_named():
    with pytest.raises(BadRequest, match="version 2"):
        run(read(bytes.fromhex("0aa16776657273696f6e02") + bytes(40)))
