"""Which formats a model answers in: as the text of its chat template says, or as the operator does."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from hfms_cli.parsing.answer import AnswerParser
from hfms_cli.parsing.calls import FORMATS, Forced, Functions, Json, Reader
from hfms_cli.parsing.reasoning import ReasoningReader

TOOL_FORMATS = ("auto", *FORMATS)
_MARKS: Mapping[str, tuple[str, str]] = {
    "think": ("<think>", "</think>"),
    "mistral": ("[THINK]", "[/THINK]"),
}
REASONING_FORMATS = ("auto", "none", *_MARKS)

# The most telling first: what a template writes before calls that a model made in an earlier turn.
_TOOLS_BY_TEXT = (
    ("qwen3_coder", "<function="),
    ("hermes", "<tool_call>"),
    ("mistral", "[TOOL_CALLS]"),
    ("llama3_json", "<|python_tag|>"),
    ("llama3_json", '"parameters": '),
)
_USES_TOOLS = re.compile(r"\{%(?:(?!%\}).)*\btools\b", re.DOTALL)


@dataclass(frozen=True)
class Formats:
    """How a model says what. tools: None where its template takes no tools. reasoning: None where it has none."""

    tools: str | None
    reasoning: str | None
    switchable: bool
    """The template knows `enable_thinking`."""
    graded: bool
    """The template knows `reasoning_effort`."""

    def marks(self, *, tools: bool) -> tuple[str, ...]:
        """Text that an engine must not leave out of an answer, be it of special tokens."""
        reader = FORMATS[self.tools] if tools and self.tools else None
        calls = (*reader.markers, *reader.closers, *getattr(reader, "special", ())) if reader else ()
        return (*_MARKS[self.reasoning], *calls) if self.reasoning else calls

    def parser(self, functions: Functions, *, one_call: bool = False) -> AnswerParser | None:
        """For one answer; None where there is nothing to tell apart."""
        reasoning = ReasoningReader(*_MARKS[self.reasoning]) if self.reasoning else None
        calls: Reader | None = FORMATS[self.tools](functions) if self.tools and functions else None
        return AnswerParser(reasoning, calls, one_call=one_call) if reasoning or calls else None


def forced_parser(functions: Functions, name: str | None) -> AnswerParser:
    """For an answer that constrained decoding makes a call: the arguments of the one named, or an array of calls."""
    return AnswerParser(None, Forced(name) if name else Json(functions))


@lru_cache(maxsize=256)
def formats_of(template: str, tools: str = "auto", reasoning: str = "auto") -> Formats:
    """By the template's text, where a setting does not say. A template that uses tools has a format: at least JSON."""
    if not _USES_TOOLS.search(template):
        found = None
    elif tools != "auto":
        found = tools
    else:
        found = next((name for name, text in _TOOLS_BY_TEXT if text in template), "json")
    if reasoning == "auto":
        thinks = next((name for name, (_, closing) in _MARKS.items() if closing in template), None)
    else:
        thinks = None if reasoning == "none" else reasoning
    return Formats(found, thinks, "enable_thinking" in template, "reasoning_effort" in template)
