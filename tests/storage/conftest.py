"""Storages with real sources behind them: folders, a package index and a Hub on loopback."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import save

from hfms_storage.bucket import Bucket
from hfms_storage.hf_cache import HfCache, HfCacheOptions
from hfms_storage.options import BucketOptions
from hfms_storage.package import Package, PackageOptions
from tests.storage.hub import Hub, Repo
from tests.storage.wheels import Index

if TYPE_CHECKING:
    from tests.storage.buckets import S3

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 64}


@pytest.fixture
def model() -> dict[str, bytes]:
    """A model of a few bytes that is whole."""
    return {
        "config.json": json.dumps(CONFIG).encode(),
        "tokenizer.json": b"{}",
        "model.safetensors": save({"a": np.zeros((8, 8), np.float32)}),
    }


@pytest.fixture(scope="session")
def hub_client(tmp_path_factory: pytest.TempPathFactory) -> None:
    """huggingface_hub, which keeps the environment of its first import: it must not be the developer's own."""
    if "huggingface_hub.constants" not in sys.modules:
        with pytest.MonkeyPatch.context() as patch:
            for name in [n for n in os.environ if n.startswith("HF_")]:
                patch.delenv(name)
            patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("huggingface")))
            patch.setenv("HF_HUB_OFFLINE", "1")
            import huggingface_hub.constants  # noqa: F401


@pytest.fixture
async def hub(hub_client: None, model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Hub]:
    """A Hub with `org/tiny`, that huggingface_hub may ask."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in [n for n in os.environ if n.startswith("HF_")]:
        monkeypatch.delenv(name)
    async with Hub({"org/tiny": Repo(model)}) as started:
        yield started


@pytest.fixture
def hf_cache(hub: Hub, tmp_path: Path) -> HfCache:
    return HfCache(HfCacheOptions(endpoint=hub.url, cache_dir=str(tmp_path / "hub")))


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """An S3 server, which this process knows by its environment alone."""
    pytest.importorskip("s3fs")
    from tests.storage.buckets import S3

    for name in [n for n in os.environ if n.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    server = S3()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    yield server
    server.stop()


@pytest.fixture
def bucket(s3: S3, tmp_path: Path) -> Bucket:
    return Bucket(BucketOptions(url="s3://models/hub", cache_dir=str(tmp_path / "cache")))


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip with nobody's settings, and with a cache of its own."""
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_CACHE_DIR", str(tmp_path / "pip-cache"))
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    monkeypatch.setenv("PIP_RETRIES", "0")


@pytest.fixture
async def index(pip: None, tmp_path: Path) -> AsyncIterator[Index]:
    (tmp_path / "wheels").mkdir()
    async with Index(tmp_path / "wheels") as started:
        yield started


@pytest.fixture
def package(index: Index, tmp_path: Path) -> Package:
    return Package(PackageOptions(cache_dir=str(tmp_path / "cache"), index_url=index.url))


@pytest.fixture
def env(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """An environment in which `hfms` knows that Hub, and nothing of the developer's own."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HFMS_"))}
    return clean | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HOME": str(tmp_path),
        "HFMS_STATE_DIR": str(tmp_path / "state"),
        "HFMS_CACHE_DIR": str(tmp_path / "cache"),
        "HFMS_STORAGE_ORDER": "hf_cache",
    }
