"""An engine without a model: it answers with the prompt's own words, one a step.

It exists to measure what the server itself costs, and to test everything around an engine without one. `hfms serve
echo:NAME` serves it; `[engine.echo] step_ms` makes it as slow as a real one.
"""

from __future__ import annotations

import hashlib
import re
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hfms_cli import (
    BadRequest,
    Call,
    CallInput,
    Chunk,
    ContextLengthExceeded,
    Conversation,
    Device,
    HfmsError,
    LoadedInfo,
    LoadRequest,
    Manifest,
    ModelCard,
    ModelName,
    Pair,
    Progress,
    Question,
    Recording,
    Reply,
    Segment,
    Speech,
    Task,
    TextOf,
    TokenLogprob,
    Tokens,
    TokensOf,
    Vocabulary,
    VocabularyOf,
    setting,
)
from hfms_engines.middle import no_middle

CONTEXT = 32_768
DIMENSIONS = 8
VOCABULARY = 50_000


@dataclass(frozen=True)
class EchoOptions:
    """Options of `[engine.echo]`."""

    step_ms: float = setting(0.0, "Time that one step takes, in milliseconds.", ge=0)
    max_batch: int = setting(64, "Sequences that run at once.", ge=1)
    template: str = setting("", "Chat template that its models claim to have: it says how calls are read from answers.")


@dataclass
class Choice:
    """One choice on its way: the words to say, and how many."""

    call_id: str
    index: int
    words: list[str]
    limit: int
    endless: bool
    prompt_tokens: int
    logprobs: int | None = None
    prompt: list[str] | None = None
    """Said first, where that was asked for."""
    said: int = 0

    def next(self) -> Chunk:
        """The next word, and whether it was the last."""
        chunk = self._next() if self.limit else Chunk(index=self.index, finish_reason="length")
        chunk.prompt_tokens, self.prompt_tokens = self.prompt_tokens, 0
        if self.logprobs is not None and chunk.tokens:
            chunk.logprobs = [scored(chunk.text, self.logprobs)]
        if self.prompt is not None:
            if self.logprobs is not None:
                first, *others = self.prompt
                words = [scored(first, None), *(scored(word, self.logprobs) for word in others)]
                chunk.logprobs = words + (chunk.logprobs or [])
            chunk.text, self.prompt = "".join(self.prompt) + chunk.text, None
        return chunk

    def _next(self) -> Chunk:
        word = self.words[self.said % len(self.words)]
        self.said += 1
        finish: Literal["stop", "length"] | None = None
        if self.said == len(self.words) and not self.endless:
            finish = "stop"
        elif self.said == self.limit:
            finish = "length"
        return Chunk(index=self.index, text=word, tokens=1, finish_reason=finish)


def words_of(item: CallInput) -> list[str]:
    """What the echo says to an input; each word is a token."""
    if isinstance(item, Pair):
        return [*words_of(item.query), *words_of(item.document)]
    if isinstance(item, Speech):
        item = item.data.decode(errors="replace")
    if isinstance(item, Conversation):
        content = item.messages[-1].get("content")
        item = content if isinstance(content, str) else " ".join(texts_of(item))
    elif not isinstance(item, str):
        item = " ".join(map(str, item))
    return re.findall(r"\s*\S+\s*?|\s+", item) or [""]


def texts_of(chat: Conversation) -> Iterator[str]:
    """Texts of the last message, and its images as if their bytes were text."""
    parts = chat.messages[-1]["content"]
    pictures = iter(chat.pictures[-sum(part["type"] == "image" for part in parts) :])
    for part in parts:
        yield part["text"] if part["type"] == "text" else next(pictures).data.decode(errors="replace")


def token_id(word: str) -> int:
    """The number of a word."""
    return zlib.crc32(word.encode()) % VOCABULARY


def scored(word: str, rivals: int | None) -> TokenLogprob:
    """How likely a word is: the same each time. None of its rivals is as likely; None: it is the first of a prompt."""
    if rivals is None:
        return TokenLogprob(token_id(word), word, word.encode(), None)
    logprob = -token_id(word) / VOCABULARY
    names = [word] + [f"{word}#{k}" for k in range(1, rivals)]
    top = [(token_id(name), name, name.encode(), logprob - k) for k, name in enumerate(names[:rivals])]
    return TokenLogprob(token_id(word), word, word.encode(), logprob, top)


def likeness(item: CallInput) -> float:
    """The score of a pair: the part of the query's words that are in the document."""
    assert isinstance(item, Pair)
    query = {*item.query.split()}
    return len(query & {*item.document.split()}) / max(1, len(query))


def heard(item: CallInput) -> list[Chunk]:
    """What is said in a recording, as if its bytes were text: a segment of a second for each word."""
    words = words_of(item)
    chunks = [
        Chunk(text=word, tokens=1, segment=Segment(i, i + 1, word, [token_id(word)], seek=100 * i))
        for i, word in enumerate(words)
    ]
    return [
        Chunk(prompt_tokens=len(words), recording=Recording(float(len(words)), "english")),
        *chunks,
        Chunk(finish_reason="stop"),
    ]


@dataclass
class EchoModel:
    """The loaded model."""

    info: LoadedInfo
    options: EchoOptions
    queue: list[Choice] = field(default_factory=list)
    open: dict[str, int] = field(default_factory=dict)
    """Choices of a call that are not finished."""
    done: list[tuple[str, Chunk | HfmsError | None]] = field(default_factory=list)

    def submit(self, call: Call) -> None:
        sampling = call.sampling
        for name in ("stop", "min_tokens", "logit_bias", "stop_token_ids"):
            if getattr(sampling, name):
                raise BadRequest(f"The echo engine does not support `{name}`.", param=name)
        if call.suffix:
            raise no_middle()
        if (structure := sampling.structure) is not None:
            raise BadRequest(
                f"The echo engine does not support `{structure.param}`.",
                param=structure.param,
                code="unsupported_parameter",
            )
        if call.task == "transcribe":
            self.done += [(call.id, chunk) for chunk in heard(call.inputs[0])]
            self.done.append((call.id, None))
            return
        if call.task == "score":
            for i, item in enumerate(call.inputs):
                self.done.append((call.id, Chunk(index=i, prompt_tokens=len(words_of(item)), score=likeness(item))))
            self.done.append((call.id, None))
            return
        if call.task == "embed":
            for i, item in enumerate(call.inputs):
                words = words_of(item)
                vector = hashlib.sha256("".join(words).encode()).digest()[:DIMENSIONS]
                packed = struct.pack(f"<{DIMENSIONS}f", *(b / 255 for b in vector))
                self.done.append((call.id, Chunk(index=i, prompt_tokens=len(words), vector=packed)))
            self.done.append((call.id, None))
            return
        for i, item in enumerate(call.inputs):
            words = words_of(item)
            if len(words) >= CONTEXT:
                raise ContextLengthExceeded(
                    f"This model's maximum context length is {CONTEXT} tokens. However, your input has "
                    f"{len(words)} tokens.",
                    param="prompt",
                )
            room = CONTEXT - len(words)
            limit = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
            for k in range(call.n):
                prompt = 0 if k else len(words)
                choice = Choice(call.id, i * call.n + k, words, limit, sampling.ignore_eos, prompt, sampling.logprobs)
                choice.prompt = words if call.echo else None
                self.queue.append(choice)
        self.open[call.id] = len(call.inputs) * call.n

    def ask(self, question: Question) -> Reply:
        """Each word is a token; the text of tokens is their numbers, as a prompt of numbers is echoed."""
        match question:
            case VocabularyOf():
                return Vocabulary(kind="words", size=VOCABULARY)
            case TextOf(ids):
                return Tokens(ids, [*map(str, ids)], " ".join(map(str, ids)))
            case TokensOf(item):
                words = words_of(item)
                return Tokens([token_id(word) for word in words], words)

    def cancel(self, call_id: str) -> None:
        self.open.pop(call_id, None)
        self.queue = [s for s in self.queue if s.call_id != call_id]

    def busy(self) -> bool:
        return bool(self.queue or self.done)

    def step(self) -> list[tuple[str, Chunk | HfmsError | None]]:
        if self.options.step_ms:
            time.sleep(self.options.step_ms / 1000)
        out, self.done = self.done, []
        running = self.queue[: self.options.max_batch]
        for sequence in running:
            chunk = sequence.next()
            out.append((sequence.call_id, chunk))
            if chunk.finish_reason:
                self.queue.remove(sequence)
                self.open[sequence.call_id] -= 1
                if not self.open[sequence.call_id]:
                    del self.open[sequence.call_id]
                    out.append((sequence.call_id, None))
        return out

    def waiting(self) -> int:
        return len({s.call_id for s in self.queue[self.options.max_batch :]})

    def close(self) -> None:
        self.queue.clear()


class EchoEngine:
    """The engine `echo`: only the models that the storage `echo` makes."""

    name = "echo"
    tasks: tuple[Task, ...] = ("generate", "embed", "score", "transcribe", "image-text-to-text")

    def __init__(self, options: EchoOptions) -> None:
        self.options = options

    def supports(self, card: ModelCard, device: Device) -> str | None:
        if card.model_type != "echo":
            return "runs no real model"
        return None if device.kind == "cpu" else "runs on the CPU"

    def estimate(self, request: LoadRequest) -> int:
        return 64 * 2**20  # the Python process itself

    def load(self, request: LoadRequest) -> EchoModel:
        info = LoadedInfo(
            engine=self.name,
            device=request.device.id,
            dtype="none",
            tasks=self.tasks,
            context_length=CONTEXT,
            max_batch=self.options.max_batch,
            memory_bytes=0,
            chat=True,
            dimensions=DIMENSIONS,
            template=self.options.template,
        )
        return EchoModel(info, self.options)


class EchoStorage:
    """The storage `echo`: every `echo:NAME` is there, and takes no room."""

    name = "echo"
    root = None
    FOLDER = Path(__file__).parent / "echo_model"

    def claims(self, name: ModelName) -> bool:
        return name.scheme == "echo"

    async def find(self, name: ModelName) -> Manifest | None:
        return Manifest(name=name, storage=self.name, revision="1", files=(), source="built in")

    async def fetch(self, manifest: Manifest, progress: Progress) -> Path:
        return self.FOLDER

    async def list(self) -> Sequence[Manifest]:
        return ()

    async def remove(self, manifest: Manifest) -> None:
        raise BadRequest("The echo model is built in and cannot be removed.", param="model")
