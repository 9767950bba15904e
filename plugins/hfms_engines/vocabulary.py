"""What single tokens stand for: their text and their bytes, for logprobs and for `/tokenize`."""

from __future__ import annotations

import re
from collections.abc import Container
from typing import Any

import hfms_cli

_BROKEN = "\ufffd"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level vocabularies (GPT-2's and all after it) write bytes with."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}


BYTES = _byte_alphabet()


def described(tokenizer: Any) -> hfms_cli.Vocabulary:
    """What clients need to know of one of transformers' tokenizers."""
    template = getattr(tokenizer, "chat_template", None)
    return hfms_cli.Vocabulary(
        kind=type(tokenizer).__name__,
        size=len(tokenizer),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        unk_token=tokenizer.unk_token,
        special_tokens=list(tokenizer.all_special_tokens),
        # Of several the one that a chat gets unasked.
        chat_template=template.get("default") if isinstance(template, dict) else template,
    )


class Vocabulary:
    """Text and bytes of each token, as they are within a text, remembered once they were asked for.

    tokenizer: one of transformers'. silent: tokens without text.
    """

    def __init__(self, tokenizer: Any, silent: Container[int]) -> None:
        self._tokenizer = tokenizer
        self._silent = silent
        self._known: dict[int, tuple[str, bytes]] = {}
        # The first token of a text may lose the space that it begins with, so each is looked at behind another.
        before = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._before: list[int] = list(before)
        self._shown = len(self._decode(before))

    def __getitem__(self, token: int) -> tuple[str, bytes]:
        """For people, and what it adds to a text; a special token has its name, and adds nothing."""
        if (known := self._known.get(token)) is None:
            known = self._known[token] = self._look_up(token)
        return known

    def first(self, token: int) -> tuple[str, bytes]:
        """The same for the token that a text begins with."""
        text = "" if token in self._silent else self._decode([token])
        return self[token] if not text or _BROKEN in text else (text, text.encode())

    def name(self, token: int) -> str:
        """As the vocabulary has it; empty for a number that it has no token for."""
        return self._tokenizer.convert_ids_to_tokens(token) or ""

    def _look_up(self, token: int) -> tuple[str, bytes]:
        name = self.name(token)
        if token in self._silent:
            return name, b""
        text = self._decode([*self._before, token])[self._shown :]
        if _BROKEN not in text:
            return text, text.encode()
        # Part of a character. Only the vocabulary's own spelling says which.
        if match := _BYTE.fullmatch(name):
            raw = bytes.fromhex(match[1])
        elif all(character in BYTES for character in name):
            raw = bytes(BYTES[character] for character in name)
        else:
            raw = text.encode()
        return raw.decode(errors="replace"), raw

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text
