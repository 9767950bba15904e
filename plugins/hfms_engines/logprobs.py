"""How likely the model found its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hfms_cli import TokenLogprob
from hfms_engines.vocabulary import Vocabulary

if TYPE_CHECKING:
    from hfms_engines.arrays import Array

# Rows that are looked at together: what is made of them on the way takes as much memory as they do.
_ROWS = 32
# For what is out of the question, as OpenAI has it: JSON knows no infinity.
_LEAST = -9999.0


def scored(logits: Array, tokens: Sequence[int], tops: Sequence[int], vocabulary: Vocabulary) -> list[TokenLogprob]:
    """How likely each of `tokens` was by its row of `logits`, [rows, vocabulary], and the likeliest `tops` of each."""
    said: list[TokenLogprob] = []
    for at in range(0, len(tokens), _ROWS):
        some = slice(at, at + _ROWS)
        said += _scored(logits[some], tokens[some], tops[some], vocabulary)
    return said


def _scored(logits: Array, tokens: Sequence[int], tops: Sequence[int], vocabulary: Vocabulary) -> list[TokenLogprob]:
    found = likelihoods(logits, [max(0, token) for token in tokens], min(max(1, *tops), logits.shape[1]))
    return [
        TokenLogprob(
            token,
            *vocabulary[token],
            max(logprob, _LEAST),
            [(i, *vocabulary[i], max(value, _LEAST)) for i, value in zip(places[:top], values[:top], strict=True)],
        )
        for token, top, logprob, places, values in zip(tokens, tops, *found, strict=True)
    ]


def likelihoods(
    logits: Array, tokens: Sequence[int], most: int
) -> tuple[list[float], list[list[int]], list[list[float]]]:
    """The logarithm of each token's probability; the `most` likeliest of each row, the first first, and theirs."""
    if not isinstance(logits, np.ndarray):
        if logits.device.type != "cpu":
            from hfms_engines import torch_sampling

            return torch_sampling.likelihoods(logits, tokens, most)
        logits = logits.numpy()
    own, ranked, values = [], [], []
    with np.errstate(all="ignore"):  # of rows that are not finite nothing is told
        for row, token in zip(logits, tokens, strict=True):
            largest = row.max()
            total = largest + np.log(np.exp(row - largest).sum(dtype=np.float64))
            places = np.flatnonzero(row >= np.partition(row, -most)[-most])
            places = places[np.argsort(-row[places], kind="stable")][:most]
            own.append(float(row[token] - total))
            ranked.append(places.tolist())
            values.append((row[places] - total).tolist())
    return own, ranked, values
