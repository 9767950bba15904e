"""Server-sent events as OpenAI sends them: one `data:` line an event, and `[DONE]` when all went well."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from hfms_cli.errors import HfmsError

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


class EventStream:
    """An open stream. Nothing goes out before the first write, so an early error still has a status of its own."""

    def __init__(self, request: web.Request, head: dict[str, Any]) -> None:
        """head: what every event begins with; it is encoded once."""
        self._request = request
        self._head = b"data: " + _encode(head)[:-1] + b","
        self._unsent: list[bytes] = []
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

    async def send(self, *events: dict[str, Any], more: bool = False) -> None:
        """Send events in one write, or with `more` together with those that follow at once: a write costs most."""
        self._unsent += [self._head + _encode(event)[1:] + b"\n\n" for event in events]
        if self._unsent and not more:
            await self._open()
            await self._response.write(self._taken())

    def fail(self, error: HfmsError) -> None:
        """Tell an error as the last event. No `[DONE]` follows: it would say that the answer is whole."""
        self._unsent.append(b"data: " + _encode(error.envelope()) + b"\n\n")

    async def close(self, *, done: bool) -> web.StreamResponse:
        """End the body, which clients wait for after `[DONE]`. done: all went well."""
        await self._open()
        if done:
            self._unsent.append(DONE)
        await self._response.write_eof(self._taken())
        return self._response

    async def _open(self) -> None:
        if not self._response.prepared:
            await self._response.prepare(self._request)

    def _taken(self) -> bytes:
        taken = b"".join(self._unsent)
        self._unsent.clear()
        return taken
