"""`/admin/keys/*`: what `hfms keys` does, over HTTP, for administrators only."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial, wraps
from typing import Annotated, Any, TypeVar

from aiohttp import web
from msgspec import Meta, Struct

from hfms_cli import BadRequest, Forbidden, caller_of, operation, parse, parse_fields, respond
from hfms_middleware.auth.admin import ImportRequest, KeyAdmin, KeyRequest, RotateRequest
from hfms_middleware.auth.answers import Audit, Export, Imported, Key, KeyList, NewKey
from hfms_middleware.auth.audit import Actor
from hfms_middleware.auth.keyring import Keyring

T = TypeVar("T")
ONE_KEY = "/admin/keys/{key_id:[0-9A-Za-z]{12}}"
Deed = Callable[[web.Request, Actor], Awaitable[Any]]


class AuditRequest(Struct, forbid_unknown_fields=True):
    """The query of `GET /admin/keys/audit`."""

    last: Annotated[int, Meta(ge=1, le=10_000)] = 50
    """How many lines."""


def add_routes(app: web.Application, admin: KeyAdmin, keyring: Keyring) -> None:
    """Add the routes; `keyring` is told of what changes, so that this server knows at once."""

    def route(deed: Deed) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        @wraps(deed)  # so that the handler says what the deed says of itself
        async def handler(request: web.Request) -> web.StreamResponse:
            return respond(await deed(request, _administrator(request)), headers={"Cache-Control": "no-store"})

        return handler

    async def change(work: Callable[..., Any], *args: Any) -> Any:
        try:
            return await asyncio.to_thread(work, *args)
        finally:
            keyring.forget_freshness()

    told = partial(operation, "Administration")

    @told(
        NewKey,
        body=KeyRequest,
        body_required=False,
        example={"name": "laptop", "rate_limit": 60, "allowed_models": ["org/*"]},
        errors=(403,),
    )
    async def generate(request: web.Request, actor: Actor) -> Any:
        """Make a key. Its secret is told in this answer only.

        The fields may also come as a form, or in the query.
        """
        return await change(admin.create, await _read(request, KeyRequest), actor)

    @told(KeyList, errors=(403,))
    async def listed(request: web.Request, actor: Actor) -> Any:
        """Every key, the oldest first; never a secret."""
        return {"object": "list", "data": await asyncio.to_thread(admin.all)}

    @told(Key, errors=(403, 404))
    async def show(request: web.Request, actor: Actor) -> Any:
        """One key."""
        return await asyncio.to_thread(admin.show, request.match_info["key_id"])

    @told(Key, errors=(403, 404))
    async def revoke(request: web.Request, actor: Actor) -> Any:
        """Make a key worthless for good. To revoke twice changes nothing."""
        return await change(admin.revoke, request.match_info["key_id"], actor)

    @told(NewKey, body=RotateRequest, body_required=False, example={"grace_seconds": 3600}, errors=(403, 404))
    async def rotate(request: web.Request, actor: Actor) -> Any:
        """A new secret for a key; the old one stays good for a while."""
        asked = await _read(request, RotateRequest)
        return await change(admin.rotate, request.match_info["key_id"], asked, actor)

    @told(Export, errors=(403,))
    async def export(request: web.Request, actor: Actor) -> Any:
        """Every key as it is kept, with the digest of its secret."""
        return {"object": "list", "data": await asyncio.to_thread(admin.export, actor)}

    @told(Imported, body=ImportRequest, example={"keys": [], "replace": False}, errors=(403, 409))
    async def load(request: web.Request, actor: Actor) -> Any:
        """Keep keys that another server exported."""
        asked = parse(ImportRequest, await request.read())
        done, present = await change(partial(admin.load, asked.keys, replace_known=asked.replace, actor=actor))
        return {"imported": done, "present": present}

    @told(Audit, query=AuditRequest, errors=(403,))
    async def audit(request: web.Request, actor: Actor) -> Any:
        """What administrators did on this machine."""
        asked = parse_fields(AuditRequest, _fields(request.query))
        return {"object": "list", "data": await asyncio.to_thread(admin.audit, asked.last)}

    app.router.add_post("/admin/keys/generate", route(generate))
    app.router.add_get("/admin/keys/export", route(export))
    app.router.add_post("/admin/keys/import", route(load))
    app.router.add_get("/admin/keys/audit", route(audit))
    app.router.add_get("/admin/keys/list", route(listed))
    app.router.add_get(ONE_KEY, route(show))
    app.router.add_post(f"{ONE_KEY}/revoke", route(revoke))
    app.router.add_post(f"{ONE_KEY}/rotate", route(rotate))


def _administrator(request: web.Request) -> Actor:
    """Who asks. Raises Forbidden, also where there is no key yet: a page in a browser here could ask, too."""
    caller = caller_of(request)
    if not caller.admin:
        raise Forbidden(
            "This key may not administer keys."
            if caller.key_id
            else "Keys are administered with an administrator's key: make the first with `hfms keys create --admin`, "
            "or set HFMS_ADMIN_API_KEY.",
            code="not_admin",
        )
    return Actor(caller.key_id or "", caller.address)


async def _read(request: web.Request, kind: type[T]) -> T:
    """The fields that were asked for: as JSON, as a form, or in the query."""
    body = await request.read()
    if body and request.query:
        raise BadRequest("Give the fields in the body or in the query, not in both.", code="ambiguous_fields")
    if request.content_type == "application/x-www-form-urlencoded" and body:
        return parse_fields(kind, _fields(await request.post()))
    if body:
        return parse(kind, body)
    return parse_fields(kind, _fields(request.query))


def _fields(sent: Any) -> dict[str, Any]:
    """Texts by name. `allowed_models` may come several times, or with commas."""
    fields: dict[str, Any] = {}
    for name in sent:
        values = sent.getall(name)
        if name == "allowed_models":
            fields[name] = [part.strip() for value in values for part in value.split(",") if part.strip()]
        elif len(values) > 1:
            raise BadRequest(f"`{name}` is given more than once.", param=name)
        else:
            fields[name] = values[0]
    return fields
