"""Answers that would come out the same again: kept, and made once for all who ask at the same time.

Only what is deterministic: embeddings, and texts at temperature 0 or with a seed. An answer belongs to the caller's
key (or its group, or address), unless `shared` says that all may see what others have asked.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import msgspec

from hfms_cli import Call, Caller, Chunk, Middleware, Proceed, exchange
from hfms_middleware.cache.answers import Answers, MemoryAnswers, RedisAnswers
from hfms_middleware.cache.flight import Flight
from hfms_middleware.cache.options import CacheOptions
from hfms_middleware.documenting import say_headers
from hfms_middleware.redis_link import RedisLink

if TYPE_CHECKING:
    from aiohttp import web
    from prometheus_client import CollectorRegistry

log = logging.getLogger("hfms.cache")

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[Chunk]).decode


class Cache(Middleware):
    """Stands around the call. Says `x-cache` where it had a say."""

    def __init__(self, options: CacheOptions) -> None:
        self._options = options
        self._answers: Answers
        if options.store == "memory":
            self._answers = MemoryAnswers(options.max_bytes, options.ttl_seconds)
        else:
            link = RedisLink(options.store, "[middleware.cache] store")
            self._answers = RedisAnswers(link, options.max_bytes, options.ttl_seconds)
        self._flights: dict[str, Flight] = {}
        self._cleared = 0
        self._landing: set[asyncio.Task[None]] = set()
        self._counts = {"hit": 0, "miss": 0, "shared": 0}

    def call(self, call: Call, proceed: Proceed) -> AsyncIterator[Chunk]:
        asked = {word.strip().lower() for word in exchange().asked.get("Cache-Control", "").split(",")}
        if not deterministic(call) or "no-store" in asked:
            return proceed(call)
        return self._answer(call, proceed, fresh="no-cache" in asked)

    async def _answer(self, call: Call, proceed: Proceed, *, fresh: bool) -> AsyncIterator[Chunk]:
        key = key_of(call, shared=self._options.shared)
        if not fresh:
            if (kept := await self._kept(key)) is not None:
                self._say("hit")
                for chunk in kept:
                    yield chunk
                return
            flight = self._flights.get(key)
            if flight is not None and not flight.abandoned:
                self._say("shared")
                async with aclosing(flight.read()) as chunks:
                    async for chunk in chunks:
                        yield chunk
                return
        self._say("miss")
        flight = self._flights[key] = Flight(proceed(call))
        cleared = self._cleared
        try:
            async with aclosing(flight.read()) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            # Others may be reading what this caller's stretch of the road brings: it stays until they have it.
            await flight.landed()
            task = asyncio.create_task(self._land(key, flight, cleared))
            self._landing.add(task)
            task.add_done_callback(self._landing.discard)

    async def _kept(self, key: str) -> list[Chunk] | None:
        found = await self._answers.get(key)
        if found is None:
            return None
        try:
            return _decode(found)
        except msgspec.DecodeError:
            log.warning("a kept answer cannot be read")  # another version's, or not ours
            return None

    async def _land(self, key: str, flight: Flight, cleared: int) -> None:
        """Keep the answer, and only then take the flight from the board: nobody comes between.

        In a task of its own, so that no caller waits for the store.
        """
        try:
            if flight.whole and cleared == self._cleared:
                await self._answers.put(key, _encode(flight.chunks))
        finally:
            if self._flights.get(key) is flight:
                del self._flights[key]

    def _say(self, how: str) -> None:
        exchange().answer["x-cache"] = how
        self._counts[how] += 1

    # What belongs to the feature beside its work.

    def stats(self) -> dict[str, Any]:
        """Counts since the start, and how full the store is."""
        return {
            "hits": self._counts["hit"],
            "misses": self._counts["miss"],
            "shared": self._counts["shared"],
            "in_flight": len(self._flights),
            **self._answers.status(),
        }

    def status(self) -> dict[str, Any]:
        return self.stats() | {"ttl_seconds": self._options.ttl_seconds, "shared_by_all": self._options.shared}

    async def clear(self) -> int:
        """Forget all answers, and keep none that is on its way now."""
        self._cleared += 1
        return await self._answers.clear()

    def routes(self, app: web.Application) -> None:
        from hfms_cli import operation, require_admin, respond

        @operation("Administration", dict[str, Any], errors=(403,))
        async def stats(request: web.Request) -> web.Response:
            """Hits, misses and bytes of the cache. Administrators only."""
            require_admin(request)
            return respond(self.stats())

        @operation("Administration", dict[str, int], errors=(403,))
        async def clear(request: web.Request) -> web.Response:
            """Forget all answers. Administrators only."""
            require_admin(request)
            return respond({"cleared": await self.clear()})

        app.router.add_get("/admin/cache/stats", stats)
        app.router.add_post("/admin/cache/clear", clear)

    def document(self, document: dict[str, Any]) -> None:
        say_headers(document, {"x-cache": "`hit`, `miss` or `shared`, where the cache had a say."})

    def metrics(self, registry: CollectorRegistry) -> None:
        from prometheus_client.core import CounterMetricFamily

        counts = self._counts

        class Lookups:
            """Read from the counts that the statistics show, so that the two cannot differ."""

            def collect(self) -> list[CounterMetricFamily]:
                hits = CounterMetricFamily(
                    "hfms_cache_hits", "Calls that were answered without the engine, joined ones too.", labels=["kind"]
                )
                hits.add_metric(["hit"], counts["hit"])
                hits.add_metric(["shared"], counts["shared"])
                misses = CounterMetricFamily("hfms_cache_misses", "Calls that the engine answered.", counts["miss"])
                return [hits, misses]

        registry.register(Lookups())

    async def close(self) -> None:
        await asyncio.gather(*self._landing)
        await self._answers.close()


def deterministic(call: Call) -> bool:
    """Whether the same call would be answered the same."""
    return call.task in ("embed", "score") or call.sampling.temperature == 0 or call.sampling.seed is not None


def key_of(call: Call, *, shared: bool) -> str:
    """SHA-256 of the model's digest, all that was asked of it, and whose cache it is.

    Everything of a call counts but its name and its turn, so that a parameter that calls learn later counts, too.
    """
    tenant = None if shared else call.caller.tenant
    asked = msgspec.structs.replace(call, id="", model="", caller=Caller(), priority=1, waited=0.0)
    # With keys in order: the same dict, written in another order, asks the same. Recordings stay bytes.
    plain = msgspec.to_builtins([tenant, asked], str_keys=True, order="sorted", builtin_types=(bytes,))
    return hashlib.sha256(_encode(plain)).hexdigest()
