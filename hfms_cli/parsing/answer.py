"""An answer as its format says: first the reasoning, then content and calls."""

from __future__ import annotations

from collections.abc import Iterable

from hfms_cli.parsing.calls import Reader
from hfms_cli.parsing.events import CallBegins, Content, Event, joined
from hfms_cli.parsing.reasoning import ReasoningReader


class AnswerParser:
    """Text in, events out. calls: None: nothing is a call. one_call: what follows a first call is left out."""

    def __init__(self, reasoning: ReasoningReader | None, calls: Reader | None, *, one_call: bool = False) -> None:
        self._reasoning = reasoning
        self._calls = calls
        self._one_call = one_call
        self._begun = 0

    @property
    def reasons(self) -> bool:
        """Whether what came last is reasoning."""
        return self._reasoning is not None and self._reasoning.state in ("opened", "reasoning")

    @property
    def called(self) -> bool:
        """Whether there is a call."""
        return self._begun > 0

    def feed(self, text: str) -> list[Event]:
        """What can be said for certain now."""
        return self._within(self._read(self._reasoning.feed(text) if self._reasoning else [Content(text)]))

    def end(self) -> list[Event]:
        """The rest, at the end of the answer."""
        events = list(self._read(self._reasoning.end())) if self._reasoning else []
        return self._within([*events, *(self._calls.end() if self._calls else ())])

    def _read(self, events: list[Event]) -> Iterable[Event]:
        for event in events:
            if isinstance(event, Content):
                yield from self._calls.feed(event.text) if self._calls else [event] if event.text else []
            else:
                yield event

    def _within(self, events: Iterable[Event]) -> list[Event]:
        kept: list[Event] = []
        for event in events:
            self._begun += isinstance(event, CallBegins)
            if self._begun < 2 or not self._one_call:
                kept.append(event)
        return joined(kept)
