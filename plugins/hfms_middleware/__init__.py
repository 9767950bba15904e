"""Middlewares that come with hfms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hfms_cli import Middleware, Provider, hookimpl
from hfms_middleware.auth.options import AuthOptions

if TYPE_CHECKING:
    import typer


@hookimpl
def hfms_middlewares() -> Iterator[Provider[Middleware]]:
    yield Provider(
        "auth", _auth, AuthOptions, summary="Keys: who may call, and who may administer.", commands=_key_verbs
    )


# What only a server or a verb needs is imported for it.


def _auth(options: AuthOptions) -> Middleware:
    from hfms_middleware.auth.middleware import Auth

    return Auth(options)


def _key_verbs(app: typer.Typer) -> None:
    from hfms_middleware.auth.commands import keys

    app.add_typer(keys, name="keys")
