"""Middlewares that come with hfms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hfms_cli import Middleware, Provider, hookimpl
from hfms_middleware.auth.options import AuthOptions
from hfms_middleware.breaker import BreakerOptions, CircuitBreaker
from hfms_middleware.cache import Cache, CacheOptions, add_verbs
from hfms_middleware.rate_limit import RateLimit, RateLimitOptions

if TYPE_CHECKING:
    import typer


@hookimpl
def hfms_middlewares() -> Iterator[Provider[Middleware]]:
    yield Provider(
        "auth", _auth, AuthOptions, summary="Keys: who may call, and who may administer.", commands=_key_verbs
    )
    yield Provider("rate_limit", RateLimit, RateLimitOptions, summary="Limits: requests and tokens of each key.")
    yield Provider(
        "cache", Cache, CacheOptions, summary="Answers that would come out the same again.", commands=add_verbs
    )
    yield Provider("breaker", CircuitBreaker, BreakerOptions, summary="Leaves an engine alone that fails in a row.")


# What only a server or a verb needs is imported for it.


def _auth(options: AuthOptions) -> Middleware:
    from hfms_middleware.auth.middleware import Auth

    return Auth(options)


def _key_verbs(app: typer.Typer) -> None:
    from hfms_middleware.auth.commands import keys

    app.add_typer(keys, name="keys")
