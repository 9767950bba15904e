"""A Redis that may be away: asked with short patience, and left alone for a second after it did not answer."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from hfms_cli import ConfigError

if TYPE_CHECKING:
    from redis.asyncio import Redis

log = logging.getLogger("hfms.redis")

T = TypeVar("T")

PATIENCE_SECONDS = 1.0
"""For a connection, and for an answer."""
PAUSE_SECONDS = 1.0
"""After a failure nobody asks for so long; then one call tries, and the others go on without."""
CONNECTIONS = 32


class RedisGone(Exception):
    """Redis did not answer, or is not asked because it lately did not."""


class RedisLink:
    """One Redis, for one middleware.

    url: `redis://`, `rediss://` or `unix://`. setting: where it was written, for the message of a ConfigError.
    """

    def __init__(self, url: str, setting: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.error: str | None = None
        """The kind of the last failure, as long as it lasts."""
        self._clock = clock
        self._ask_again = 0.0
        self._trying = False
        self._redis = _connect(url, setting)

    async def ask(self, operation: Callable[[Redis], Awaitable[T]]) -> T:
        """What `operation` answers. Raises RedisGone."""
        from redis.exceptions import RedisError

        if self.error and (self._trying or self._clock() < self._ask_again):
            raise RedisGone(self.error)
        self._trying = self.error is not None
        try:
            answer = await operation(self._redis)
        except (RedisError, OSError) as exc:
            self._ask_again = self._clock() + PAUSE_SECONDS
            if self.error is None:
                log.error("Redis does not answer: %s", type(exc).__name__)
            self.error = type(exc).__name__
            raise RedisGone(self.error) from exc
        finally:
            self._trying = False
        if self.error is not None:
            log.warning("Redis answers again")
        self.error = None
        return answer

    def status(self) -> dict[str, Any]:
        """As of the last time it was asked."""
        return {"store": "redis", "reachable": self.error is None} | ({"error": self.error} if self.error else {})

    async def close(self) -> None:
        await self._redis.aclose()


def _connect(url: str, setting: str) -> Redis:
    """A client; nothing is sent yet. Raises ConfigError, without the URL: it may hold a password."""
    try:
        scheme = urlsplit(url).scheme
    except ValueError:
        scheme = ""
    if scheme not in ("redis", "rediss", "unix"):
        raise ConfigError(f'{setting} must be "memory" or an address such as redis://127.0.0.1:6379/0', param="store")
    try:
        from redis.asyncio import BlockingConnectionPool, Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
    except ImportError as exc:
        raise ConfigError(
            f"{setting} names a Redis, which needs a package more: pip install 'hfms[redis]'", param="store"
        ) from exc
    try:
        # A pool that blocks: redis-py's usual one raises when all connections are in use.
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS,
            timeout=PATIENCE_SECONDS,
            socket_timeout=PATIENCE_SECONDS,
            socket_connect_timeout=PATIENCE_SECONDS,
            retry=Retry(NoBackoff(), 1),  # once: a connection that was kept may have been closed by the other side
        )
    except ValueError as exc:
        raise ConfigError(f"{setting} is not a usable address of a Redis", param="store") from exc
    return Redis.from_pool(pool)
