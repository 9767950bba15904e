"""How many calls may wait for an engine, and how long. Who of them is next is the engine's own line to say.

An engine tells when it begins to read a call; until then the call waits. It waits at the priority of its key, or at a
lower one that it asked for, fairly between keys, in the engine's process: there is known what has a place and what
could give it up, so the order reaches into the running batch. Here is kept what must hold in front of that: a full
queue refuses at once, nobody waits past the deadline, and the numbers add up.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfms_cli import (
    PRIORITIES,
    Call,
    Chunk,
    Conversation,
    DeadlineExceeded,
    Middleware,
    Overloaded,
    Proceed,
)
from hfms_middleware.queue.options import QueueOptions

if TYPE_CHECKING:
    from aiohttp import web
    from prometheus_client import CollectorRegistry, Histogram

# Characters of a token, at least: what waits is counted before it is tokenised.
_CHARACTERS = 3


@dataclass
class Numbers:
    """What has become of the calls of one queue: total_queued is the sum of the others and of those that wait."""

    current_size: int = 0
    current_tokens: int = 0
    total_queued: int = 0
    total_processed: int = 0
    total_timeouts: int = 0
    total_rejected: int = 0
    total_cancelled: int = 0
    """Callers who left while they waited, and calls that failed before they began."""


class Queue(Middleware):
    """Stands around the call until the engine begins it."""

    name = "queue"

    def __init__(self, options: QueueOptions) -> None:
        self._options = options
        self._all = Numbers()
        self._models: dict[str, Numbers] = {}
        self._waited: Histogram | None = None

    async def call(self, call: Call, proceed: Proceed) -> AsyncIterator[Chunk]:
        loop = asyncio.get_running_loop()
        began = loop.time()
        numbers, tokens = self._of(call.model), _tokens(call)
        numbers.total_queued += 1
        self._refuse_more(numbers, tokens)
        numbers.current_size += 1
        numbers.current_tokens += tokens
        end = "total_cancelled"
        chunks = aiter(proceed(call))
        try:
            async with asyncio.timeout_at(began - call.waited + self._options.timeout_seconds):
                first = await anext(chunks, None)
            end = "total_processed"
        except TimeoutError:
            end = "total_timeouts"
            raise DeadlineExceeded(
                f"The model was not free within {self._options.timeout_seconds:g} s; try again later."
            ) from None
        finally:
            numbers.current_size -= 1
            numbers.current_tokens -= tokens
            setattr(numbers, end, getattr(numbers, end) + 1)
            if self._waited is not None:
                self._waited.labels(call.model, PRIORITIES[call.priority]).observe(loop.time() - began)
        if first is not None:
            yield first
            async for chunk in chunks:
                yield chunk

    def _refuse_more(self, numbers: Numbers, tokens: int) -> None:
        most, bound = self._options.max_size, self._options.max_tokens
        if numbers.current_size >= most:
            why = f"{numbers.current_size} calls wait already"
        elif bound and numbers.current_size and numbers.current_tokens + tokens > bound:
            why = f"{numbers.current_tokens} tokens wait already"
        else:
            return
        numbers.total_rejected += 1
        raise Overloaded(f"The queue is full: {why}. Try again later.", code="queue_full", retry_after=1.0)

    def _of(self, model: str) -> Numbers:
        """Models are named by the road, which has found them: callers cannot make up names."""
        return self._models.setdefault(model, Numbers()) if self._options.per_model else self._all

    def statistics(self) -> dict[str, Any]:
        """As `GET /admin/queue/stats` answers."""
        queues = {name: self._shown(numbers) for name, numbers in self._models.items()}
        if not self._options.per_model:
            return self._shown(self._all)
        total = Numbers(*(sum(getattr(n, f) for n in self._models.values()) for f in Numbers.__dataclass_fields__))
        return self._shown(total, queues=max(1, len(queues))) | {"queues": queues}

    def _shown(self, numbers: Numbers, queues: int = 1) -> dict[str, Any]:
        most = self._options.max_size * queues
        return {**vars(numbers), "max_size": most, "utilization": round(numbers.current_size / most, 4)}

    def patience(self) -> float | None:
        return self._options.timeout_seconds

    def status(self) -> dict[str, Any]:
        return self.statistics()

    def routes(self, app: web.Application) -> None:
        from hfms_cli import operation, require_admin, respond

        @operation("Administration", dict[str, Any], errors=(403,))
        async def stats(request: web.Request) -> web.StreamResponse:
            """Who waits, and what became of those who did. Administrators only."""
            require_admin(request)
            return respond(self.statistics())

        app.router.add_get("/admin/queue/stats", stats)

    def metrics(self, registry: CollectorRegistry) -> None:
        from prometheus_client import Histogram

        self._waited = Histogram(
            "hfms_request_queue_time_seconds",
            "How long calls waited for an engine to begin them.",
            ["model", "priority"],
            buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 120),
            registry=registry,
        )


def _tokens(call: Call) -> int:
    """Tokens of a call's prompts, guessed from below by their length."""
    return sum(_length(entry) for entry in call.inputs)


def _length(entry: Any) -> int:
    if isinstance(entry, list):
        return len(entry)
    if isinstance(entry, Conversation):
        return sum(len(str(m.get("content") or "")) for m in entry.messages) // _CHARACTERS
    return len(str(entry)) // _CHARACTERS
