"""Keys in Redis, shared by all servers that reach it. How well they are kept is how well Redis keeps anything.

    {hfms:keys}            hash: id -> record
    {hfms:keys}:changed    sorted set: id -> revision of its last change
    {hfms:keys}:revision   the store's revision
    {hfms:keys}:used       hash: id -> Unix time of its last use
    {hfms:keys}:schema     version of all this

The braces keep them on one node of a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec

from hfms_cli import ConfigError
from hfms_middleware.auth.keys import StoredKey
from hfms_middleware.auth.store import (
    TIMEOUT_SECONDS,
    StoreUnavailable,
    key_exists,
    missing_extra,
    no_such_key,
    without_password,
)

KEYS = "{hfms:keys}"
CHANGED, REVISION, USED, SCHEMA = f"{KEYS}:changed", f"{KEYS}:revision", f"{KEYS}:used", f"{KEYS}:schema"
VERSION = 1

_decode = msgspec.json.Decoder(StoredKey).decode
_LATER_ONLY = """
local old = redis.call('HGET', KEYS[1], ARGV[1])
if not old or tonumber(old) < tonumber(ARGV[2]) then redis.call('HSET', KEYS[1], ARGV[1], ARGV[2]) end
"""


class RedisStore:
    """Each write is one transaction, tried again where another server wrote in between."""

    kind = "redis"

    def __init__(self, url: str) -> None:
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError as exc:
            raise missing_extra("redis") from exc
        self._url = url
        try:
            self._redis: redis.Redis = redis.Redis.from_url(
                url,
                socket_timeout=TIMEOUT_SECONDS,
                socket_connect_timeout=TIMEOUT_SECONDS,
                protocol=2,
                retry=Retry(NoBackoff(), 1),  # once more where an idle connection was cut; its own waits for seconds
            )
        except ValueError as exc:
            raise ConfigError(f"[middleware.auth] store: {without_password(str(exc), url)}", param="store") from exc
        self._later_only = self._redis.register_script(_LATER_ONLY)
        self._checked = False

    def changes(self, since: int) -> tuple[int, list[StoredKey]]:
        with self._asking():
            with self._redis.pipeline(transaction=True) as pipe:
                pipe.get(REVISION)
                pipe.zrangebyscore(CHANGED, f"({since}", "+inf")
                found, ids = pipe.execute()
            revision = int(found or 0)
            if revision < since:
                return revision, [_decode(r) for r in self._redis.hvals(KEYS)]
            records = self._redis.hmget(KEYS, ids) if ids else []
        return revision, [_decode(r) for r in records if r is not None]

    def insert(self, key: StoredKey) -> None:
        def change(old: StoredKey | None) -> StoredKey:
            if old is not None:
                raise key_exists(key.id)
            return key

        self._write(key.id, change)

    def update(self, key_id: str, change: Callable[[StoredKey], StoredKey]) -> StoredKey:
        def changed(old: StoredKey | None) -> StoredKey:
            if old is None:
                raise no_such_key(key_id)
            return change(old)

        return self._write(key_id, changed)

    def touch(self, used: Mapping[str, float]) -> None:
        with self._asking():
            for key_id, at in used.items():
                self._later_only(keys=[USED], args=[key_id, at])

    def last_used(self) -> dict[str, float]:
        with self._asking():
            found: Any = self._redis.hgetall(USED)
        return {key_id.decode(): float(at) for key_id, at in found.items()}

    def close(self) -> None:
        self._redis.close()

    def _write(self, key_id: str, change: Callable[[StoredKey | None], StoredKey]) -> StoredKey:
        from redis import WatchError

        with self._asking(), self._redis.pipeline() as pipe:
            while True:
                try:
                    # Every write changes the revision, so that watching it is watching everything.
                    pipe.watch(REVISION)  # type: ignore[no-untyped-call]
                    revision = int(pipe.get(REVISION) or 0) + 1
                    old = pipe.hget(KEYS, key_id)
                    key = change(None if old is None else _decode(old))
                    pipe.multi()
                    pipe.set(REVISION, revision)
                    pipe.hset(KEYS, key_id, msgspec.json.encode(key))
                    pipe.zadd(CHANGED, {key_id: revision})
                    pipe.execute()
                    return key
                except WatchError:
                    continue

    @contextmanager
    def _asking(self) -> Iterator[None]:
        import redis

        try:
            if not self._checked:
                self._check_schema()
            yield
        except redis.RedisError as exc:
            raise StoreUnavailable(without_password(str(exc), self._url)) from exc

    def _check_schema(self) -> None:
        self._redis.set(SCHEMA, VERSION, nx=True)
        found: Any = self._redis.get(SCHEMA)
        if int(found) > VERSION:
            raise ConfigError(
                f"the key store has schema {int(found)} and this hfms knows {VERSION}: it was written by a newer hfms",
                param="store",
            )
        self._checked = True
