"""Server-sent events as OpenAI sends them: one `data:` line an event, and `[DONE]` when all went well."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from hfms_cli.errors import HfmsError

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


class EventStream:
    """An open stream. Nothing is sent before `open`, so an early error still has a status of its own."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self._response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",  # nginx would hold tokens back
            }
        )

    @property
    def opened(self) -> bool:
        return self._response.prepared

    async def send(self, *events: dict[str, Any]) -> None:
        """Send events in one write; opens the stream."""
        if not self._response.prepared:
            await self._response.prepare(self._request)
        await self._response.write(b"".join(b"data: " + _encode(e) + b"\n\n" for e in events))

    async def fail(self, error: HfmsError) -> None:
        """Tell an error in mid-stream. No `[DONE]` follows: it would say that the answer is whole."""
        await self.send(error.envelope())

    async def done(self) -> None:
        await self._response.write(DONE)

    async def close(self) -> web.StreamResponse:
        """End the body; clients wait for that after `[DONE]`."""
        await self._response.write_eof()
        return self._response
