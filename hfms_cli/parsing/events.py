"""What a piece of an answer says."""

from __future__ import annotations

from msgspec import Struct


class Content(Struct, frozen=True, gc=False):
    text: str


class Reasoning(Struct, frozen=True, gc=False):
    """What the model says to itself before it answers."""

    text: str


class CallBegins(Struct, frozen=True, gc=False):
    """A call of a function; the `Arguments` that follow are its own, until the next begins."""

    name: str


class Arguments(Struct, frozen=True, gc=False):
    """A piece of the JSON text of a call's arguments; never a part of an escape."""

    text: str


Event = Content | Reasoning | CallBegins | Arguments


def joined(events: list[Event]) -> list[Event]:
    """The same, with neighbours of one kind in one piece."""
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        if isinstance(event, CallBegins) or isinstance(last, CallBegins) or type(event) is not type(last):
            out.append(event)
        elif last is not None:
            out[-1] = type(event)(last.text + event.text)
    return out
