"""How likely the model found its tokens. Imports torch: only worker processes import this module."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hfms_cli import TokenLogprob
from hfms_engines.vocabulary import Vocabulary

# Rows that are looked at together: what is made of them on the way takes as much memory as they do.
_ROWS = 32
# For what is out of the question, as OpenAI has it: JSON knows no infinity.
_LEAST = -9999.0


def scored(
    logits: torch.Tensor, tokens: Sequence[int], tops: Sequence[int], vocabulary: Vocabulary
) -> list[TokenLogprob]:
    """How likely each of `tokens` was by its row of `logits`, [rows, vocabulary], and the likeliest `tops` of each."""
    said: list[TokenLogprob] = []
    with torch.inference_mode():
        for at in range(0, len(tokens), _ROWS):
            some = slice(at, at + _ROWS)
            said += _scored(logits[some], tokens[some], tops[some], vocabulary)
    return said


def _scored(
    logits: torch.Tensor, tokens: Sequence[int], tops: Sequence[int], vocabulary: Vocabulary
) -> list[TokenLogprob]:
    total = logits.logsumexp(dim=-1, keepdim=True)
    ids = torch.tensor(tokens, device=logits.device)[:, None].clamp(min=0)
    own = (logits.gather(1, ids) - total).clamp(min=_LEAST)[:, 0].tolist()
    best = logits.topk(min(max(tops), logits.shape[1]), dim=-1)
    values = (best.values - total).clamp(min=_LEAST).tolist()
    return [
        TokenLogprob(
            token,
            *vocabulary[token],
            logprob,
            [(i, *vocabulary[i], value) for i, value in zip(ranked[:top], likely[:top], strict=True)],
        )
        for token, logprob, top, ranked, likely in zip(tokens, own, tops, best.indices.tolist(), values, strict=True)
    ]
