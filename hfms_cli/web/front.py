"""A further front of `workers = N`: it answers calls by itself and passes every other request on to the owner.

Entry point of its process: `python -m hfms_cli.web.front FD LISTENING_FD...`. It ends when the owner does.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path

import aiohttp
import structlog
from aiohttp import web
from aiohttp.typedefs import Middleware
from multidict import CIMultiDict
from yarl import URL

from hfms_cli.config import load_config
from hfms_cli.garbage import collect_rarely, settle
from hfms_cli.plugins import discover
from hfms_cli.serving import frames
from hfms_cli.serving.front import FrontRuntime, Owner, owner_gone
from hfms_cli.telemetry import logs
from hfms_cli.web.app import ADDRESS, Handler, base_app
from hfms_cli.web.context import respond
from hfms_cli.web.listener import Runner

# Of one connection, and so neither passed on nor back (RFC 9110, 7.6.1).
HOP_BY_HOP = (
    "Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization", "TE", "Trailer", "Transfer-Encoding",
    "Upgrade", "Expect",
)  # fmt: skip


def passing_on(owner: aiohttp.ClientSession) -> Middleware:
    """A middleware that sends to the owner whatever this front has no route for."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.match_info.http_exception is None:
            return await handler(request)
        headers = _without_hops(request.headers)
        headers[ADDRESS] = request.remote or ""  # whatever the client said it was
        try:
            answer = await owner.request(
                request.method,
                URL(f"http://owner{request.raw_path}", encoded=True),
                headers=headers,
                data=request.content if request.can_read_body else None,
                allow_redirects=False,
            )
        except aiohttp.ClientConnectionError:  # it has just gone, and this front goes with it
            gone = owner_gone()
            return respond(
                gone.envelope(), gone.status, {"x-request-id": f"req-{uuid.uuid4().hex}", "Retry-After": "5"}
            )
        async with answer:
            response = web.StreamResponse(
                status=answer.status, reason=answer.reason, headers=_without_hops(answer.headers)
            )
            await response.prepare(request)
            async for data in answer.content.iter_any():
                await response.write(data)
            await response.write_eof()
            return response

    return middleware


def _without_hops(headers: Mapping[str, str]) -> CIMultiDict[str]:
    kept = CIMultiDict(headers)
    for name in HOP_BY_HOP:
        kept.popall(name, None)
    return kept


async def serve(fd: int, listening: list[int]) -> None:
    """Serve until the owner is gone, and then until what it has answered is with the clients."""
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=fd))
    start = frames.decode_for_front(await frames.read(reader))
    assert isinstance(start, frames.Start)
    config = load_config(Path(start.config_file) if start.config_file else None, flags=start.flags)
    logs.configure(config.log)
    structlog.contextvars.bind_contextvars(front=start.number)
    runtime = FrontRuntime.build(config, discover(config), Owner(reader, writer))
    async with aiohttp.ClientSession(
        connector=aiohttp.UnixConnector(start.owner, limit=0),
        timeout=aiohttp.ClientTimeout(total=None),
        auto_decompress=False,
        skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        cookie_jar=aiohttp.DummyCookieJar(),
    ) as owner:
        app = base_app(runtime, passing_on(owner))
        # The owner has told every call how it ended; what is left is to write that.
        runner = Runner(app)
        await runner.setup()
        for number in listening:
            await web.SockSite(runner, socket.socket(fileno=number)).start()
        settle()
        await runtime.pool.listen(runtime.metrics)
        shutil.rmtree(Path(start.owner).parent, ignore_errors=True)  # an owner that was killed could not
        await runner.cleanup()
        await runtime.close()


def main() -> None:
    """Ctrl-C and SIGTERM are the owner's to handle: it drains first."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    collect_rarely()
    fd, *listening = map(int, sys.argv[1:])
    try:
        from uvloop import run
    except ImportError:  # not on Windows
        from asyncio import run
    run(serve(fd, listening))


if __name__ == "__main__":
    main()
