"""The storage `hf_cache`, with the real huggingface_hub and a Hub on loopback that can fail in every way."""

import asyncio
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hfms_cli import BadRequest, FetchFailed, GatedModel, ModelName, ModelNotFound, VerifyFailed
from hfms_cli.models.names import parse
from hfms_cli.models.router import Router
from hfms_storage import hub_download
from hfms_storage.hf_cache import HfCache, HfCacheOptions
from tests.storage.hub import Hub, Repo

TINY = ModelName("", "org/tiny")


def ignore(done, total):
    """Progress that nobody watches."""


async def pull(storage, name=TINY):
    return await Router([storage]).pull(name, ignore)


def large(repo):
    return {
        p: hashlib.sha256(raw).hexdigest() for p, raw in repo.files.items() if p.endswith((".safetensors", ".gguf"))
    }


# The road.


async def test_finding_lists_what_an_engine_needs_and_fetches_nothing(hub, hf_cache, model):
    hub.repos["org/tiny"] = Repo(
        model | {"README.md": b"x", "pytorch_model.bin": b"x", "onnx/model.onnx": b"x", "x.py": b"x"}
    )
    manifest = await hf_cache.find(TINY)
    assert {f.path: f.size for f in manifest.files} == {p: len(raw) for p, raw in model.items()}
    assert {f.path: f.sha256 for f in manifest.files if f.sha256} == {
        "model.safetensors": large(Repo(model))["model.safetensors"]
    }
    assert manifest.revision == hub.repos["org/tiny"].commit
    assert hub.sent == []


async def test_a_pull_brings_each_file_once(hub, hf_cache, model):
    manifest, folder = await pull(hf_cache)
    assert {f.path: (folder / f.path).read_bytes() for f in manifest.files} == model
    await pull(hf_cache)
    assert sorted(path for path, _, _ in hub.sent) == sorted(model)


async def test_a_repository_without_safetensors_is_fetched_as_pickles(hub, hf_cache):
    hub.repos["org/old"] = Repo({"config.json": b"{}", "pytorch_model.bin": b"x", "optimizer.pt": b"x"})
    manifest, folder = await pull(hf_cache, ModelName("", "org/old"))
    assert [f.path for f in manifest.files] == ["config.json", "pytorch_model.bin"]
    assert not (folder / "optimizer.pt").exists()


async def test_a_revision_can_be_pinned_by_its_commit(hub, hf_cache, model):
    commit = hub.repos["org/tiny"].commit
    manifest, _ = await pull(hf_cache, ModelName("", "org/tiny", commit))
    assert manifest.revision == commit
    assert [str(m.name) for m in await hf_cache.list()] == [f"org/tiny@{commit}"]


async def test_progress_counts_bytes_up_to_all_of_them(hub, hf_cache, model):
    size = sum(map(len, model.values()))
    seen = []
    await hf_cache.fetch(await hf_cache.find(TINY), lambda done, total: seen.append((done, total)))
    await asyncio.sleep(0)  # what the thread told last
    assert seen[0] == (0, size)
    assert seen[-1] == (size, size)
    assert seen == sorted(seen)


async def test_the_cache_is_as_other_programs_expect_it(hub, hf_cache, model):
    from huggingface_hub import snapshot_download

    _, folder = await pull(hf_cache)
    hub.down = 503
    found = snapshot_download("org/tiny", cache_dir=hf_cache.root, local_files_only=True, allow_patterns=[*model])
    assert Path(found) == folder


async def test_what_another_program_has_fetched_is_found(hub, hf_cache):
    from huggingface_hub import snapshot_download

    folder = await asyncio.to_thread(snapshot_download, "org/tiny", cache_dir=hf_cache.root, endpoint=hub.url)
    sent = len(hub.sent)
    assert [str(m.name) for m in await hf_cache.list()] == ["org/tiny"]
    assert (await pull(hf_cache))[1] == Path(folder)
    assert len(hub.sent) == sent


# GGUF.


@pytest.fixture
def ggufs(hub):
    hub.repos["org/gguf"] = Repo({"README.md": b"", "m-Q4_K_M.gguf": b"GGUF4", "m-Q8_0.gguf": b"GGUF8"})
    return hub.repos["org/gguf"]


async def test_of_several_gguf_models_a_name_must_say_which(hf_cache, ggufs):
    for name in ("org/gguf", "org/gguf:Q2_K"):
        with pytest.raises(BadRequest, match="`org/gguf:Q4_K_M`, `org/gguf:Q8_0`"):
            await hf_cache.find(parse(name))
    manifest, folder = await pull(hf_cache, parse("org/gguf:Q8_0"))
    assert [f.path for f in manifest.files] == ["m-Q8_0.gguf"]
    assert not (folder / "m-Q4_K_M.gguf").exists()


async def test_the_operator_can_say_which_gguf_is_meant(hub, ggufs, tmp_path):
    storage = HfCache(HfCacheOptions(endpoint=hub.url, cache_dir=str(tmp_path), quant="Q4_K_M"))
    assert [f.path for f in (await storage.find(parse("org/gguf"))).files] == ["m-Q4_K_M.gguf"]


async def test_gguf_models_of_one_repository_are_listed_and_removed_one_by_one(hub, hf_cache, ggufs):
    for name in ("org/gguf:Q4_K_M", "org/gguf:Q8_0"):
        await pull(hf_cache, parse(name))
    assert [str(m.name) for m in await hf_cache.list()] == ["org/gguf:Q4_K_M", "org/gguf:Q8_0"]
    await Router([hf_cache]).remove(parse("org/gguf:Q4_K_M"))
    assert [str(m.name) for m in await hf_cache.list()] == ["org/gguf:Q8_0"]
    assert b"GGUF4" not in {p.read_bytes() for p in hf_cache.root.rglob("*") if p.is_file()}
    await Router([hf_cache]).remove(parse("org/gguf:Q8_0"))
    assert await hf_cache.list() == []


@pytest.fixture
def parts(hub):
    """A GGUF model in three parts, one in one, and one of which the Hub lacks a part."""
    names = [f"big-Q8_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    others = ["big-Q4_0.gguf", "big-BF16-00001-of-00002.gguf"]
    hub.repos["org/parts"] = Repo({name: b"GGUF" + name.encode() for name in [*names, *others]})
    return names


async def test_a_gguf_model_in_parts_is_pulled_verified_listed_and_removed_as_one(hub, hf_cache, parts):
    manifest, folder = await pull(hf_cache, parse("org/parts:Q8_0"))
    assert [f.path for f in manifest.files] == parts
    assert {f.path: f.sha256 for f in manifest.files} == {p: large(hub.repos["org/parts"])[p] for p in parts}
    assert sorted({path for path, _, _ in hub.sent}) == parts
    assert [str(m.name) for m in await hf_cache.list()] == ["org/parts:Q8_0"]
    await Router([hf_cache]).remove(parse("org/parts:Q8_0"))
    assert await hf_cache.list() == []
    assert not [p for p in folder.parents[1].rglob("*") if p.is_file() and p.read_bytes().startswith(b"GGUF")]


async def test_a_gguf_model_of_which_the_hub_lacks_a_part_is_not_offered_and_nothing_of_it_is_fetched(
    hub, hf_cache, parts
):
    with pytest.raises(BadRequest) as refused:
        await hf_cache.find(parse("org/parts:BF16"))
    assert "`org/parts:Q8_0`" in refused.value.message
    assert "`org/parts:BF16`" not in refused.value.message
    assert hub.sent == []


async def test_the_only_gguf_model_needs_no_choice(hub, hf_cache):
    hub.repos["org/one"] = Repo({"m-Q8_0.gguf": b"GGUF"})
    await pull(hf_cache, ModelName("", "org/one"))
    assert [str(m.name) for m in await hf_cache.list()] == ["org/one"]


# What is not there, or not for us.


async def test_a_repository_that_does_not_exist_is_none(hub, hf_cache, monkeypatch):
    assert await hf_cache.find(ModelName("", "org/none")) is None
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    assert await hf_cache.find(ModelName("", "org/none")) is None


async def test_a_revision_that_does_not_exist_is_told(hub, hf_cache):
    with pytest.raises(ModelNotFound, match="`org/tiny` has no revision `v9`"):
        await hf_cache.find(ModelName("", "org/tiny", "v9"))


async def test_a_repository_without_a_model_is_told(hub, hf_cache):
    hub.repos["org/docs"] = Repo({"README.md": b"x", "config.json": b"{}"})
    with pytest.raises(ModelNotFound, match="holds no model"):
        await hf_cache.find(ModelName("", "org/docs"))


@pytest.mark.parametrize("token", [None, "hf_stranger"])
async def test_a_gated_repository_is_told_from_a_missing_one(hub, hf_cache, monkeypatch, token):
    hub.repos["org/tiny"].gated = True
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(GatedModel, match="accept its terms") as caught:
        await hf_cache.find(TINY)
    assert "hf_stranger" not in caught.value.message


async def test_a_gated_repository_opens_to_its_token(hub, hf_cache, monkeypatch, model):
    hub.repos["org/tiny"].gated = True
    hub.repos["org/tiny"].readers = frozenset({"hf_reader"})
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert {f.path for f in (await pull(hf_cache))[0].files} == {*model}
    assert hub.tokens == {"hf_reader", ""}  # the place of large files is another, and must not see it


async def test_a_repository_that_is_gated_between_finding_and_fetching_is_told(hub, hf_cache):
    manifest = await hf_cache.find(TINY)
    hub.repos["org/tiny"].gated = True
    with pytest.raises(GatedModel):
        await hf_cache.fetch(manifest, ignore)


async def test_a_file_name_that_leads_out_is_refused(hub, hf_cache):
    hub.repos["org/evil"] = Repo(
        {"config.json": b"{}", "model.safetensors": b"x", "1_x/..": b"x", "../evil.gguf": b"x"}
    )
    assert {f.path for f in (await hf_cache.find(ModelName("", "org/evil"))).files} == {
        "config.json",
        "model.safetensors",
    }
    hub.repos["org/evil"] = Repo({"../evil.gguf": b"x"})
    with pytest.raises(FetchFailed, match="unsafe file name"):
        await hf_cache.find(ModelName("", "org/evil"))


@pytest.mark.parametrize("sha", ["../../../../x", "/etc", "main", "C0FFEE" * 7])
async def test_a_commit_that_is_none_never_becomes_a_folder(hub, hf_cache, sha):
    hub.repos["org/tiny"].sha = sha
    with pytest.raises(FetchFailed, match="names no commit"):
        await hf_cache.find(TINY)


# What goes wrong on the way.


async def test_wrong_bytes_under_the_right_name_are_refused_and_do_not_stay(hub, hf_cache, model):
    hub.wrong = {"model.safetensors"}
    hub.held = {"model.safetensors": asyncio.Event()}
    wrong = asyncio.create_task(pull(hf_cache))
    async with asyncio.timeout(30):
        while len([b for b in hf_cache.root.glob("models--*/blobs/*") if b.suffix != hub_download.SUFFIX]) < 2:
            await asyncio.sleep(0.01)  # until the other two files are whole: they must not be fetched again
    hub.held["model.safetensors"].set()
    with pytest.raises(VerifyFailed, match=r"model\.safetensors"):
        await wrong
    assert await hf_cache.list() == []
    hub.wrong = set()
    _, folder = await pull(hf_cache)
    assert (folder / "model.safetensors").read_bytes() == model["model.safetensors"]
    assert len([p for p, _, _ in hub.sent if p == "tokenizer.json"]) == 1  # what was right has stayed


async def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub, hf_cache, model):
    hub.cuts = {"model.safetensors": [100]}
    _, folder = await pull(hf_cache)
    assert (folder / "model.safetensors").read_bytes() == model["model.safetensors"]
    size = len(model["model.safetensors"])
    assert [(first, n) for p, first, n in hub.sent if p == "model.safetensors"] == [(0, 100), (100, size - 100)]


async def test_a_hub_that_breaks_down_in_the_middle_leaves_nothing_that_looks_whole(hub, hf_cache, monkeypatch):
    monkeypatch.setattr(hub_download, "PAUSES", (0.0, 0.0))
    manifest = await hf_cache.find(TINY)
    hub.cuts = {"model.safetensors": [0] * 99}
    with pytest.raises(FetchFailed):
        await hf_cache.fetch(manifest, ignore)
    assert await hf_cache.list() == []
    hub.down = 503
    with pytest.raises(FetchFailed, match="503"):
        await hf_cache.find(TINY)
    hub.down, hub.cuts = 0, {}
    await pull(hf_cache)
    assert [str(m.name) for m in await hf_cache.list()] == ["org/tiny"]


async def test_a_fetch_that_is_cancelled_stops_and_leaves_nothing_that_looks_whole(hub, hf_cache, model):
    hub.held = {"model.safetensors": asyncio.Event()}
    manifest = await hf_cache.find(TINY)
    begun = asyncio.Event()
    fetch = asyncio.create_task(hf_cache.fetch(manifest, lambda done, total: done and begun.set()))
    await asyncio.wait_for(begun.wait(), 30)
    fetch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetch
    hub.held["model.safetensors"].set()
    await asyncio.get_running_loop().shutdown_default_executor()  # the thread ends by itself
    assert not list(hf_cache.root.glob("models--*/snapshots/*/model.safetensors"))


# Without the Hub.


@pytest.mark.parametrize("how", [503, 500, 429, "gone"])
async def test_a_hub_that_does_not_answer_leaves_what_is_here(hub, hf_cache, how):
    before = await pull(hf_cache)
    hub.repos["org/other"] = hub.repos["org/tiny"]
    if how == "gone":
        await hub.__aexit__()
    else:
        hub.down = how
    manifest, folder = await pull(hf_cache)
    assert (manifest.revision, folder) == (before[0].revision, before[1])
    assert {f.path: f.sha256 for f in manifest.files} == {f.path: f.sha256 for f in before[0].files}
    with pytest.raises(FetchFailed, match="could not be reached" if how == "gone" else str(how)):
        await hf_cache.find(ModelName("", "org/other"))


async def test_a_repository_that_is_gated_now_is_served_as_it_is_here(hub, hf_cache):
    before = await pull(hf_cache)
    hub.repos["org/tiny"].gated = True
    assert (await pull(hf_cache))[1] == before[1]


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json", "config.json"])
async def test_what_is_here_in_part_is_not_taken_for_whole(hub, hf_cache, missing):
    _, folder = await pull(hf_cache)
    (folder / missing).unlink()
    assert await hf_cache.list() == []
    hub.down = 503
    with pytest.raises(FetchFailed):
        await hf_cache.find(TINY)


async def test_shards_that_are_missing_are_seen_without_the_hubs_list(hub, hf_cache, model):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    files = {"config.json": model["config.json"], "model.safetensors.index.json": json.dumps(index).encode()}
    hub.repos["org/parts"] = Repo(files | dict.fromkeys(index["weight_map"].values(), model["model.safetensors"]))
    name = ModelName("", "org/parts")
    _, folder = await pull(hf_cache, name)
    for tree in hf_cache.root.glob("models--*/trees/*"):
        tree.unlink()
    from huggingface_hub import _tree_cache

    _tree_cache._IN_MEMORY_TREE_CACHE.clear()  # as in a new process
    hub.down = 503
    assert (await hf_cache.find(name)).revision == hub.repos["org/parts"].commit
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FetchFailed):
        await hf_cache.find(name)


async def test_a_new_commit_is_fetched_and_the_old_one_stays(hub, hf_cache, model):
    old, _ = await pull(hf_cache)
    hub.repos["org/tiny"] = Repo(model | {"tokenizer.json": b'{"new": 1}'})
    new, _ = await pull(hf_cache)
    assert new.revision != old.revision
    assert {str(m.name): m.revision for m in await hf_cache.list()} == {
        "org/tiny": new.revision,
        f"org/tiny@{old.revision}": old.revision,
    }
    assert [p for p, _, _ in hub.sent].count("model.safetensors") == 1  # both commits have the same weights
    await Router([hf_cache]).remove(ModelName("", "org/tiny", old.revision))
    hub.down = 503
    _, folder = await pull(hf_cache)
    assert (folder / "model.safetensors").read_bytes() == model["model.safetensors"]


async def test_removing_deletes_the_bytes(hub, hf_cache, model):
    await pull(hf_cache)
    await Router([hf_cache]).remove(TINY)
    assert await hf_cache.list() == []
    assert not any(p.is_file() and p.read_bytes() == model["model.safetensors"] for p in hf_cache.root.rglob("*"))


async def test_what_is_no_model_in_the_cache_is_not_listed(hub, hf_cache):
    from huggingface_hub import hf_hub_download

    there = {"cache_dir": hf_cache.root, "endpoint": hub.url}
    await asyncio.to_thread(hf_hub_download, "org/tiny", "config.json", **there)
    (hf_cache.root / "datasets--org--x" / "snapshots" / "c0ffee").mkdir(parents=True)
    (hf_cache.root / "models--broken").mkdir()
    assert await hf_cache.list() == []


async def test_a_cache_that_is_not_there_yet_holds_nothing(hub, hf_cache):
    assert await hf_cache.list() == []
    assert not hf_cache.root.exists()


# The environment, in a process of its own: huggingface_hub reads it once.

SCRIPT = """
import asyncio, json, sys
from hfms_cli import HfmsError, ModelName
from hfms_cli.models.router import Router
from hfms_storage import hub_download
from hfms_storage.hf_cache import HfCache, HfCacheOptions

async def main():
    try:
        manifest, folder = await Router([HfCache(HfCacheOptions())]).pull(ModelName("", "org/tiny"), lambda *_: None)
        print(json.dumps({"folder": str(folder), "revision": manifest.revision}))
    except HfmsError as exc:
        print(json.dumps({"error": type(exc).__name__, "message": exc.message}))

asyncio.run(main())
"""


async def run_with(env):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", SCRIPT], env=clean | env, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


async def test_the_hubs_own_variables_are_honoured(hub: Hub, tmp_path):
    hub.repos["org/tiny"].gated = True
    hub.repos["org/tiny"].readers = frozenset({"hf_reader"})
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    assert (await run_with(env))["error"] == "GatedModel"
    first = await run_with(env | {"HF_TOKEN": "hf_reader"})
    assert first["folder"].startswith(str(tmp_path / "home" / "hub"))
    sent, hub.repos = len(hub.sent), {}
    assert await run_with(env | {"HF_HUB_OFFLINE": "1"}) == first
    assert len(hub.sent) == sent


async def test_offline_means_that_nobody_is_asked(hub, tmp_path):
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    answer = await run_with(env)
    assert answer["error"] == "FetchFailed"
    assert "HF_HUB_OFFLINE" in answer["message"]
    assert hub.tokens == set()
