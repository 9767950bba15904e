"""Filling in the middle: the prompt that a model was trained to complete what lies between two texts by."""

from __future__ import annotations

from typing import Any

from hfms_cli import BadRequest

# What stands before the text, between the two, and behind the second; each model family has its own.
# Qwen, StarCoder, SantaCoder, DeepSeek, Code Llama.
_MARKS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)


def around(tokenizer: Any, prompt: str | list[int], suffix: str) -> list[int]:
    """Tokens that ask for what comes between. Raises BadRequest where the model has no marks for that."""
    known = tokenizer.get_vocab()
    marks = next(([known[mark] for mark in family] for family in _MARKS if all(m in known for m in family)), None)
    if marks is None:
        raise no_middle()
    before, between, behind = marks
    if isinstance(prompt, str):
        prompt = tokenizer.encode(prompt, add_special_tokens=False)
    first = [tokenizer.bos_token_id] if tokenizer("")["input_ids"] else []
    return [*first, before, *prompt, between, *tokenizer.encode(suffix, add_special_tokens=False), behind]


def no_middle() -> BadRequest:
    return BadRequest(
        "This model does not fill in the middle; leave `suffix` out, or use one that does.",
        param="suffix",
        code="unsupported_parameter",
    )
