"""Blocks in a folder beside the Hugging Face cache: whole or not there, checked, and gone when nobody pins them."""

import os
import random
import subprocess

import pytest

from hfms_cli import FetchFailed, NotFound, VerifyFailed
from hfms_cli.ipfs import Cid, blocks_of_bytes, parse
from hfms_storage.hf_cache import HfCache, HfCacheOptions

DATA = random.Random(11).randbytes(600_000)


@pytest.fixture
def store(tmp_path):
    return HfCache(HfCacheOptions(cache_dir=str(tmp_path / "hub")))


async def test_blocks_lie_beside_the_cache_and_are_named_by_their_cids(store, tmp_path):
    await store.add_bytes(DATA)
    names = {p.name for p in (tmp_path / "ipfs" / "blocks").glob("*/*")}
    assert names == {str(cid) for cid, _ in blocks_of_bytes(DATA)}
    assert not (tmp_path / "hub").exists()


async def test_the_folder_can_be_chosen(tmp_path):
    store = HfCache(HfCacheOptions(cache_dir=str(tmp_path / "hub"), blocks_dir=str(tmp_path / "elsewhere")))
    await store.add_bytes(b"x")
    assert (tmp_path / "elsewhere" / "blocks").is_dir()


async def test_a_block_that_rotted_is_refused_and_makes_place_for_a_good_one(store, tmp_path):
    cid = await store.add_bytes(b"good bytes")
    (file,) = (tmp_path / "ipfs" / "blocks").glob("*/*")
    file.write_bytes(b"bad bytes!")
    with pytest.raises(VerifyFailed):
        await store.block_get(cid)
    with pytest.raises(NotFound):
        await store.block_get(cid)
    assert await store.add_bytes(b"good bytes") == cid
    assert await store.block_get(cid) == b"good bytes"


async def test_a_cid_of_either_version_means_the_same_block(store):
    *_, (root, _) = blocks_of_bytes(DATA, version=0)
    await store.dag_import(_car(blocks_of_bytes(DATA, version=0), root))
    assert await store.cat(str(root)) == DATA
    assert await store.cat(str(Cid(1, root.codec, root.hash, root.digest))) == DATA
    await store.unpin(str(Cid(1, root.codec, root.hash, root.digest)))


async def _car(blocks, root):
    from hfms_cli.ipfs import car_header, car_section

    yield car_header([root])
    for block in blocks:
        yield car_section(*block)


async def test_what_is_not_whole_cannot_be_pinned(store, tmp_path):
    cid = await store.add_bytes(DATA, pin=False)
    (next(p for p in (tmp_path / "ipfs/blocks").glob("*/*") if p.name != cid)).unlink()
    with pytest.raises(NotFound, match="is not on this disk"):
        await store.pin(cid)


async def test_what_nobody_pins_goes_and_the_rest_stays(store, tmp_path):
    kept = await store.add_bytes(DATA, pin=True)
    lost = await store.add_bytes(DATA[:300_000], pin=False)  # its first chunk is the other's as well
    own = sum(len(block) for _, block in blocks_of_bytes(DATA[:300_000])) - 262_144
    assert await store.gc() == own
    assert await store.cat(kept) == DATA
    with pytest.raises(NotFound):
        await store.cat(lost)
    await store.unpin(kept)
    await store.gc()
    assert list((tmp_path / "ipfs" / "blocks").glob("*/*")) == []


@pytest.fixture
def small_disk(tmp_path):
    """A disk of one megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if os.geteuid() != 0 or mounted.returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


async def test_a_full_disk_is_a_clear_error_and_harms_nothing(small_disk):
    store = HfCache(HfCacheOptions(blocks_dir=str(small_disk / "ipfs")))
    kept = await store.add_bytes(DATA)
    with pytest.raises(FetchFailed, match="No space left on device"):
        await store.add_bytes(random.Random(12).randbytes(3 * 2**20))
    assert await store.cat(kept) == DATA
    for file in (small_disk / "ipfs" / "blocks").glob("*/*"):
        assert Cid.of("raw" if parse(file.name).codec == 0x55 else "dag-pb", file.read_bytes()) == parse(file.name)
    await store.gc()
    assert await store.cat(kept) == DATA


async def test_a_file_that_does_not_fit_is_not_begun(small_disk, store):
    cid = await store.add_bytes(random.Random(12).randbytes(3 * 2**20))
    with pytest.raises(FetchFailed, match="bytes of disk"):
        await store.get_to_path(cid, output_path=small_disk / "out")
    assert list(small_disk.iterdir()) == []
