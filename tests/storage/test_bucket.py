"""The storage `bucket`: an S3 server (moto's) on loopback, folders, memory, and a plain web server."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import threading
from pathlib import Path

import pytest
from aiohttp import web

from hfms_cli import BadRequest, ConfigError, FetchFailed, ModelNotFound, VerifyFailed, Watch
from hfms_cli.models.names import parse
from hfms_cli.models.plan import look
from hfms_cli.models.router import Router
from hfms_storage.bucket import Bucket
from hfms_storage.options import BucketOptions
from hfms_storage.partial import PIECE
from tests.storage.buckets import KEY, SECRET, sums
from tests.storage.verbs import hfms

TINY = parse("org/tiny")


def ignore(done, total):
    """Progress that nobody watches."""


def made(url: str, tmp_path: Path, **options) -> Bucket:
    return Bucket(BucketOptions(url=url, cache_dir=str(tmp_path / "cache"), **options))


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for path, raw in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(raw)
    return folder


def inside(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- sources ---


async def test_only_what_an_engine_needs_is_fetched_and_modules_come_along(s3, bucket, model):
    more = {"1_Pooling/config.json": b"{}", "modules.json": b"[]"}
    s3.put("hub/org/tiny", model | more | {"README.md": b"x", "pytorch_model.bin": b"x", "onnx/model.onnx": b"x"})
    _, folder = await Router([bucket]).pull(TINY, ignore)
    assert inside(folder) == model | more


async def test_a_folder_and_memory_and_a_web_server_are_read_as_s3_is(model, tmp_path, free_port):
    import fsspec

    put(tmp_path / "hub/org/tiny", model | {"SHA256SUMS": sums(model)})
    memory = fsspec.filesystem("memory")
    for path, raw in model.items():
        memory.pipe_file(f"/hfms-test/org/tiny/{path}", raw)
    app = web.Application()
    app.router.add_static("/hub", tmp_path / "hub")  # which lists nothing: SHA256SUMS says what there is
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", free_port).start()
    try:
        for i, url in enumerate([f"file://{tmp_path}/hub", "memory://hfms-test", f"http://127.0.0.1:{free_port}/hub"]):
            manifest, folder = await Router([made(url, tmp_path / str(i))]).pull(TINY, ignore)
            assert inside(folder) == model, url
            assert manifest.source == f"{url}/org/tiny"
            assert await made(url, tmp_path / str(i)).find(parse("org/none")) is None
    finally:
        await runner.cleanup()
        memory.rm("/hfms-test", recursive=True)


async def test_of_several_gguf_models_a_name_must_say_which_and_all_parts_come(s3, bucket):
    parts = {f"m-Q8_0-0000{i}-of-00002.gguf": b"GGUF%d" % i for i in (1, 2)}
    s3.put("hub/org/gguf", {"m-Q4_0.gguf": b"GGUF", **parts})
    with pytest.raises(BadRequest, match="`org/gguf:Q4_0`, `org/gguf:Q8_0`"):
        await bucket.find(parse("org/gguf"))
    _, folder = await Router([bucket]).pull(parse("org/gguf:Q8_0"), ignore)
    assert inside(folder) == parts
    assert [str(m.name) for m in await bucket.list()] == ["org/gguf:Q8_0"]


async def test_a_folder_without_a_model_is_told_from_none(s3, bucket):
    s3.put("hub/org/readme", {"README.md": b"x"})
    with pytest.raises(ModelNotFound, match="holds no model in a format"):
        await bucket.find(parse("org/readme"))
    assert await bucket.find(parse("org/none")) is None


async def test_what_is_not_here_is_planned_by_its_headers(s3, bucket, model):
    s3.put("hub/org/tiny", model)
    seen = await look(Router([bucket]), TINY)
    assert (seen.here, seen.card.parameters) == (False, 64)


# --- nobody is believed ---


async def test_what_is_not_as_sha256sums_says_is_refused_and_does_not_stay(s3, bucket, model):
    wrong = bytes(len(model["model.safetensors"]))
    s3.put("hub/org/tiny", model | {"SHA256SUMS": sums(model), "model.safetensors": wrong})
    with pytest.raises(VerifyFailed, match=r"`model\.safetensors` of `org/tiny` has not the SHA-256"):
        await bucket.fetch(await bucket.find(TINY), ignore)
    assert list(await bucket.list()) == []
    assert wrong not in inside(bucket.root).values()
    s3.put("hub/org/tiny", {"model.safetensors": model["model.safetensors"]})
    manifest, folder = await Router([bucket]).pull(TINY, ignore)
    assert inside(folder) == model
    assert {f.path: f.sha256 for f in manifest.files} == {
        path: hashlib.sha256(raw).hexdigest() for path, raw in model.items()
    }


async def test_files_that_sha256sums_does_not_name_are_not_taken(s3, bucket, model):
    s3.put("hub/org/tiny", model | {"SHA256SUMS": sums(model), "extra.json": b"{}"})
    assert [f.path for f in (await bucket.find(TINY)).files] == sorted(model)


@pytest.mark.parametrize("line", [b"no sum at all", b"0" * 64 + b"  ../../outside.json", b"0" * 64 + b"  /etc/passwd"])
async def test_a_sha256sums_that_is_none_or_leads_out_is_refused(s3, bucket, model, line, tmp_path):
    s3.put("hub/org/tiny", model | {"SHA256SUMS": sums(model) + line + b"\n"})
    with pytest.raises(FetchFailed, match=r"none of sha256sum's|unsafe file name"):
        await bucket.find(TINY)
    assert not bucket.root.exists()


async def test_what_changes_while_it_is_fetched_is_not_mixed(s3, bucket, model):
    s3.put("hub/org/tiny", model)
    found = await bucket.find(TINY)
    s3.put("hub/org/tiny", {"tokenizer.json": b"[]"})
    with pytest.raises(FetchFailed, match="was changed at its source"):
        await bucket.fetch(found, ignore)
    _, folder = await Router([bucket]).pull(TINY, ignore)
    assert inside(folder) == model | {"tokenizer.json": b"[]"}


async def test_a_revision_is_what_it_was_while_it_is_on_this_disk(s3, bucket, model):
    s3.put("hub/org/tiny", model)
    first, old = await Router([bucket]).pull(TINY, ignore)
    s3.put("hub/org/tiny", {"tokenizer.json": b"[]"})
    second, new = await Router([bucket]).pull(TINY, ignore)
    assert (inside(old)["tokenizer.json"], inside(new)["tokenizer.json"]) == (b"{}", b"[]")
    _, again = await Router([bucket]).pull(parse(f"org/tiny@{first.revision}"), ignore)
    assert again == old
    assert [str(m.name) for m in await bucket.list()] == ["org/tiny", f"org/tiny@{first.revision}"]
    assert await bucket.find(parse("org/tiny@" + "0" * 40)) is None
    assert first.revision != second.revision


# --- what breaks ---


async def test_a_fetch_that_ended_early_goes_on_where_it_was(s3, bucket, model, monkeypatch):
    big = os.urandom(3 * PIECE + 17)
    s3.put("hub/org/tiny", model | {"tokenizer.json": big})
    found = await bucket.find(TINY)
    read, asked = bucket._read, []
    enough = threading.Event()

    def counted(path, first, count):
        if enough.is_set():
            raise FetchFailed("The source went away.")
        data = read(path, first, count)
        asked.append((path, first, count))
        if len(asked) == 6:
            enough.set()
        return data

    monkeypatch.setattr(bucket, "_read", counted)
    with pytest.raises(FetchFailed, match="went away"):
        await bucket.fetch(found, ignore)
    assert list(await bucket.list()) == []
    (left,) = bucket.leftovers()
    assert left.about == "a broken pull from a bucket"
    enough.clear()
    before = {*asked}
    asked.clear()
    asked += [("", 0, 0)] * 6  # never six again
    seen = []
    folder = await bucket.fetch(found, Watch(lambda done, total: seen.append(done)))
    assert inside(folder)["tokenizer.json"] == big
    assert before.isdisjoint({*asked})
    assert seen == sorted(seen)
    assert list(bucket.leftovers()) == []


async def test_two_fetches_at_once_are_one_download(s3, bucket, model, tmp_path, monkeypatch):
    s3.put("hub/org/tiny", model)
    other = made("s3://models/hub", tmp_path)
    asked = []
    for storage in (bucket, other):
        read = storage._read
        monkeypatch.setattr(storage, "_read", lambda *what, read=read: asked.append(what) or read(*what))
    found = await bucket.find(TINY)
    folders = await asyncio.gather(bucket.fetch(found, ignore), other.fetch(found, ignore))
    assert folders[0] == folders[1]
    assert len(asked) == len(model)


async def test_a_server_without_ranges_is_refused_in_words(model, tmp_path, free_port):
    big = model | {"tokenizer.json": b" " * (5 * 2**20) + b"{}"}

    async def whole(request):
        raw = (big | {"SHA256SUMS": sums(big)}).get(request.match_info["path"])
        return web.Response(status=404) if raw is None else web.Response(body=raw)

    app = web.Application()
    app.router.add_get("/org/tiny/{path}", whole)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", free_port).start()
    storage = made(f"http://127.0.0.1:{free_port}", tmp_path)
    try:
        with pytest.raises(FetchFailed, match=r"sent 5,242,882 bytes of `org/tiny/tokenizer\.json` where it was asked"):
            await storage.fetch(await storage.find(TINY), ignore)
    finally:
        await runner.cleanup()


async def test_a_source_that_is_not_there_is_told_without_what_it_was_asked_with(s3, bucket, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    s3.stop()
    with pytest.raises(FetchFailed) as failed:
        await bucket.find(TINY)
    assert "did not answer as it should" in failed.value.message
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(FetchFailed):
        await made("s3://models/hub", Path(bucket.root)).find(TINY)
    for text in (failed.value.message, caplog.text):
        assert KEY not in text
        assert SECRET not in text


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "must be a URL"),
        ("/folder", "must be a URL"),
        (f"s3://{KEY}:{SECRET}@models/hub", "credentials belong into the environment"),
        ("https://host/hub?token=secret", "credentials belong into the environment"),
        ("simplecache::s3://models", "must be a URL"),
        ("az://models/hub", "pip install adlfs"),
    ],
)
def test_a_url_that_is_none_or_holds_a_secret_stops_the_start(url, said, tmp_path):
    with pytest.raises(ConfigError, match=said) as refused:
        made(url, tmp_path)
    assert "secret" not in str(refused.value).replace("s3:", "")


# --- through the command line ---


async def test_a_model_is_pulled_from_s3_and_listed_by_the_command_line(s3, model, tmp_path):
    s3.put("hub/org/tiny", model | {"SHA256SUMS": sums(model)})
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HFMS_"))}
    env = clean | {
        "HOME": str(tmp_path),
        "HFMS_STATE_DIR": str(tmp_path / "state"),
        "HFMS_CACHE_DIR": str(tmp_path / "cache"),
        "HFMS_STORAGE_ORDER": "bucket",
        "HFMS_BUCKET_URL": "s3://models/hub",
    }
    status, *pulled = await hfms(env, "pull", "org/tiny")
    assert status == 0, pulled
    status, *listed = await hfms(env, "list", "--json")
    assert "org/tiny" in listed[0]
    assert SECRET not in "".join([*pulled, *listed])
