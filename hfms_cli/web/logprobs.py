"""Logprobs as OpenAI's two endpoints show them."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from hfms_cli.types import TokenLogprob


def of_chat(scores: Sequence[TokenLogprob]) -> dict[str, Any]:
    """`logprobs` of a chat's choice. A special token has no bytes."""
    content = [
        {
            "token": score.text,
            "logprob": score.logprob,
            "bytes": list(score.bytes) or None,
            "top_logprobs": [
                {"token": text, "logprob": logprob, "bytes": list(raw) or None} for _, text, raw, logprob in score.top
            ],
        }
        for score in scores
    ]
    return {"content": content, "refusal": None}


class TextLogprobs:
    """`logprobs` of a completion's choice, piece by piece: offsets go on from one piece to the next."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def of(self, text: str, scores: Sequence[TokenLogprob]) -> dict[str, Any]:
        """For the choice's next text, and the tokens that end in it."""
        self._text += text
        return {
            "tokens": [_spelt(score.text, score.bytes) for score in scores],
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [_likeliest(score) for score in scores],
            "text_offset": [self._pass(score) for score in scores],
        }

    def _pass(self, score: TokenLogprob) -> int:
        """Where a token begins; the next one begins behind it. What a stop string has cut off begins at the end."""
        begins = self._at
        if score.bytes:
            self._at += len(self._decoder.decode(score.bytes))
        elif self._text.startswith(score.text, self._at):
            self._at += len(score.text)  # a special token that is shown
        return min(begins, len(self._text))


def _likeliest(score: TokenLogprob) -> dict[str, float] | None:
    """The token itself is always among them, as OpenAI and vLLM have it."""
    if score.logprob is None:
        return None
    likely = {_spelt(text, raw): logprob for _, text, raw, logprob in reversed(score.top)}
    return dict(reversed(likely.items())) | {_spelt(score.text, score.bytes): score.logprob}


def _spelt(text: str, raw: bytes) -> str:
    """A token's text; of a part of a character its bytes, as OpenAI writes them, so that no two look the same."""
    try:
        return raw.decode() if raw else text
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
