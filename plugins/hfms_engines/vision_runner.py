"""A model that looks at images, with what makes its inputs of them. Imports torch: for worker processes only.

It runs as any decoder does (`torch_runner`): of a prompt with images, the pass that reads it is given the pixels, and
where they stand among the tokens is the model's own business. The passes after that are of tokens alone.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from PIL import Image

from hfms_cli import Conversation, LoadFailed
from hfms_engines.chats import templated
from hfms_engines.limits import unfit_messages
from hfms_engines.torch_runner import Runner

Inputs = dict[str, torch.Tensor]


class VisionRunner(Runner):
    """A model with its processor, which is transformers' name for a tokenizer and an image processor together."""

    engine = "vision"
    family = transformers.AutoModelForImageTextToText
    reader = transformers.AutoProcessor

    def __init__(self, model: Any, processor: Any, **more: Any) -> None:
        # A tokenizer of its own, for the processor's is used by another thread, and one cannot be used by two.
        tokenizer = copy.deepcopy(processor.tokenizer)
        tokenizer.chat_template = getattr(processor, "chat_template", None) or tokenizer.chat_template
        super().__init__(model, tokenizer, **more)
        self._processor = processor
        self._takes = inspect.signature(model.forward).parameters.keys() - {"input_ids", "attention_mask"}

    def text(self, chat: Conversation) -> str:
        """The prompt of a chat, with a mark where each image stands. Raises BadRequest and NoChatTemplate."""
        parts = [
            message | {"content": [{"type": "text", "text": message["content"]}]}
            if isinstance(message["content"], str)
            else message
            for message in chat.messages
        ]

        def apply(messages: Any, **how: Any) -> str:
            text: str = self.tokenizer.apply_chat_template(parts, tokenize=False, **how)
            return text

        return templated(chat, self.tokenizer.chat_template, apply)

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

    def placed(self, inputs: Mapping[str, torch.Tensor]) -> Inputs:
        """Inputs where the model is."""
        return {name: value.to(self.device) for name, value in inputs.items()}

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
            beside = self.placed(inputs)
            tokens = torch.tensor([ids], device=self.device)
            whole = self.model(input_ids=tokens, use_cache=False, **beside).logits[0, -2:].float()
            self.cache.reserve(1, len(ids))
            parts = [self.forward([ids[:-1]], [0], beside=beside), self.forward([ids[-1:]], [len(ids) - 1])]
        except Exception as exc:
            if self.is_out_of_memory(exc):
                raise
            raise LoadFailed(f"{type(self.model).__name__} cannot read an image into our cache.") from exc
        if not self.is_same(torch.cat(parts), whole):
            raise LoadFailed(f"{type(self.model).__name__} answers otherwise when an image is in our cache.")
