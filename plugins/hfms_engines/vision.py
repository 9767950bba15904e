"""The `vision` engine: answers about images, by torch. Imports nothing heavy until `load`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfms_cli import Device, Footprint, LoadedInfo, LoadRequest, ModelCard, Task, setting
from hfms_engines.generation import TorchOptions
from hfms_engines.memory import MIB, cache_bytes, footprint, torch_bytes, torch_weights
from hfms_engines.text import template_text

if TYPE_CHECKING:
    from hfms_engines.vision_scheduler import VisionScheduler

PACKAGES = ("torch", "transformers", "PIL")
FAMILIES = ("idefics3", "llava")
"""Whose tokens have one place each, so that they stand in our cache as those of any text do."""
KEPT_BYTES = 256 * MIB
"""Of pixels of those that wait. Others are decoded again when it is their turn: their files take a fraction of it."""
PIXEL_BYTES = 6
"""Of a pixel while it is decoded and scaled."""
TILE_BYTES = 128 * MIB
"""What a model makes of a tile on the way."""


@dataclass(frozen=True)
class VisionOptions(TorchOptions):
    """Options of `[engine.vision]`."""

    max_images: int = setting(8, "Images that a chat may have.", ge=1)
    max_image_pixels: int = setting(
        50_000_000, "Pixels that the images of a chat may have together.", ge=1, le=80_000_000
    )
    max_image_bytes: int = setting(20 * 2**20, "Longest file of an image, in bytes.", ge=1)


class VisionEngine:
    """Vision-language models, from safetensors, wherever torch runs. `find` says whether a package is installed."""

    name = "vision"
    tasks: tuple[Task, ...] = ("generate", "image-text-to-text")
    packages = ("torch", "transformers")

    def __init__(
        self,
        options: VisionOptions = VisionOptions(),
        find: Callable[[str], object] = importlib.util.find_spec,
    ) -> None:
        self._options = options
        self._find = find

    def supports(self, card: ModelCard, device: Device) -> str | None:
        """None, or the reason why not."""
        if "image-text-to-text" not in card.tasks:
            return f"{card.architecture or card.model_type} does not look at images"
        if card.format not in ("safetensors", "pickle"):
            return f"its weights are {card.format}, and this engine reads safetensors"
        if card.model_type not in FAMILIES:
            return f"this engine takes models of the types {' and '.join(FAMILIES)}, and this is {card.model_type}"
        if device.torch_device is None:
            return f"torch cannot use {device.id}"
        if missing := [name for name in PACKAGES if self._find(name) is None]:
            named = " and ".join("pillow" if name == "PIL" else name for name in missing)
            return f"{named} not installed; run: pip install 'hfms[vision]'"
        return None

    def estimate(self, request: LoadRequest) -> int:
        return self.footprint(request).total

    def footprint(self, request: LoadRequest) -> Footprint:
        held = torch_bytes(request) + TILE_BYTES
        if request.device.torch_device == "cpu":  # elsewhere images are decoded in memory that is not the device's
            held += KEPT_BYTES + PIXEL_BYTES * self._options.max_image_pixels
        return footprint(torch_weights(request), held, cache_bytes(request, self._options.kv_cache_bytes, held))

    def load(self, request: LoadRequest) -> VisionScheduler:
        """Raises LoadFailed, UnsafeFormat and DoesNotFit."""
        from hfms_engines import torch_runner
        from hfms_engines.pictures import Bounds
        from hfms_engines.vision_runner import VisionRunner
        from hfms_engines.vision_scheduler import VisionScheduler

        options = self._options
        runner = torch_runner.load(
            request, cache_bytes=self.footprint(request).cache, threads=options.threads, kind=VisionRunner
        )
        assert isinstance(runner, VisionRunner)
        template = template_text(runner.tokenizer)
        info = LoadedInfo(
            engine=self.name,
            device=request.device.id,
            dtype=str(runner.model.dtype).removeprefix("torch."),
            tasks=self.tasks,
            context_length=runner.context_length,
            max_batch=options.max_batch,
            batching="slots",
            memory_bytes=self.estimate(request),
            chat=bool(template),
            weights_bytes=runner.weights_bytes(),
            template=template,
        )
        return VisionScheduler(
            runner,
            info,
            bounds=Bounds(options.max_images, options.max_image_pixels, options.max_image_bytes),
            prefill_tokens=options.prefill_on(request.device),
            stall_seconds=options.stall_seconds,
        )
