"""Pulls from the Hub that are killed, cut off, run twice at once or find no room: `hfms models pull` as a process."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.storage.hub import Hub, Repo
from tests.storage.verbs import hfms, start

BLOCK = 2**18
ON_THE_WIRE = 2**17
"""Bytes that the sockets of both sides hold."""


@pytest.fixture
def big(model, hub: Hub) -> dict[str, bytes]:
    """`org/big`: weights of three pieces, random, so that none of them can stand for another."""
    weights = random.Random(5).randbytes(40 * 2**20 + 12345)
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(weights)], "data_offsets": [0, len(weights)]}}).encode()
    files = model | {"model.safetensors": len(header).to_bytes(8, "little") + header + weights}
    hub.repos["org/big"] = Repo(files)
    return files


def whole_blocks_sent(hub: Hub, path: str) -> Counter[int]:
    """How often each whole block of a file has gone out in one answer."""
    return Counter(
        block
        for sent, first, count in hub.sent
        if sent == path
        for block in range(-(-first // BLOCK), (first + count) // BLOCK)
    )


@pytest.mark.parametrize("kills", [8, pytest.param(100, marks=pytest.mark.slow)])
async def test_a_pull_that_is_killed_again_and_again_completes_and_fetches_no_block_three_times(hub, env, big, kills):
    weights = big["model.safetensors"]
    chance = random.Random(kills)
    hub.slowly = 0.001
    for _ in range(kills):
        left = chance.randrange(1, 2 * len(weights) // (kills + 2))
        process = await start(env, "pull", "org/big")

        def count(more: int, process: asyncio.subprocess.Process = process) -> None:
            nonlocal left
            left -= more
            if left <= 0 < left + more:
                process.kill()

        hub.on_bytes = count
        await asyncio.wait_for(process.communicate(), 120)
        assert process.returncode == -signal.SIGKILL
    hub.slowly = 0.0
    status, out, err = await hfms(env, "pull", "org/big", "--json")
    assert status == 0, err
    folder = Path(json.loads(out)["folder"])
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == big
    assert max(whole_blocks_sent(hub, "model.safetensors").values()) <= 2
    # What was on the wire when a process died came to nobody: of each of three connections, a few of its buffers.
    sent = sum(n for path, _, n in hub.sent if path == "model.safetensors")
    assert sent <= len(weights) + kills * 3 * 4 * ON_THE_WIRE
    left_over = [p.name for p in (folder.parents[1] / "blobs").iterdir()]
    assert sorted(left_over) == sorted({Path(os.readlink(p)).name for p in folder.iterdir()})


async def test_two_pulls_of_one_model_at_once_are_one_download(hub, env, big):
    hub.held["model.safetensors"] = asyncio.Event()
    one = await start(env, "pull", "org/big")
    while not any(path == "model.safetensors" for path, _, _ in hub.sent):
        await asyncio.sleep(0.01)
    two = await start(env, "pull", "org/big")
    said = await asyncio.wait_for(two.stderr.readuntil(b"waiting for it."), 60)
    assert b"Another process fetches `org/big` already" in said
    hub.held["model.safetensors"].set()
    await asyncio.gather(one.communicate(), two.communicate())
    assert (one.returncode, two.returncode) == (0, 0)
    assert sum(n for path, _, n in hub.sent if path == "model.safetensors") == len(big["model.safetensors"])


async def test_the_lock_of_a_process_that_was_killed_keeps_nobody_out(hub, env, big):
    hub.slowly = 0.001
    process = await start(env, "pull", "org/big")
    hub.on_bytes = lambda count: hub.on_bytes is not ignore and (process.kill(), setattr(hub, "on_bytes", ignore))
    await process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert list(Path(env["HF_HOME"]).rglob("*.lock"))
    hub.slowly = 0.0
    status, _, err = await hfms(env, "pull", "org/big")
    assert status == 0, err
    assert "Another process" not in err


def ignore(count):
    """Bytes that nobody waits for."""


async def test_a_pull_of_which_another_program_fetches_a_file_waits_for_that(hub, env, big):
    """huggingface_hub holds the same locks."""
    import filelock

    folder = Path(env["HF_HOME"], "hub", ".locks", "models--org--big")
    folder.mkdir(parents=True)
    name = hashlib.sha256(big["model.safetensors"]).hexdigest()
    with filelock.FileLock(folder / f"{name}.lock"):
        process = await start(env, "pull", "org/big")
        said = await asyncio.wait_for(process.stderr.readuntil(b"waiting for it."), 60)
        assert b"Another process" in said
        assert hub.sent == []
    await process.communicate()
    assert process.returncode == 0


@contextmanager
def disk(path: Path, size: str, *more: str) -> Iterator[None]:
    """A small disk of its own, mounted there."""
    path.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *more]), "tmpfs", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


root_only = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")


@root_only
async def test_a_disk_without_room_is_told_before_anything_is_fetched(hub, env, big):
    with disk(Path(env["HF_HOME"]), "20m"):
        status, _, err = await hfms(env, "pull", "org/big")
        assert status == 1
        assert "There is no room: " in err
        assert "hfms models gc" in err
        assert hub.sent == []
        assert not [p for p in Path(env["HF_HOME"]).rglob("*") if p.is_file() and p.suffix != ".lock"]


@root_only
async def test_a_disk_that_runs_full_on_the_way_is_told_and_a_larger_one_goes_on(hub, env, big):
    weights = big["model.safetensors"]
    hub.slowly = 0.001
    with disk(Path(env["HF_HOME"]), "50m"):
        rival = Path(env["HF_HOME"], "rival")

        def fill(count: int) -> None:
            if not rival.exists():
                rival.write_bytes(bytes(30 * 2**20))

        hub.on_bytes = fill
        status, out, err = await hfms(env, "pull", "org/big")
        assert (status, out) == (1, "")
        assert "No space left on device" in err
        assert "Traceback" not in err
        assert not list(Path(env["HF_HOME"]).rglob("snapshots/*/model.safetensors"))
        rival.write_bytes(b"")
        hub.slowly = 0.0
        status, _, err = await hfms(env, "pull", "org/big")
        assert status == 0, err
        assert sum(n for path, _, n in hub.sent if path == "model.safetensors") < 1.5 * len(weights)


@root_only
async def test_a_cache_that_cannot_be_written_is_told_and_serves_what_it_has(hub, env, big):
    with disk(Path(env["HF_HOME"]), "100m"):
        assert (await hfms(env, "pull", "org/tiny"))[0] == 0
        subprocess.run(["mount", "-o", "remount,ro", env["HF_HOME"]], check=True)
        status, _, err = await hfms(env, "pull", "org/big")
        assert status == 1
        assert "could not be written to the Hugging Face cache: Read-only file system." in err
        assert (await hfms(env, "pull", "org/tiny"))[0] == 0
