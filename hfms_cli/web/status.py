"""How the server is: `/health`, `/ready`, `/status`, `/metrics`."""

from __future__ import annotations

import asyncio

from aiohttp import web

from hfms_cli.errors import Unavailable
from hfms_cli.web.context import RUNTIME, respond

routes = web.RouteTableDef()


@routes.get("/health")
async def health(request: web.Request) -> web.StreamResponse:
    """200 while the process lives and its loop turns."""
    return respond({"status": "ok"})


@routes.get("/ready")
async def ready(request: web.Request) -> web.StreamResponse:
    """200 only when an engine's own loop was heard lately and all that was asked for at start serves."""
    if reason := request.app[RUNTIME].not_ready():
        raise Unavailable(f"Not ready: {reason}.", code="not_ready")
    return respond({"status": "ready"})


@routes.get("/status")
async def status(request: web.Request) -> web.StreamResponse:
    # Probing devices reads files and may ask drivers: not on the loop.
    return respond(await asyncio.to_thread(request.app[RUNTIME].status))


async def metrics(request: web.Request) -> web.StreamResponse:
    """Prometheus text; a route only where [server] metrics says so."""
    text = await request.app[RUNTIME].render_metrics()
    return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
