"""A model that looks at images, with what makes its inputs of them. Imports torch: for worker processes only.

It runs as any decoder does (`torch_runner`). Images are looked at first, a tile at a time, which makes states of them;
a pass that reads tokens which stand for an image is given these states. All other passes are of tokens alone.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec
import torch
import transformers
from PIL import Image
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hfms_cli import Conversation, LoadFailed
from hfms_engines.chats import templated
from hfms_engines.limits import unfit_messages
from hfms_engines.torch_runner import Runner

Inputs = dict[str, torch.Tensor]

TILES = {"idefics3": 1, "llava": 0}
"""Families of models, and the axis of their pixels along which images, or tiles of them, stand side by side."""


class VisionRunner(Runner):
    """A model with its processor, which is transformers' name for a tokenizer and an image processor together."""

    engine = "vision"
    adapters = ""
    family = transformers.AutoModelForImageTextToText
    reader = transformers.AutoProcessor

    def __init__(self, model: Any, processor: Any, **more: Any) -> None:
        # A tokenizer of its own, for the processor's is used by another thread, and one cannot be used by two.
        tokenizer = copy.deepcopy(processor.tokenizer)
        tokenizer.chat_template = getattr(processor, "chat_template", None) or tokenizer.chat_template
        super().__init__(model, tokenizer, **more)
        self._processor = processor
        self.image_id: int = processor.image_token_id
        """The token that stands for a state of an image."""
        self._takes = inspect.signature(model.forward).parameters.keys() - {"input_ids", "attention_mask"}

    def text(self, chat: Conversation) -> str:
        """The prompt of a chat, with a mark where each image stands. Raises BadRequest and NoChatTemplate."""
        # Templates of these models take parts; what has no image came as one text.
        parts = [
            message | {"content": [{"type": "text", "text": message["content"]}]}
            if isinstance(message["content"], str)
            else message
            for message in chat.messages
        ]

        apply: Callable[..., str] = partial(self.tokenizer.apply_chat_template, tokenize=False)
        return templated(msgspec.structs.replace(chat, messages=parts), self.tokenizer.chat_template, apply)

    def tokens(self, text: str) -> list[int]:
        """Of a prompt without images."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=self._adds_special(text))["input_ids"]
        return ids

    def read(self, text: str, images: Sequence[Any]) -> tuple[list[int], Inputs]:
        """Tokens of a prompt, and what else the model takes of it. images: PIL's. Raises BadRequest.

        This may run in a thread beside everything else.
        """
        try:
            made = self._processor(
                text=text, images=[list(images)], add_special_tokens=self._adds_special(text), return_tensors="pt"
            )
        except MemoryError:
            raise
        except Exception as exc:  # as where a text has marks of images of its own
            raise unfit_messages() from exc
        inputs = {
            name: value.to(self.model.dtype) if value.is_floating_point() else value
            for name, value in made.items()
            if name in self._takes and isinstance(value, torch.Tensor)
        }
        return made["input_ids"][0].tolist(), inputs

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def look(self, inputs: Inputs, first: int) -> tuple[torch.Tensor, int]:
        """States of the tile `first`, on GPUs of some more, [tokens, width]; and the tile that is next, 0 after all."""
        axis = TILES[self.model.config.model_type]
        tiles = inputs["pixel_values"].shape[axis]
        some = min(tiles - first, 1 if self.device.type == "cpu" else 8)
        piece = {name: value.narrow(axis, first, some).to(self.device) for name, value in inputs.items()}
        states = self.model.get_image_features(**piece, return_dict=True).pooler_output
        return torch.cat(list(states)), (first + some) % tiles

    @staticmethod
    def beside(states: torch.Tensor) -> dict[str, Any]:
        """What a pass takes beside tokens that stand for these states."""
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=[states])}}

    def _adds_special(self, text: str) -> bool:
        """As transformers' processors: a template may have written the first one already."""
        first = self.tokenizer.bos_token
        return first is None or not text.startswith(first)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def prove(self) -> None:
        """As for other decoders, and with an image: read into our cache, it must mean what it means in one pass.

        This refuses models whose tokens have more places than one, or that remember the last image by themselves.
        """
        super().prove()
        image = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
        try:
            ids, inputs = self.read(f"a{self._processor.image_token}b c", [image])
            pictures = Pictures(self, ids, inputs, dict)
            while not pictures.seen:
                pictures.look()
            placed = {name: value.to(self.device) for name, value in inputs.items()}
            tokens = torch.tensor([ids], device=self.device)
            whole = self.model(input_ids=tokens, use_cache=False, **placed).logits[0, -2:].float()
            self.cache.reserve(1, len(ids))
            half, end = ids.index(self.image_id) + 1, len(ids) - 1
            parts = [
                self.forward([ids[a:b]], [a], beside=pictures.beside(a, b))
                for a, b in ((0, half), (half, end), (end, end + 1))
            ]
        except Exception as exc:
            if self.is_out_of_memory(exc):
                raise
            raise LoadFailed(f"{type(self.model).__name__} cannot read an image into our cache.") from exc
        if not self.is_same(torch.cat(parts[1:]), whole):
            raise LoadFailed(f"{type(self.model).__name__} answers otherwise when an image is in our cache.")


class Pictures:
    """The images of a prompt: their pixels until they were looked at, and their states from then on.

    ids: of the prompt. inputs: the pixels. again: decodes them again, where they were let go.
    """

    def __init__(self, runner: VisionRunner, ids: list[int], inputs: Inputs, again: Callable[[], Inputs]) -> None:
        self.ids = ids
        self._runner = runner
        self._inputs: Inputs | None = inputs
        self._again = again
        self._states: list[torch.Tensor] = []
        self._next = 0
        """The tile to look at."""
        self.seen = False

    @property
    def bytes(self) -> int:
        """Of the pixels that are kept."""
        return sum(value.nbytes for value in (self._inputs or {}).values())

    def let_go(self) -> None:
        """Keep no pixels while it waits."""
        self._inputs = None

    def look(self) -> None:
        """At the next tiles. Raises what the model does; then nothing has changed."""
        if self._inputs is None:
            self._inputs = self._again()
        states, self._next = self._runner.look(self._inputs, self._next)
        self._states.append(states)
        if not self._next:
            self._states = [torch.cat(self._states)]
            self._inputs = None
            self.seen = True

    def beside(self, begin: int, end: int) -> dict[str, Any]:
        """What a pass takes beside these tokens of the prompt."""
        first, count = (self.ids[a:b].count(self._runner.image_id) for a, b in ((0, begin), (begin, end)))
        return self._runner.beside(self._states[0][first : first + count]) if count else {}
