"""Options of the storages, apart from what they do: `hfms --help` and every engine's process read these alone."""

from __future__ import annotations

from dataclasses import dataclass

from hfms_cli import setting


@dataclass(frozen=True)
class PackageOptions:
    """Options of `[storage.package]`."""

    cache_dir: str = setting(
        "",
        'Folder for what is fetched and what is made of it; empty: "hfms" in the user\'s cache folder.',
        env="CACHE_DIR",
    )
    index_url: str = setting("", "Package index to ask; empty: pip's own settings.", secret=True)


@dataclass(frozen=True)
class IpfsKitOptions:
    """Options of `[storage.ipfs_kit]`."""

    factory: str = setting(
        "ipfs_kit_py.backends.ipfs_backend:IPFSBackendAdapter", "What makes the adapter: MODULE:NAME."
    )
    timeout_seconds: float = setting(60.0, "Longest time for its import, and for one answer.", ge=0.1)


@dataclass(frozen=True)
class HfCacheOptions:
    """Options of `[storage.hf_cache]`."""

    endpoint: str = setting("", "The Hub, or a mirror of it; empty: HF_ENDPOINT, then https://huggingface.co.")
    cache_dir: str = setting("", "The Hub's cache; empty: HF_HUB_CACHE, then HF_HOME, then its usual place.")
    blocks_dir: str = setting("", 'Where what has a CID is kept; empty: "ipfs" beside the Hub\'s cache.')
    connections: int = setting(8, "How many parts of files are fetched at once.", ge=1, le=64)
    xet: bool = setting(
        False,
        "Fetch by Xet what the Hub keeps so: files share their chunks, but a pull that breaks off begins them anew. "
        "Files above 50 GB always come so.",
    )
    quant: str = setting("", "Which GGUF to take of several where a name does not say, such as Q4_K_M; empty: ask.")


@dataclass(frozen=True)
class BucketOptions:
    """Options of `[storage.bucket]`."""

    url: str = setting(
        "",
        "Where folders org/name are: s3://bucket/folder, https://host/folder, or what else fsspec reads.",
        env="BUCKET_URL",
    )
    connections: int = setting(8, "How many parts of a file are fetched at once.", ge=1, le=64)
    cache_dir: str = setting(
        "",
        'Folder for what is fetched and what is made of it; empty: "hfms" in the user\'s cache folder.',
        env="CACHE_DIR",
    )


@dataclass(frozen=True)
class KuboOptions:
    """Options of `[storage.kubo]`."""

    api: str = setting(
        "http://127.0.0.1:5001", "The node's RPC: a URL, or /ip4/ADDRESS/tcp/PORT.", env="IPFS_API", bare=True
    )
    command: str = setting(
        "ipfs", "The program to run where the RPC cannot be reached; empty: none.", env="KUBO_CMD", bare=True
    )
    timeout_seconds: float = setting(60.0, "Longest time for one answer of the node, and for one pause in it.", ge=0.1)


@dataclass(frozen=True)
class GatewayOptions:
    """Options of `[storage.gateway]`."""

    urls: list[str] = setting(
        lambda: ["https://trustless-gateway.link", "https://ipfs.io"],
        "Gateways, best first. They learn what is fetched.",
        env="IPFS_GATEWAYS",
    )
    timeout_seconds: float = setting(30.0, "Longest pause in an answer.", ge=0.1)


@dataclass(frozen=True)
class NeighbourOptions:
    """Options of `[storage.neighbours]`."""

    urls: list[str] = setting(list, "Other hfms servers, best first: http://HOST:PORT.", env="NEIGHBOURS")
    keys: dict[str, str] = setting(dict, "API keys to send: URL = key, each to that server alone.", secret=True)
    timeout_seconds: float = setting(10.0, "Longest pause in an answer.", ge=0.1)
