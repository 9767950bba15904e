"""Middlewares that come with hfms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hfms_cli import Middleware, Provider, hookimpl
from hfms_middleware.auth.options import AuthOptions
from hfms_middleware.breaker import BreakerOptions, CircuitBreaker
from hfms_middleware.cache.options import CacheOptions
from hfms_middleware.queue.options import QueueOptions
from hfms_middleware.rate_limit.options import RateLimitOptions

if TYPE_CHECKING:
    import typer


@hookimpl
def hfms_middlewares() -> Iterator[Provider[Middleware]]:
    yield Provider(
        "auth", _auth, AuthOptions, summary="Keys: who may call, and who may administer.", commands=_key_verbs
    )
    yield Provider("rate_limit", _rate_limit, RateLimitOptions, summary="Limits: requests and tokens of each key.")
    yield Provider(
        "cache", _cache, CacheOptions, summary="Answers that would come out the same again.", commands=_cache_verbs
    )
    yield Provider("queue", _queue, QueueOptions, summary="How many calls may wait for an engine, and how long.")
    yield Provider("breaker", CircuitBreaker, BreakerOptions, summary="Leaves an engine alone that fails in a row.")


# What only a server or a verb needs is imported for it.


def _auth(options: AuthOptions) -> Middleware:
    from hfms_middleware.auth.middleware import Auth

    return Auth(options)


def _key_verbs(app: typer.Typer) -> None:
    from hfms_middleware.auth.commands import keys

    app.add_typer(keys, name="keys")


def _rate_limit(options: RateLimitOptions) -> Middleware:
    from hfms_middleware.rate_limit.middleware import RateLimit

    return RateLimit(options)


def _cache(options: CacheOptions) -> Middleware:
    from hfms_middleware.cache.middleware import Cache

    return Cache(options)


def _queue(options: QueueOptions) -> Middleware:
    from hfms_middleware.queue.middleware import Queue

    return Queue(options)


def _cache_verbs(app: typer.Typer) -> None:
    from hfms_middleware.cache.commands import cache

    app.add_typer(cache, name="cache")
