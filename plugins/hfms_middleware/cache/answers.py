"""Where the cache keeps answers: in this process, bounded in bytes, or on a Redis that several servers share."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from hfms_middleware.redis_link import RedisGone, RedisLink

if TYPE_CHECKING:
    from redis.asyncio import Redis

OVERHEAD_BYTES = 512
"""What an entry takes beside its value: key, links and objects, generously."""
PREFIX = "hfms:cache:"


class Answers(Protocol):
    """Encoded answers by key. None of these fails: a store that is away is an empty one."""

    async def get(self, key: str) -> bytes | None: ...

    async def put(self, key: str, value: bytes) -> None: ...

    async def clear(self) -> int:
        """Forget everything; how many answers that were."""
        ...

    def status(self) -> dict[str, Any]: ...

    async def close(self) -> None: ...


class MemoryAnswers:
    """Of this process. The one that was used longest ago makes room."""

    def __init__(self, max_bytes: int, ttl_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        from cachetools import TTLCache

        self._kept: TTLCache[str, bytes] = TTLCache(
            max_bytes, ttl_seconds, timer=clock, getsizeof=lambda value: len(value) + OVERHEAD_BYTES
        )

    async def get(self, key: str) -> bytes | None:
        return self._kept.get(key)

    async def put(self, key: str, value: bytes) -> None:
        self._kept.pop(key, None)
        with contextlib.suppress(ValueError):  # larger than all the room there is
            self._kept[key] = value

    async def clear(self) -> int:
        self._kept.expire()
        count = len(self._kept)
        self._kept.clear()
        return count

    def status(self) -> dict[str, Any]:
        return {
            "store": "memory",
            "entries": len(self._kept),
            "bytes": int(self._kept.currsize),
            "max_bytes": int(self._kept.maxsize),
        }

    async def close(self) -> None:
        self._kept.clear()


class RedisAnswers:
    """Of all servers. Their bytes are bounded by Redis's own `maxmemory`; one answer by `max_bytes`."""

    def __init__(self, link: RedisLink, max_bytes: int, ttl_seconds: float) -> None:
        self._link = link
        self._max_bytes = max_bytes
        self._ttl_ms = max(1, round(ttl_seconds * 1000))

    async def get(self, key: str) -> bytes | None:
        async def get(redis: Redis) -> bytes | None:
            found = await redis.get(PREFIX + key)
            assert not isinstance(found, str)  # the connection decodes nothing
            return found

        try:
            return await self._link.ask(get)
        except RedisGone:
            return None

    async def put(self, key: str, value: bytes) -> None:
        async def put(redis: Redis) -> None:
            await redis.set(PREFIX + key, value, px=self._ttl_ms)

        if len(value) > self._max_bytes:
            return
        with contextlib.suppress(RedisGone):
            await self._link.ask(put)

    async def clear(self) -> int:
        async def clear(redis: Redis) -> int:
            count = 0
            async for key in redis.scan_iter(match=PREFIX + "*", count=1000):
                count += await redis.unlink(key)
            return count

        with contextlib.suppress(RedisGone):
            return await self._link.ask(clear, patience=60.0)  # in many steps
        return 0

    def status(self) -> dict[str, Any]:
        return self._link.status()

    async def close(self) -> None:
        await self._link.close()
