"""Digests of models are remembered, and never believed of files that have changed since."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from hfms_engines import model_digest
from hfms_engines.model_digest import REMEMBERED, SETTLED_SECONDS, of_model


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def later(monkeypatch):
    """Has some seconds pass: files that were written before are settled."""
    moved = [0.0]
    now = time.time
    monkeypatch.setattr(model_digest.time, "time", lambda: now() + moved[0])

    def pass_by():
        moved[0] += SETTLED_SECONDS + 1

    return pass_by


@pytest.fixture
def read(monkeypatch):
    """Names of files whose bytes are read."""
    seen = []
    digest = hashlib.file_digest

    def watched(stream, kind):
        seen.append(os.path.basename(stream.name))
        return digest(stream, kind)

    monkeypatch.setattr(model_digest.hashlib, "file_digest", watched)
    return seen


def test_files_that_have_settled_are_read_once(folder, tmp_path, later, read):
    later()
    first = of_model(folder, tmp_path)
    assert read == ["config.json", "model.safetensors"]
    assert of_model(folder, tmp_path) == first
    assert len(read) == 2


def test_a_digest_is_of_names_and_bytes_wherever_they_lie(folder, tmp_path, later):
    later()
    moved = folder.rename(tmp_path / "elsewhere")
    copied = of_model(moved, tmp_path)
    (moved / "config.json").rename(moved / "other.json")
    renamed = of_model(moved, tmp_path)
    assert len({copied, renamed}) == 2
    (moved / "other.json").rename(moved / "config.json")
    assert of_model(moved, tmp_path) == copied


def test_files_that_were_written_just_now_are_read_again(folder, tmp_path, read, monkeypatch):
    written = max(p.stat().st_ctime for p in folder.iterdir())
    monkeypatch.setattr(model_digest.time, "time", lambda: written + SETTLED_SECONDS / 2)
    of_model(folder, tmp_path)
    of_model(folder, tmp_path)
    assert len(read) == 4
    assert not (tmp_path / REMEMBERED).exists()


def test_other_bytes_of_the_same_size_with_the_old_time_are_noticed(folder, tmp_path, later):
    weights = folder / "model.safetensors"
    later()
    before, told = of_model(folder, tmp_path), weights.stat()
    weights.write_bytes(b"WEIGHTS")
    os.utime(weights, ns=(told.st_atime_ns, told.st_mtime_ns))
    later()
    assert of_model(folder, tmp_path) != before


def test_a_file_that_changes_while_it_is_read_is_not_remembered(folder, tmp_path, later, monkeypatch):
    later()
    digest = hashlib.file_digest

    def while_it_is_written(stream, kind):
        found = digest(stream, kind)
        Path(stream.name).write_text("[]")
        return found

    monkeypatch.setattr(model_digest.hashlib, "file_digest", while_it_is_written)
    of_model(folder, tmp_path)
    assert not (tmp_path / REMEMBERED).exists()


def test_what_is_remembered_may_be_damaged_or_in_the_way(folder, tmp_path, later):
    later()
    digest = of_model(folder, tmp_path)
    (tmp_path / REMEMBERED).write_text("{")
    assert of_model(folder, tmp_path) == digest
    (tmp_path / REMEMBERED).unlink()
    (tmp_path / REMEMBERED).mkdir()
    assert of_model(folder, tmp_path) == digest


def test_of_each_file_the_latest_hash_is_remembered_until_it_is_gone(folder, tmp_path, later, read):
    for i in range(4):
        (folder / "config.json").write_text(str(i))
        later()
        latest = of_model(folder, tmp_path)
    kept = json.loads((tmp_path / REMEMBERED).read_bytes())
    assert len(kept) == 2
    read.clear()
    assert of_model(folder, tmp_path) == latest
    assert read == []
    (folder / "config.json").rename(folder / "other.json")
    of_model(folder, tmp_path)
    assert {Path(file).name for file in json.loads((tmp_path / REMEMBERED).read_bytes())} == {
        "model.safetensors",
        "other.json",
    }
