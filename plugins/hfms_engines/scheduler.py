"""Calls in, chunks out: what every scheduler of text generation does, whatever its cache is like.

    submit   call -> sequences, one for each input and choice, in the line
    compile  what an answer must look like is compiled first, beside the steps
    begin    who is next in line gets its place, and reads its prompt
    advance  each step makes a token of each sequence under way
    leave    a sequence that is done, or whose call is cancelled, gives its place back

Who is next is `line.Line`'s to say: the highest priority, then the key that has had least. Where no place is left, one
under way waits again if it is of lower priority than the first in line, or if its key has more than its share. It
loses nothing but time: what it has made stays, and it reads again what the cache has not kept.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from hfms_cli import (
    Adapter,
    BadRequest,
    Call,
    Chunk,
    Conversation,
    DoesNotFit,
    EngineFault,
    HfmsError,
    LoadedInfo,
    Question,
    Reply,
    TextOf,
    TokenLogprob,
    Tokens,
    TokensOf,
    VocabularyOf,
)
from hfms_engines import limits, middle, vocabulary
from hfms_engines.calls import Choice, OpenCall, Prompt
from hfms_engines.chats import templated
from hfms_engines.line import Line
from hfms_engines.logprobs import scored
from hfms_engines.pace import Pace
from hfms_engines.sampling import Sampler, sample
from hfms_engines.structure import STUCK, Matchers, Workshop
from hfms_engines.text import CONTEXT, Detokenizer, StopStrings, Withheld, decoder_of, opened, special_tokens

if TYPE_CHECKING:
    from hfms_engines.arrays import Array
    from hfms_engines.lora import Adapters
    from hfms_engines.structure import Matcher

log = logging.getLogger("hfms.engine")

T = TypeVar("T")
Event = tuple[str, Chunk | HfmsError | None]

# Numbers in the logits of prompts that one pass makes at most, 128 MiB of them: a prompt is read in pieces for that.
_LOGITS = 2**25


@dataclass(eq=False)
class Seq(Choice):
    """One choice of a call, token by token."""

    sampler: Sampler
    words: Detokenizer
    stops: StopStrings
    stop_ids: frozenset[int]
    made: list[int] = field(default_factory=list)
    cached: int = 0
    """Tokens whose keys and values are in the cache."""
    order: int = 0
    """When it was let in; the newest has the highest."""
    echo: bool = False
    """Its prompt is still to be said."""
    scores: deque[TokenLogprob] = field(default_factory=deque)
    """Of the tokens that it takes next, where logprobs were asked for."""
    unsaid: Withheld[TokenLogprob] = field(default_factory=Withheld)

    @property
    def tokens(self) -> list[int]:
        return self.prompt.ids + self.made

    @property
    def length(self) -> int:
        return len(self.prompt.ids) + len(self.made)

    def take(self, token: int) -> Chunk:
        """Go on by a token; the chunk's finish reason says whether it was the last."""
        if not self.limit:  # only the prompt was asked about
            return Chunk(index=self.index, finish_reason="length", text=self.prompt.text, logprobs=self.prompt.scores)
        self.made.append(token)
        self.sampler.took(token)
        silent = token in self.stop_ids
        ended = silent or self.sampler.complete
        last = ended or len(self.made) >= self.limit
        text = "" if silent else self.words.feed(token)
        if last:
            text += self.words.flush()
        if self.scores:
            self.unsaid.feed(self.scores.popleft(), len(text))
        stopped = False
        # As in vLLM: what is said before the least length is reached cannot be part of a stop string.
        if len(self.made) > self.sampler.sampling.min_tokens:
            text, stopped = self.stops.feed(text)
            if last and not stopped:
                text += self.stops.flush()
        chunk = Chunk(
            index=self.index,
            text=text,
            tokens=1,
            finish_reason="stop" if ended or stopped else "length" if last else None,
        )
        if self.sampler.sampling.logprobs is not None:
            chunk.logprobs = self.unsaid.rest() if chunk.finish_reason else self.unsaid.shown(self.stops.held)
        if self.echo:
            self.echo = False
            chunk.text = self.prompt.text + chunk.text
            if chunk.logprobs is not None:
                chunk.logprobs = (self.prompt.scores or []) + chunk.logprobs
        return chunk


class AnyChanges(Protocol):
    """The LoRA adapters of a model."""

    adapters: Adapters


class AnyRunner(Protocol):
    """What every scheduler needs to know of a model and its tokenizer."""

    tokenizer: Any
    vocabulary: int
    stop_ids: frozenset[int]
    silent_ids: set[int]
    """Tokens without text."""

    @property
    def changes(self) -> AnyChanges: ...

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

    def __init__(
        self,
        runner: AnyRunner,
        info: LoadedInfo,
        *,
        prefill_tokens: int,
        stall_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.info = info
        self._runner = runner
        self._vocabulary = vocabulary.Vocabulary(runner.tokenizer, runner.silent_ids)
        self._score_tokens = max(1, _LOGITS // runner.vocabulary)
        """Tokens of a prompt that a pass may tell the logprobs of."""
        self._clock = clock
        self._pace = Pace(prefill_tokens, stall_seconds)
        self._calls: dict[str, OpenCall] = {}
        self._line: Line[Seq] = Line(clock)
        matchers = Matchers(
            runner.tokenizer, vocabulary=runner.vocabulary, stop_ids=runner.stop_ids, silent_ids=runner.silent_ids
        )
        self._structures = Workshop(matchers.make, matchers.close)
        self._rows: list[Seq] = []
        """Under way."""
        self._admitted = 0

    @abstractmethod
    def step(self) -> list[Event]:
        """One forward pass, or a few that belong together."""

    @abstractmethod
    def _leave(self, seq: Seq) -> None:
        """Take the place of a sequence that is under way."""

    @abstractmethod
    def _wipe(self, seq: Seq) -> None:
        """Remove what a sequence has stored that is not finite."""

    # --- calls in ---

    def submit(self, call: Call) -> None:
        """Raises BadRequest, ContextLengthExceeded and NoChatTemplate."""
        entries = limits.check_call(call, self._runner.vocabulary)
        self._runner.changes.adapters.check(call.adapter)
        if call.id in self._calls:
            raise BadRequest("A call with this id is under way.")
        prompts = [self._prompt(call, entry) for entry in entries]
        most = [
            limits.answer_limit(len(prompt.ids), entry, call.sampling, self.info.context_length)
            for prompt, entry in zip(prompts, entries, strict=True)
        ]
        kept = OpenCall.of(call)

        def enter(matcher: Matcher | None = None) -> None:
            for i, (prompt, limit) in enumerate(zip(prompts, most, strict=True)):
                for k in range(call.n):
                    own = matcher and matcher.copy()
                    seq = self._sequence(kept, call, i * call.n + k, k, prompt, limit, own)
                    seq.echo = call.echo or bool(prompt.text)
                    self._line.enter(seq)

        if call.sampling.structure is None:
            enter()
        else:
            self._structures.order(call.id, call.sampling.structure, enter)
        self._calls[call.id] = kept

    def _prompt(self, call: Call, entry: limits.Entry) -> Prompt:
        ids = self._tokens(entry)
        if call.suffix and not isinstance(entry, Conversation):
            ids = middle.around(self._runner.tokenizer, entry, call.suffix)
        prompt = Prompt(ids)
        if call.echo:
            prompt.text = entry if isinstance(entry, str) else self._runner.decode(ids)
            if call.sampling.logprobs is not None and ids:
                prompt.scores = [TokenLogprob(ids[0], *self._vocabulary.first(ids[0]), None)]
        elif call.marks and isinstance(entry, Conversation):
            prompt.text = opened(decoder_of(self._runner.tokenizer, special=True)(ids[-CONTEXT:]), call.marks)
        return prompt

    def _sequence(
        self,
        kept: OpenCall,
        call: Call,
        index: int,
        choice: int,
        prompt: Prompt,
        limit: int,
        matcher: Matcher | None,
    ) -> Seq:
        runner, sampling = self._runner, call.sampling
        special = not sampling.skip_special_tokens
        stop_ids = runner.stop_ids.union(sampling.stop_token_ids)
        return Seq(
            kept,
            index,
            prompt,
            limit,
            sampler=Sampler(sampling, prompt=prompt.ids, stop_ids=stop_ids, choice=choice, matcher=matcher),
            words=Detokenizer(
                decoder_of(runner.tokenizer, special=True) if special else runner.decode,
                skip=() if special else runner.silent_ids,
                shown=special_tokens(runner.tokenizer, call.marks) if call.marks and not special else {},
                context=prompt.ids,
            ),
            stops=StopStrings(sampling.stop, include=sampling.include_stop),
            stop_ids=frozenset(sampling.stop_token_ids) if sampling.ignore_eos else stop_ids,
        )

    def _tokens(self, entry: limits.Entry) -> list[int]:
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
                limits.check_token(token, self._runner.vocabulary, "prompt")
        return list(ids)

    def ask(self, question: Question) -> Reply:
        """What the tokenizer says. Raises BadRequest and NoChatTemplate."""
        tokenizer = self._runner.tokenizer
        match question:
            case VocabularyOf():
                return vocabulary.described(tokenizer)
            case TextOf(ids):
                for token in ids:
                    limits.check_token(token, self._runner.vocabulary, "tokens")
                text = decoder_of(tokenizer, special=True)(ids)
            case TokensOf(Conversation() as chat):
                ids, text = self._chat(chat), ""
            case TokensOf(str(text), special):
                ids = tokenizer(text, add_special_tokens=special)["input_ids"]
        return Tokens(list(ids), [self._vocabulary.name(token) for token in ids], text)

    def _chat(self, chat: Conversation) -> list[int]:
        tokenizer = self._runner.tokenizer
        apply = partial(tokenizer.apply_chat_template, tokenize=True, return_dict=False)
        ids: list[int] = templated(chat, getattr(tokenizer, "chat_template", None), apply)
        return ids

    def add_adapter(self, adapter: Adapter) -> None:
        """Raises BadRequest; then nothing has changed."""
        self._runner.changes.adapters.add(adapter)

    def remove_adapter(self, adapter_id: str) -> None:
        self._runner.changes.adapters.remove(adapter_id)

    def cancel(self, call_id: str) -> None:
        self._forget(call_id)

    # --- the state of things ---

    def busy(self) -> bool:
        return bool(self._under_way() or self._line or self._structures)

    def waiting(self) -> int:
        return sum(not call.begun for call in self._calls.values())

    def close(self) -> None:
        for call_id in list(self._calls):
            self._forget(call_id)
        self._structures.close()
        self._runner.release()

    # --- what every step is made of ---

    def _compiled(self, events: list[Event]) -> None:
        """Calls whose structure is compiled join the line. A step waits a little for them, and long if it is idle."""
        idle = not (self._under_way() or self._line)
        for call_id, error in self._structures.deliver(0.05 if idle else 0.002):
            self._forget(call_id)
            events.append((call_id, error))

    def _under_way(self) -> list[Seq]:
        """Everyone that has a place."""
        return self._rows

    def _let_in(self, seq: Seq, events: list[Event]) -> None:
        """The first in line begins, or goes on."""
        self._line.take(seq)
        self._admitted += 1
        seq.order = self._admitted
        seq.call.begun = True
        if not seq.prompt.reported:
            seq.prompt.reported = True
            events.append((seq.call.id, Chunk(index=seq.index, prompt_tokens=len(seq.prompt.ids))))

    def _was_read(self, seq: Seq, tokens: int) -> None:
        """So many tokens of what a sequence has are now in the cache. What it had to read again was not its fault."""
        seq.cached += tokens
        if not seq.made:
            self._line.charge(seq.key, tokens)

    def _send_back(self, seq: Seq) -> None:
        """One that is under way waits again."""
        self._leave(seq)
        seq.cached = 0
        self._line.again(seq)

    def _last(self, seqs: Iterable[Seq]) -> Seq:
        """Who is the first to give its place up: of the lowest priority, of the key with most under way, the newest."""
        seqs = list(seqs)
        share = Counter(s.key for s in seqs)
        return min(seqs, key=lambda s: (s.priority, -share[s.key], -s.order))

    def _yielding(self, seq: Seq) -> Seq | None:
        """Who under way gives its place to one that waits, where there is no other."""
        if not self._rows:
            return None
        other = self._last(self._rows)
        return other if self._gives_way(other, seq, self._shares()) else None

    def _shares(self) -> Counter[str]:
        """How many sequences of each key have a place."""
        return Counter(s.key for s in self._under_way())

    def _gives_way(self, one: Seq, other: Seq, share: Counter[str]) -> bool:
        """Whether one is of lower priority than another, or its key has more than its share."""
        if one.priority != other.priority:
            return one.priority < other.priority
        # Equal shares are left alone, and so is who has had less, or the two would change places for ever.
        return share[one.key] > share[other.key] + 1 and self._line.had(one.key) >= self._line.had(other.key)

    def _choose(self, logits: Array, seqs: Sequence[Seq], samplers: Sequence[Sampler] | None = None) -> list[int]:
        """The next token of each row. Where they are wanted, its logprobs wait with its sequence, to be taken along.

        samplers: of each row, where they are not just its sequence's own.
        """
        wanted = [i for i, s in enumerate(seqs) if s.sampler.sampling.logprobs is not None]
        raw = logits[wanted] if wanted else None  # a copy: choosing changes what it chooses from
        tokens: list[int] = sample(logits, samplers or [s.sampler for s in seqs])
        if raw is not None:
            tops = [seqs[i].sampler.sampling.logprobs or 0 for i in wanted]
            scores = scored(raw, [max(0, tokens[i]) for i in wanted], tops, self._vocabulary)
            for i in wanted:
                seqs[i].scores.clear()  # what a guess that was wrong has left
            for i, score in zip(wanted, scores, strict=True):
                seqs[i].scores.append(score)
        return tokens

    @staticmethod
    def _to_score(seq: Seq, read: int) -> int:
        """How many of the next `read` tokens of a sequence, counted from the last, tell of a prompt's unscored ones."""
        if not seq.prompt.unscored:
            return 0
        end = min(seq.cached + read, len(seq.prompt.ids) - 1)
        return max(0, end - max(seq.cached, len(seq.prompt.scores or ()) - 1))

    def _score_prompt(self, seq: Seq, logits: Array) -> Callable[[], None]:
        """How likely a prompt's next tokens were by these rows; what is returned keeps that, once the pass is over."""
        prompt = seq.prompt
        assert prompt.scores is not None
        at = len(prompt.scores)
        ids = prompt.ids[at : at + logits.shape[0]]
        scores = scored(logits, ids, [seq.sampler.sampling.logprobs or 0] * len(ids), self._vocabulary)

        def keep() -> None:
            assert prompt.scores is not None
            prompt.scores += scores[len(prompt.scores) - at :]  # another choice may have read the same in this pass

        return keep

    def _attempt(self, work: Callable[[], T], seqs: Sequence[Seq], events: list[Event]) -> T | None:
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

    def _advance(self, seqs: Sequence[Seq], tokens: Sequence[int], events: list[Event]) -> None:
        """Let each sequence take its token, and let go those that are done."""
        for seq, token in zip(seqs, tokens, strict=True):
            call = seq.call
            if call.id not in self._calls:
                continue  # another of its sequences has just failed
            structure = seq.sampler.sampling.structure
            if token < 0 and structure is not None and seq.sampler.stuck:
                self._fail([seq], BadRequest(STUCK, param=structure.param, code="invalid_schema"), events)
                continue
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
            self._line.charge(seq.key, 1)
            if chunk.finish_reason:
                self._leave(seq)
                self._line.leave(seq)
                call.unfinished -= 1
                if not call.unfinished:
                    del self._calls[call.id]
                    events.append((call.id, None))

    def _fail(self, seqs: Iterable[Seq], error: HfmsError, events: list[Event]) -> None:
        for call_id in dict.fromkeys(s.call.id for s in seqs):
            self._forget(call_id)
            events.append((call_id, error))

    def _forget(self, call_id: str) -> None:
        call = self._calls.pop(call_id, None)
        if call is None:
            return
        self._structures.drop(call_id)
        for seq in [s for s in self._line if s.call is call]:
            self._line.leave(seq)
        for seq in [s for s in self._under_way() if s.call is call]:
            self._leave(seq)
            self._line.leave(seq)
