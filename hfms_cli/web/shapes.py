"""Chunks -> JSON of the OpenAI API on the way out: what an answer has come to, and the shapes that it is told in."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from hfms_cli.hookspecs import exchange
from hfms_cli.parsing import Arguments, CallBegins, Content, Event, Reasoning
from hfms_cli.serving.receipt import RECEIPT, fingerprint
from hfms_cli.types import Call, Chunk, LoadedInfo, TokenLogprob
from hfms_cli.web.dialogue import Dialogue
from hfms_cli.web.logprobs import TextLogprobs, of_chat


@dataclass
class Tally:
    """What an answer has come to so far."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    chunks: dict[int, list[Chunk]] = field(default_factory=dict)
    """Of each choice."""
    logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    """Tokens of each choice."""
    finish: dict[int, str] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)
    first_token_seconds: float | None = None

    def add(self, chunk: Chunk) -> None:
        if self.first_token_seconds is None and not chunk.begins:
            self.first_token_seconds = time.perf_counter() - self.began
        self.prompt_tokens += chunk.prompt_tokens
        self.completion_tokens += chunk.tokens
        self.chunks.setdefault(chunk.index, []).append(chunk)
        self.lengths[chunk.index] = self.lengths.get(chunk.index, 0) + chunk.tokens
        if chunk.logprobs is not None:
            self.logprobs.setdefault(chunk.index, []).extend(chunk.logprobs)
        if chunk.finish_reason:
            self.finish[chunk.index] = chunk.finish_reason

    def best(self, choices: range, count: int) -> list[int]:
        """Of some choices those that the model finds likeliest, token for token, in the order of that."""

        def likeliness(index: int) -> float:
            made = self.logprobs.get(index, [])[-self.lengths[index] :] if self.lengths.get(index) else []
            return sum(score.logprob or 0.0 for score in made) / max(1, len(made))

        return sorted(choices, key=likeliness, reverse=True)[:count]

    def log(self) -> dict[str, Any]:
        """What the access line says of it."""
        first = self.first_token_seconds
        return self.usage() | ({} if first is None else {"first_token_seconds": round(first, 4)})

    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


class CompletionShape:
    """`text_completion` objects."""

    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, call: Call, *, best: int | None = None, logprobs: bool = True) -> None:
        """best: how many of each input's answers are shown; None: all. logprobs: whether those that come are shown."""
        self.call = call
        self.created = int(time.time())
        self._best = best
        self._logprobs = logprobs
        self._offsets: dict[int, TextLogprobs] = {}

    def fit(self, call: Call, info: LoadedInfo) -> Call:
        """The call as the model needs it, once that is known. Raises BadRequest."""
        return call

    def head(self, kind: str) -> dict[str, Any]:
        """What all of an answer's objects begin with. Known once the model is."""
        return {
            "id": self.call.id,
            "object": kind,
            "created": self.created,
            "model": self.call.model,
            "system_fingerprint": fingerprint(exchange().answer.get(RECEIPT, "")),
        }

    def events(self, chunk: Chunk) -> list[dict[str, Any]]:
        """What a chunk adds to the stream, each without its head."""
        if not chunk.text and not chunk.finish_reason:
            return []  # it has begun, or the text of a token is still held back
        return [{"choices": [self.choice(chunk.index, [chunk], chunk.logprobs, chunk.finish_reason)]}]

    def choice(
        self, index: int, chunks: list[Chunk], logprobs: list[TokenLogprob] | None, finish: str | None
    ) -> dict[str, Any]:
        text = "".join(chunk.text for chunk in chunks)
        told = None
        if logprobs is not None and self._logprobs:
            told = self._offsets.setdefault(index, TextLogprobs()).of(text, logprobs)
        return {"index": index, "text": text, "logprobs": told, "finish_reason": finish}

    def whole(self, tally: Tally) -> dict[str, Any]:
        n = self.call.n
        shown = [
            index
            for first in range(0, len(self.call.inputs) * n, n)
            for index in (
                range(first, first + n) if self._best is None else tally.best(range(first, first + n), self._best)
            )
        ]
        choices = [self.choice(i, tally.chunks.get(i, []), tally.logprobs.get(i), tally.finish.get(i)) for i in shown]
        for number, choice in enumerate(choices):
            choice["index"] = number
        return {**self.head(self.object), "choices": choices, "usage": self.usage(tally)}

    def usage(self, tally: Tally) -> dict[str, Any]:
        return tally.usage()


class ChatShape(CompletionShape):
    """`chat.completion` objects. The first event of a choice has its role, the last its finish_reason."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, call: Call, dialogue: Dialogue) -> None:
        super().__init__(call)
        self.dialogue = dialogue
        self._begun: set[int] = set()
        self._untold: dict[int, list[TokenLogprob]] = {}
        """Logprobs for which there was no event yet."""

    def fit(self, call: Call, info: LoadedInfo) -> Call:
        return self.dialogue.fit(call, info)

    def events(self, chunk: Chunk) -> list[dict[str, Any]]:
        deltas: list[tuple[dict[str, Any], str | None]] = []
        deltas += [(self._delta(chunk.index, *said), None) for said in self.dialogue.hear(chunk)]
        if chunk.finish_reason:
            deltas.append(({}, self._finish(chunk.index, chunk.finish_reason)))
        if chunk.logprobs:
            self._untold.setdefault(chunk.index, []).extend(chunk.logprobs)
        events = [self._event(chunk.index, delta, finish) for delta, finish in deltas]
        if events and (untold := self._untold.pop(chunk.index, None)):
            events[0]["choices"][0]["logprobs"] = of_chat(untold)
        if chunk.index not in self._begun:
            self._begun.add(chunk.index)
            role = {"role": "assistant", "content": "", "refusal": None}
            events.insert(0, self._event(chunk.index, role, None))
        return events

    @staticmethod
    def _event(index: int, delta: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"choices": [{"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}]}

    def _delta(self, index: int, event: Event, at: int) -> dict[str, Any]:
        match event:
            case Content(text):
                return {"content": text}
            case Reasoning(text):
                return {"reasoning_content": text}
            case CallBegins(name):
                id = self.dialogue.heard(index).calls[at].id
                return {"tool_calls": [{"index": at, **_call_object(id, name, "")}]}
            case Arguments(text):
                return {"tool_calls": [{"index": at, "function": {"arguments": text}}]}

    def choice(
        self, index: int, chunks: list[Chunk], logprobs: list[TokenLogprob] | None, finish: str | None
    ) -> dict[str, Any]:
        for chunk in chunks:
            self.dialogue.hear(chunk)
        heard = self.dialogue.heard(index)
        content = "".join(heard.content)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if heard.reasoning:
            message["reasoning_content"] = "".join(heard.reasoning)
        if heard.calls:
            message["content"] = content or None
            message["tool_calls"] = [_call_object(call.id, call.name, call.arguments) for call in heard.calls]
        told = None if logprobs is None else of_chat(logprobs)
        return {"index": index, "message": message, "logprobs": told, "finish_reason": self._finish(index, finish)}

    def _finish(self, index: int, reason: str | None) -> str | None:
        return "tool_calls" if reason == "stop" and self.dialogue.heard(index).calls else reason

    def usage(self, tally: Tally) -> dict[str, Any]:
        if not self.dialogue.reasons:
            return tally.usage()
        details = {"reasoning_tokens": self.dialogue.reasoning_tokens()}
        return tally.usage() | {"completion_tokens_details": details}


def _call_object(id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
