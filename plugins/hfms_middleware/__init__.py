"""Middlewares that come with hfms."""

from __future__ import annotations

from collections.abc import Iterator

from hfms_cli import Middleware, Provider, hookimpl
from hfms_middleware.auth import Auth, AuthOptions


@hookimpl
def hfms_middlewares() -> Iterator[Provider[Middleware]]:
    yield Provider("auth", Auth, AuthOptions, summary="Keys: who may call, and who may administer.")
