"""Models by CID: found, fetched block by block, kept, listed and removed, whoever served them."""

import asyncio
import json
import os
import pickle
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from hfms_cli import BadRequest, FetchFailed, HfmsError, ModelNotFound, VerifyFailed
from hfms_cli.ipfs import blocks_of_bytes
from hfms_cli.ipfs import parse as parse_cid
from hfms_cli.models.content import Content
from hfms_cli.models.inspect import inspect
from hfms_cli.models.ipfs import IpfsModels
from hfms_cli.models.names import parse
from hfms_cli.models.router import Router
from tests.models.test_content import Shelf

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 64}
HEADER = json.dumps({"w": {"dtype": "F32", "shape": [200_000], "data_offsets": [0, 800_000]}}).encode()
FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "model.safetensors": struct.pack("<Q", len(HEADER)) + HEADER + bytes(range(256)) * 3125,
    "pytorch_model.bin": b"a duplicate that nobody needs",
}


def ignore(done, total):
    """Progress that nobody watches."""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    for name, data in FILES.items():
        (tmp_path / "model" / name).write_bytes(data)
    return tmp_path / "model"


@pytest.fixture
async def shelf(folder):
    """A store that has the model; `shelf.cid` is its CID."""
    shelf = Shelf("shelf")
    shelf.cid = await shelf.add_path(folder, recursive=True)
    return shelf


def models(*shelves, root):
    return Router([IpfsModels(Content(shelves), root)])


async def test_a_model_is_fetched_by_its_cid_and_only_what_is_needed(shelf, tmp_path):
    router, seen = models(shelf, root=tmp_path / "ipfs"), []
    manifest, folder = await router.pull(parse(f"ipfs://{shelf.cid}"), lambda done, total: seen.append((done, total)))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        name: FILES[name] for name in ("config.json", "model.safetensors")
    }
    assert (manifest.storage, manifest.revision) == ("ipfs", shelf.cid)
    assert all(len(f.sha256) == 64 for f in (await router.list())[0].files)
    assert inspect(folder, [f.path for f in manifest.files]).architecture == "LlamaForCausalLM"
    assert seen[-1] == (manifest.size, manifest.size)


async def test_what_was_fetched_is_there_when_the_stores_are_not(shelf, tmp_path):
    name = parse(f"ipfs://{shelf.cid}")
    await models(shelf, root=tmp_path / "ipfs").pull(name, ignore)
    router = models(root=tmp_path / "ipfs")
    assert (await router.pull(name, ignore))[0].revision == shelf.cid
    assert await router.on_disk(name)
    removed = await router.remove(name)
    assert removed.revision == shelf.cid
    assert await router.list() == []
    with pytest.raises(HfmsError):
        await router.pull(name, ignore)


async def test_the_model_is_whole_or_not_there_when_a_block_is_wrong(shelf, tmp_path):
    victim = next(c for c, block in shelf.blocks.items() if len(block) == 262_144)
    good, shelf.blocks[victim] = shelf.blocks[victim], bytes(262_144)
    root = tmp_path / "ipfs"
    with pytest.raises(VerifyFailed, match="are not those of"):
        await models(shelf, root=root).pull(parse(f"ipfs://{shelf.cid}"), ignore)
    assert await models(root=root).list() == []

    other = Shelf("other")
    other.blocks[victim] = good
    content = Content([shelf, other])
    _, folder = await Router([IpfsModels(content, root)]).pull(parse(f"ipfs://{shelf.cid}"), ignore)
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]


async def test_a_file_that_changed_on_the_disk_is_noticed(shelf, tmp_path):
    router, name = models(shelf, root=tmp_path / "ipfs"), parse(f"ipfs://{shelf.cid}")
    _, folder = await router.pull(name, ignore)
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    with pytest.raises(VerifyFailed):
        await router.pull(name, ignore)


async def test_a_gguf_file_needs_no_folder_around_it(tmp_path):
    shelf = Shelf("shelf")
    cid = await shelf.add_bytes(b"GGUF" + bytes(500_000))
    _, folder = await models(shelf, root=tmp_path / "ipfs").pull(parse(f"ipfs://{cid}"), ignore)
    assert (folder / "model.gguf").stat().st_size == 500_004


async def test_a_path_below_a_cid_may_be_the_model(tmp_path, folder):
    shelf = Shelf("shelf")
    cid = await shelf.add_path(folder.parent, recursive=True)
    manifest, _ = await models(shelf, root=tmp_path / "ipfs").pull(parse(f"ipfs://{cid}/model"), ignore)
    assert manifest.revision == await shelf.add_path(folder, recursive=True)


@pytest.mark.parametrize(
    ("files", "error"),
    [({"readme.md": b"x"}, ModelNotFound), ({"a-Q4_0.gguf": b"1", "a-Q8_0.gguf": b"2"}, BadRequest)],
)
async def test_what_is_no_model_or_several_is_said(files, error, tmp_path):
    (tmp_path / "in").mkdir()
    for name, data in files.items():
        (tmp_path / "in" / name).write_bytes(data)
    shelf = Shelf("shelf")
    cid = await shelf.add_path(tmp_path / "in", recursive=True)
    with pytest.raises(error):
        await models(shelf, root=tmp_path / "ipfs").pull(parse(f"ipfs://{cid}"), ignore)


@pytest.mark.parametrize("name", ["ipfs:x", "ipfs:--help", "ipfs:bafy/../../etc/passwd", "ipfs://" + "b" * 400])
async def test_a_name_that_holds_no_cid_is_refused(name, tmp_path):
    with pytest.raises(BadRequest):
        await models(Shelf("shelf"), root=tmp_path / "ipfs").pull(parse(name), ignore)
    assert not (tmp_path / "ipfs").exists()


async def test_a_cid_takes_no_revision(shelf, tmp_path):
    with pytest.raises(BadRequest, match="no revision"):
        await models(shelf, root=tmp_path / "ipfs").pull(parse(f"ipfs://{shelf.cid}@main"), ignore)


async def test_what_a_killed_fetch_left_goes_after_a_day(shelf, tmp_path):
    (tmp_path / "ipfs" / ".fetch-old").mkdir(parents=True)
    (tmp_path / "ipfs" / ".fetch-new").mkdir()
    os.utime(tmp_path / "ipfs" / ".fetch-old", (0, 0))
    await models(shelf, root=tmp_path / "ipfs").pull(parse(f"ipfs://{shelf.cid}"), ignore)
    assert {p.name for p in (tmp_path / "ipfs").iterdir()} == {".fetch-new", ".locks", shelf.cid}


async def test_a_cache_that_cannot_be_written_is_said(shelf, tmp_path):
    (tmp_path / "ipfs").write_bytes(b"a file")
    with pytest.raises(FetchFailed, match="cannot be written"):
        await models(shelf, root=tmp_path / "ipfs").pull(parse(f"ipfs://{shelf.cid}"), ignore)


class Counted(Shelf):
    """A store that notes what it was asked for, and may give nothing more after some blocks."""

    most = 10**9

    def __init__(self, name, blocks=None):
        super().__init__(name)
        self.blocks = dict(blocks or {})
        self.asked = []

    async def block_get(self, cid):
        if len(self.asked) >= self.most:
            raise FetchFailed("It gives no more.")
        self.asked.append(str(parse_cid(cid)))
        return await super().block_get(cid)


BIG = {"config.json": FILES["config.json"], "model.safetensors": FILES["model.safetensors"] + os.urandom(6 * 2**20)}


@pytest.fixture
async def big(tmp_path):
    """A model of 27 blocks in a store that counts."""
    (tmp_path / "big").mkdir()
    for name, data in BIG.items():
        (tmp_path / "big" / name).write_bytes(data)
    store = Counted("store")
    store.cid = await store.add_path(tmp_path / "big", recursive=True)
    return store


def leaves(asked):
    return [cid for cid in asked if parse_cid(cid).codec == 0x55]


async def test_a_fetch_goes_on_where_an_earlier_one_ended_and_asks_for_no_block_twice(big, tmp_path):
    name, root = parse(f"ipfs://{big.cid}"), tmp_path / "ipfs"
    big.most = 20
    with pytest.raises(HfmsError):
        await models(big, root=root).pull(name, ignore)
    (draft,) = root.glob(".fetch-*")
    written = (draft / "files" / "model.safetensors").stat().st_size // 262_144
    assert written >= 8
    first, big.asked, big.most = leaves(big.asked), [], 10**9
    _, folder = await models(big, root=root).pull(name, ignore)
    assert (folder / "model.safetensors").read_bytes() == BIG["model.safetensors"]
    in_place = {str(c) for c, _ in blocks_of_bytes(BIG["model.safetensors"][: written * 262_144])}
    assert not in_place & set(leaves(big.asked))
    assert set(first) & in_place
    assert not list(root.glob(".fetch-*"))


async def test_what_is_wrong_in_the_file_of_a_killed_fetch_is_fetched_again(big, tmp_path):
    name, root = parse(f"ipfs://{big.cid}"), tmp_path / "ipfs"
    draft = root / f".fetch-{big.cid}" / "files"
    draft.mkdir(parents=True)
    torn = bytearray(BIG["model.safetensors"])
    torn[5 * 262_144] ^= 1
    (draft / "model.safetensors").write_bytes(torn + b"and more than there should be")
    (draft / "config.json").write_bytes(b"{}")
    _, folder = await models(big, root=root).pull(name, ignore)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == BIG
    weights = {str(c) for c, _ in blocks_of_bytes(BIG["model.safetensors"])}
    made = [str(c) for c, _ in blocks_of_bytes(BIG["model.safetensors"])]
    assert set(leaves(big.asked)) & weights <= {made[0], made[5]}  # the first one, to see what the file is


async def test_two_that_fetch_the_same_model_fetch_it_once(big, tmp_path):
    name, root = parse(f"ipfs://{big.cid}"), tmp_path / "ipfs"
    routers = [models(big, root=root), models(big, root=root)]
    (_, one), (_, other) = await asyncio.gather(*(r.pull(name, ignore) for r in routers))
    assert one == other
    counts = Counter(leaves(big.asked))
    last = str([c for c, _ in blocks_of_bytes(BIG["model.safetensors"])][-2])
    assert counts[last] == 1


KILLED = """
import asyncio, os, pathlib, pickle, sys
from hfms_cli.models.names import parse
from tests.models.test_ipfs_models import Counted, models
blocks, cid, root, most, log = pickle.load(open(sys.argv[1], "rb"))
class Dying(Counted):
    async def block_get(self, cid):
        await asyncio.sleep(0.002)
        with open(log, "a") as file:
            file.write(cid + "\\n")
        if len(self.asked) >= most:
            os.kill(os.getpid(), 9)
        return await super().block_get(cid)
name = parse(f"ipfs://{cid}")
asyncio.run(models(Dying("store", blocks), root=pathlib.Path(root)).pull(name, lambda done, total: None))
"""


def test_a_fetch_that_is_killed_again_and_again_ends_whole_and_fetches_little_twice(tmp_path):
    shelf = Counted("store")
    (tmp_path / "big").mkdir()
    for name, data in BIG.items():
        (tmp_path / "big" / name).write_bytes(data)
    cid = asyncio.run(shelf.add_path(tmp_path / "big", recursive=True))
    root, log, given = tmp_path / "ipfs", tmp_path / "log", tmp_path / "given.pickle"
    for kills in range(12):
        given.write_bytes(pickle.dumps((shelf.blocks, cid, str(root), 14 + kills, str(log))))
        ended = subprocess.run([sys.executable, "-c", KILLED, str(given)], cwd=Path(__file__).parents[2])
        if ended.returncode == 0:
            break
        assert ended.returncode == -9
        assert not (root / cid).exists()
    assert kills > 1
    folder = root / cid / "files"
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == BIG
    # What was under way when it was killed is lost: the blocks of one write, and those asked for ahead.
    made = [str(c) for c, _ in blocks_of_bytes(BIG["model.safetensors"])]
    counts = Counter(log.read_text().split())
    assert sum(counts[c] - 1 for c in made[1:-1]) <= kills * (4 + 32)
