"""Models by CID: found, fetched block by block, kept, listed and removed, whoever served them."""

import json
import os
import struct

import pytest

from hfms_cli import BadRequest, FetchFailed, HfmsError, ModelNotFound, VerifyFailed
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
    assert list(root.iterdir()) == []

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
    assert {p.name for p in (tmp_path / "ipfs").iterdir()} == {".fetch-new", shelf.cid}


async def test_a_cache_that_cannot_be_written_is_said(shelf, tmp_path):
    (tmp_path / "ipfs").write_bytes(b"a file")
    with pytest.raises(FetchFailed, match="cannot be written"):
        await models(shelf, root=tmp_path / "ipfs").pull(parse(f"ipfs://{shelf.cid}"), ignore)
