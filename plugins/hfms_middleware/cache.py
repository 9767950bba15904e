"""Answers that would come out the same again: kept, and made once for all who ask at the same time.

Only what is deterministic: embeddings, and texts at temperature 0 or with a seed. An answer belongs to the caller's key
(or address), unless `shared` says that all may see what others have asked.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

from hfms_cli import Call, Caller, Chunk, Middleware, Proceed, exchange, setting
from hfms_middleware.answers import Answers, MemoryAnswers, RedisAnswers
from hfms_middleware.flight import Flight
from hfms_middleware.redis_link import RedisLink

if TYPE_CHECKING:
    import typer
    from aiohttp import web
    from prometheus_client import CollectorRegistry

log = structlog.get_logger("hfms.cache")

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[Chunk]).decode


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
        from hfms_cli import require_admin, respond

        async def stats(request: web.Request) -> web.Response:
            require_admin(request)
            return respond(self.stats())

        async def clear(request: web.Request) -> web.Response:
            require_admin(request)
            return respond({"cleared": await self.clear()})

        app.router.add_get("/admin/cache/stats", stats)
        app.router.add_post("/admin/cache/clear", clear)

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
    return call.task != "generate" or call.sampling.temperature == 0 or call.sampling.seed is not None


def key_of(call: Call, *, shared: bool) -> str:
    """SHA-256 of the model's digest, all that was asked of it, and whose cache it is.

    Everything of a call counts except what only names it, so that a parameter that calls learn later counts, too.
    """
    tenant = None if shared else [call.caller.key_id, None if call.caller.key_id else call.caller.address]
    asked = msgspec.structs.replace(call, id="", model="", caller=Caller())
    # JSON with its keys in order: the same dict, written in another order, asks the same.
    plain = msgspec.to_builtins([tenant, asked], str_keys=True, order="sorted")
    return hashlib.sha256(msgspec.json.encode(plain)).hexdigest()


# `hfms cache`, for the cache of the running server.


def add_verbs(app: typer.Typer) -> None:
    """`hfms cache stats` and `hfms cache clear`."""
    import typer

    from hfms_cli import AsJson, Client, ConfigFile, ServerUrl, admin_key, load_config, local_url, print_json

    cache = typer.Typer(help="Look at the cache of the running server, or empty it.", no_args_is_help=True)

    def ask(url: str | None, config: Any, method: str, path: str) -> dict[str, Any]:
        async def answer() -> Any:
            async with Client(url or local_url(load_config(config).server), admin_key()) as client:
                return await (client.get(path) if method == "GET" else client.post(path, {}))

        found: dict[str, Any] = asyncio.run(answer())
        return found

    @cache.command()
    def stats(url: ServerUrl = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
        """Show how often the cache had the answer, and how full it is."""
        found = ask(url, config, "GET", "/admin/cache/stats")
        if as_json:
            print_json(found)
            return
        from hfms_cli import print_table

        print_table(["WHAT", "VALUE"], found.items())

    @cache.command()
    def clear(url: ServerUrl = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
        """Forget every answer that is kept."""
        found = ask(url, config, "POST", "/admin/cache/clear")
        if as_json:
            print_json(found)
            return
        typer.echo(f"{found.get('cleared')} answers forgotten")

    app.add_typer(cache, name="cache")
