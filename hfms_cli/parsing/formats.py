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
_NO_SYSTEM = re.compile(r"raise_exception\([^)]*\bsystem\b", re.IGNORECASE)


@dataclass(frozen=True)
class Formats:
    """How a model says what. tools: the format of its calls. reasoning: None where it has none."""

    tools: str
    reasoning: str | None
    templated: bool
    """The template takes tools; if not, the model is told of them in a message, to be called as Hermes does."""
    system: bool
    """The template takes a system message."""
    switchable: bool
    """The template knows `enable_thinking`."""
    graded: bool
    """The template knows `reasoning_effort`."""

    def marks(self, *, tools: bool) -> tuple[str, ...]:
        """Text that an engine must not leave out of an answer, be it of special tokens."""
        reader = FORMATS[self.tools] if tools else None
        calls = (*reader.markers, *reader.closers, *getattr(reader, "special", ())) if reader else ()
        return (*_MARKS[self.reasoning], *calls) if self.reasoning else calls

    def parser(self, functions: Functions, *, one_call: bool = False) -> AnswerParser | None:
        """For one answer; None where there is nothing to tell apart."""
        reasoning = ReasoningReader(*_MARKS[self.reasoning]) if self.reasoning else None
        calls: Reader | None = FORMATS[self.tools](functions) if functions else None
        return AnswerParser(reasoning, calls, one_call=one_call) if reasoning or calls else None


def forced_parser(functions: Functions, name: str | None) -> AnswerParser:
    """For an answer that constrained decoding makes a call: the arguments of the one named, or an array of calls."""
    return AnswerParser(None, Forced(name) if name else Json(functions))


@lru_cache(maxsize=256)
def formats_of(template: str, tools: str = "auto", reasoning: str = "auto") -> Formats:
    """By the template's text, where a setting does not say. A template that uses tools has a format: at least JSON."""
    templated = bool(_USES_TOOLS.search(template))
    if not templated:
        found = "hermes"
    elif tools != "auto":
        found = tools
    else:
        found = next((name for name, text in _TOOLS_BY_TEXT if text in template), "json")
    if reasoning == "auto":
        thinks = next((name for name, (_, closing) in _MARKS.items() if closing in template), None)
    else:
        thinks = None if reasoning == "none" else reasoning
    return Formats(
        found,
        thinks,
        templated=templated,
        # One that speaks of users, and not of systems, passes those over, or refuses them.
        system=not _NO_SYSTEM.search(template) and ("system" in template or "user" not in template),
        switchable="enable_thinking" in template,
        graded="reasoning_effort" in template,
    )
