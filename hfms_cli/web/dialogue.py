"""A chat's answers as what they say: by the format of the model, and by what the caller lets it call."""

from __future__ import annotations

import secrets
import string
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from hfms_cli.config import ModelsConfig
from hfms_cli.errors import BadRequest
from hfms_cli.parsing import (
    AnswerParser,
    Arguments,
    CallBegins,
    Content,
    Event,
    Formats,
    Reasoning,
    forced_parser,
    formats_of,
)
from hfms_cli.types import Call, Chunk, Conversation, LoadedInfo
from hfms_cli.web import tool_text
from hfms_cli.web.tools import ToolUse

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
"""How much a model is to think."""
_LETTERS = string.ascii_letters + string.digits


def with_tools(chat: Conversation, use: ToolUse | None, formats: Formats) -> Conversation:
    """The chat with what the model may call: for its template, or, where that takes no tools, in its messages."""
    tools = use.tools if use else None
    if formats.templated:
        return msgspec.structs.replace(chat, tools=tools)
    return msgspec.structs.replace(chat, messages=tool_text.told(chat.messages, tools, system=formats.system))


class Dialogue:
    """Of one call. `fit` comes first; it finds the model's format."""

    def __init__(
        self,
        settings: ModelsConfig,
        use: ToolUse | None,
        *,
        effort: Effort | None = None,
        effort_param: str = "reasoning_effort",
    ) -> None:
        """effort_param: the request's field that asks for the effort."""
        self._settings = settings
        self._use = use
        self._effort, self._effort_param = effort, effort_param
        self._formats = formats_of("")
        self._structured = False
        self._heard: dict[int, Heard] = {}

    @property
    def forced(self) -> bool:
        """Whether the answer can be nothing but calls."""
        return self._use is not None and bool(self._use.required or self._use.named)

    @property
    def reasons(self) -> bool:
        """Whether the model's answers may have reasoning."""
        return self._formats.reasoning is not None and not self._structured

    def fit(self, call: Call, info: LoadedInfo) -> Call:
        """The call for a model of this format. Raises BadRequest where its template cannot do what is asked for.

        An answer that must have a structure has it from its first token: it is not thought over.
        """
        self._formats = formats_of(info.template, self._settings.tool_parser, self._settings.reasoning_parser)
        (chat,) = call.inputs
        assert isinstance(chat, Conversation)
        if chat.pictures and "image-text-to-text" not in info.tasks:
            raise BadRequest(
                f"The model `{call.model}` takes no images; send text alone, or name a model that does: their `tasks`"
                " in /v1/models have `image-text-to-text`.",
                param=chat.pictures[0].param,
                code="unsupported_value",
            )
        chat = with_tools(chat, self._use, self._formats)
        if self._use and call.sampling.structure is not None:
            raise BadRequest(
                "An answer that must have a structure cannot call functions; leave one of both out, or send"
                ' `tool_choice: "none"`.',
                param="tools",
                code="unsupported_value",
            )
        self._structured = self.forced or call.sampling.structure is not None
        if thinking := self._thinking():
            chat = msgspec.structs.replace(chat, template_kwargs=thinking | (chat.template_kwargs or {}))
        call = msgspec.structs.replace(call, inputs=[chat])
        if self._use and self.forced:
            sampling = msgspec.structs.replace(call.sampling, structure=self._use.structure())
            return msgspec.structs.replace(call, sampling=sampling)
        marks = () if self._structured else self._formats.marks(tools=self._use is not None)
        return msgspec.structs.replace(call, marks=marks)

    def _thinking(self) -> dict[str, Any]:
        """What tells the template how much to think."""
        if self._effort is None:
            return {"enable_thinking": False} if self._structured and self._formats.switchable else {}
        if self._formats.graded:
            return {"reasoning_effort": self._effort}
        if self._effort == "none" and (self._formats.switchable or not self._formats.reasoning):
            return {"enable_thinking": False} if self._formats.switchable else {}
        raise BadRequest(
            f"The chat template of this model knows no effort `{self._effort}`.",
            param=self._effort_param,
            code="unsupported_value",
        )

    def hear(self, chunk: Chunk) -> list[tuple[Event, int]]:
        """What a chunk says, and all that was held back where it is the last of its choice.

        With each event goes the number of the choice's latest call, from 0.
        """
        return self.heard(chunk.index).take(chunk)

    def heard(self, index: int) -> Heard:
        """What a choice has said so far."""
        if index not in self._heard:
            self._heard[index] = Heard(self._parser())
        return self._heard[index]

    def reasoning_tokens(self) -> int:
        return sum(heard.reasoning_tokens for heard in self._heard.values())

    def _parser(self) -> AnswerParser | None:
        if self._use and self.forced:
            return forced_parser(self._use.functions, self._use.named)
        if self._structured:
            return None
        if self._use is None:
            return self._formats.parser({})
        return self._formats.parser(self._use.functions, one_call=not self._use.parallel)


@dataclass
class MadeCall:
    """A call of a function in an answer."""

    name: str
    id: str
    arguments: str = ""


@dataclass
class Heard:
    """What one choice has said so far."""

    parser: AnswerParser | None
    """None: all of it is content."""
    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[MadeCall] = field(default_factory=list)
    reasoning_tokens: int = 0

    def take(self, chunk: Chunk) -> list[tuple[Event, int]]:
        """What a chunk says; see `Dialogue.hear`."""
        if self.parser is None:
            self.content.append(chunk.text)
            return [(Content(chunk.text), -1)] if chunk.text else []
        events = self.parser.feed(chunk.text)
        if self.parser.reasons:
            self.reasoning_tokens += chunk.tokens
        if chunk.finish_reason:
            events += self.parser.end()
        told = []
        for event in events:
            match event:
                case Content(text):
                    self.content.append(text)
                case Reasoning(text):
                    self.reasoning.append(text)
                case CallBegins(name):
                    self.calls.append(MadeCall(name, new_id()))
                case Arguments(text):
                    self.calls[-1].arguments += text
            told.append((event, len(self.calls) - 1))
        return told


def new_id() -> str:
    """An id for a call: nine letters and digits, for Mistral's templates take no others."""
    return "".join(secrets.choice(_LETTERS) for _ in range(9))
