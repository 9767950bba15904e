"""The `transformers` engine: text generation with continuous batching. Imports nothing heavy until `load`.

A call is answered by sequences, one for each input and choice. Each step runs every sequence that is under way one
token further, in one forward pass, and then reads prompts in another: several short ones, or a piece of a long one. So
sequences join, leave and are cancelled between any two steps.

    submit   call -> sequences, in order of arrival, in `_waiting`
    fill     the first of them move to the slots behind the rows, and their prompts are read
    decode   they are in `_rows`, and each step makes one token of each
    leave    the last row moves into the free slot, so that rows stay without gaps

Slots are as long as the longest sequence in them, so memory is slots times longest. A sequence begins when there is
room for it as it is. If those under way outgrow the cache, the newest waits again and later reads again what it had.
"""

from __future__ import annotations

import importlib.util
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from hfms_cli import (
    BadRequest,
    Call,
    Chunk,
    ContextLengthExceeded,
    Conversation,
    Device,
    DoesNotFit,
    EngineFault,
    HfmsError,
    LoadedInfo,
    LoadRequest,
    ModelCard,
    NoChatTemplate,
    Sampling,
    Task,
    setting,
)
from hfms_engines.text import Detokenizer, StopStrings

if TYPE_CHECKING:
    import torch

    from hfms_engines.sampling import Sampler
    from hfms_engines.torch_runner import Runner

log = logging.getLogger("hfms.engine")

T = TypeVar("T")
Event = tuple[str, Chunk | HfmsError | None]

# What a process with torch in it, and activations, take beside weights and cache.
WORKING_BYTES = 512 * 2**20
# Of the memory that is free when the weights are in, so much may go to keys and values.
CACHE_SHARE = 0.25

# fmt: off
# Models with a state that is not keys and values. `load` finds out by itself; this is to say so before anything runs.
_RECURRENT = {
    "bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2",
    "lfm2_moe", "mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen35", "qwen35moe", "qwen3_5",
    "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "recurrent_gemma", "rwkv", "xlstm", "zamba",
    "zamba2",
}
# GGUF architectures that transformers can unpack.
GGUF_ARCHITECTURES = {
    "bloom", "deci", "falcon", "gemma2", "gemma3", "gemma4", "gpt-oss", "gpt2", "llama", "minimax-m2", "mistral",
    "nemotron", "phi3", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "stablelm", "starcoder2",
}
# What a client may pass to a chat template; the other arguments of `apply_chat_template` are the engine's.
_NOT_FOR_TEMPLATES = {
    "chat_template", "conversation", "max_length", "padding", "return_assistant_tokens_mask", "return_dict",
    "return_tensors", "sanitize_control_tokens", "tokenize", "tokenizer_kwargs", "truncation",
}
# fmt: on


@dataclass(frozen=True)
class GenerationOptions:
    """Text generation by torch and transformers."""

    max_batch: int = setting(16, "Sequences that run at once.", ge=1)
    prefill_tokens: int = setting(
        512, "Prompt tokens that one step reads; more is faster, and stalls answers longer.", ge=1
    )
    kv_cache_bytes: int = setting(
        0, "Memory for keys and values of running sequences; 0: a quarter of what the weights leave free.", ge=0
    )


class GenerationEngine:
    """Decoders that transformers' AutoModelForCausalLM knows, from safetensors or GGUF, wherever torch runs."""

    name = "transformers"
    tasks: tuple[Task, ...] = ("generate",)

    def __init__(self, options: GenerationOptions = GenerationOptions()) -> None:
        self.options = options

    def supports(self, card: ModelCard, device: Device) -> str | None:
        """None, or the reason why not."""
        needed = ["torch", "transformers", *(["gguf", "accelerate"] if card.format == "gguf" else [])]
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if "generate" not in card.tasks:
            return f"{card.architecture or card.model_type} does not generate text"
        if card.format == "none":
            return "the model has no weights"
        if device.torch_device is None:
            return f"torch cannot use {device.id}"
        if missing:
            return f"{' and '.join(missing)} not installed; run: pip install 'hfms[transformers]'"
        if card.model_type in _RECURRENT:
            return f"{card.model_type} keeps a recurrent state; this engine runs attention models"
        if card.format == "gguf" and card.model_type not in GGUF_ARCHITECTURES:
            return f"transformers cannot read {card.model_type} from GGUF"
        if card.format == "gguf" and len(card.weights) != 1:
            return "a GGUF must be one file"
        return None

    def estimate(self, request: LoadRequest) -> int:
        """Bytes for weights, keys and values, and work."""
        return weights_bytes(request) + cache_bytes(request, self.options.kv_cache_bytes) + WORKING_BYTES

    def load(self, request: LoadRequest) -> Generator:
        """Raises LoadFailed, UnsafeFormat and DoesNotFit."""
        from hfms_engines import torch_runner

        cache = cache_bytes(request, self.options.kv_cache_bytes)
        runner = torch_runner.load(request, cache_bytes=cache)
        info = LoadedInfo(
            engine=self.name,
            device=request.device.id,
            dtype=str(runner.model.dtype).removeprefix("torch."),
            tasks=self.tasks,
            context_length=runner.context_length,
            max_batch=self.options.max_batch,
            memory_bytes=runner.weights_bytes() + cache + WORKING_BYTES,
            chat=bool(getattr(runner.tokenizer, "chat_template", None)),
        )
        return Generator(runner, info, prefill_tokens=self.options.prefill_tokens)


def weights_bytes(request: LoadRequest) -> int:
    """Bytes of the weights once they are loaded, by the card alone."""
    card = request.card
    on_cpu = request.device.torch_device in (None, "cpu")
    unpacked = card.format == "gguf"
    dtype = request.dtype
    if dtype == "auto":
        dtype = "float32" if on_cpu else "bfloat16" if unpacked else card.dtype
    width = 4 if dtype == "float32" else 2
    if card.parameters:
        return card.parameters * width
    # Unknown: files hold two bytes a parameter, or five bits of a GGUF.
    return int(card.weights_bytes * width / (5 / 8 if unpacked else 4 if card.dtype == "float32" else 2))


def cache_bytes(request: LoadRequest, asked: int) -> int:
    """Bytes for keys and values: what the operator asked for, or a share of what the weights leave free."""
    spare = request.device.free_bytes - weights_bytes(request) - WORKING_BYTES
    return asked or max(0, int(spare * CACHE_SHARE))


@dataclass(eq=False)
class _Prompt:
    """One input of a call, shared by its choices."""

    ids: list[int]
    reported: bool = False
    """A chunk has told how many tokens it has."""


@dataclass(eq=False)
class _Sequence:
    """One choice of a call on its way."""

    call: _Call
    index: int
    prompt: _Prompt
    limit: int
    """Tokens that it may make."""
    sampler: Sampler
    words: Detokenizer
    stops: StopStrings
    stop_ids: frozenset[int]
    made: list[int] = field(default_factory=list)
    cached: int = 0
    """Tokens whose keys and values are in its slot."""
    order: int = 0
    """When it was let in; the newest has the highest."""

    @property
    def tokens(self) -> list[int]:
        return self.prompt.ids + self.made

    @property
    def length(self) -> int:
        return len(self.prompt.ids) + len(self.made)

    def take(self, token: int) -> Chunk:
        """Go on by a token; the chunk's finish reason says whether it was the last."""
        self.made.append(token)
        self.sampler.took(token)
        ended = token in self.stop_ids
        last = ended or len(self.made) >= self.limit
        text = "" if ended else self.words.feed(token)
        if last:
            text += self.words.flush()
        stopped = False
        # As in vLLM: what is said before the least length is reached cannot be part of a stop string.
        if len(self.made) > self.sampler.sampling.min_tokens:
            text, stopped = self.stops.feed(text)
            if last and not stopped:
                text += self.stops.flush()
        prompt_tokens = 0 if self.prompt.reported else len(self.prompt.ids)
        self.prompt.reported = True
        return Chunk(
            index=self.index,
            text=text,
            tokens=1,
            finish_reason="stop" if ended or stopped else "length" if last else None,
            prompt_tokens=prompt_tokens,
        )


@dataclass(eq=False)
class _Call:
    id: str
    unfinished: int
    begun: bool = False


class AnyRunner(Protocol):
    """What every scheduler needs to know of a model and its tokenizer."""

    tokenizer: Any
    vocabulary: int
    stop_ids: frozenset[int]
    silent_ids: set[int]
    """Tokens without text."""

    def decode(self, ids: list[int]) -> str: ...

    def release(self) -> None:
        """Give memory back that nothing needs between calls."""

    def trim(self) -> None:
        """Give memory back after there was too little."""

    def is_out_of_memory(self, exc: BaseException) -> bool: ...

    def is_lost(self, exc: BaseException) -> bool:
        """Whether only a new process can go on."""


class Scheduler(ABC):
    """Calls in, chunks out. What a step runs, and where keys and values lie, is the business of those derived from it.

    Counts of tokens include the one that ends an answer, as vLLM's do.
    """

    _runner: AnyRunner

    def __init__(self, runner: AnyRunner, info: LoadedInfo, *, prefill_tokens: int) -> None:
        from hfms_engines import sampling

        self.info = info
        self._runner = runner
        self._sample = sampling.sample
        self._sampler = sampling.Sampler
        self._prefill_tokens = prefill_tokens
        self._calls: dict[str, _Call] = {}
        self._waiting: deque[_Sequence] = deque()
        self._rows: list[_Sequence] = []
        """Under way."""
        self._admitted = 0

    @abstractmethod
    def step(self) -> list[Event]:
        """One forward pass, or a few that belong together."""

    @abstractmethod
    def _leave(self, seq: _Sequence) -> None:
        """Take a sequence out of `_rows`."""

    @abstractmethod
    def _wipe(self, seq: _Sequence) -> None:
        """Remove what a sequence has stored that is not finite."""

    # --- calls in ---

    def submit(self, call: Call) -> None:
        """Raises BadRequest, ContextLengthExceeded and NoChatTemplate."""
        if call.task != "generate":
            raise BadRequest(
                f"The model `{call.model}` generates text; it cannot be used to {call.task}.", param="model"
            )
        if call.id in self._calls:
            raise BadRequest("A call with this id is under way.")
        self._check(call.sampling)
        prompts = [_Prompt(self._tokens(entry)) for entry in call.inputs]
        limits = [self._limit(prompt, entry, call.sampling) for prompt, entry in zip(prompts, call.inputs, strict=True)]
        kept = _Call(call.id, unfinished=len(prompts) * call.n)
        self._calls[call.id] = kept
        for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            for k in range(call.n):
                self._waiting.append(self._sequence(kept, i * call.n + k, k, prompt, limit, call.sampling))

    def _sequence(
        self, call: _Call, index: int, choice: int, prompt: _Prompt, limit: int, sampling: Sampling
    ) -> _Sequence:
        runner = self._runner
        return _Sequence(
            call,
            index,
            prompt,
            limit,
            sampler=self._sampler(sampling, prompt=prompt.ids, stop_ids=runner.stop_ids, choice=choice),
            words=Detokenizer(runner.decode, skip=runner.silent_ids, context=prompt.ids),
            stops=StopStrings(sampling.stop),
            stop_ids=frozenset() if sampling.ignore_eos else runner.stop_ids,
        )

    def _check(self, sampling: Sampling) -> None:
        if sampling.max_tokens is not None and sampling.max_tokens < 1:
            raise BadRequest("`max_tokens` must be 1 or more.", param="max_tokens")
        for token in sampling.logit_bias or ():
            self._check_token(token, "logit_bias")

    def _check_token(self, token: int, param: str) -> None:
        if not 0 <= token < self._runner.vocabulary:
            raise BadRequest(
                f"Token {token} is not in the model's vocabulary, which has {self._runner.vocabulary} tokens.",
                param=param,
            )

    def _tokens(self, entry: str | list[int] | Conversation) -> list[int]:
        tokenizer = self._runner.tokenizer
        if isinstance(entry, Conversation):
            ids = self._chat(entry)
        elif isinstance(entry, str):
            ids = tokenizer(entry)["input_ids"]
            if not ids and tokenizer.bos_token_id is not None:
                ids = [tokenizer.bos_token_id]
        else:
            ids = entry
            for token in ids:
                self._check_token(token, "prompt")
        if not ids:
            raise BadRequest("The prompt is empty.", param=_param(entry))
        return list(ids)

    def _chat(self, chat: Conversation) -> list[int]:
        from jinja2 import TemplateError

        tokenizer = self._runner.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise NoChatTemplate(
                "This model has no chat template, so it cannot hold a conversation; use /v1/completions.",
                param="messages",
            )
        extra = chat.template_kwargs or {}
        if taken := sorted(_NOT_FOR_TEMPLATES & extra.keys()):
            raise BadRequest(f"`{taken[0]}` is not a variable of chat templates.", param="chat_template_kwargs")
        try:
            ids: list[int] = tokenizer.apply_chat_template(
                chat.messages, **{"add_generation_prompt": True, **extra}, tokenize=True, return_dict=False
            )
        except TemplateError as exc:
            raise BadRequest(f"The model's chat template refuses these messages: {exc}", param="messages") from exc
        except Exception as exc:
            raise BadRequest(
                "The model's chat template cannot make a prompt of these messages; check their roles and the types of"
                " their contents.",
                param="messages",
            ) from exc
        return ids

    def _limit(self, prompt: _Prompt, entry: Any, sampling: Sampling) -> int:
        """Tokens that an answer to this prompt may have. Nothing is ever cut to fit."""
        most, there = self.info.context_length, len(prompt.ids)
        limit = sampling.max_tokens if sampling.max_tokens is not None else max(1, most - there)
        if there + limit > most:
            where = _param(entry)
            raise ContextLengthExceeded(
                f"This model's maximum context length is {most} tokens. However, you requested {there + limit} tokens"
                f" ({there} in the {where}, {limit} in the completion). Please reduce the length of the {where} or of"
                " the completion.",
                param=where,
            )
        return limit

    def cancel(self, call_id: str) -> None:
        self._forget(call_id)

    # --- the state of things ---

    def busy(self) -> bool:
        return bool(self._rows or self._waiting)

    def waiting(self) -> int:
        return sum(not call.begun for call in self._calls.values())

    def close(self) -> None:
        for call_id in list(self._calls):
            self._forget(call_id)
        self._runner.release()

    # --- what every step is made of ---

    def _let_in(self) -> _Sequence:
        """The first in line, which begins now."""
        seq = self._waiting.popleft()
        self._admitted += 1
        seq.order = self._admitted
        seq.call.begun = True
        return seq

    def _choose(self, logits: torch.Tensor, seqs: Sequence[_Sequence]) -> list[int]:
        tokens: list[int] = self._sample(logits, [s.sampler for s in seqs])
        return tokens

    def _attempt(self, work: Callable[[], T], seqs: Sequence[_Sequence], events: list[Event]) -> T | None:
        """Do work on the device; where it fails, give up no more calls than needed, and return None.

        What a next attempt relies on changes only after the work.
        """
        try:
            return work()
        except Exception as exc:
            if self._runner.is_lost(exc):
                raise
            if self._runner.is_out_of_memory(exc):
                newest = max(seqs, key=lambda s: s.order)
                self._fail([newest], DoesNotFit("The device ran out of memory; try again, or with less."), events)
                self._runner.trim()
            else:
                log.exception("a forward pass failed")
                self._fail(seqs, EngineFault("The model failed on this request."), events)
            return None

    def _advance(self, seqs: Sequence[_Sequence], tokens: Sequence[int], events: list[Event]) -> None:
        """Let each sequence take its token, and let go those that are done."""
        for seq, token in zip(seqs, tokens, strict=True):
            call = seq.call
            if call.id not in self._calls:
                continue  # another of its sequences has just failed
            if token < 0:
                self._wipe(seq)
                self._fail([seq], EngineFault("The model's output was not a number; try another prompt."), events)
                continue
            try:
                chunk = seq.take(token)
            except Exception:
                log.exception("a token could not become text")
                self._fail([seq], EngineFault("The model's output could not become text."), events)
                continue
            events.append((call.id, chunk))
            if chunk.finish_reason:
                self._leave(seq)
                call.unfinished -= 1
                if not call.unfinished:
                    del self._calls[call.id]
                    events.append((call.id, None))

    def _fail(self, seqs: Iterable[_Sequence], error: HfmsError, events: list[Event]) -> None:
        for call_id in dict.fromkeys(s.call.id for s in seqs):
            self._forget(call_id)
            events.append((call_id, error))

    def _forget(self, call_id: str) -> None:
        call = self._calls.pop(call_id, None)
        if call is None:
            return
        self._waiting = deque(s for s in self._waiting if s.call is not call)
        for seq in [s for s in self._rows if s.call is call]:
            self._leave(seq)


class Generator(Scheduler):
    """A loaded model in torch: the scheduler around slots."""

    _runner: Runner

    def __init__(self, runner: Runner, info: LoadedInfo, *, prefill_tokens: int) -> None:
        super().__init__(runner, info, prefill_tokens=prefill_tokens)
        self._cache = runner.cache
        self._filling: list[_Sequence] = []
        """Let in, and not read to the end. Where the first is partly read, it is in the slot behind the rows."""

    def busy(self) -> bool:
        return super().busy() or bool(self._filling)

    # --- one step ---

    def step(self) -> list[Event]:
        """One token of each sequence under way, and up to `prefill_tokens` tokens of prompts."""
        events: list[Event] = []
        self._make_room()
        if self._rows:
            self._decode(events)
            self._make_room()
        self._fill(events)
        if not self.busy():
            self._runner.release()
        return events

    def _decode(self, events: list[Event]) -> None:
        rows = list(self._rows)

        def work() -> list[int]:
            logits = self._forward([[s.made[-1]] for s in rows], [s.cached for s in rows], first=0)
            return self._choose(logits, rows)

        tokens = self._attempt(work, rows, events)
        if tokens is not None:
            for seq in rows:
                seq.cached += 1
            self._advance(rows, tokens, events)

    def _fill(self, events: list[Event]) -> None:
        self._admit()
        if not self._filling:
            return
        # One sequence reads each prompt, and the others that have the same copy what it has read.
        readers = self._readers(self._filling)
        copiers = [s for s in self._filling if s not in readers]
        family = readers + copiers
        width = min(self._prefill_tokens, max(s.length - s.cached for s in readers))
        pieces = [s.tokens[s.cached : s.cached + width] for s in readers]
        last = all(s.cached + len(piece) == s.length for s, piece in zip(readers, pieces, strict=True))

        def work() -> list[int]:
            short = [width - len(piece) for piece in pieces]
            tokens = [piece[:1] * n + piece for n, piece in zip(short, pieces, strict=True)]
            starts = [s.cached - n for n, s in zip(short, readers, strict=True)]
            first = len(self._rows)
            logits = self._forward(tokens, starts, first=first)
            if not last:
                return []
            source = [next(i for i, r in enumerate(readers) if r.prompt is s.prompt and not r.made) for s in copiers]
            for slot, i in enumerate(source, first + len(readers)):
                self._cache.copy(first + i, slot, readers[i].length)
            return self._choose(logits[[*range(len(readers)), *source]], family)

        tokens = self._attempt(work, self._filling, events)
        if tokens is None:
            return
        for seq, piece in zip(readers, pieces, strict=True):
            seq.cached += len(piece)
        if last:
            for seq in copiers:
                seq.cached = seq.length
            self._rows += family
            self._filling = []
            self._advance(family, tokens, events)

    @staticmethod
    def _readers(seqs: Iterable[_Sequence]) -> list[_Sequence]:
        """The first sequence of each prompt; one that has waited again has more to read than others with its prompt."""
        first: dict[int, _Sequence] = {}
        for seq in seqs:
            first.setdefault(id(seq if seq.made else seq.prompt), seq)
        return list(first.values())

    def _forward(self, tokens: list[list[int]], starts: list[int], *, first: int) -> torch.Tensor:
        self._cache.reserve(*self._slots())
        return self._runner.forward(tokens, starts, first)

    def _admit(self) -> None:
        """Let in the first in line: as many as there are slots and room for, and as one pass can read."""
        while self._waiting and self._fits(self._waiting[0]):
            readers = self._readers([*self._filling, self._waiting[0]])
            if len(readers) > 1 and len(readers) * max(s.length for s in readers) > self._prefill_tokens:
                return
            self._filling.append(self._let_in())

    def _fits(self, seq: _Sequence) -> bool:
        used = [*self._rows, *self._filling, seq]
        longest = max(s.length for s in used)
        return len(used) <= self.info.max_batch and self._cache.fits(len(used), longest + 1)

    # --- slots ---

    def _slots(self) -> tuple[int, int]:
        """Slots in use, and the longest sequence that the next pass makes of them."""
        used = [*self._rows, *self._filling]
        return len(used), max((s.length for s in used), default=0)

    def _make_room(self) -> None:
        """Send the newest back to wait while those under way outgrow the cache."""
        while not self._cache.fits(*self._slots()):
            if self._filling:
                newest = self._filling.pop()
            else:
                newest = max(self._rows, key=lambda s: s.order)
                self._leave(newest)
            newest.cached = 0
            self._waiting.appendleft(newest)

    def _leave(self, seq: _Sequence) -> None:
        """Take a sequence out of its slot, and close the gap."""
        at, last = self._rows.index(seq), len(self._rows) - 1
        self._cache.copy(last, at, self._rows[last].cached)
        self._rows[at] = self._rows[last]
        self._rows.pop()
        if self._filling:
            self._cache.copy(last + 1, last, self._filling[0].cached)

    def _wipe(self, seq: _Sequence) -> None:
        self._cache.wipe(self._rows.index(seq))

    def _forget(self, call_id: str) -> None:
        self._filling = [s for s in self._filling if s.call.id != call_id]
        super()._forget(call_id)


def _param(entry: str | list[int] | Conversation) -> str:
    return "messages" if isinstance(entry, Conversation) else "prompt"
