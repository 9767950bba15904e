"""Chats with images, beside those without in one batch.

    submit   what no image could make right is refused
    read     a thread decodes the images and makes inputs of them (`beside`), and so finds out how many tokens they are
    enter    the call stands in the line as any other; all that follows is that of `slots`

Who gets a place looks at its images first, a piece in each step, and then reads its prompt. So answers that are under
way go on meanwhile.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from hfms_cli import BadRequest, Call, Conversation, LoadedInfo
from hfms_engines import limits
from hfms_engines.beside import Beside
from hfms_engines.calls import Prompt
from hfms_engines.scheduler import Event
from hfms_engines.slots import SlotScheduler
from hfms_engines.vision import KEPT_BYTES

if TYPE_CHECKING:
    from hfms_engines.pictures import Bounds
    from hfms_engines.vision_runner import Inputs, Pictures, VisionRunner


class VisionScheduler(SlotScheduler):
    """A loaded model that looks at images."""

    _runner: VisionRunner

    def __init__(self, runner: VisionRunner, info: LoadedInfo, *, bounds: Bounds, **more: Any) -> None:
        super().__init__(runner, info, **more)
        self._bounds = bounds
        self._reading: Beside[Pictures] = Beside("The images could not be read.", name="images")
        self._held: WeakSet[Pictures] = WeakSet()
        self._entering: Pictures | None = None

    def submit(self, call: Call) -> None:
        pictures = [p for entry in call.inputs if isinstance(entry, Conversation) for p in entry.pictures]
        if not pictures:
            super().submit(call)
            return
        (chat,) = limits.check_call(call, self._runner.vocabulary)
        assert isinstance(chat, Conversation)
        self._bounds.check(pictures)
        self._reading.wait_for(call.id, self._reading.begin(partial(self._read, chat)), partial(self._enter, call))

    def _read(self, chat: Conversation) -> Pictures:
        """In the thread. Raises BadRequest and NoChatTemplate."""
        from hfms_engines.vision_runner import Pictures

        text = self._runner.text(chat)

        def read() -> tuple[list[int], Inputs]:
            return self._runner.read(text, self._bounds.decoded(chat.pictures))

        ids, inputs = read()
        return Pictures(self._runner, ids, inputs, lambda: read()[1])

    def _enter(self, call: Call, pictures: Pictures) -> None:
        """Raises what `submit` does."""
        if pictures.bytes + sum(others.bytes for others in self._held) > KEPT_BYTES:
            pictures.let_go()
        self._held.add(pictures)
        self._entering = pictures
        try:
            super().submit(call)
        finally:
            self._entering = None

    def _prompt(self, call: Call, entry: limits.Entry) -> Prompt:
        prompt = super()._prompt(call, entry)
        prompt.pictures = self._entering
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
