"""How the server is: `/health`, `/ready`, `/status`, `/metrics`."""

from __future__ import annotations

import asyncio

from aiohttp import web

from hfms_cli.errors import Unavailable
from hfms_cli.web import answers
from hfms_cli.web.context import RUNTIME, respond
from hfms_cli.web.operation import operation

routes = web.RouteTableDef()


@routes.get("/health")
@operation("Server", answers.Word)
async def health(request: web.Request) -> web.StreamResponse:
    """200 while the process lives and its loop turns."""
    return respond({"status": "ok"})


@routes.get("/ready")
@operation("Server", answers.Word, errors=(503,))
async def ready(request: web.Request) -> web.StreamResponse:
    """200 only when an engine's own loop was heard lately and all that was asked for at start serves."""
    if reason := request.app[RUNTIME].not_ready():
        raise Unavailable(f"Not ready: {reason}.", code="not_ready")
    return respond({"status": "ready"})


@routes.get("/status")
@operation("Server", answers.ServerStatus)
async def status(request: web.Request) -> web.StreamResponse:
    """Models, devices, plugins, middlewares and warnings."""
    # Probing devices reads files and may ask drivers: not on the loop.
    return respond(await asyncio.to_thread(request.app[RUNTIME].status))


@operation("Server", "text/plain")
async def metrics(request: web.Request) -> web.StreamResponse:
    """Prometheus text.

    A route only where [server] metrics says so.
    """
    text = await request.app[RUNTIME].render_metrics()
    return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
