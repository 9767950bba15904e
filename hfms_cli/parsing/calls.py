"""The formats in which models call functions. Their names are those of vLLM's `--tool-call-parser`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from hfms_cli.parsing.events import Arguments, CallBegins, Event
from hfms_cli.parsing.reading import CallReader, NotACall, Steps

_NAME = re.compile(r"[\w.-]")


class Hermes(CallReader):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Hermes, Qwen 2.5, Qwen 3 and many more."""

    markers = ("<tool_call>",)
    closers = ("</tool_call>",)

    def _call(self) -> Steps[None]:
        yield from self._calls((yield from self._skip()), marked=True)


class Json(CallReader):
    """The answer is an object `{"name": ..., "arguments": {...}}`, several of them, or an array of such."""

    bare = True

    def _call(self) -> Steps[None]:
        c = yield from self._skip()
        yield from self._calls(c, marked=False)
        while c != "[" and (c := (yield from self._skip())):
            if c in ";,":
                c = yield from self._skip()
            if c != "{":
                self._refuse(c)
            yield from self._object(c, marked=False)


class Llama3(Json):
    """The same, or after a marker: Llama 3.1 and later."""

    markers = ("<|python_tag|>",)


class Mistral(CallReader):
    """`[TOOL_CALLS]` and an array of objects, or (newer) `name{...}` or `name[ARGS]{...}`."""

    markers = ("[TOOL_CALLS]",)
    special = ("[ARGS]", "[CALL_ID]")

    def _call(self) -> Steps[None]:
        c = yield from self._skip()
        if c in ("[", "{"):
            yield from self._calls(c, marked=True)
            return
        name = ""
        while c and _NAME.match(c):
            name += c
            c = yield from self._next()
        if name not in self._functions:
            self._refuse(c)
        while c == "[":  # [CALL_ID] and an id, which is ours to give, then [ARGS]
            while c and c != "]":
                c = yield from self._next()
            c = yield from self._skip()
            while c and _NAME.match(c):
                c = yield from self._next()
        if c.isspace():
            c = yield from self._skip()
        if c != "{":
            self._refuse(c)
        self._begin(name)
        yield from self._arguments(c, self._say_arguments)


class Qwen3Coder(CallReader):
    """`<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>`: Qwen 3 Coder and later.

    Values are text. Which of them are JSON, the function's schema says.
    """

    markers = ("<tool_call>",)
    closers = ("</tool_call>",)

    def _call(self) -> Steps[None]:
        yield from self._expect_after_space("<function=")
        name = yield from self._until(">")
        if name not in self._functions:
            raise NotACall
        self._begin(name)
        self._say_arguments("{")
        between = ""
        while (yield from self._tag()) == "<parameter=":
            key = yield from self._until(">")
            value = yield from self._until("</parameter>")
            value = value.removeprefix("\n").removesuffix("\n")
            self._say_arguments(f"{between}{json.dumps(key)}: {self._as_json(name, key, value)}")
            between = ", "
        if not self._over:
            self._say_arguments("}")

    def _expect_after_space(self, text: str) -> Steps[None]:
        c = yield from self._skip()
        if c != text[0]:
            self._refuse(c)
        yield from self._expect(text[1:])

    def _tag(self) -> Steps[str]:
        """Which of two tags comes next; at the end, none."""
        c = yield from self._skip()
        if not c:
            return ""
        if c != "<":
            self._refuse(c)
        c = yield from self._next()
        tag = "<parameter=" if c == "p" else "</function>"
        self._unread(c)
        yield from self._expect(tag[1:])
        return tag

    def _until(self, text: str) -> Steps[str]:
        """All before `text`, which is read too, or before the end."""
        read = ""
        while not read.endswith(text) and (c := (yield from self._next())):
            read += c
        return read.removesuffix(text)

    def _as_json(self, function: str, key: str, value: str) -> str:
        properties = (self._functions[function] or {}).get("properties")
        schema = properties.get(key) if isinstance(properties, dict) else None
        kind = schema.get("type") if isinstance(schema, dict) else None
        if kind != "string":
            try:
                json.loads(value)
            except ValueError:
                pass
            else:
                return value
        return json.dumps(value, ensure_ascii=False)


class Forced:
    """The answer is the arguments of one function, and nothing else: what constrained decoding makes."""

    def __init__(self, name: str) -> None:
        self._begins: list[Event] = [CallBegins(name)]

    def feed(self, text: str) -> list[Event]:
        begins, self._begins = (self._begins, []) if text else ([], self._begins)
        return [*begins, Arguments(text)] if text else []

    def end(self) -> list[Event]:
        return []


FORMATS: Mapping[str, type[CallReader]] = {
    "hermes": Hermes,
    "llama3_json": Llama3,
    "mistral": Mistral,
    "qwen3_coder": Qwen3Coder,
    "json": Json,
}

Reader = CallReader | Forced
Functions = Mapping[str, Any]
