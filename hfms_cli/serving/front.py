"""A front's side of `workers = N`: its road leads to the owner, and there through the middlewares to the models."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from hfms_cli.config import Config
from hfms_cli.engines.wire import Fault
from hfms_cli.errors import Unavailable
from hfms_cli.hookspecs import Middleware, exchange
from hfms_cli.models.pool import ANYBODY
from hfms_cli.plugins import Plugins
from hfms_cli.serving import frames
from hfms_cli.serving.road import Road
from hfms_cli.telemetry.metrics import Metrics
from hfms_cli.types import Call, Caller, Chunk


class Conversation:
    """What the owner says under one number."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.over = False
        """The last word was heard."""
        self._heard: asyncio.Queue[frames.Say] = asyncio.Queue()

    def tell(self, word: frames.Say) -> None:
        self._heard.put_nowait(word)

    async def hear(self) -> frames.Say:
        """The next word. Raises what went wrong."""
        word = await self._heard.get()
        self.over = word.chunk is None and word.leased is None
        if word.answer is not None:
            exchange().answer.update(frames.headers_sent(word.answer))
        if word.fault is not None:
            raise word.fault.error()
        return word

    @property
    def more(self) -> bool:
        """Whether the next word is here already."""
        return not self._heard.empty()


class LeasedModel:
    """A model of the owner's, as the road knows it. It answers one call."""

    def __init__(self, owner: Owner, conversation: Conversation, leased: frames.Leased) -> None:
        self.id, self.digest, self.weights, self.info = leased.id, leased.digest, leased.weights, leased.info
        self._owner = owner
        self._conversation = conversation

    async def submit(self, call: Call) -> AsyncIterator[Chunk]:
        """As an engine's own, with the middlewares around it."""
        conversation, asked, answer = self._conversation, exchange().asked, exchange().answer
        self._owner.send(
            frames.Ask(conversation.number, call, frames.headers_to_send(asked), frames.headers_to_send(answer))
        )
        while (chunk := (await conversation.hear()).chunk) is not None:
            chunk.more = conversation.more
            yield chunk


class Owner:
    """The owner, as a front sees it, over the socket that came with this process."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._numbers = itertools.count()
        self._conversations: dict[int, Conversation] = {}
        self._seen: dict[str, LeasedModel] = {}
        self._gone = False

    def called(self, name: str) -> LeasedModel | None:
        """A model that was leased by this name before."""
        return self._seen.get(name)

    @contextlib.asynccontextmanager
    async def lease(self, name: str, caller: Caller = ANYBODY) -> AsyncIterator[LeasedModel]:
        """As the owner's own `Pool.lease`, in all that it raises too."""
        with self._conversation() as conversation:
            self.send(frames.Lease(conversation.number, name, caller))
            leased = (await conversation.hear()).leased
            assert leased is not None
            self._seen[name] = model = LeasedModel(self, conversation, leased)
            yield model

    async def ask(self, middleware: str, method: str, arguments: bytes) -> bytes:
        """What a method of one of its middlewares returns, or raises: see `hookspecs.in_owner`."""
        with self._conversation() as conversation:
            self.send(frames.Question(conversation.number, middleware, method, arguments))
            result = (await conversation.hear()).result
            assert result is not None
            return result

    @contextlib.contextmanager
    def _conversation(self) -> Iterator[Conversation]:
        """A new number, until the block ends; the owner is told where that comes before its last word."""
        if self._gone:
            raise owner_gone()
        conversation = Conversation(next(self._numbers))
        self._conversations[conversation.number] = conversation
        try:
            yield conversation
        finally:
            del self._conversations[conversation.number]
            if not conversation.over:
                self.send(frames.Leave(conversation.number))

    def send(self, frame: frames.ToOwner) -> None:
        if not self._gone:
            self._writer.write(frames.pack(frame))

    async def listen(self, metrics: Metrics) -> None:
        """Hand out what the owner says, until it is gone."""
        try:
            while True:
                match frames.decode_for_front(await frames.read(self._reader)):
                    case frames.Said(words):
                        for word in words:
                            if conversation := self._conversations.get(word.number):  # it may just have been left
                                conversation.tell(word)
                    case frames.Count():
                        self.send(frames.Series(metrics.render()))
        except (asyncio.IncompleteReadError, ConnectionError):
            self._gone = True
            self._writer.close()
            for conversation in self._conversations.values():
                conversation.tell(frames.Say(conversation.number, fault=Fault.of(owner_gone())))


def owner_gone() -> Unavailable:
    return Unavailable("The server is shutting down.", code="draining", retry_after=5.0)


@dataclass
class FrontRuntime:
    """What handlers need of a server, in a front."""

    config: Config
    middlewares: Sequence[Middleware]
    """Those that stand around HTTP; what stands around calls does so in the owner."""
    pool: Owner
    road: Road
    metrics: Metrics

    @classmethod
    def build(cls, config: Config, plugins: Plugins, owner: Owner) -> FrontRuntime:
        created = plugins.in_use("middleware", config)
        middlewares = [m for m in created if type(m).http is not Middleware.http]
        metrics = Metrics()
        for middleware in middlewares:
            middleware.owner = owner.ask
            list(middleware.check(config))  # some open here what they need; the owner has told the warnings
            middleware.metrics(metrics.registry)
        return cls(config, middlewares, owner, Road(owner, [], metrics), metrics)

    def admit(self) -> AbstractContextManager[None]:
        """The owner does that, when it leases a model."""
        return contextlib.nullcontext()

    async def close(self) -> None:
        for middleware in self.middlewares:
            await middleware.close()
