"""What quantisation does to a model: perplexity on a text that comes with hfms, and how often the choice is the same.

The text is the beginning of "Alice's Adventures in Wonderland" (Lewis Carroll, 1865), which is in the public domain. It
is read in windows of their own, so a model that knows it by heart gains little, and both models see the same.

Imports torch: for worker processes and their children only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

import torch

from hfms_cli import Quality

MOST_TOKENS = 2048
WINDOW = 512
"""Tokens."""

Logits = Callable[[Sequence[int]], torch.Tensor]
"""Takes the tokens of one window; gives [tokens, vocabulary] of a model that sees nothing else."""


def measure(tokenizer: Any, before: Logits, after: Logits, *, window: int = WINDOW) -> Quality:
    """Compare a model with what was made of it.

    window: tokens that both can read at once.
    """
    text = files("hfms_engines").joinpath("prose.txt").read_text("utf-8")
    ids: list[int] = tokenizer(text)["input_ids"][:MOST_TOKENS]
    losses = [0.0, 0.0]
    same = places = 0
    for at in range(0, len(ids), window):
        piece = ids[at : at + window]
        if len(piece) < 2:
            continue
        told = [logits(piece)[:-1].float() for logits in (before, after)]
        next_ids = torch.tensor(piece[1:])
        for i, logits in enumerate(told):
            losses[i] += float(torch.nn.functional.cross_entropy(logits, next_ids, reduction="sum"))
        same += int((told[0].argmax(-1) == told[1].argmax(-1)).sum())
        places += len(next_ids)
    perplexity_before, perplexity = (math.exp(loss / places) for loss in losses)
    return Quality(tokens=len(ids), perplexity=perplexity, perplexity_before=perplexity_before, agreement=same / places)
