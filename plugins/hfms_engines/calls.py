"""A call that an engine has taken, its prompts and its choices: what every kind of engine keeps of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from hfms_cli import Call, TokenLogprob


class AnyPictures(Protocol):
    """The images of a prompt. They are looked at before it is read."""

    @property
    def seen(self) -> bool: ...

    def look(self) -> None:
        """At a piece of them."""

    def beside(self, begin: int, end: int) -> Mapping[str, Any]:
        """What a pass takes beside these tokens of the prompt."""
        ...


@dataclass(eq=False)
class Prompt:
    """One input of a call, shared by its choices."""

    ids: list[int]
    reported: bool = False
    """A chunk has told how many tokens it has."""
    text: str = ""
    """What its answers begin with, where that was asked for."""
    scores: list[TokenLogprob] | None = None
    """Where they were asked for: of its tokens from the first on, as far as it was read."""
    pictures: AnyPictures | None = None
    """Its images; such a prompt is read alone."""

    @property
    def unscored(self) -> bool:
        """Whether it has to be read for the sake of its own tokens' logprobs."""
        return self.scores is not None and len(self.scores) < len(self.ids)

    @property
    def alone(self) -> bool:
        """Whether no other may be read in the same pass."""
        return self.unscored or self.pictures is not None


@dataclass(eq=False)
class OpenCall:
    """A call whose sequences wait or run."""

    id: str
    priority: int
    key: str
    """Whose it is."""
    tenant: str
    """With whose calls it may share what the cache keeps."""
    unfinished: int
    """Sequences that have not ended."""
    adapter: str = ""
    """The id of the LoRA adapter that answers; empty: none."""
    begun: bool = False
    gone: bool = False
    """Cancelled or failed."""

    @classmethod
    def of(cls, call: Call) -> OpenCall:
        who = call.caller.key_id or call.caller.address
        unfinished = len(call.inputs) * call.n
        return cls(call.id, call.priority, who, call.caller.tenant, unfinished, call.adapter)


@dataclass(eq=False)
class Choice:
    """One choice of a call on its way; it can stand in a `Line`."""

    call: OpenCall
    index: int
    prompt: Prompt
    limit: int
    """Tokens that it may make."""
    since: float = field(default=0.0, init=False)
    """When it began to wait."""

    @property
    def priority(self) -> int:
        return self.call.priority

    @property
    def key(self) -> str:
        return self.call.key
