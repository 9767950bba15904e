"""For other hfms servers: what this one has published, as a trustless gateway serves it. Off unless share_models is on.

`GET /.well-known/hfms/index.json`      the signed index
`GET /ipfs/{cid}?format=raw|car`        a block, or all blocks below one, of what was published and of nothing else

The paths and formats are those of https://specs.ipfs.tech/http-gateways/trustless-gateway/, so that any IPFS client can
read here, too. A key that may use only some models gets the blocks of only those.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Literal

from aiohttp import web
from msgspec import Struct

from hfms_cli.errors import BadRequest, Forbidden, NotFound
from hfms_cli.hookspecs import ContentStore
from hfms_cli.ipfs import BlockStore, Cid, Fetch, parse, walk
from hfms_cli.models.publications import Publications, Shared
from hfms_cli.serving.runtime import Runtime
from hfms_cli.web.context import RUNTIME, caller_of
from hfms_cli.web.operation import operation

__all__ = ["INDEX_PATH", "add_routes"]

INDEX_PATH = "/.well-known/hfms/index.json"
_SHARED = web.AppKey("shared", Shared)
_KINDS = {"raw": "application/vnd.ipld.raw", "car": "application/vnd.ipld.car"}


def add_routes(app: web.Application, runtime: Runtime) -> None:
    app[_SHARED] = Shared(Publications(runtime.config.state_dir))
    app.router.add_get(INDEX_PATH, _index)
    app.router.add_get("/ipfs/{cid}", _block)


@operation("Sharing", "application/json", errors=(403, 404))
async def _index(request: web.Request) -> web.StreamResponse:
    """What was published here, as a signed index in a DSSE envelope."""
    shared, caller = request.app[_SHARED], caller_of(request)
    offers = await asyncio.to_thread(shared.offers)
    if not all(caller.may_use(offer.name) for offer in offers):
        raise Forbidden("This key may use only some of the models in the index, which is signed as a whole.")
    raw = await asyncio.to_thread(shared.publications.raw)
    if raw is None:
        raise NotFound("Nothing was published here.")
    return web.Response(body=raw, content_type="application/json", headers={"Cache-Control": "no-store"})


class BlockQuery(Struct):
    """The query of a block."""

    format: Literal["raw", "car"] | None = None
    """One block, or an archive of all below it; without it the Accept header says."""


@operation("Sharing", "application/vnd.ipld.raw", query=BlockQuery, errors=(400, 404))
async def _block(request: web.Request) -> web.StreamResponse:
    """A block, or all blocks below one, of what was published here."""
    cid, kind = parse(request.match_info["cid"]), _kind(request)
    stores = await _holders(request, cid)
    headers = {
        "ETag": f'"{cid}.{kind}"',
        "Cache-Control": "private, max-age=29030400, immutable",
        "X-Content-Type-Options": "nosniff",
        "Content-Disposition": f'attachment; filename="{cid}.{kind}"',
    }
    if request.headers.get("If-None-Match") == headers["ETag"]:
        return web.Response(status=304, headers=headers)
    # From where it was published to, and from nowhere else: nobody can make this server fetch things.
    fetch = Fetch([source for store in stores if isinstance(store, BlockStore) for source in store.sources])
    if kind == "raw":
        return web.Response(body=await fetch.get(cid), content_type=_KINDS[kind], headers=headers)
    headers["Content-Type"] = f"{_KINDS[kind]}; version=1; order=dfs; dups=n"
    response = web.StreamResponse(headers=headers)
    async with aclosing(walk.export(fetch, cid)) as chunks:
        first = [await anext(chunks), await anext(chunks, b"")]  # an error still has a status of its own
        await response.prepare(request)
        for chunk in first:
            await response.write(chunk)
        async for chunk in chunks:
            await response.write(chunk)
    await response.write_eof()
    return response


async def _holders(request: web.Request, cid: Cid) -> list[ContentStore]:
    """The stores with a published block that the caller may have. Raises NotFound.

    What several models have in common may have been published to several, one of which may be away.
    """
    caller, content = caller_of(request), request.app[RUNTIME].router.content
    holding = await asyncio.to_thread(request.app[_SHARED].holding, cid)
    names = {store for offer, store in holding if caller.may_use(offer.name)}
    if not names:
        raise NotFound(f"`{cid}` is no part of what is published here.", param="cid")
    return [store for store in content.stores if store.name in names] or [content.named(min(names))]


def _kind(request: web.Request) -> str:
    """What is asked for: `?format=`, else the Accept header. Raises BadRequest."""
    asked = request.query.get("format")
    if asked is None:
        accepted = request.headers.get("Accept", "")
        asked = next((kind for kind, name in _KINDS.items() if name in accepted), "")
    if asked not in _KINDS:
        raise BadRequest("This gateway sends only blocks (`format=raw`) and archives (`format=car`).", param="format")
    return asked
