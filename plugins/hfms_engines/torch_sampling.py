"""What `sampling` and `logprobs` do where logits are on a GPU: all rows at once, and the processor hardly waits.

Imports torch: for worker processes only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from hfms_engines.sampling import Sampler

# Tokens that are looked at before all of them are sorted; top_p hardly ever keeps more.
_FEW = 512


def sample(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """As `sampling.sample`."""
    with torch.inference_mode():
        tokens: list[int] = _sample(logits, samplers).tolist()
    return tokens


def _sample(logits: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    # The largest of a row with a NaN is NaN, so one pass finds the token and proves the row sound.
    chosen = logits.argmax(dim=-1)
    sound = logits.gather(1, chosen[:, None])[:, 0].isfinite()
    adjusted = [i for i, s in enumerate(samplers) if s.adjusts]
    if adjusted:
        for i in adjusted:
            samplers[i].adjust(logits[i])
        chosen = logits.argmax(dim=-1)
        sound &= logits.gather(1, chosen[:, None])[:, 0].isfinite()
        for i in adjusted:
            if samplers[i].stuck:
                sound[i] = False
    drawn = [i for i, s in enumerate(samplers) if not s.greedy]
    if drawn:
        chosen[drawn] = _draw(logits[drawn], [samplers[i] for i in drawn])
    return torch.where(sound, chosen, -1)


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


def likelihoods(
    logits: torch.Tensor, tokens: Sequence[int], most: int
) -> tuple[list[float], list[list[int]], list[list[float]]]:
    """As `logprobs.likelihoods`."""
    with torch.inference_mode():
        total = logits.logsumexp(dim=-1, keepdim=True)
        ids = torch.tensor(tokens, device=logits.device)[:, None]
        own = (logits.gather(1, ids) - total)[:, 0]
        best = logits.topk(most, dim=-1)
        return own.tolist(), best.indices.tolist(), (best.values - total).tolist()
