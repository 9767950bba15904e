"""Reading calls from text, a character at a time: what the formats of `calls.py` are written with.

A format is a generator that is sent each character, so the text may be cut anywhere. What was read and is not
accounted for yet is kept: when it proves to be no call, it becomes content, and the last character is read again.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Generator, Mapping
from typing import Any, NoReturn, TypeVar

from hfms_cli.parsing.events import Arguments, CallBegins, Content, Event, joined

T = TypeVar("T")
Steps = Generator[None, str, T]

ARGUMENTS = ("arguments", "parameters")
_ASIDE = ("type", "id")
"""Keys beside name and arguments that a call without a marker may have; with any other it is an object like others."""


class NotACall(Exception):
    """What was read is no call after all."""


class CallReader:
    """Text in, content and calls out. Derived classes say what a call looks like.

    functions: the schema of the arguments of each function that may be called, by its name. What names another is no
    call. White space around a call belongs to it.
    """

    markers: tuple[str, ...] = ()
    """What a call begins with."""
    closers: tuple[str, ...] = ()
    """What may stand after a call, and says nothing."""
    bare = False
    """An answer may begin with a call that has no marker."""

    def __init__(self, functions: Mapping[str, Any]) -> None:
        self._functions = functions
        self._watched = (*self.markers, *self.closers)
        self._starts = {word[0] for word in self._watched}
        self._in_prose = False
        """What comes next is content unless a marker or white space begins; nothing is held back."""
        self._letters = set("".join(self._watched))
        self._events: list[Event] = []
        self._raw: list[str] = []
        """Read, and not accounted for."""
        self._again: list[str] = []
        """To be read once more, the next one last."""
        self._over = False
        self._after_call = False
        """Nothing but white space was said since the last call."""
        self._run = self._answer()
        next(self._run)

    def feed(self, text: str) -> list[Event]:
        """What can be said for certain now."""
        if self._in_prose and not text[-1:].isspace() and not any(start in text for start in self._starts):
            self._say_content(text)  # as all of this would, in one step
            return self._taken()
        for character in text:
            self._run.send(character)
        return self._taken()

    def end(self) -> list[Event]:
        """The rest, at the end of the answer."""
        try:
            self._run.send("")
        except StopIteration:
            return self._taken()
        raise AssertionError("a reader of calls goes on after the end")

    def _taken(self) -> list[Event]:
        events, self._events = joined(self._events), []
        return events

    def _call(self) -> Steps[None]:
        """Read a call whose marker was read. Raises NotACall."""
        raise NotImplementedError

    # --- the answer as a whole ---

    def _answer(self) -> Steps[None]:
        if self.bare:
            yield from self._attempt()
        while marker := (yield from self._prose()):
            if marker in self.markers:
                yield from self._attempt()
            elif self._after_call:
                self._raw.clear()
            else:
                self._say_content("".join(self._raw))

    def _attempt(self) -> Steps[None]:
        try:
            yield from self._call()
        except NotACall:
            text = "".join(self._raw)
            self._raw.clear()
            if text.isspace():
                self._again += reversed(text)
            else:
                self._say_content(text)
        self._raw.clear()

    def _prose(self) -> Steps[str]:
        """Say content up to the next marker or closer, and return that, still in `_raw`; at the end, nothing."""
        held = ""
        while True:
            self._in_prose = not held
            c = yield from self._next()
            self._in_prose = False
            if not c:
                break
            self._raw.clear()
            held += c
            if c not in self._letters and not c.isspace():
                self._say_content(held)
                held = ""
            while held and not self._may_begin(held):
                self._say_content(held[0])
                held = held[1:]
            if held.lstrip() in self._watched:
                self._raw.append(held)
                return held.lstrip()
        word = held.strip()
        if not self._after_call or (word and not any(closer.startswith(word) for closer in self.closers)):
            self._say_content(held)
        return ""

    def _may_begin(self, held: str) -> bool:
        word = held.lstrip()
        return not word or any(m.startswith(word) for m in self._watched)

    # --- what is said ---

    def _say_content(self, text: str) -> None:
        if text:
            self._say(Content(text))
            self._after_call = self._after_call and text.isspace()

    def _say(self, event: Event) -> None:
        self._events.append(event)
        self._raw.clear()

    def _begin(self, name: str) -> None:
        self._say(CallBegins(name))
        self._after_call = True

    def _say_arguments(self, text: str) -> None:
        self._say(Arguments(text))

    # --- characters ---

    def _next(self) -> Steps[str]:
        """The next character; at the end, and ever after, an empty one."""
        if self._again:
            c = self._again.pop()
        elif self._over:
            c = ""
        else:
            c = yield
            self._over = not c
        self._raw.append(c)
        return c

    def _unread(self, c: str) -> None:
        self._raw.pop()
        if c:
            self._again.append(c)

    def _skip(self) -> Steps[str]:
        """The next character that is no white space."""
        while (c := (yield from self._next())).isspace():
            pass
        return c

    def _refuse(self, c: str) -> NoReturn:
        """There is no call, by this character, which was the last that was read."""
        self._unread(c)
        raise NotACall

    def _expect(self, text: str) -> Steps[None]:
        """Read just this, or what of it comes before the end."""
        for wanted in text:
            c = yield from self._next()
            if not c:
                return
            if c != wanted:
                self._refuse(c)

    # --- JSON ---

    def _calls(self, first: str, *, marked: bool) -> Steps[None]:
        """One call as an object, or an array of them; `first` is read."""
        if first != "[":
            yield from self._object(first, marked=marked)
            return
        while True:
            yield from self._object((yield from self._skip()), marked=marked)
            c = yield from self._skip()
            if c != ",":
                break
        if c not in ("]", ""):
            self._refuse(c)

    def _object(self, first: str, *, marked: bool) -> Steps[None]:
        """A call as an object with its name and its arguments, in any order; `first` is read.

        marked: the format says that this is a call, so it may have other keys, and need not have arguments.
        """
        if first != "{":
            self._refuse(first)
        name: str | None = None
        early: list[str] | None = None
        """Arguments that came before the name."""
        begun = False
        c = yield from self._skip()
        while c != "}":
            if c != '"':
                self._refuse(c)
            key = yield from self._string()
            if (c := (yield from self._skip())) != ":":
                self._refuse(c)
            c = yield from self._skip()
            if key == "name" and name is None:
                if c != '"':
                    self._refuse(c)
                name = yield from self._string()
                if name not in self._functions:
                    raise NotACall
                if early is not None:
                    self._begin(name)
                    self._say_arguments("".join(early))
                    begun = True
            elif key in ARGUMENTS and not begun and early is None:
                if c not in ("{", '"'):
                    self._refuse(c)
                say: Callable[[str], None] = self._say_arguments
                if name is None:
                    early = []
                    say = early.append
                else:
                    self._begin(name)
                    begun = True
                yield from self._arguments(c, say)
            elif marked or key in _ASIDE:
                yield from self._value(c)
            else:
                self._refuse(c)
            c = yield from self._skip()
            if c == ",":
                c = yield from self._skip()
            elif c != "}":
                self._refuse(c)
        if not begun:
            if name is None or not marked:
                raise NotACall
            self._begin(name)
            self._say_arguments("{}")
        self._raw.clear()

    def _arguments(self, first: str, say: Callable[[str], None]) -> Steps[None]:
        """An object, or the text of one in a string, as OpenAI has it."""
        if first == "{":
            say(first)
            yield from self._nested(say)
        else:
            yield from self._characters(lambda unit: say(_meant(unit)))

    def _nested(self, say: Callable[[str], None]) -> Steps[None]:
        """The rest of an object or array, as it is written."""
        depth = 1
        while depth and (c := (yield from self._next())):
            say(c)
            if c == '"':
                yield from self._characters(say, closing=True)
            elif c in "{[":
                depth += 1
            elif c in "}]":
                depth -= 1

    def _characters(self, say: Callable[[str], None], *, closing: bool = False) -> Steps[bool]:
        """The rest of a string, each character as it is written; whether the string is whole."""
        while c := (yield from self._next()):
            if c == '"':
                if closing:
                    say(c)
                return True
            say(c if c != "\\" else (yield from self._escape()))
        return False

    def _escape(self) -> Steps[str]:
        """All of an escape whose backslash was read; of a pair of surrogates, both."""
        unit = yield from self._one_escape()
        if unit[:4].lower() in ("\\ud8", "\\ud9", "\\uda", "\\udb"):
            c = yield from self._next()
            if c == "\\":
                unit += yield from self._one_escape()
            else:
                self._unread(c)
        return unit

    def _one_escape(self) -> Steps[str]:
        unit = "\\" + (yield from self._next())
        while unit[1:2] == "u" and len(unit) < 6:
            c = yield from self._next()
            if c not in string.hexdigits or not c:
                self._unread(c)
                break
            unit += c
        return unit

    def _string(self) -> Steps[str]:
        """What a string says whose opening quote was read. Raises NotACall where it has no end."""
        units: list[str] = []
        if not (yield from self._characters(units.append)):
            raise NotACall
        return "".join(map(_meant, units))

    def _value(self, first: str) -> Steps[None]:
        """Read a value and leave it be."""
        if first == '"':
            yield from self._string()
        elif first and first in "{[":
            yield from self._nested(lambda c: None)
        elif first and first in "-0123456789tfn":
            while (c := (yield from self._next())) and c not in ",}]" and not c.isspace():
                pass
            self._unread(c)
        else:
            self._refuse(first)


def _meant(unit: str) -> str:
    """The characters that one character of a JSON string, or an escape, stands for."""
    if unit[0] != "\\":
        return unit
    try:
        text: str = json.loads(f'"{unit}"')
    except ValueError:
        return unit
    # A half of a pair is no character.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
