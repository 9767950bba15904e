"""An answer's text -> what it says: content, reasoning, calls of functions. Pure, and as the text comes.

    text -> reasoning.py (`<think>`) -> calls.py (one class a format, on reading.py) -> events

However the text is cut, the events say the same, only in other pieces; and what turns out to be no call is content.
"""

from hfms_cli.parsing.answer import AnswerParser
from hfms_cli.parsing.events import Arguments, CallBegins, Content, Event, Reasoning
from hfms_cli.parsing.formats import REASONING_FORMATS, TOOL_FORMATS, Formats, forced_parser, formats_of

__all__ = [
    "REASONING_FORMATS",
    "TOOL_FORMATS",
    "AnswerParser",
    "Arguments",
    "CallBegins",
    "Content",
    "Event",
    "Formats",
    "Reasoning",
    "forced_parser",
    "formats_of",
]
