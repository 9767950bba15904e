"""A Redis that may be away: asked with short patience, and left alone for a second after it did not answer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from hfms_cli import ConfigError

if TYPE_CHECKING:
    from redis.asyncio import Redis

log = logging.getLogger("hfms.redis")

T = TypeVar("T")

PATIENCE_SECONDS = 1.0
"""For an answer."""
GLANCES = 10
"""How often it is looked for meanwhile: see `_in_time`."""
PAUSE_SECONDS = 1.0
"""After a failure nobody asks for so long; then one call tries, and the others go on without."""
CONNECTIONS = 16


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
        # redis-py's pools raise when all connections are in use: one at once, the other after a while, which is how
        # long a thousand calls may well take. Here they wait, and what patience there is begins with their turn.
        self._turns = asyncio.Semaphore(CONNECTIONS)

    async def ask(self, operation: Callable[[Redis], Coroutine[Any, Any, T]], patience: float = PATIENCE_SECONDS) -> T:
        """What `operation` answers. Raises RedisGone."""
        from redis.exceptions import RedisError

        async with self._turns:
            if self.error and (self._trying or self._clock() < self._ask_again):
                raise RedisGone(self.error)
            self._trying = self.error is not None
            try:
                answer = await _in_time(operation(self._redis), patience)
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


async def _in_time(work: Coroutine[Any, Any, T], seconds: float) -> T:
    """What `work` returns, or TimeoutError.

    Looked for in several glances, each at least a turn of the event loop: where the loop itself is late, as under a
    thousand calls at once, an answer may have lain there all the while, and Redis is not to blame.
    """
    task = asyncio.ensure_future(work)
    try:
        for _ in range(GLANCES):
            if (await asyncio.wait([task], timeout=seconds / GLANCES))[0]:
                return task.result()
        raise TimeoutError
    finally:
        task.cancel()


def _connect(url: str, setting: str) -> Redis:
    """A client; nothing is sent yet. Raises ConfigError, without the URL: it may hold a password."""
    try:
        scheme = urlsplit(url).scheme
    except ValueError:
        scheme = ""
    if scheme not in ("redis", "rediss", "unix"):
        raise ConfigError(f'{setting} must be "memory" or an address such as redis://127.0.0.1:6379/0', param="store")
    try:
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
    except ImportError as exc:
        raise ConfigError(
            f"{setting} names a Redis, which needs a package more: pip install 'hfms[redis]'", param="store"
        ) from exc
    try:
        # Once more: a connection that was kept may have been closed by the other side.
        return Redis.from_url(url, socket_timeout=None, socket_connect_timeout=None, retry=Retry(NoBackoff(), 1))
    except ValueError as exc:
        raise ConfigError(f"{setting} is not a usable address of a Redis", param="store") from exc
