"""The storage `local`: what it takes for a model, and that it never deletes."""

import os

import pytest

from hfms_cli import BadRequest, ModelName, ModelNotFound
from hfms_cli.models.inspect import inspect
from hfms_cli.models.names import parse
from hfms_storage.local import Local


def write(folder, files):
    for path, raw in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(raw)
    return ModelName("path", str(folder))


async def test_a_folder_is_its_models_files_and_not_all_that_lies_in_it(tmp_path, model):
    name = write(
        tmp_path, model | {"notes.md": b"x", "secret.py": b"x", "pytorch_model.bin": b"x", ".git/config": b"x"}
    )
    manifest = await Local().find(name)
    assert {f.path for f in manifest.files} == {*model}
    assert {f.path: f.size for f in manifest.files} == {p: len(raw) for p, raw in model.items()}


async def test_a_sentence_transformers_folder_brings_its_modules(tmp_path, model):
    name = write(tmp_path, model | {"modules.json": b"[]", "1_Pooling/config.json": b"{}"})
    manifest = await Local().find(name)
    assert {"modules.json", "1_Pooling/config.json"} <= {f.path for f in manifest.files}


async def test_a_gguf_file_beside_others_is_served_alone(tmp_path):
    for name in ("a.Q4_1.gguf", "a.Q8_0.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    local = Local()
    manifest = await local.find(parse(str(tmp_path / "a.Q8_0.gguf")))
    assert [f.path for f in manifest.files] == ["a.Q8_0.gguf"]
    assert await local.fetch(manifest, lambda done, total: None) == tmp_path
    with pytest.raises(BadRequest, match=r"a\.Q4_1\.gguf.*a\.Q8_0\.gguf"):
        await local.find(ModelName("path", str(tmp_path)))


async def test_the_other_parts_of_a_gguf_model_come_along(tmp_path):
    for name in ("a-00001-of-00002.gguf", "a-00002-of-00002.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    manifest = await Local().find(ModelName("path", str(tmp_path / "a-00001-of-00002.gguf")))
    assert [f.path for f in manifest.files] == ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: None, "No such file"),
        (lambda p: p.mkdir(), "holds no model"),
        (lambda p: write(p, {"config.json": b"{}"}), "holds no model"),
    ],
)
async def test_what_is_no_model_is_not_found_and_the_reason_is_told(tmp_path, make, said):
    make(tmp_path / "x")
    with pytest.raises(ModelNotFound, match=said):
        await Local().find(ModelName("path", str(tmp_path / "x")))


async def test_a_file_that_is_not_gguf_is_refused(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(BadRequest, match="name the folder"):
        await Local().find(ModelName("path", str(tmp_path / "model.safetensors")))


async def test_the_revision_changes_with_the_files(tmp_path, model):
    name = write(tmp_path, model)
    before = await Local().find(name)
    assert (await Local().find(name)).revision == before.revision
    stat = (tmp_path / "model.safetensors").stat()
    os.utime(tmp_path / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert (await Local().find(name)).revision != before.revision


async def test_a_whole_disk_is_not_walked_for_a_model(tmp_path, model):
    name = write(tmp_path, {"a/b/c/config.json": b"{}", **model})
    (tmp_path / "a" / "b" / "loop").symlink_to(tmp_path)
    assert {f.path for f in (await Local().find(name)).files} == {*model}


async def test_what_local_finds_can_be_inspected(tmp_path, model):
    manifest = await Local().find(write(tmp_path, model))
    assert inspect(tmp_path, [f.path for f in manifest.files]).parameters == 64
