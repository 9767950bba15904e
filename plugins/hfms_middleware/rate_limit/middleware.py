"""Limits: requests a minute around HTTP; a model's tokens a minute and a day around the call.

A call sets aside what it may come to before it begins, and settles for what it came to however it ends. The owner of a
bucket is a key, or the address of a caller without one.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from hfms_cli import (
    Call,
    Caller,
    CallInput,
    Chunk,
    Config,
    Conversation,
    Middleware,
    Overloaded,
    Proceed,
    Speech,
    Unavailable,
    exchange,
    in_owner,
)
from hfms_middleware.documenting import say_headers
from hfms_middleware.rate_limit.buckets import Buckets, Limit, MemoryBuckets, RedisBuckets, Taken
from hfms_middleware.rate_limit.options import RateLimitOptions
from hfms_middleware.redis_link import RedisGone, RedisLink

if TYPE_CHECKING:
    from aiohttp import web
    from prometheus_client import CollectorRegistry

UNLIMITED_PATHS = frozenset({"/health", "/ready", "/status", "/metrics"})
"""Those who watch the server ask them, also when it can tell nobody's limit."""
BLOCKS = "/ipfs/"
"""Below it other servers read what this one shares: thousands of blocks for one model."""
BYTES_PER_TOKEN = 3
"""Of a prompt that is not yet tokenised. English has more than four a token, code and Chinese about three."""
BYTES_PER_SOUND = 80
"""Of a recording: a second is 50 tokens, and takes 4,000 bytes where it is compressed well."""
TOKENS_PER_PICTURE = 1_024
"""Of an image, whatever its size: models make 64 to some thousands of one, and only they know."""
MINUTE, DAY = 60, 86_400


class RateLimit(Middleware):
    """Raises Overloaded (429) beyond a limit; says on every answer what is left."""

    def __init__(self, options: RateLimitOptions, clock: Callable[[], float] = time.monotonic) -> None:
        self._options = options
        self._link: RedisLink | None = None
        self._buckets: Buckets
        if options.store == "memory":
            self._buckets = MemoryBuckets(clock)
        else:
            self._link = RedisLink(options.store, "[middleware.rate_limit] store")
            self._buckets = RedisBuckets(self._link)
        self._refusals: Counter[str] = Counter()
        self._count: Callable[[str], None] = lambda limit: None
        self._settling: set[asyncio.Task[None]] = set()

    # The two places where it stands.

    async def http(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        from hfms_cli import caller_of  # aiohttp takes long, and the first model need not wait for it

        caller = caller_of(request)
        # Of tokens nothing is taken here: it is asked what is left, so that every answer can tell.
        wants = dict.fromkeys(self._request_limits(caller), 1.0) | dict.fromkeys(self._token_limits(caller), 0.0)
        if wants and request.path not in UNLIMITED_PATHS and not request.path.startswith(BLOCKS):
            await self._take(owner_of(caller), wants)
        return await handler(request)

    def call(self, call: Call, proceed: Proceed) -> AsyncIterator[Chunk]:
        limits = self._token_limits(call.caller)
        return self._metered(call, proceed, limits) if limits else proceed(call)

    async def _metered(self, call: Call, proceed: Proceed, limits: list[Limit]) -> AsyncIterator[Chunk]:
        expected = most_tokens(call, self._options.reserve_tokens)
        # A call that may come to more than a bucket holds waits until it is full, and may leave it below nothing.
        reserved = {limit: float(min(expected, limit.amount)) for limit in limits}
        owner = owner_of(call.caller)
        granted = await self._take(owner, reserved)
        used = 0
        try:
            async for chunk in proceed(call):
                used += chunk.prompt_tokens + chunk.tokens
                yield chunk
        finally:
            if granted:
                if exchange().answer.get("x-cache") in ("hit", "shared") and not self._options.count_cached:
                    used = 0
                await self._settle(owner, {limit: used - amount for limit, amount in reserved.items()})

    # Limits.

    def _request_limits(self, caller: Caller) -> list[Limit]:
        return self._limits(("requests_per_minute", caller.requests_per_minute, MINUTE))

    def _token_limits(self, caller: Caller) -> list[Limit]:
        return self._limits(
            ("tokens_per_minute", caller.tokens_per_minute, MINUTE), ("tokens_per_day", caller.tokens_per_day, DAY)
        )

    def _limits(self, *wanted: tuple[str, int | None, int]) -> list[Limit]:
        """Of each name the key's own limit, else everybody's; 0 is none."""
        found = []
        for name, own, seconds in wanted:
            amount: int = getattr(self._options, name) if own is None else own
            if amount > 0:
                found.append(Limit(name, amount, seconds))
        return found

    @in_owner
    async def _take_from_memory(self, owner: str, wants: dict[Limit, float]) -> Taken:
        return await self._buckets.take(owner, wants)

    @in_owner
    async def _count_refusal(self, limit: str) -> None:
        self._refusals[limit] += 1
        self._count(limit)

    async def _take(self, owner: str, wants: dict[Limit, float]) -> bool:
        """Whether all was taken; False where nobody could say and the operator lets such calls pass."""
        # Whoever asks Redis hears the truth; what is kept in memory is that of the owner.
        take = self._take_from_memory if self._link is None else self._buckets.take
        try:
            taken = await take(owner, wants)
        except RedisGone:
            if self._options.on_error == "open":
                return False
            raise Unavailable(
                "The server cannot tell how much of your limit is left; try again later.",
                code="rate_limiter_unavailable",
            ) from None
        tell(taken)
        if taken.refused is None:
            return True
        limit = taken.refused
        await self._count_refusal(limit.name)
        what, _, period = limit.name.partition("_per_")
        raise Overloaded(
            f"Rate limit reached: {limit.amount} {what} a {period}. Try again in {math.ceil(taken.wait)} s.",
            code="rate_limit_exceeded",
            retry_after=taken.wait,
        )

    async def _settle(self, owner: str, differences: Mapping[Limit, float]) -> None:
        if self._link is None:
            tell(await self._buckets.settle(owner, differences))
            return

        async def settle() -> None:
            try:
                tell(await self._buckets.settle(owner, differences))
            except RedisGone:
                return  # the bucket fills by itself

        # In a task of its own: a caller who leaves a second time, as a shutdown makes them, must not stop it.
        task = asyncio.create_task(settle())
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)
        await asyncio.shield(task)

    # What belongs to the feature beside its work.

    def check(self, config: Config) -> Iterable[str]:
        order = config.middleware.order
        if "auth" in order and order.index("auth") > order.index(self.name):
            yield "rate_limit stands before auth in [middleware] order: it counts by address, whatever the key"

    def document(self, document: dict[str, Any]) -> None:
        say_headers(
            document,
            {
                f"X-RateLimit-{what}{suffix}": f"{text} {unit} a minute."
                for suffix, unit in (("", "requests"), ("-Tokens", "tokens"))
                for what, text in (
                    ("Limit", "The limit of"),
                    ("Remaining", "What is left of"),
                    ("Reset", "Seconds until nothing is used up of"),
                )
            },
        )

    def metrics(self, registry: CollectorRegistry) -> None:
        from prometheus_client import Counter as Series

        limited = Series("hfms_rate_limited", "Requests and calls refused by a limit.", ["limit"], registry=registry)
        self._count = lambda limit: limited.labels(limit).inc()

    def status(self) -> dict[str, Any]:
        """Defaults, refusals, and how the store is."""
        names = ("requests_per_minute", "tokens_per_minute", "tokens_per_day", "on_error")
        if isinstance(self._buckets, MemoryBuckets):
            store: dict[str, Any] = {"store": "memory", "buckets": len(self._buckets)}
        else:
            assert self._link is not None
            store = self._link.status()
        return {name: getattr(self._options, name) for name in names} | store | {"refused": dict(self._refusals)}

    async def close(self) -> None:
        await asyncio.gather(*self._settling)
        await self._buckets.close()


def owner_of(caller: Caller) -> str:
    """Whose bucket: the key's, or that of the address. An IPv6 host has a whole /64 to choose addresses from."""
    if caller.key_id is not None:
        return f"key:{caller.key_id}"
    try:
        address = ipaddress.ip_address(caller.address)
    except ValueError:
        return f"address:{caller.address}"
    if address.version == 6 and address.ipv4_mapped is None:
        return f"address:{ipaddress.ip_network((address, 64), strict=False)}"
    return f"address:{getattr(address, 'ipv4_mapped', None) or address}"


def most_tokens(call: Call, reserve_tokens: int) -> int:
    """What a call may come to: its prompts by their bytes, and for each choice all that it may write."""
    prompts = sum(map(_most_prompt_tokens, call.inputs))
    if call.task != "generate":
        return prompts
    most = reserve_tokens if call.sampling.max_tokens is None else call.sampling.max_tokens
    return prompts + len(call.inputs) * call.n * most


def _most_prompt_tokens(item: CallInput) -> int:
    """Of one input. Recordings and images count by measures of their own: their bytes are no text."""
    if isinstance(item, list):
        return len(item)
    if isinstance(item, Speech):
        return -(-len(item.data) // BYTES_PER_SOUND)
    pictures = 0
    if isinstance(item, Conversation):
        pictures = len(item.pictures)
        item = msgspec.structs.replace(item, pictures=[])
    return -(-len(msgspec.json.encode(item)) // BYTES_PER_TOKEN) + TOKENS_PER_PICTURE * pictures


def tell(taken: Taken) -> None:
    """X-RateLimit-* of the answer; those of tokens are of the minute."""
    for limit, level in taken.levels.items():
        if limit.seconds != MINUTE:
            continue
        suffix = "-Tokens" if limit.name.startswith("tokens") else ""
        exchange().answer.update(
            {
                f"X-RateLimit-Limit{suffix}": str(limit.amount),
                f"X-RateLimit-Remaining{suffix}": str(max(0, math.floor(level))),
                f"X-RateLimit-Reset{suffix}": str(math.ceil(limit.until(limit.amount, level))),
            }
        )
