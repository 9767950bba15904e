"""What a model says to itself before it answers, and where that ends."""

from __future__ import annotations

from hfms_cli.parsing.events import Content, Event, Reasoning, joined


class ReasoningReader:
    """Text in, reasoning and content out.

    Reasoning is what stands between the marks at the answer's begin. White space around it and around the marks is left
    out. An answer that ends in its reasoning has no content.
    """

    def __init__(self, opening: str, closing: str) -> None:
        self._opening, self._closing = opening, closing
        self._held = ""
        self.state = "begin"
        """`begin`, `opened` (nothing but white space yet), `reasoning`, `closed` (the same) or `content`."""

    def feed(self, text: str) -> list[Event]:
        """What can be said for certain now."""
        if self.state == "content" and not self._held:
            return [Content(text)] if text else []
        self._held += text
        events: list[Event] = []
        while self._on(events):
            pass
        return joined(events)

    def end(self) -> list[Event]:
        """The rest, at the end of the answer."""
        held, self._held = self._held, ""
        if self.state == "reasoning":
            held = held.rstrip()
            return [Reasoning(held)] if held else []
        if self.state == "opened":
            return [Reasoning(held.strip())] if held.strip() else []
        return [Content(held)] if held and not (self.state == "closed" and held.isspace()) else []

    def _on(self, events: list[Event]) -> bool:
        """Do what the text that is held allows; whether that changed what comes next."""
        before = self.state
        word = self._held.lstrip()
        match self.state:
            case "begin":
                if word.startswith(self._opening):
                    self.state, self._held = "opened", word.removeprefix(self._opening)
                elif word.startswith(self._closing):  # the template itself has opened and closed it
                    self.state, self._held = "closed", word.removeprefix(self._closing)
                elif word and not any(mark.startswith(word) for mark in (self._opening, self._closing)):
                    self.state = "content"
            case "opened" if word:
                self.state, self._held = "reasoning", word
            case "reasoning":
                thought, mark, rest = self._held.partition(self._closing)
                if mark:
                    said = thought.rstrip()
                    self.state, self._held = "closed", rest
                else:
                    said = self._held[: len(self._held) - _overlap(self._held, self._closing)].rstrip()
                    self._held = self._held[len(said) :]
                if said:
                    events.append(Reasoning(said))
            case "closed" if word:
                self.state, self._held = "content", word
            case "content":
                if self._held:
                    events.append(Content(self._held))
                self._held = ""
        return self.state != before


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that `mark` begins with."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
