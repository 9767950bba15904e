"""Asks a server: one request (`Sender`), and many of them under a load (`closed_loop`, `open_loop`).

A client that lags behind would be measured instead of the server, so while an answer streams only its times are kept.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Self

import msgspec

from hfms_cli.bench.dataset import Prompt, seeded
from hfms_cli.bench.measure import Outcome, Run
from hfms_cli.sse import EventReader

if TYPE_CHECKING:
    import aiohttp

Send = Callable[[Prompt], Awaitable[None]]
CONNECT_SECONDS = 10.0
REASON_CHARACTERS = 200


class Endpoint(StrEnum):
    """What is asked of the server; each is named in words, and as `vllm bench serve --backend` has it."""

    CHAT = "chat"
    COMPLETIONS = "completions"
    EMBEDDINGS = "embeddings"

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self is Endpoint.CHAT else f"/v1/{self}"

    @property
    def backend(self) -> str:
        return "openai" if self is Endpoint.COMPLETIONS else f"openai-{self}"


class Delta(msgspec.Struct):
    """What a chat's event adds. Some servers name a thought `reasoning`."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[msgspec.Raw] | None = None


class Choice(msgspec.Struct):
    """A choice of a chat's event or of a completion's."""

    delta: Delta | None = None
    text: str | None = None
    finish_reason: str | None = None

    def says_something(self) -> bool:
        """Whether a person would see more of the answer; a bare role or reason is none."""
        delta = self.delta
        if delta is None:
            return bool(self.text)
        return bool(delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls)


class Usage(msgspec.Struct):
    """The server's count."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Event(msgspec.Struct):
    """An event of a stream."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


class Embeddings(msgspec.Struct):
    """An answer with vectors, which nobody here reads."""

    data: list[msgspec.Raw]
    usage: Usage | None = None


class Failed(Exception):
    """A request failed: the kind, which is counted, and what the server said."""

    def __init__(self, kind: str, reason: str = "") -> None:
        self.kind = kind
        self.reason = reason


_event = msgspec.json.Decoder(Event).decode
_embeddings = msgspec.json.Decoder(Embeddings).decode


class Sender:
    """Asks one model of one server. Use it as an async context manager.

    url: the server's root, without `/v1`. key: sent as a bearer token. sampling: further fields of every request.
    now: the clock of the outcomes, in seconds.
    """

    def __init__(
        self,
        url: str,
        endpoint: Endpoint,
        model: str,
        *,
        key: str | None = None,
        sampling: dict[str, Any] | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.endpoint = endpoint
        self.model = model
        self._path = url + endpoint.path
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._sampling = sampling or {}
        self._now = now

    async def __aenter__(self) -> Self:
        import aiohttp

        # Neither a limit on connections nor on time: both belong to the load, not to the client.
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def send(self, prompt: Prompt) -> Outcome:
        """Ask once. Never raises for what the server does: that is the outcome."""
        import aiohttp

        body = msgspec.json.encode(self.body(prompt))
        outcome = Outcome(sent=self._now())
        try:
            await self._ask(body, outcome)
        except Failed as exc:
            outcome.error, outcome.reason = exc.kind, exc.reason
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            outcome.error = "no connection"
        except (aiohttp.ClientError, OSError):
            outcome.error = "connection broke"
        except msgspec.MsgspecError:
            outcome.error = "not what OpenAI's API answers"
        if outcome.error is not None:
            outcome.ended = self._now()
        return outcome

    def body(self, prompt: Prompt) -> dict[str, Any]:
        """The request's JSON."""
        if self.endpoint is Endpoint.EMBEDDINGS:
            return {"model": self.model, "input": prompt.text}
        chat = self.endpoint is Endpoint.CHAT
        return {
            "model": self.model,
            **({"messages": [{"role": "user", "content": prompt.text}]} if chat else {"prompt": prompt.text}),
            "max_tokens": prompt.output_len,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._sampling,
        }

    async def _ask(self, body: bytes, outcome: Outcome) -> None:
        import aiohttp

        try:
            response = await self._session.post(self._path, data=body, allow_redirects=False)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            # A kept connection that the server closes just as it is used is no answer of its: ask once more.
            response = await self._session.post(self._path, data=body, allow_redirects=False)
        async with response:
            if response.status != 200:
                raise Failed(f"HTTP {response.status}", _reason(await response.read()))
            if self.endpoint is Endpoint.EMBEDDINGS:
                self._count(_embeddings(await response.read()).usage, outcome)
                outcome.ended = self._now()
            elif response.content_type == "text/event-stream":
                await self._read_stream(response, outcome)
            else:
                raise Failed("not a stream")

    async def _read_stream(self, response: aiohttp.ClientResponse, outcome: Outcome) -> None:
        events = EventReader()
        complete = False
        async for data in response.content.iter_any():
            now = self._now()
            for raw in events.feed(data):
                if raw == b"[DONE]":
                    complete = True
                    continue
                if not raw:
                    continue  # some servers keep a connection warm with empty ones
                event = _event(raw)
                if event.error:
                    raise Failed("error in the stream", _reason(raw))
                if event.usage is not None:
                    self._count(event.usage, outcome)
                for choice in event.choices:
                    if choice.says_something():
                        outcome.times.append(now)
                        outcome.ended = now
                    if choice.finish_reason is not None:
                        complete = True
                        outcome.ended = now
        if not complete:
            raise Failed("broke off before its end")
        outcome.ended = outcome.ended or self._now()

    def _count(self, usage: Usage | None, outcome: Outcome) -> None:
        if usage is not None:
            outcome.prompt_tokens, outcome.output_tokens = usage.prompt_tokens, usage.completion_tokens


def _reason(answer: bytes) -> str:
    """The message of an error's envelope, or nothing: a page of HTML says little."""
    try:
        error = msgspec.json.decode(answer)["error"]
        message = error["message"] if isinstance(error, dict) else error
    except (msgspec.MsgspecError, KeyError, TypeError):
        return ""
    return message[:REASON_CHARACTERS] if isinstance(message, str) else ""


@dataclass(frozen=True)
class Load:
    """How hard to ask. max_concurrency: requests in flight at most, None for no limit. request_rate: arrivals a second,
    infinite where each is sent as soon as there is room. seed: of the arrivals."""

    max_concurrency: int | None = None
    request_rate: float = math.inf
    burstiness: float = 1.0
    seed: int = 0

    @property
    def label(self) -> str:
        """The limit in few words."""
        return "no limit" if self.max_concurrency is None else f"c={self.max_concurrency}"


async def apply(
    load: Load,
    prompts: Sequence[Prompt],
    ask: Callable[[Prompt], Awaitable[Outcome]],
    run: Run,
    told: Callable[[Outcome], None],
    *,
    now: Callable[[], float] = time.perf_counter,
) -> None:
    """Ask every prompt under a load. `run` has each outcome as soon as it is there, so that a cancelled one is worth
    something too. told: called with each."""

    async def send(prompt: Prompt) -> None:
        outcome = await ask(prompt)
        run.outcomes.append(outcome)
        told(outcome)

    run.began = now()
    try:
        if math.isinf(load.request_rate):
            await closed_loop(prompts, send, load.max_concurrency or len(prompts))
        else:
            rng = seeded("arrivals", load.seed)
            times = arrivals(len(prompts), load.request_rate, load.burstiness, rng)
            await open_loop(prompts, send, times, load.max_concurrency)
        run.whole = True
    finally:
        run.ended = now()


async def closed_loop(prompts: Sequence[Prompt], send: Send, width: int) -> None:
    """Keep `width` requests in flight: the next is sent when one is answered."""
    waiting = iter(prompts)

    async def ask() -> None:
        for prompt in waiting:
            await send(prompt)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(width, len(prompts))):
            group.create_task(ask())


async def open_loop(
    prompts: Sequence[Prompt],
    send: Send,
    arrivals: Iterator[float],
    width: int | None = None,
    *,
    now: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Send each request when it arrives, whatever became of those before.

    arrivals: seconds from now, ascending. width: no more at once; the rest wait their turn, and are not yet sent.
    """
    gate: AbstractAsyncContextManager[Any] = asyncio.Semaphore(width) if width else nullcontext()

    async def ask(prompt: Prompt) -> None:
        async with gate:
            await send(prompt)

    begun = now()
    async with asyncio.TaskGroup() as group:
        for prompt, arrival in zip(prompts, arrivals, strict=False):
            if (wait := begun + arrival - now()) > 0:
                await sleep(wait)
            group.create_task(ask(prompt))


def arrivals(size: int, rate: float, burstiness: float, rng: random.Random) -> Iterator[float]:
    """When each of `size` requests arrives, in seconds; the last at size / rate.

    The gaps are gamma distributed with shape `burstiness`: 1 makes it a Poisson process, less makes bursts, more evens
    them out. They are stretched to fill the time exactly, as `vllm bench serve` does: a few dozen requests would
    otherwise arrive at quite another rate.
    """
    times = list(accumulate(rng.gammavariate(burstiness, 1.0) for _ in range(size)))
    stretch = size / rate / times[-1]
    return iter([t * stretch for t in times])
