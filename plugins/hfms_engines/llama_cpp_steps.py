"""Answers of llama.cpp's, a request a token: what a stream of its does not tell, or not as asked.

In a stream llama.cpp leaves out the logprobs of tokens that end in the middle of a character, does not say which tokens
those were, counts the prompt in every penalty, and knows neither a least length nor other tokens that end an answer.
Asked for one token at a time it says all of that. The slot keeps what it has read, so a step costs what it costs in a
stream; and as a prompt's own tokens can be forced, they are scored in the same way.

For worker processes only.
"""

from __future__ import annotations

import codecs
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from hfms_cli import Chunk, Sampling, TokenLogprob
from hfms_engines.calls import Prompt
from hfms_engines.text import StopStrings, Withheld

# For what is out of the question, as OpenAI has it: JSON knows no infinity.
_LEAST = -9999.0
# Added to a logit, nothing else is chosen. Of the model's own logprobs it changes nothing.
_FORCE = 1000.0
# Rivals that are looked through for a token whose logprob llama.cpp leaves out.
_RIVALS = 64
# Added to that token and to the one that is made in its place: far above all others, and far from each other.
_LIFT, _LIFT_MORE = 60.0, 100.0


class _Likely(msgspec.Struct):
    id: int
    bytes: list[int]
    logprob: float = 0.0
    prob: float = 0.0
    """Where it was asked for what the sampler made of it."""
    top_logprobs: list[_Likely] = []
    top_probs: list[_Likely] = []


class _Likelies(msgspec.Struct):
    content: list[_Likely]


class _Choice(msgspec.Struct):
    logprobs: _Likelies | None = None
    finish_reason: str | None = None


class _Verbose(msgspec.Struct):
    tokens: list[int]


class Step(msgspec.Struct):
    """What llama.cpp says of one token."""

    choices: list[_Choice]
    verbose: _Verbose = msgspec.field(name="__verbose")

    @property
    def token(self) -> int:
        return self.verbose.tokens[0]

    @property
    def told(self) -> _Likely | None:
        """None where the token ends in the middle of a character."""
        logprobs = self.choices[0].logprobs
        return logprobs.content[0] if logprobs and logprobs.content else None


Ask = Callable[[dict[str, Any]], Step]
"""What is asked on top of that it is one token. Raises HfmsError."""


@dataclass(eq=False)
class Words:
    """Names of special tokens, and where a token cannot be told from its place, one that can stand there.

    whole: a token that is no part of a character. vocabulary: tokens in all.
    """

    detokenize: Callable[[list[int]], str]
    whole: int
    vocabulary: int
    _names: dict[int, str] = field(default_factory=dict)

    def name(self, token: int) -> str:
        if token not in self._names:
            self._names[token] = self.detokenize([token])
        return self._names[token]


@dataclass(eq=False)
class Reader:
    """Asks one slot about tokens that are known already."""

    ask: Ask
    words: Words

    def score(self, before: list[int], token: int, top: int) -> TokenLogprob:
        """How likely a token is after others."""
        told = self.ask(_forced(before, token, max(top, 1))).told
        if told is None:
            return self.look_up(before, token, top)
        return self.logprob(told, told.top_logprobs, top)

    def look_up(self, before: list[int], token: int, top: int) -> TokenLogprob:
        """The same of a token that ends in the middle of a character: as a rival of one that does not."""
        made = self.ask(_forced(before, self.words.whole, max(top, _RIVALS))).told
        assert made is not None
        rivals = made.top_logprobs
        found = next((r for r in rivals if r.id == token), None) or self._lifted(before, token, made)
        if found is None:
            every = self.ask(_forced(before, self.words.whole, self.words.vocabulary)).told
            assert every is not None
            found = next(r for r in every.top_logprobs if r.id == token)
        return self.logprob(found, rivals, top)

    def _lifted(self, before: list[int], token: int, made: _Likely) -> _Likely | None:
        """Of the chances that the sampler sees once both are lifted, their quotient tells what the one's own is."""
        whole = self.words.whole
        bias = [[token, _LIFT], [whole, _LIFT_MORE]]
        asked = {"temperature": 1.0, "samplers": ["temperature"], "post_sampling_probs": True}
        told = self.ask({"prompt": before, "n_probs": _RIVALS, "logit_bias": bias, "seed": 0} | asked).told
        chances = {rival.id: rival for rival in told.top_probs} if told else {}
        one, other = chances.get(token), chances.get(whole)
        if one is None or other is None or one.prob <= 0:
            return None
        own = made.logprob + math.log(one.prob / other.prob) + _LIFT_MORE - _LIFT
        return _Likely(token, one.bytes, own)

    def logprob(self, told: _Likely, rivals: list[_Likely], top: int) -> TokenLogprob:
        best = [(r.id, *self._spelt(r), max(r.logprob, _LEAST)) for r in rivals[:top]]
        return TokenLogprob(told.id, *self._spelt(told), max(told.logprob, _LEAST), best)

    def _spelt(self, token: _Likely) -> tuple[str, bytes]:
        raw = bytes(token.bytes)
        return raw.decode(errors="replace") if raw else self.words.name(token.id), raw


@dataclass(eq=False)
class PromptScores:
    """How likely a prompt's tokens are, found out once for all of its choices."""

    top: int
    _found: list[TokenLogprob] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, prompt: list[int], reader: Reader) -> Iterator[None]:
        """Find them out; between two of them who reads can be stopped."""
        with self._lock:
            if not self._found:
                first = reader.score(prompt[:1], prompt[0], 0)
                # A text may lose the space that its first token begins with.
                text = reader.words.name(first.id)
                raw = text.encode() if first.bytes and "\ufffd" not in text else first.bytes
                self._found = [TokenLogprob(first.id, text, raw, None)]
            while len(self._found) < len(prompt):
                at = len(self._found)
                self._found.append(reader.score(prompt[:at], prompt[at], self.top))
                yield

    @property
    def found(self) -> list[TokenLogprob]:
        return self._found


@dataclass(eq=False)
class Steps:
    """One choice of a call."""

    index: int
    prompt: Prompt
    limit: int
    sampling: Sampling
    seed: Callable[[int], int | None]
    """For the token at a place of the answer; None: any."""
    marks: tuple[str, ...] = ()
    """Special tokens that have text."""
    scores: PromptScores | None = None
    made: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stops = StopStrings(self.sampling.stop, include=self.sampling.include_stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._unsaid: Withheld[TokenLogprob] = Withheld()
        self._begun = False

    def chunks(self, reader: Reader) -> Iterator[Chunk | None]:
        """The answer; None: nothing to say yet. Raises what asking does."""
        if self.scores is not None:
            for _ in self.scores.read(self.prompt.ids, reader):
                yield None
        if not self.limit:  # only the prompt was asked about
            yield self._after_prompt(Chunk(index=self.index, finish_reason="length"))
            return
        while True:
            chunk = self._step(reader)
            yield chunk
            if chunk.finish_reason:
                return

    def _step(self, reader: Reader) -> Chunk:
        sampling, before = self.sampling, [*self.prompt.ids, *self.made]
        early = len(self.made) < sampling.min_tokens
        bias: dict[int, Any] = dict(sampling.logit_bias or {})
        if early:
            bias |= dict.fromkeys(sampling.stop_token_ids, False)  # never
        counted = len(self.made) if sampling.repetition_penalty == 1 else len(before)
        asked: dict[str, Any] = {
            "prompt": before,
            "n_probs": max(sampling.logprobs or 0, 1),
            "logit_bias": list(bias.items()),
            "ignore_eos": early or sampling.ignore_eos,
            "repeat_last_n": counted,
        }
        if (seed := self.seed(len(self.made))) is not None:
            asked["seed"] = seed
        step = reader.ask(asked)
        self.made.append(step.token)
        top = sampling.logprobs or 0
        told = step.told
        score = (
            reader.look_up(before, step.token, top) if told is None else reader.logprob(told, told.top_logprobs, top)
        )
        return self._take(score, ended=step.choices[0].finish_reason == "stop")

    def _take(self, score: TokenLogprob, *, ended: bool) -> Chunk:
        sampling = self.sampling
        ended = ended or score.id in sampling.stop_token_ids
        last = ended or len(self.made) >= self.limit
        text = "" if ended else self._decoder.decode(score.bytes)
        if not (ended or score.bytes) and (not sampling.skip_special_tokens or score.text in self.marks):
            text = self._decoder.decode(b"", final=True) + score.text
            self._decoder.reset()
        if last:
            text += self._decoder.decode(b"", final=True)
        self._unsaid.feed(score, len(text))
        stopped = False
        # As in vLLM: what is said before the least length is reached cannot be part of a stop string.
        if len(self.made) > sampling.min_tokens:
            text, stopped = self._stops.feed(text)
            if last and not stopped:
                text += self._stops.flush()
        chunk = Chunk(
            index=self.index,
            text=text,
            tokens=1,
            finish_reason="stop" if ended or stopped else "length" if last else None,
        )
        if sampling.logprobs is not None:
            chunk.logprobs = self._unsaid.rest() if chunk.finish_reason else self._unsaid.shown(self._stops.held)
        return self._after_prompt(chunk)

    def _after_prompt(self, chunk: Chunk) -> Chunk:
        """The first chunk begins with what comes before the answer."""
        if not self._begun:
            self._begun = True
            chunk.text = self.prompt.text + chunk.text
            if self.scores is not None:
                chunk.logprobs = self.scores.found + (chunk.logprobs or [])
        return chunk


def _forced(before: list[int], token: int, rivals: int) -> dict[str, Any]:
    return {
        "prompt": before,
        "n_probs": rivals,
        "logit_bias": [[token, _FORCE]],
        "temperature": 0.0,
        "repeat_last_n": 0,
        "ignore_eos": False,
    }
