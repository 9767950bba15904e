"""What `verify` catches, what it will not follow, and when it need not read a file again."""

import hashlib
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfms_cli import Manifest, ModelFile, ModelName, VerifyFailed
from hfms_cli.models.verify import verify
from hfms_cli.receipts import Receipts


def manifest(*files):
    return Manifest(name=ModelName("", "org/name"), storage="x", revision="1", files=files)


def described(path, name=None):
    content = path.read_bytes()
    return ModelFile(name or path.name, len(content), hashlib.sha256(content).hexdigest())


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights" * 1000)
    return path


async def test_whole_files_pass_with_and_without_a_hash(tmp_path, weights):
    (tmp_path / "config.json").write_text("{}")
    await verify(manifest(described(weights), ModelFile("config.json", 2)), tmp_path)


async def test_a_hash_may_be_written_in_capitals(tmp_path, weights):
    file = described(weights)
    await verify(manifest(ModelFile(file.path, file.size, file.sha256.upper())), tmp_path)


async def test_a_missing_file_is_named(tmp_path, weights):
    with pytest.raises(VerifyFailed, match=r"`tokenizer\.json` cannot be read: No such file"):
        await verify(manifest(described(weights), ModelFile("tokenizer.json", 1)), tmp_path)


async def test_a_short_file_is_named_with_both_sizes(tmp_path, weights):
    file = described(weights)
    weights.write_bytes(b"weights")
    with pytest.raises(VerifyFailed, match=r"`model\.safetensors` has 7 bytes and should have 7,000"):
        await verify(manifest(file), tmp_path)


async def test_other_bytes_of_the_same_length_are_caught(tmp_path, weights):
    file = described(weights)
    weights.write_bytes(b"WEIGHTS" * 1000)
    with pytest.raises(VerifyFailed, match=r"`model\.safetensors` has the SHA-256"):
        await verify(manifest(file), tmp_path)


@given(place=st.integers(0, 6999), bit=st.integers(0, 7))
async def test_one_flipped_bit_anywhere_is_caught(tmp_path_factory, place, bit):
    folder = tmp_path_factory.mktemp("model")
    (folder / "x").write_bytes(b"weights" * 1000)
    file = described(folder / "x")
    content = bytearray(b"weights" * 1000)
    content[place] ^= 1 << bit
    (folder / "x").write_bytes(content)
    with pytest.raises(VerifyFailed):
        await verify(manifest(file), folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "a\\b", "C:/x", ""])
async def test_a_name_that_leads_out_is_refused_and_not_opened(tmp_path, name):
    (tmp_path / "model").mkdir()
    (tmp_path / "secret").write_text("x")
    with pytest.raises(VerifyFailed, match="unsafe file name"):
        await verify(manifest(ModelFile(name, 1)), tmp_path / "model")


async def test_a_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "secret").write_text("x")
    (tmp_path / "model" / "config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(VerifyFailed, match="leads out"):
        await verify(manifest(ModelFile("config.json", 1)), tmp_path / "model")


async def test_a_link_to_itself_and_a_pipe_are_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    for name in ("loop", "pipe"):
        with pytest.raises(VerifyFailed, match=name):
            await verify(manifest(ModelFile(name, 0)), tmp_path)


async def test_the_hub_caches_own_links_are_followed_and_others_of_it_are_not(tmp_path):
    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    for blobs in (repo / "blobs", tmp_path / "blobs" / "ab", tmp_path / "models--org--other" / "blobs"):
        blobs.mkdir(parents=True)
        (blobs / "blob").write_bytes(b"{}")
    (snapshot / "config.json").symlink_to("../../blobs/blob")
    (snapshot / "shared.json").symlink_to("../../../blobs/ab/blob")
    (snapshot / "other.json").symlink_to("../../../models--org--other/blobs/blob")
    own = described(repo / "blobs" / "blob", "config.json")
    await verify(manifest(own, ModelFile("shared.json", 2)), snapshot)
    with pytest.raises(VerifyFailed, match=r"`other\.json` is a link that leads out"):
        await verify(manifest(ModelFile("other.json", 2)), snapshot)


# Receipts. What was read shows in what a change goes unnoticed by: only a receipt explains a wrong hash that passes.


def forge(receipts_file, weights, digest):
    """Put another hash into the receipt of the unchanged file."""
    text = receipts_file.read_text()
    right = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert right in text
    receipts_file.write_text(text.replace(right, digest))


async def test_an_unchanged_file_is_not_hashed_again_by_the_next_process(tmp_path, weights):
    await verify(manifest(described(weights)), tmp_path, receipts=Receipts(tmp_path / "cache" / "verified.json"))
    forge(tmp_path / "cache" / "verified.json", weights, "0" * 64)
    receipts = Receipts(tmp_path / "cache" / "verified.json")
    with pytest.raises(VerifyFailed, match="000000000000"):
        await verify(manifest(described(weights)), tmp_path, receipts=receipts)
    await verify(manifest(described(weights)), tmp_path, receipts=receipts, force=True)


async def test_a_file_written_with_its_old_size_and_time_is_hashed_again(tmp_path, weights):
    receipts, file, before = Receipts(tmp_path / "verified.json"), described(weights), weights.stat()
    await verify(manifest(file), tmp_path, receipts=receipts)
    with weights.open("r+b") as opened:
        opened.write(b"WEIGHTS")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(VerifyFailed, match="SHA-256"):
        await verify(manifest(file), tmp_path, receipts=receipts)


async def test_receipts_of_files_that_are_gone_are_forgotten(tmp_path, weights):
    receipts = Receipts(tmp_path / "verified.json")
    await verify(manifest(described(weights)), tmp_path, receipts=receipts)
    weights.rename(tmp_path / "other")
    await verify(manifest(described(tmp_path / "other")), tmp_path, receipts=receipts)
    assert str(weights) not in (tmp_path / "verified.json").read_text()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"/x": 1}', "\x00"])
async def test_a_broken_file_of_receipts_costs_only_time(tmp_path, weights, text):
    (tmp_path / "verified.json").write_text(text)
    await verify(manifest(described(weights)), tmp_path, receipts=Receipts(tmp_path / "verified.json"))
    assert str(weights) in (tmp_path / "verified.json").read_text()


async def test_receipts_that_cannot_be_kept_do_not_fail_the_check(tmp_path, weights):
    (tmp_path / "file").touch()
    await verify(manifest(described(weights)), tmp_path, receipts=Receipts(tmp_path / "file" / "verified.json"))
