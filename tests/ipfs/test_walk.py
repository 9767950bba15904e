"""From files to blocks and back: equal for any bytes and any tree, and nothing wrong is ever believed."""

import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfms_cli.errors import BadRequest, Conflict, FetchFailed, HfmsError, NotFound, VerifyFailed
from hfms_cli.ipfs import Cid, Fetch, blocks_of_bytes, blocks_of_path, root_of, walk
from hfms_cli.ipfs.unixfs import Kind, Link, encode_node
from tests.ipfs.blocks import Blocks, run


def read(blocks, root) -> bytes:
    async def work():
        return b"".join([piece async for piece in walk.cat(Fetch([blocks]), root)])

    return run(work())


@given(st.integers(0, 3000), st.integers(1, 40), st.sampled_from([0, 1]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_bytes_in_any_chunks_come_back(size, chunk, version, streams):
    data = random.Random(size).randbytes(size)
    made = list(blocks_of_bytes(data, chunker=f"size-{chunk}", version=version))
    assert read(Blocks(dict(made), streams=streams), made[-1][0]) == data


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_no_changed_block_is_believed(data):
    made = list(blocks_of_bytes(random.Random(1).randbytes(2000), chunker="size-100"))
    victim = data.draw(st.integers(0, len(made) - 1))
    cid, block = made[victim]
    at, change = data.draw(st.integers(0, len(block) - 1)), data.draw(st.integers(1, 255))
    changed = block[:at] + bytes([block[at] ^ change]) + block[at + 1 :]
    source = Blocks(dict(made) | {cid: changed}, streams=data.draw(st.booleans()))
    with pytest.raises(VerifyFailed):
        read(source, made[-1][0])


def test_a_file_that_repeats_itself_comes_back_from_a_stream_that_does_not():
    data = bytes(5_000) + b"middle" + bytes(5_000)
    made = list(blocks_of_bytes(data, chunker="size-50"))
    source = Blocks(dict(made), streams=True)
    assert read(source, made[-1][0]) == data
    assert source.asked == [made[-1][0]]  # the root, to see what it is


@pytest.fixture
def folder(tmp_path):
    for path, data in {"a": b"1", "sub/b": b"2" * 1000, "sub/deep/c": b"", ".hidden": b"3"}.items():
        (tmp_path / "in" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / path).write_bytes(data)
    (tmp_path / "in" / "empty").mkdir()
    return tmp_path / "in"


def blocks_of(path):
    made = list(blocks_of_path(path, recursive=True))
    return Blocks(dict(made)), made[-1][0]


async def test_a_folder_comes_back_without_what_is_hidden(folder, tmp_path):
    blocks, root = blocks_of(folder)
    seen = []
    size = await walk.save(Fetch([blocks]), root, tmp_path / "out", lambda done, total: seen.append((done, total)))
    assert {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*")} == {
        "a", "empty", "sub", "sub/b", "sub/deep", "sub/deep/c",
    }  # fmt: skip
    assert (tmp_path / "out/sub/b").read_bytes() == b"2" * 1000
    assert seen[-1] == (size, size) == (1001, 1001)


async def test_a_sharded_folder_is_listed_and_found_in(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(4000):
        (tmp_path / "in" / f"{i:064}").write_bytes(b"%d" % i)
    blocks, root = blocks_of(tmp_path / "in")
    listed = await walk.ls(Fetch([blocks]), root)
    assert [e.name for e in listed] == [f"{i:064}" for i in range(4000)]
    found = await walk.resolve(Fetch([blocks]), root, [f"{1234:064}"])
    assert found == Cid.of("raw", b"1234")
    with pytest.raises(NotFound):
        await walk.resolve(Fetch([blocks]), root, ["nothing"])


async def test_nothing_is_written_over_and_nothing_is_left_after_an_error(folder, tmp_path):
    blocks, root = blocks_of(folder)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_bytes(b"mine")
    with pytest.raises(Conflict):
        await walk.save(Fetch([blocks]), root, tmp_path / "out")
    del blocks.blocks[Cid.of("raw", b"2" * 1000)]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(NotFound):
        await walk.save(Fetch([blocks]), root, tmp_path / "other")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "../../etc/passwd", "a\\b", "a\0b", "x" * 300])
async def test_a_folder_with_a_name_that_is_none_is_not_written(tmp_path, name):
    leaf = Cid.of("raw", b"x")
    block = encode_node(Kind.FOLDER, links=[Link(leaf, name, 1), Link(leaf, "good", 1)])
    root = Cid.of("dag-pb", block)
    with pytest.raises(VerifyFailed, match="no name of a file"):
        await walk.save(Fetch([Blocks({root: block, leaf: b"x"})]), root, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["root", "inside"])
async def test_a_symbolic_link_is_never_written(tmp_path, where):
    link = encode_node(Kind.SYMLINK, data=b"/etc/passwd")
    blocks = {Cid.of("dag-pb", link): link}
    root = Cid.of("dag-pb", link)
    if where == "inside":
        block = encode_node(Kind.FOLDER, links=[Link(root, "passwd", 1)])
        root = Cid.of("dag-pb", block)
        blocks[root] = block
    with pytest.raises(VerifyFailed, match="symbolic link"):
        await walk.save(Fetch([Blocks(blocks)]), root, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


async def test_a_file_whose_parts_are_not_as_long_as_it_says_is_refused():
    leaf = Cid.of("raw", b"four")
    block = encode_node(Kind.FILE, links=[Link(leaf, total=4)] * 3, parts=[4, 5, 4])
    root = Cid.of("dag-pb", block)
    with pytest.raises(VerifyFailed, match="not the part of a file"):
        [piece async for piece in walk.cat(Fetch([Blocks({root: block, leaf: b"four"})]), root)]


async def test_a_file_that_unfolds_for_ever_is_refused_before_anything_is_written(tmp_path):
    """Thirty blocks of some kilobytes that stand for more bytes than there are disks."""
    block, blocks, size = b"x" * 1000, {}, 1000
    cid = Cid.of("raw", block)
    blocks[cid] = block
    for _ in range(7):
        block = encode_node(Kind.FILE, links=[Link(cid, total=size)] * 100, parts=[size] * 100)
        cid, size = Cid.of("dag-pb", block), size * 100
        blocks[cid] = block
    with pytest.raises(FetchFailed, match="bytes of disk"):
        await walk.save(Fetch([Blocks(blocks)]), cid, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


async def test_folders_that_unfold_for_ever_are_refused(tmp_path):
    block = encode_node(Kind.FOLDER)
    blocks, cid = {Cid.of("dag-pb", block): block}, Cid.of("dag-pb", block)
    for _ in range(6):
        block = encode_node(Kind.FOLDER, links=[Link(cid, f"{i:03}", 1) for i in range(100)])
        cid = Cid.of("dag-pb", block)
        blocks[cid] = block
    with pytest.raises(VerifyFailed, match="more than 100,000"):
        await walk.save(Fetch([Blocks(blocks)]), cid, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_a_block_of_nonsense_raises_nothing_but_our_errors(block):
    cid = Cid.of("dag-pb", block)

    async def work():
        await walk.ls(Fetch([Blocks({cid: block})]), cid)

    try:
        run(work())
    except HfmsError as exc:
        assert exc.message  # noqa: PT017


async def test_data_of_another_kind_is_no_file():
    cid = Cid.of("dag-cbor", b"\xa0")
    with pytest.raises(BadRequest, match="neither a file nor a folder"):
        await walk.ls(Fetch([Blocks({cid: b"\xa0"})]), cid)


def test_a_folder_is_added_only_when_that_is_asked_for(folder):
    with pytest.raises(BadRequest, match="is a folder"):
        root_of(blocks_of_path(folder))


@pytest.mark.parametrize("chunker", ["", "rabin", "size-", "size-0", "size--1", "size-2000000", "--help", "size-1 "])
def test_a_chunker_that_is_none_is_refused(chunker, folder):
    with pytest.raises(BadRequest) as failed:
        root_of(blocks_of_path(folder / "a", chunker=chunker))
    assert failed.value.param == "chunker"


def test_a_link_that_leads_out_is_not_followed(folder, tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(BadRequest, match="leads out of the folder"):
        root_of(blocks_of_path(folder, recursive=True))


def test_a_link_within_is_taken_for_the_file_as_in_the_hubs_cache(tmp_path):
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / "abc"
    blobs = tmp_path / "models--org--tiny" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1234").write_bytes(b"{}")
    (snapshot / "config.json").symlink_to("../../blobs/1234")
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_bytes(b"{}")
    assert root_of(blocks_of_path(snapshot, recursive=True)) == root_of(blocks_of_path(plain, recursive=True))


def test_a_pipe_is_refused_and_not_waited_for(folder):
    os.mkfifo(folder / "pipe")
    with pytest.raises(BadRequest, match="neither a file nor a folder"):
        root_of(blocks_of_path(folder, recursive=True))
