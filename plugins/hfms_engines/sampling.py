"""Choosing the next token. Imports torch: only worker processes import this module.

Each sequence draws with one random number a token from its own generator, so its answer depends on its seed and its
own row of logits, and not on the rows that happen to be beside it, their number, or the kind of device.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch

from hfms_cli import Sampling

if TYPE_CHECKING:
    from hfms_engines.structure import Matcher

# Below this, a temperature means: the likeliest token.
GREEDY = 1e-5
# Tokens that are looked at before all of them are sorted; top_p hardly ever keeps more.
_FEW = 512


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

    def adjust(self, row: torch.Tensor) -> None:
        """Apply bias, minimum length, penalties and structure to a row of logits, [vocabulary], in place."""
        s = self.sampling
        if s.logit_bias:
            ids = torch.tensor(list(s.logit_bias), device=row.device)
            row[ids] += torch.tensor(list(s.logit_bias.values()), device=row.device, dtype=row.dtype)
        if self._too_early and self.matcher is None:
            row[self._stop_ids] = -torch.inf
        if s.repetition_penalty != 1 and (seen := self._prompt + list(self.made)):
            ids = torch.tensor(seen, device=row.device)
            was = row[ids]
            row[ids] = torch.where(was > 0, was / s.repetition_penalty, was * s.repetition_penalty)
        if self._count and self.made:
            ids = torch.tensor(list(self.made), device=row.device)
            times = torch.tensor(list(self.made.values()), device=row.device, dtype=row.dtype)
            row[ids] -= s.frequency_penalty * times + s.presence_penalty
        if self.matcher is not None:
            self.matcher.bar(row, self._stop_ids if self._too_early or s.ignore_eos else ())

    def draw(self) -> float:
        """A number from 0 to 1, without 1."""
        return self._random.random()


def sample(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """The next token of each row of `logits`, [rows, vocabulary] float32.

    -1 where a row is not finite, or where its sampler's matcher is stuck. The logits are overwritten.
    """
    with torch.inference_mode():
        tokens: list[int] = _sample(logits, samplers).tolist()
    return tokens


def _sample(logits: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    # The largest of a row with a NaN is NaN, so one pass finds the token and proves the row sound.
    chosen = _likeliest(logits)
    sound = logits.gather(1, chosen[:, None])[:, 0].isfinite()
    adjusted = [i for i, s in enumerate(samplers) if s.adjusts]
    if adjusted:
        for i in adjusted:
            samplers[i].adjust(logits[i])
        chosen = _likeliest(logits)
        for i in adjusted:
            if samplers[i].stuck:
                sound[i] = False
    drawn = [i for i, s in enumerate(samplers) if not s.greedy]
    if drawn:
        chosen[drawn] = _draw(logits[drawn], [samplers[i] for i in drawn])
    return torch.where(sound, chosen, -1)


def _likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The place of each row's largest; of its first NaN, where there is one."""
    if logits.device.type == "cpu":
        # Five times as fast as torch's, which on a small model is a hundredth of the whole step.
        return torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


def _draw(logits: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    def column(values: list[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor(values, device=logits.device, dtype=dtype)[:, None]

    settings = [s.sampling for s in samplers]
    probs = (logits / column([s.temperature for s in settings])).softmax(dim=-1)
    if any(s.min_p for s in settings):
        least = column([s.min_p for s in settings]) * probs.amax(dim=-1, keepdim=True)
        probs = probs.where(probs >= least, 0)
    if any(s.top_k or s.top_p < 1 for s in settings):
        probs = _keep_top(
            probs, column([s.top_k or logits.shape[1] for s in settings]), column([s.top_p for s in settings])
        )
    # MPS has no float64.
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    heaped = probs.cumsum(dim=-1, dtype=exact)
    total = heaped[:, -1:]
    at = column([s.draw() for s in samplers], exact) * total
    # Rounding must not reach the total: beyond it are tokens that were ruled out.
    at = torch.minimum(at, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(heaped, at, right=True)[:, 0].clamp(max=logits.shape[1] - 1)


def _keep_top(probs: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Probabilities with those that top_k and then top_p rule out set to 0; of equals, all stay.

    probs: [rows, vocabulary], top_k and top_p: [rows, 1]. Rows are cut by value and not by rank, so the outcome does
    not depend on how many tokens were sorted to find it.
    """
    vocabulary = probs.shape[1]
    by_rank = top_k < vocabulary
    few = min(vocabulary, max([_FEW, *top_k[by_rank].int().tolist()]))
    best = probs.topk(few, dim=-1).values
    mass = probs.sum(dim=-1, keepdim=True)
    if (~by_rank & (top_p < 1) & (best.sum(dim=-1, keepdim=True) < top_p * mass)).any():
        best = probs.sort(dim=-1, descending=True).values
    ranked = best.where(torch.arange(best.shape[1], device=best.device) < top_k, 0)
    mass = torch.where(by_rank, ranked.sum(dim=-1, keepdim=True), mass)
    # A token stays while those before it have not yet reached top_p.
    before = ranked.cumsum(dim=-1) - ranked
    stays = (ranked > 0) & ((before < top_p * mass) | (top_p >= 1))
    least = best.where(stays, torch.inf).amin(dim=-1, keepdim=True)
    return probs.where(probs >= least.where(by_rank | (top_p < 1), 0), 0)
