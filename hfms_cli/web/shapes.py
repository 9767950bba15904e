"""Chunks -> JSON of the OpenAI API on the way out: what an answer has come to, and the shapes that it is told in."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from hfms_cli.types import Call, Chunk


@dataclass
class Tally:
    """What an answer has come to so far."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    texts: dict[int, list[str]] = field(default_factory=dict)
    finish: dict[int, str] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)
    first_token_seconds: float | None = None

    def add(self, chunk: Chunk) -> None:
        if self.first_token_seconds is None and not chunk.begins:
            self.first_token_seconds = time.perf_counter() - self.began
        self.prompt_tokens += chunk.prompt_tokens
        self.completion_tokens += chunk.tokens
        self.texts.setdefault(chunk.index, []).append(chunk.text)
        if chunk.finish_reason:
            self.finish[chunk.index] = chunk.finish_reason

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

    def __init__(self, call: Call) -> None:
        self.call = call
        self.created = int(time.time())

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.call.id, "object": kind, "created": self.created, "model": self.call.model}

    def events(self, chunk: Chunk) -> list[dict[str, Any]]:
        """What a chunk adds to the stream, each without its head."""
        if not chunk.text and not chunk.finish_reason:
            return []  # a token whose text is still held back
        return [{"choices": [self.choice(chunk.index, chunk.text, chunk.finish_reason)]}]

    def choice(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}

    def whole(self, tally: Tally, count: int) -> dict[str, Any]:
        choices = [self.choice(i, "".join(tally.texts.get(i, ())), tally.finish.get(i)) for i in range(count)]
        return {**self.head(self.object), "choices": choices, "usage": tally.usage()}


class ChatShape(CompletionShape):
    """`chat.completion` objects. The first event of a choice has its role, the last its finish_reason."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self._begun: set[int] = set()

    def events(self, chunk: Chunk) -> list[dict[str, Any]]:
        deltas: list[tuple[dict[str, Any], str | None]] = []
        if chunk.index not in self._begun:
            self._begun.add(chunk.index)
            deltas.append(({"role": "assistant", "content": "", "refusal": None}, None))
        if chunk.text:
            deltas.append(({"content": chunk.text}, None))
        if chunk.finish_reason:
            deltas.append(({}, chunk.finish_reason))
        return [
            {"choices": [{"index": chunk.index, "delta": delta, "logprobs": None, "finish_reason": finish}]}
            for delta, finish in deltas
        ]

    def choice(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": finish}
