"""The request's road, top to bottom: a call comes in, its model is leased, middlewares wrap it, chunks come back.

HTTP handler -> answer -> lease -> middleware[0] -> ... -> middleware[n] -> engine -> device
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from functools import partial
from typing import Protocol

import msgspec

from hfms_cli.errors import BadRequest, HfmsError
from hfms_cli.hookspecs import Middleware, Proceed, exchange
from hfms_cli.serving.receipt import RECEIPT, receipt
from hfms_cli.telemetry.metrics import Metrics
from hfms_cli.types import Call, Caller, Chunk, LoadedInfo, Task


class Model(Protocol):
    """A model that can be called."""

    @property
    def id(self) -> str: ...

    @property
    def digest(self) -> str: ...

    @property
    def weights(self) -> str: ...

    @property
    def info(self) -> LoadedInfo: ...

    @property
    def submit(self) -> Proceed: ...


class Models(Protocol):
    """Where models come from: the pool, or in a front its owner."""

    def lease(self, name: str, caller: Caller) -> AbstractAsyncContextManager[Model]:
        """A model that stays while the block runs. Raises Forbidden, ModelNotFound, Unavailable and their kin."""
        ...


Fit = Callable[[Call, LoadedInfo], Call]


def as_it_is(call: Call, info: LoadedInfo) -> Call:
    """The call, for any model."""
    return call


ABILITIES: dict[Task, str] = {
    "generate": "generate text",
    "embed": "make embeddings",
    "score": "score pairs of texts",
    "transcribe": "write down speech",
    "image-text-to-text": "look at images",
}
"""Tasks, as people are told of them."""


class Road:
    """Every model call of the server goes through `answer`."""

    def __init__(
        self,
        models: Models,
        middlewares: Sequence[Middleware],
        metrics: Metrics,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._models = models
        # A middleware that does not override `call` is not on this road.
        self._around_calls = [m for m in middlewares if type(m).call is not Middleware.call]
        self._metrics = metrics
        self._clock = clock

    async def answer(self, call: Call, fit: Fit = as_it_is) -> AsyncGenerator[Chunk, None]:
        """Chunks of every choice of `call`, as they are made. Leaving early cancels the call in the engine.

        fit: makes of the call what suits the model, once that is known, or raises BadRequest.
        """
        began = self._clock()
        async with self._models.lease(call.model, call.caller) as model, AsyncExitStack() as opened:
            self._refuse_unfit(call, model)
            waited = self._clock() - began
            call = fit(call, model.info)
            # An alias and the name behind it are one model to every middleware.
            call = msgspec.structs.replace(call, model=model.id, digest=model.digest, waited=waited)
            exchange().answer[RECEIPT] = receipt(model.weights, model.info, call)
            chunks = open_stretch(opened, self.through(model), call)
            with self._metrics.call(model.id, self._clock) as measure:
                async for chunk in chunks:
                    measure.chunk(chunk)
                    yield chunk

    def through(self, model: Model) -> Proceed:
        """The rest of the road behind the lease: the middlewares around the engine, the first one outermost."""
        proceed: Proceed = model.submit
        for middleware in reversed(self._around_calls):
            proceed = partial(self._through, middleware, proceed)
        return proceed

    async def _through(self, middleware: Middleware, proceed: Proceed, call: Call) -> AsyncIterator[Chunk]:
        """One middleware's stretch; its unexpected exceptions are counted under its name.

        What it opened further down is closed after it, so that it may see an answer through that others wait for.
        """
        try:
            async with AsyncExitStack() as below, AsyncExitStack() as own:
                further = partial(open_stretch, below, proceed)
                chunks = open_stretch(own, partial(middleware.call, proceed=further), call)
                async for chunk in chunks:
                    yield chunk
        except HfmsError:
            raise
        except Exception:
            self._metrics.plugin_errors.labels(middleware.name).inc()
            raise

    @staticmethod
    def _refuse_unfit(call: Call, model: Model) -> None:
        info = model.info
        if call.task not in info.tasks:
            can = " and ".join(ABILITIES[task] for task in info.tasks)
            raise BadRequest(
                f"The model `{model.id}` cannot {ABILITIES[call.task]}; it can {can or 'do nothing here'}.",
                param="model",
            )


def open_stretch(opened: AsyncExitStack, source: Proceed, call: Call) -> AsyncIterator[Chunk]:
    """Open a stretch of the road, and see to it that it is closed as soon as the caller leaves.

    An abandoned async generator is otherwise closed when the collector finds it: too late for a batch slot.
    """
    chunks = source(call)
    if close := getattr(chunks, "aclose", None):
        opened.push_async_callback(close)
    return chunks
