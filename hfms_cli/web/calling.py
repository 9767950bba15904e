"""From a request to its call, and from the call to its chunks: what every route that uses a model begins with."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any, Protocol

import msgspec
from aiohttp import web

from hfms_cli.serving.receipt import RECEIPT
from hfms_cli.serving.road import Fit, as_it_is
from hfms_cli.types import Call, Caller, Chunk
from hfms_cli.web.context import SERVING, caller_of, log_of
from hfms_cli.web.schemas import Priority, lowered

CALL: dict[str, Any] = {
    "errors": (403, 404, 429, 502, 503, 504),
    "headers": {"X-Priority": Priority},
    "tells": {RECEIPT: "What made the answer: weights, template, precision, engine, version and seed."},
}
"""What all calls have in common for `/openapi.json`."""


class Body(Protocol):
    """A request that asks for a call."""

    @property
    def priority(self) -> str | None: ...

    def call(self, call_id: str, caller: Caller) -> Call: ...


def call_of(request: web.Request, body: Body, prefix: str) -> Call:
    """The call that a body asks for. `X-Priority` counts where the body says nothing of it."""
    caller = caller_of(request)
    call = body.call(f"{prefix}-{uuid.uuid4().hex}", caller)
    asked, param = (body.priority, "priority") if body.priority else (request.headers.get("X-Priority"), "X-Priority")
    return msgspec.structs.replace(call, priority=lowered(asked, param, caller))


@asynccontextmanager
async def answered(request: web.Request, call: Call, fit: Fit = as_it_is) -> AsyncIterator[AsyncIterator[Chunk]]:
    """The chunks of a call, which counts as in flight until the block ends, so that a drain waits for it."""
    log_of(request)["model"] = call.model
    with request.app[SERVING].admit():
        async with aclosing(request.app[SERVING].road.answer(call, fit)) as chunks:
            yield chunks
