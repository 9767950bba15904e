"""HTTP as aiohttp speaks it, but what is no HTTP is answered as everything else is, and quoted in no log.

aiohttp's own answer and log line hold the bytes that it could not read, and a key may be among them.
"""

from __future__ import annotations

import uuid

import structlog
from aiohttp import web

from hfms_cli.errors import BadRequest, HfmsError
from hfms_cli.web.context import respond

log = structlog.get_logger("hfms.web")


class Runner(web.AppRunner):
    """Runs an application. A client that leaves cancels its handler; the access line is the application's own."""

    def __init__(self, app: web.Application, *, shutdown_timeout: float = 1.0) -> None:
        super().__init__(app, handler_cancellation=True, access_log=None, shutdown_timeout=shutdown_timeout)

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        server.__class__ = _Server  # an application makes its own, and takes no other
        return server


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Protocol(self, loop=self._loop, **self._kwargs)


class _Protocol(web.RequestHandler):
    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What aiohttp could not read, or no handler has caught. Closes the connection."""
        if request.writer.output_size > 0:
            raise ConnectionError("part of an answer was sent already")
        if status == 500:
            log.error("request failed", exc_info=exc)
            error = HfmsError("The server had an error while processing your request.")
        else:
            log.warning("no HTTP", remote=request.remote, error=type(exc).__name__)
            text = "The request is no HTTP: a line or a header is too long, or holds what may not be there."
            error = BadRequest(text, code="bad_request")
        response = respond(error.envelope(), status=status, headers={"x-request-id": f"req-{uuid.uuid4().hex}"})
        response.force_close()
        return response
