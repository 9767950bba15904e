"""Chats with images, beside those without in one batch.

    submit   what no image could make right is refused
    read     a thread decodes the images and makes inputs of them (`beside`), and so finds out how many tokens they are
    enter    the call stands in the line as any other; all that follows is that of `slots`

A prompt with images is read in one pass, and alone: half of an image cannot be read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from hfms_cli import BadRequest, Call, Conversation, LoadedInfo
from hfms_engines import limits
from hfms_engines.beside import Beside
from hfms_engines.calls import Prompt
from hfms_engines.memory import MIB
from hfms_engines.scheduler import Event
from hfms_engines.slots import SlotScheduler

if TYPE_CHECKING:
    from hfms_engines.pictures import Bounds
    from hfms_engines.vision_runner import Inputs, VisionRunner

KEPT_BYTES = 256 * MIB
"""Of pixels of those that wait. Others are decoded again when it is their turn: their files take a fraction of it."""


@dataclass(eq=False)
class Read:
    """A prompt with images, as it was read."""

    ids: list[int]
    kept: Inputs | None
    again: Callable[[], Inputs] = field(repr=False)

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.kept or {}).values())

    def inputs(self) -> Inputs:
        """What a pass takes of it. Not kept any longer: it is asked for once, unless the call has to begin anew."""
        inputs, self.kept = self.kept or self.again(), None
        return inputs


class VisionScheduler(SlotScheduler):
    """A loaded model that looks at images."""

    _runner: VisionRunner

    def __init__(self, runner: VisionRunner, info: LoadedInfo, *, bounds: Bounds, **more: Any) -> None:
        super().__init__(runner, info, **more)
        self._bounds = bounds
        self._reading: Beside[Read] = Beside("The images could not be read.", name="images")
        self._held: WeakSet[Read] = WeakSet()
        self._entering: Read | None = None

    def submit(self, call: Call) -> None:
        pictures = [p for entry in call.inputs if isinstance(entry, Conversation) for p in entry.pictures]
        if not pictures:
            super().submit(call)
            return
        (chat,) = limits.check_call(call, self._runner.vocabulary)
        assert isinstance(chat, Conversation)
        self._bounds.check(pictures)
        self._reading.wait_for(call.id, self._reading.begin(partial(self._read, chat)), partial(self._enter, call))

    def _read(self, chat: Conversation) -> Read:
        """In the thread. Raises BadRequest and NoChatTemplate."""
        text = self._runner.text(chat)

        def read() -> tuple[list[int], Inputs]:
            return self._runner.read(text, [self._bounds.decoded(picture) for picture in chat.pictures])

        ids, inputs = read()
        return Read(ids, inputs, lambda: read()[1])

    def _enter(self, call: Call, read: Read) -> None:
        """Raises what `submit` does."""
        if read.bytes + sum(held.bytes for held in self._held) > KEPT_BYTES:
            read.kept = None
        self._held.add(read)
        self._entering = read
        try:
            super().submit(call)
        finally:
            self._entering = None

    def _prompt(self, call: Call, entry: limits.Entry) -> Prompt:
        prompt = super()._prompt(call, entry)
        if (read := self._entering) is not None:
            prompt.pictures = lambda: self._runner.placed(read.inputs())
        return prompt

    def _chat(self, chat: Conversation) -> list[int]:
        if self._entering is not None:
            return self._entering.ids
        if chat.pictures:
            raise BadRequest("The tokens of images are not told here.", param=chat.pictures[0].param)
        return self._runner.tokens(self._runner.text(chat))

    def step(self) -> list[Event]:
        idle = not super().busy()
        failed: list[Event] = [*self._reading.deliver(0.05 if idle else 0.0)]
        return failed + super().step()

    def cancel(self, call_id: str) -> None:
        if made := self._reading.drop(call_id):
            made.cancel()
        super().cancel(call_id)

    def busy(self) -> bool:
        return bool(self._reading) or super().busy()

    def waiting(self) -> int:
        return len(self._reading) + super().waiting()

    def close(self) -> None:
        self._reading.close()
        super().close()
