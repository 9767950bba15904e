"""A front's side of `workers = N`: the road of this process, on models that the owner has."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from hfms_cli.config import Config
from hfms_cli.errors import HfmsError, Unavailable
from hfms_cli.hookspecs import Middleware
from hfms_cli.models.pool import ANYBODY
from hfms_cli.plugins import Plugins
from hfms_cli.serving import frames
from hfms_cli.serving.road import Road
from hfms_cli.telemetry.metrics import Metrics
from hfms_cli.types import Call, Caller, Chunk

Heard = frames.Leased | Chunk | HfmsError | None


class LeasedModel:
    """A model of the owner's, as the road knows it."""

    def __init__(self, pool: OwnersPool, leased: frames.Leased) -> None:
        self.id, self.digest, self.info = leased.model, leased.digest, leased.info
        self.weights = leased.weights
        self._pool = pool
        self._lease = leased.number

    async def submit(self, call: Call) -> AsyncIterator[Chunk]:
        """As an engine's own."""
        with self._pool.conversation() as (number, heard):
            self._pool.send(frames.Ask(number, self._lease, call))
            while outcome := await heard.get():
                if isinstance(outcome, HfmsError):
                    raise outcome
                assert isinstance(outcome, Chunk)
                outcome.more = not heard.empty()
                yield outcome


class OwnersPool:
    """The owner's models, leased over the socket that came with this process."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._numbers = itertools.count()
        self._conversations: dict[int, asyncio.Queue[Heard]] = {}
        self._seen: dict[str, LeasedModel] = {}
        self._gone = False

    def find(self, name: str) -> LeasedModel | None:
        """A model that was leased by this name before."""
        return self._seen.get(name)

    @contextlib.asynccontextmanager
    async def lease(self, name: str, caller: Caller = ANYBODY) -> AsyncIterator[LeasedModel]:
        """As the owner's own `Pool.lease`, in all that it raises too."""
        with self.conversation() as (number, heard):
            self.send(frames.Lease(number, name, caller))
            first = await heard.get()
            if isinstance(first, HfmsError):
                raise first
            assert isinstance(first, frames.Leased)
            self._seen[name] = model = LeasedModel(self, first)
            yield model

    @contextlib.contextmanager
    def conversation(self) -> Iterator[tuple[int, asyncio.Queue[Heard]]]:
        """A new number, and what the owner says under it until the block ends, and then no longer."""
        if self._gone:
            raise owner_gone()
        number, heard = next(self._numbers), asyncio.Queue[Heard]()
        self._conversations[number] = heard
        try:
            yield number, heard
        finally:
            del self._conversations[number]
            self.send(frames.Leave(number))

    def send(self, frame: frames.ToOwner) -> None:
        if not self._gone:
            self._writer.write(frames.pack(frame))

    async def listen(self, metrics: Metrics) -> None:
        """Hand out what the owner says, until it is gone."""
        try:
            while True:
                match frames.decode_for_front(await frames.read(self._reader)):
                    case frames.Leased(number) as leased:
                        self._tell(number, leased)
                    case frames.Said(words):
                        for word in words:
                            self._tell(word.number, word.fault.error() if word.fault else word.chunk)
                    case frames.Count():
                        self.send(frames.Series(metrics.render()))
        except (asyncio.IncompleteReadError, ConnectionError):
            self._gone = True
            self._writer.close()
            for heard in self._conversations.values():
                heard.put_nowait(owner_gone())

    def _tell(self, number: int, heard: Heard) -> None:
        if queue := self._conversations.get(number):  # it may just have left
            queue.put_nowait(heard)


def owner_gone() -> Unavailable:
    return Unavailable("The server is shutting down.", code="draining", retry_after=5.0)


@dataclass
class FrontRuntime:
    """What handlers need of a server, in a front."""

    config: Config
    middlewares: Sequence[Middleware]
    pool: OwnersPool
    road: Road
    metrics: Metrics

    @classmethod
    def build(
        cls, config: Config, plugins: Plugins, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> FrontRuntime:
        middlewares = [plugins.create("middleware", name, config) for name in config.middleware.order]
        metrics, pool = Metrics(), OwnersPool(reader, writer)
        for middleware in middlewares:
            list(middleware.check(config))  # some open here what they need; the owner has told the warnings
            middleware.metrics(metrics.registry)
        return cls(config, middlewares, pool, Road(pool, middlewares, metrics), metrics)

    def admit(self) -> AbstractContextManager[None]:
        """The owner does that, when it leases a model."""
        return contextlib.nullcontext()

    async def close(self) -> None:
        for middleware in self.middlewares:
            await middleware.close()
