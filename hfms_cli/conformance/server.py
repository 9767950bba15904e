"""A server as the checks see it: what it answers, errors and headers too, and its streams event by event."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

from hfms_cli.conformance.suite import Failed, Skipped, expect
from hfms_cli.sse import EventReader

if TYPE_CHECKING:
    import aiohttp

SECONDS = 120.0
"""For one answer."""
SHOWN = 160
"""Characters of an answer that a verdict quotes."""
HELLO = [{"role": "user", "content": "Say hello."}]
COUNTING = "one two three four five six seven eight nine"


@dataclass(frozen=True)
class Answer:
    """One answer. body: its JSON; None where it is none."""

    status: int
    body: Any
    headers: Mapping[str, str]
    text: str = ""

    def ok(self) -> dict[str, Any]:
        """The JSON object of a 200. Raises Failed where it is anything else."""
        expect(self.status == 200, f"answered {self.status}: {self.said()}")
        expect(isinstance(self.body, dict), f"answered no JSON object: {self.text[:SHOWN]}")
        assert isinstance(self.body, dict)
        return self.body

    def said(self) -> str:
        """An error's message, or the beginning of whatever came."""
        error = self.body.get("error", self.body) if isinstance(self.body, dict) else None
        message = error.get("message") if isinstance(error, dict) else error
        return str(message or self.text)[:SHOWN]

    def refused(self, *statuses: int) -> Self:
        """This answer, if it is an error of these statuses. Raises Failed."""
        expect(self.status in statuses, f"answered {self.status} instead of {' or '.join(map(str, statuses))}")
        return self

    @property
    def absent(self) -> bool:
        """The server has no such route, or none that it has switched on."""
        error = self.body.get("error") if isinstance(self.body, dict) else None
        code = error.get("code") if isinstance(error, dict) else None
        return self.status in (405, 501) or (self.status == 404 and code != "model_not_found")


@dataclass
class Stream:
    """A streamed answer, read to its end."""

    status: int
    content_type: str
    events: list[Any] = field(default_factory=list)
    """The JSON of each."""
    done: bool = False
    """`[DONE]` came, and after it nothing."""

    def choices(self, index: int = 0) -> list[dict[str, Any]]:
        """What the events say of one choice."""
        return [c for e in self.events for c in e.get("choices") or () if c.get("index") == index]

    def text(self, index: int = 0) -> str:
        """The text of a choice, of a chat or of a completion."""
        parts = [(c.get("delta") or c) for c in self.choices(index)]
        return "".join(p.get("content") or p.get("text") or "" for p in parts)

    def finish(self, index: int = 0) -> str | None:
        reasons = [c.get("finish_reason") for c in self.choices(index)]
        return next((r for r in reasons if r), None)


class Server:
    """One server and its models. Use it as an async context manager.

    url: its root. model: for generation. embedding_model, rerank_model: None where nothing is to be checked of these.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        embedding_model: str | None = None,
        rerank_model: str | None = None,
    ) -> None:
        self.url = url
        self.model = model
        self.key = key
        self.embedding_model = embedding_model
        self.rerank_model = rerank_model

    async def __aenter__(self) -> Self:
        import aiohttp

        # A connection for each request: what one check leaves behind on a connection must not be another's fault.
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=SECONDS),
            connector=aiohttp.TCPConnector(force_close=True),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    # Requests.

    async def get(self, path: str) -> Answer:
        return await self.send("GET", path)

    async def post(self, path: str, **body: Any) -> Answer:
        return await self.send("POST", path, json.dumps(body).encode())

    async def send(self, method: str, path: str, body: bytes | None = None, *, key: bool = True) -> Answer:
        """One request. key: False leaves the key out."""
        async with self._request(method, path, body, key=key) as response:
            text = await response.text(errors="replace")
            try:
                parsed = json.loads(text)
            except ValueError:
                parsed = None
            return Answer(response.status, parsed, response.headers, text)

    def _request(
        self, method: str, path: str, body: bytes | None, *, key: bool = True
    ) -> aiohttp.client._RequestContextManager:
        from yarl import URL

        url = URL(self.url + path, encoded=True)
        headers = {"Content-Type": "application/json"} if body is not None else {}
        if key and self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        return self._session.request(method, url, data=body, headers=headers, allow_redirects=False)

    async def stream(self, path: str, *, most: int | None = None, **body: Any) -> Stream:
        """A streamed answer; Failed where it is none. most: leave after so many events."""
        sent = json.dumps(body | {"stream": True}).encode()
        async with self._request("POST", path, sent) as response:
            if response.status != 200:
                text = await response.text(errors="replace")
                raise Failed(f"answered {response.status}: {text[:SHOWN]}")
            stream = Stream(response.status, response.content_type)
            events = EventReader()
            async for data in response.content.iter_any():
                for event in events.feed(data):
                    if most is not None and len(stream.events) >= most:
                        return stream
                    self._take(stream, event)
            return stream

    @staticmethod
    def _take(stream: Stream, event: bytes) -> None:
        expect(not stream.done, "events came after `[DONE]`")
        if event == b"[DONE]":
            stream.done = True
            return
        if not event:
            return  # some servers keep a connection warm with empty ones
        try:
            parsed = json.loads(event)
        except ValueError:
            raise Failed(f"sent an event that is no JSON: {event[:SHOWN]!r}") from None
        expect(isinstance(parsed, dict), "sent an event that is no JSON object")
        expect("error" not in parsed, f"ended the stream with an error: {str(parsed.get('error'))[:SHOWN]}")
        stream.events.append(parsed)

    # What is asked most.

    async def chat(self, messages: Any = HELLO, **more: Any) -> dict[str, Any]:
        """A chat completion, greedy and short unless said otherwise."""
        return (await self.post("/v1/chat/completions", **self.chat_body(messages, **more))).ok()

    async def chat_stream(self, messages: Any = HELLO, **more: Any) -> Stream:
        return await self.stream("/v1/chat/completions", **self.chat_body(messages, **more))

    def chat_body(self, messages: Any = HELLO, **more: Any) -> dict[str, Any]:
        length = {} if "max_completion_tokens" in more else {"max_tokens": 16}
        return {"model": self.model, "messages": messages, "temperature": 0} | length | more

    async def complete(self, prompt: Any = COUNTING, **more: Any) -> dict[str, Any]:
        """A completion, greedy and short unless said otherwise."""
        return (await self.post("/v1/completions", **self.completion_body(prompt, **more))).ok()

    async def completion_stream(self, prompt: Any = COUNTING, **more: Any) -> Stream:
        return await self.stream("/v1/completions", **self.completion_body(prompt, **more))

    def completion_body(self, prompt: Any = COUNTING, **more: Any) -> dict[str, Any]:
        return {"model": self.model, "prompt": prompt, "temperature": 0, "max_tokens": 16} | more

    async def context_length(self) -> int:
        """Tokens of a prompt and its answer, as vLLM, hfms or llama.cpp tell them. Raises Skipped."""
        listed = (await self.get("/v1/models")).ok().get("data") or []
        row: dict[str, Any] = next((m for m in listed if m.get("id") == self.model), {})
        props = (await self.get("/props")).body
        slot = props.get("default_generation_settings") if isinstance(props, dict) else None
        found = row.get("max_model_len") or (slot or {}).get("n_ctx")
        if not isinstance(found, int):
            raise Skipped("the server does not tell how long its context is")
        return found


def segment(name: str) -> str:
    """A model's name as a part of a path, as OpenAI's client writes it."""
    return quote(name, safe="")


def choice_of(body: dict[str, Any], index: int = 0) -> dict[str, Any]:
    """A choice by its index. Raises Failed."""
    found: list[dict[str, Any]] = [c for c in body.get("choices") or () if c.get("index") == index]
    expect(len(found) == 1, f"`choices` has {len(found)} entries of index {index}")
    return found[0]


def message_of(body: dict[str, Any], index: int = 0) -> dict[str, Any]:
    """A choice's message. Raises Failed."""
    message = choice_of(body, index).get("message")
    expect(isinstance(message, dict), "a choice has no `message`")
    assert isinstance(message, dict)
    return message


def content_of(body: dict[str, Any], index: int = 0) -> str:
    """The text of a chat. Raises Failed."""
    content = message_of(body, index).get("content")
    expect(isinstance(content, str), f"`content` is {content!r}, no text")
    return str(content)


def text_of(body: dict[str, Any], index: int = 0) -> str:
    """The text of a completion. Raises Failed."""
    text = choice_of(body, index).get("text")
    expect(isinstance(text, str), f"`text` is {text!r}, no text")
    return str(text)


def usage_of(body: dict[str, Any], *counts: str) -> dict[str, int]:
    """`usage`, whose numbers add up. Raises Failed. counts: those that it must have."""
    usage = body.get("usage")
    expect(isinstance(usage, dict), "there is no `usage`")
    assert isinstance(usage, dict)
    for name in counts or ("prompt_tokens", "completion_tokens", "total_tokens"):
        expect(isinstance(usage.get(name), int), f"`usage.{name}` is {usage.get(name)!r}")
    parts = usage["prompt_tokens"] + (usage.get("completion_tokens") or 0)
    expect(usage["total_tokens"] == parts, f"`usage` does not add up: {usage}")
    return usage
