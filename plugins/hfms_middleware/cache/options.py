"""`[middleware.cache]`."""

from __future__ import annotations

from dataclasses import dataclass

from hfms_cli import setting


@dataclass(frozen=True)
class CacheOptions:
    """Options of `[middleware.cache]`."""

    max_bytes: int = setting(256 * 2**20, "Memory for answers; the longest unused make room.", ge=2**10, le=2**50)
    ttl_seconds: float = setting(3600.0, "How long an answer is kept.", ge=0.001, le=365 * 86_400)
    shared: bool = setting(
        False, "Answer a key with what another key asked for; otherwise each has a cache of its own."
    )
    store: str = setting(
        "memory",
        'Where answers are kept: "memory", or a Redis for all servers together, such as redis://127.0.0.1:6379/0.',
        env="CACHE_STORE",
        secret=True,  # it may hold a password
    )
