"""Server-sent events as OpenAI sends them: one `data:` line an event, and `[DONE]` when all went well."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import structlog
from aiohttp import web

from hfms_cli.errors import EngineFault, HfmsError
from hfms_cli.web.context import REQUEST_ID, log_of

log = structlog.get_logger("hfms.web")

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which readers pass over."""
encode = msgspec.json.Encoder().encode


class EventStream:
    """An open stream. Nothing goes out before the first write, so an early error still has a status of its own.

    But whoever waits for so long that a proxy might lose patience gets the headers, and a comment now and then.
    """

    farewell = DONE
    """What follows the last event where all went well."""

    def __init__(self, request: web.Request, head: Callable[[], dict[str, Any]], *, keep_alive_seconds: float) -> None:
        """head: what every event begins with; asked for and encoded once. keep_alive_seconds: 0: no comments."""
        self._request = request
        self._make_head = head
        self._head = b""
        self._unsent: list[bytes] = []
        self._failed = False
        self._response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",  # nginx would hold tokens back
            }
        )
        self._loop = asyncio.get_running_loop()
        self._patience = keep_alive_seconds
        self._wrote = self._loop.time()
        self._writing = asyncio.Lock()
        self._comment: asyncio.Task[None] | None = None
        self._timer = self._loop.call_later(keep_alive_seconds, self._break_silence) if keep_alive_seconds else None

    @property
    def opened(self) -> bool:
        return self._response.prepared

    async def send(self, *events: dict[str, Any], more: bool = False) -> None:
        """Send events in one write, or with `more` together with those that follow at once: a write costs most."""
        self._unsent += [self.encoded(event) for event in events]
        if self._unsent and not more:
            await self._write(self._taken())

    def encoded(self, event: dict[str, Any]) -> bytes:
        """An event as it goes over the wire."""
        if not self._head:
            self._head = b"data: " + encode(self._make_head())[:-1] + b","
        return self._head + encode(event)[1:] + b"\n\n"

    def rest(self) -> None:
        """No comments any more: the answer is complete, or failed, or its reader is gone."""
        for pending in (self._timer, self._comment):
            if pending is not None:
                pending.cancel()

    @contextlib.contextmanager
    def telling_errors(self) -> Iterator[None]:
        """An error before the first event is raised, and becomes an ordinary answer; after it, it is the last event."""
        try:
            yield
        except (ConnectionError, web.HTTPException):
            raise
        except Exception as exc:
            if not self.opened:
                raise
            if not isinstance(exc, HfmsError):
                log.exception("stream failed", request_id=self._request[REQUEST_ID])
                exc = EngineFault("The server had an error while it answered.", code="internal_error")
            log_of(self._request)["error"] = exc.code
            self._failed = True
            self._unsent.append(self.failure(exc))

    def failure(self, error: HfmsError) -> bytes:
        """The event that tells an error. No `[DONE]` follows: it would say that the answer is whole."""
        return b"data: " + encode(error.envelope()) + b"\n\n"

    async def close(self) -> web.StreamResponse:
        """End the body, which clients wait for after the last event."""
        if not self._failed:
            self._unsent.append(self.farewell)
        async with self._writing:
            await self._open()
            await self._response.write_eof(self._taken())
        return self._response

    async def _write(self, data: bytes) -> None:
        async with self._writing:
            await self._open()
            await self._response.write(data)
        self._wrote = self._loop.time()

    async def _open(self) -> None:
        if not self._response.prepared:
            await self._response.prepare(self._request)

    def _break_silence(self) -> None:
        now = self._loop.time()
        if now >= self._wrote + self._patience:
            self._wrote = now
            self._comment = asyncio.create_task(self._say_that_it_lives())
        self._timer = self._loop.call_at(self._wrote + self._patience, self._break_silence)

    async def _say_that_it_lives(self) -> None:
        with contextlib.suppress(ConnectionError):  # its handler hears of that by itself
            await self._write(KEEP_ALIVE)

    def _taken(self) -> bytes:
        taken = b"".join(self._unsent)
        self._unsent.clear()
        return taken
