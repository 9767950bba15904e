"""Tokens into text while they are still coming: incremental decoding, and strings that end an answer."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_BROKEN = "\ufffd"
# So many of a prompt's last tokens surely hold a whole character, be they bytes.
CONTEXT = 16


def decoder_of(tokenizer: Any, *, special: bool = False) -> Callable[[list[int]], str]:
    """Tokens to text, special ones left out unless they are wanted, as transformers' tokenizer does it.

    Where that only passes them on to one in Rust, this asks it directly: twice as fast, and done twice a token.
    """
    if passes_on(tokenizer, "decode", "_decode"):
        return partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=not special)
    return partial(tokenizer.decode, skip_special_tokens=not special, clean_up_tokenization_spaces=False)


def passes_on(tokenizer: Any, *methods: str) -> bool:
    """Whether a tokenizer of transformers' does in these what the common class does: pass it on to one in Rust."""
    from transformers import PreTrainedTokenizerFast

    kind = type(tokenizer)
    return all(getattr(kind, name, None) is getattr(PreTrainedTokenizerFast, name) for name in methods)


class Detokenizer:
    """Text of a growing sequence of tokens, handed out as soon as it can no longer change.

    decode: tokens to text, special tokens left out; bytes that are no UTF-8 become U+FFFD.
    skip: tokens without text. shown: text of special tokens that have some here. context: the prompt, whose end may be
    half a character, and on which a leading space depends in some vocabularies.

    A token may end in the middle of a character, and its text may depend on the token before it. So a short window is
    decoded again with each token: what was said last, which begins and ends with whole characters, and what came since.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        *,
        skip: Container[int] = (),
        shown: Mapping[int, str] = {},
        context: Sequence[int] = (),
    ) -> None:
        self._decode = decode
        self._skip = skip
        self._specials = shown
        self._window = [t for t in context[-CONTEXT:] if t not in skip]
        self._said = len(self._window)
        """Tokens at the window's start that were there when it last ended in a whole character."""
        self._shown = len(_whole(decode(self._window))) if self._window else 0
        """Characters of the window's text that were handed out."""

    def feed(self, token: int) -> str:
        """The text that this token completes; often none."""
        if token in self._specials:
            before = self.flush()
            self._window, self._said, self._shown = [], 0, 0
            return before + self._specials[token]
        if token in self._skip:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        whole = _whole(text)
        new, self._shown = whole[self._shown :], max(self._shown, len(whole))
        if new and whole == text:
            self._window = self._window[self._said :]
            self._said = len(self._window)
            self._shown = len(self._decode(self._window))
        return new

    def flush(self) -> str:
        """What was held back, at the end of the sequence."""
        text = self._decode(self._window) if self._window else ""
        new, self._shown = text[self._shown :], len(text)
        return new


def _whole(text: str) -> str:
    """The text without what may yet become a character at its end."""
    return text.rstrip(_BROKEN)


def special_tokens(tokenizer: Any, marks: Sequence[str]) -> dict[int, str]:
    """Which of `marks` are special tokens, which decoding leaves out."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {i: token.content for i, token in added.items() if token.special and token.content in marks}


def opened(prompt: str, marks: Sequence[str]) -> str:
    """The mark that a prompt ends with, and the white space after it: the answer begins inside of what it opens."""
    bare = prompt.rstrip()
    mark = next((m for m in marks if bare.endswith(m)), "")
    return prompt[len(bare) - len(mark) :] if mark else ""


def template_text(tokenizer: Any) -> str:
    """The text of a tokenizer's chat templates; of several, all."""
    template = getattr(tokenizer, "chat_template", None) or ""
    return template if isinstance(template, str) else "\n".join(template.values())


class StopStrings:
    """Lets text through up to the first stop string, and holds back what may be the beginning of one.

    The first is the one that is complete first; of two that are complete at once, the one that began first. So the
    answer does not depend on how the text was cut.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """include: whether the text ends with the stop string that was met, and not before it."""
        self._stops = [s for s in stops if s]
        self._include = include
        self._held = ""

    @property
    def held(self) -> int:
        """Characters that are held back."""
        return len(self._held)

    def feed(self, text: str) -> tuple[str, bool]:
        """The text that may be shown now, and whether a stop string was met. After that, feed no more."""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            end, begin = min(found)
            return text[: end if self._include else begin], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back, at the end of the answer."""
        held, self._held = self._held, ""
        return held


class Withheld(Generic[T]):
    """What is to be told of tokens, kept until their text is shown.

    A token goes out with the last character of its text; one that adds none, such as a part of a character, with the
    next that does.
    """

    def __init__(self) -> None:
        self._items: list[T] = []
        self._ends: list[int] = []
        """Where the text of an item ends; those of the last items are not known yet."""
        self._fed = 0

    def feed(self, item: T, characters: int) -> None:
        """One more token, with which the text has grown by so many characters."""
        self._items.append(item)
        if characters:
            self._fed += characters
            self._ends += [self._fed] * (len(self._items) - len(self._ends))

    def shown(self, held: int) -> list[T]:
        """Items whose text is out, where so many characters of it are still held back."""
        count = sum(end <= self._fed - held for end in self._ends)
        out, self._items = self._items[:count], self._items[count:]
        del self._ends[:count]
        return out

    def rest(self) -> list[T]:
        """All that is left, at the end."""
        out, self._items = self._items, []
        self._ends.clear()
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
