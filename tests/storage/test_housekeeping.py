"""`hfms models verify|gc|pin|rm`: what a cache of the Hub's needs, by processes, against a Hub on loopback."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import filelock
import pytest

from hfms_storage.partial import SUFFIX
from tests.storage.hub import Repo
from tests.storage.verbs import hfms, start


@pytest.fixture
async def folder(hub, env) -> Path:
    """Where `org/tiny` lies."""
    status, out, err = await hfms(env, "pull", "org/tiny", "--json")
    assert status == 0, err
    hub.sent.clear()
    return Path(json.loads(out)["folder"])


def spoil(file: Path) -> None:
    """Change one byte, and nothing that `stat` shows of it but the times of the inode."""
    blob = file.resolve()
    stat = blob.stat()
    raw = bytearray(blob.read_bytes())
    raw[-1] ^= 1
    blob.write_bytes(raw)
    os.utime(blob, ns=(stat.st_atime_ns, stat.st_mtime_ns))


async def test_a_model_that_is_as_it_came_verifies(hub, env, folder):
    status, out, _ = await hfms(env, "verify", "org/tiny")
    assert status == 0
    assert out.startswith("org/tiny: 3 files, ")
    assert hub.sent == []


@pytest.mark.parametrize("path", ["model.safetensors", "tokenizer.json"])
async def test_verify_names_the_file_that_is_wrong_and_repair_fetches_just_that(hub, env, folder, model, path):
    spoil(folder / path)
    status, out, _ = await hfms(env, "verify", "org/tiny")
    assert status == 1
    assert [line.split("`")[1] for line in out.splitlines()] == [path]
    status, out, _ = await hfms(env, "verify", "org/tiny", "--json")
    assert status == 1
    assert [f["path"] for f in json.loads(out)["files"] if f["wrong"]] == [path]
    assert hub.sent == []
    status, out, err = await hfms(env, "verify", "org/tiny", "--repair")
    assert status == 0, err
    assert [p for p, _, _ in hub.sent] == [path]
    assert (folder / path).read_bytes() == model[path]


async def test_a_repair_that_the_hub_fails_leaves_nothing_that_looks_whole(hub, env, folder):
    spoil(folder / "model.safetensors")
    hub.wrong = {"model.safetensors"}
    status, _, err = await hfms(env, "verify", "org/tiny", "--repair")
    assert status == 1
    assert "is not that file" in err
    assert json.loads((await hfms(env, "list", "--json"))[1]) == []


async def test_verify_of_what_is_not_here_says_so(env, hub):
    status, out, err = await hfms(env, "verify", "org/none")
    assert (status, out) == (1, "")
    assert err.startswith("error: The model `org/none`")


async def test_what_a_broken_pull_left_is_collected_when_it_is_old_and_asked_for(hub, env, folder):
    hub.slowly = 0.001
    hub.repos["org/big"] = Repo(hub.repos["org/tiny"].files | {"model.safetensors": os.urandom(20 * 2**20)})
    process = await start(env, "pull", "org/big")
    hub.on_bytes = lambda count: process.returncode is None and os.kill(process.pid, signal.SIGKILL)
    await process.communicate()
    part = max(Path(env["HF_HOME"]).rglob(f"*{SUFFIX}"), key=lambda p: p.stat().st_size)

    assert (await hfms(env, "gc", "--yes"))[1] == "nothing is left over\n"  # it may go on
    status, out, _ = await hfms(env, "gc", "--now", "--dry-run")
    assert (status, part.exists()) == (0, True)
    assert "a broken pull of org/big" in out
    status, _, err = await hfms(env, "gc", "--now", stdin=open(os.devnull))  # noqa: SIM115
    assert (status, part.exists()) == (2, True)
    assert "--yes" in err
    os.utime(part, (0, time.time() - 2 * 86400))
    status, out, _ = await hfms(env, "gc", "--yes", "--json")
    assert (status, part.exists()) == (0, False)
    assert json.loads(out)["deleted"] is True
    assert (await hfms(env, "verify", "org/tiny"))[0] == 0


async def test_what_is_being_fetched_is_not_left_over(hub, env, folder):
    blob = "a" * 64
    part = folder.parents[1] / "blobs" / f"{blob}{SUFFIX}"
    part.write_bytes(b"x")
    lock = Path(env["HF_HOME"], "hub", ".locks", "models--org--tiny", f"{blob}.lock")
    with filelock.FileLock(lock):
        assert (await hfms(env, "gc", "--now", "--yes"))[1] == "nothing is left over\n"
    assert (await hfms(env, "gc", "--now", "--yes"))[0] == 0
    assert not part.exists()


async def test_a_revision_that_a_newer_one_replaced_is_collected_and_what_both_share_stays(hub, env, folder, model):
    hub.repos["org/tiny"] = Repo(model | {"tokenizer.json": b'{"new": 1}'})
    _, out, _ = await hfms(env, "pull", "org/tiny", "--json")
    new = Path(json.loads(out)["folder"])
    assert new != folder
    await hfms(env, "pin", f"org/tiny@{folder.name}")
    assert (await hfms(env, "gc", "--now", "--yes"))[1] == "nothing is left over\n"
    await hfms(env, "unpin", f"org/tiny@{folder.name}")
    status, out, _ = await hfms(env, "gc", "--now", "--yes")
    assert status == 0
    assert f"org/tiny@{folder.name[:12]}" in out
    assert not folder.exists()
    assert (await hfms(env, "verify", "org/tiny"))[0] == 0
    assert (await hfms(env, "gc", "--now", "--yes"))[1] == "nothing is left over\n"


async def test_a_model_that_is_pinned_is_removed_only_by_force(hub, env, folder):
    assert (await hfms(env, "pin", "org/tiny"))[0] == 0
    assert json.loads((await hfms(env, "pin", "--json"))[1]) == ["org/tiny"]
    status, _, err = await hfms(env, "rm", "org/tiny")
    assert status == 1
    assert "is pinned" in err
    assert folder.exists()
    assert (await hfms(env, "rm", "org/tiny", "--force"))[0] == 0
    assert not folder.exists()


async def test_unpinning_what_is_not_pinned_says_what_is(hub, env):
    await hfms(env, "pin", "org/tiny")
    status, _, err = await hfms(env, "unpin", "org/tinny")
    assert status == 1
    assert "pinned: `org/tiny`" in err
