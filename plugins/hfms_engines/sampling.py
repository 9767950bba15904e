"""Choosing the next token.

Each sequence draws with one random number a token from its own generator, so its answer depends on its seed and its
own row of logits, and not on the rows that happen to be beside it, their number, or the kind of device.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Collection, Sequence
from math import inf
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from hfms_cli import Sampling
from hfms_engines.arrays import like, namespace

if TYPE_CHECKING:
    from hfms_engines.arrays import Array
    from hfms_engines.structure import Matcher

# Below this, a temperature means: the likeliest token.
GREEDY = 1e-5
# Callers may ask for any; with more than this, logits would no longer be numbers.
_MOST_PENALTY = 1e30
# Tokens whose weights are added up before a draw looks at single ones.
_BLOCK = 256

Row: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"


class Sampler:
    """One sequence's settings, its random numbers, and the tokens that penalties count.

    prompt: for repetition_penalty. stop_ids: held back until `min_tokens`. choice: which of `n` answers this is;
    answers to one seed differ by it. matcher: of the structure that the answer must have.
    """

    def __init__(
        self,
        sampling: Sampling,
        *,
        prompt: Sequence[int],
        stop_ids: Collection[int],
        choice: int,
        matcher: Matcher | None = None,
    ) -> None:
        self.sampling = sampling
        self.matcher = matcher
        self.greedy = sampling.temperature < GREEDY
        self.made: Counter[int] = Counter()
        # Reproducible answers are wanted, not secrets.
        self._random = random.Random(  # noqa: S311
            None if sampling.seed is None else f"{sampling.seed}/{choice}"
        )
        self._stop_ids = list(stop_ids)
        self._prompt = list(set(prompt)) if sampling.repetition_penalty != 1 else []
        self._count = bool(sampling.presence_penalty or sampling.frequency_penalty)

    def took(self, token: int) -> None:
        """The sequence goes on with this token."""
        self.made[token] += 1
        if self.matcher is not None:
            self.matcher.took(token)

    @property
    def adjusts(self) -> bool:
        """Whether the next token's logits are not taken as they are."""
        return self.matcher is not None or self._weighs

    @property
    def complete(self) -> bool:
        """Whether the answer has its structure, and cannot go on."""
        return self.matcher is not None and self.matcher.complete

    @property
    def stuck(self) -> bool:
        """Whether its structure has become too much to follow."""
        return self.matcher is not None and self.matcher.stuck

    @property
    def foreseeable(self) -> bool:
        """Whether nothing but the logits, and the structure, says what comes next: so it can be guessed and checked."""
        return self.greedy and not self._weighs

    def along(self, tokens: Sequence[int]) -> list[Sampler]:
        """One for each place among tokens that may come next: before the first, and after each of them."""
        found, matcher = [self], self.matcher
        for token in tokens:
            ahead = copy.copy(self)
            if matcher is not None:
                ahead.matcher = matcher = matcher.copy()
                matcher.took(token)
            found.append(ahead)
        return found

    @property
    def _weighs(self) -> bool:
        s = self.sampling
        return bool(self._count or s.repetition_penalty != 1 or s.logit_bias or self._too_early)

    @property
    def _too_early(self) -> bool:
        least = self.sampling.min_tokens
        return least > 0 and self.made.total() < least

    def adjust(self, row: Array) -> None:
        """Apply bias, minimum length, penalties and structure to a row of logits, [vocabulary], in place."""
        s = self.sampling
        if s.logit_bias:
            row[list(s.logit_bias)] += like(row, list(s.logit_bias.values()))
        if self._too_early and self.matcher is None:
            row[self._stop_ids] = -inf
        if s.repetition_penalty != 1 and (seen := self._prompt + list(self.made)):
            was = row[seen]
            penalty = min(max(s.repetition_penalty, 1 / _MOST_PENALTY), _MOST_PENALTY)
            row[seen] = namespace(row).where(was > 0, was / penalty, was * penalty)
        if self._count and self.made:
            times = like(row, list(self.made.values()))
            row[list(self.made)] -= s.frequency_penalty * times + s.presence_penalty
        if self.matcher is not None:
            self.matcher.bar(row, self._stop_ids if self._too_early or s.ignore_eos else ())

    def draw(self) -> float:
        """A number from 0 to 1, without 1."""
        return self._random.random()


def sample(logits: Array, samplers: Sequence[Sampler]) -> list[int]:
    """The next token of each row of `logits`, [rows, vocabulary] float32.

    -1 where a row is not finite, where its sampler's matcher is stuck, and where no token may come. The logits are
    overwritten.
    """
    if not isinstance(logits, np.ndarray):
        if logits.device.type != "cpu":
            from hfms_engines import torch_sampling

            return torch_sampling.sample(logits, samplers)
        logits = logits.numpy()
    # The largest of a row with a NaN is NaN, so one pass finds the token and proves the row sound.
    likeliest = logits.argmax(axis=-1)
    sound = np.isfinite(logits[np.arange(len(likeliest)), likeliest])
    # A row at a time: what is made of one stays in the processor's cache.
    return [
        _next(row, sampler, int(token)) if fine else -1
        for row, sampler, token, fine in zip(logits, samplers, likeliest, sound, strict=True)
    ]


def _next(row: Row, sampler: Sampler, likeliest: int) -> int:
    if sampler.adjusts:
        sampler.adjust(row)
        likeliest = int(row.argmax())
        if sampler.stuck or row[likeliest] == -inf:
            return -1
    return likeliest if sampler.greedy else _draw(row, sampler)


def _draw(weights: Row, sampler: Sampler) -> int:
    """weights: the logits, at first."""
    settings = sampler.sampling
    weights /= np.float32(settings.temperature)
    weights -= weights.max()
    np.exp(weights, out=weights)
    if settings.min_p:
        weights[weights < settings.min_p] = 0  # the likeliest has 1
    by_rank = 0 < settings.top_k < len(weights)
    if by_rank or settings.top_p < 1:
        weights[weights < _least(weights, settings.top_k if by_rank else 0, settings.top_p)] = 0
    return _pick(weights, sampler.draw())


def _least(weights: Row, top_k: int, top_p: float) -> float:
    """The weight below which `top_k` (0: none) and then `top_p` rule tokens out; of equals, all stay."""
    if top_k:
        best = np.partition(weights, -top_k)[-top_k:]
        mass = best.sum(dtype=np.float64)
    else:
        mass = weights.sum(dtype=np.float64)
        # What is lighter comes to less than top_p leaves over, all of it together.
        best = weights[weights >= float((1 - top_p) * mass / len(weights))]
    best = np.sort(best[best > 0])[::-1]
    if top_p >= 1:
        return float(best[-1])
    # A token stays while those before it have not yet reached top_p.
    before = np.cumsum(best, dtype=np.float64) - best
    return float(best[before < top_p * mass][-1])


def _pick(weights: Row, number: float) -> int:
    """The token that a number from 0 to 1, without 1, falls on. First its block, which is quicker than all in a row."""

    def place(heap: Any, at: float) -> int:
        # Rounding must not reach the total: beyond it are tokens that were ruled out.
        return int(np.searchsorted(heap, min(at, np.nextafter(heap[-1], 0)), side="right"))

    heap = np.cumsum(np.add.reduceat(weights, range(0, len(weights), _BLOCK), dtype=np.float64))
    at = number * heap[-1]
    block = place(heap, at)
    within = weights[block * _BLOCK : (block + 1) * _BLOCK]
    return block * _BLOCK + place(np.cumsum(within, dtype=np.float64), at - (heap[block - 1] if block else 0))
