"""The `transformers` engine: text generation with continuous batching. Imports nothing heavy until `load`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfms_cli import Device, Footprint, LoadedInfo, LoadFailed, LoadRequest, ModelCard, Task, setting
from hfms_engines.machine import missing_packages
from hfms_engines.memory import cache_bytes, footprint, torch_bytes, torch_weights
from hfms_engines.text import template_text

if TYPE_CHECKING:
    from hfms_engines.scheduler import Scheduler
    from hfms_engines.torch_apart import ApartRunner
    from hfms_engines.torch_paged import PagedRunner
    from hfms_engines.torch_runner import Runner

log = logging.getLogger("hfms.engine")

# A pause that a reader hardly sees.
STALL_SECONDS = 0.2
_NEVER = 1e9

# fmt: off
# GGUF architectures that transformers can unpack.
GGUF_ARCHITECTURES = {
    "bloom", "deci", "falcon", "gemma2", "gemma3", "gemma4", "gpt-oss", "gpt2", "llama", "minimax-m2", "mistral",
    "nemotron", "phi3", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "stablelm", "starcoder2",
}
# fmt: on


@dataclass(frozen=True)
class TorchOptions:
    """What every engine lets one say of decoders that torch runs."""

    max_batch: int = setting(16, "Sequences that run at once.", ge=1)
    prefill_tokens: int = setting(
        0,
        "Prompt tokens that one step reads at most; 0: 128 on the CPU, where more is not faster, else 512.",
        ge=0,
    )
    stall_seconds: float = setting(
        STALL_SECONDS, "How long reading prompts may hold up answers that are under way, each step.", ge=0
    )
    threads: int = setting(0, "Threads on the CPU; 0: one for each physical core.", ge=0)
    kv_cache_bytes: int = setting(
        0, "Memory for keys and values of running sequences; 0: a quarter of what the weights leave free.", ge=0
    )

    def prefill_on(self, device: Device) -> int:
        return self.prefill_tokens or (128 if device.torch_device == "cpu" else 512)


@dataclass(frozen=True)
class GenerationOptions(TorchOptions):
    """Text generation by torch and transformers."""

    max_loras: int = setting(8, "LoRA adapters of a model that may be loaded at once.", ge=0)
    max_lora_rank: int = setting(256, "Highest rank of a LoRA adapter.", ge=1)

    cache: str = setting(
        "auto",
        "Keys and values in blocks that prompts share (paged), or in slots; auto: blocks on GPUs, slots on the CPU.",
        choices=("auto", "paged", "slots"),
    )
    prefix_cache: str = setting(
        "key",
        "Keep what prompts begin with for those of the same key that begin alike, for those of all keys, or not;"
        " in blocks only.",
        choices=("key", "all", "off"),
    )

    cuda_graphs: bool = setting(
        True, "Replay captured passes where answers go on by a token each, on CUDA and ROCm; in blocks only."
    )

    def paged_on(self, device: Device) -> bool:
        return self.cache == "paged" or (self.cache == "auto" and device.torch_device != "cpu")


class GenerationEngine:
    """Decoders that transformers' AutoModelForCausalLM knows, from safetensors or GGUF, wherever torch runs."""

    name = "transformers"
    tasks: tuple[Task, ...] = ("generate",)
    packages = ("torch", "transformers")

    def __init__(self, options: GenerationOptions = GenerationOptions()) -> None:
        self.options = options

    def supports(self, card: ModelCard, device: Device) -> str | None:
        """None, or the reason why not."""
        if "generate" not in card.tasks:
            return f"{card.architecture or card.model_type} does not generate text"
        if card.format == "none":
            return "the model has no weights"
        if card.format in ("openvino", "onnx"):
            return (
                f"its weights are {card.format}, and this engine reads safetensors and GGUF: name the repository that"
                " it was made of"
            )
        if device.torch_device is None:
            return f"torch cannot use {device.id}"
        if missing := missing_packages(card, self.packages):
            return f"{missing} not installed; run: pip install 'hfms[transformers]'"
        if card.format == "gguf" and card.model_type not in GGUF_ARCHITECTURES:
            return f"transformers cannot read {card.model_type} from GGUF"
        if card.format == "gguf" and len(card.weights) != 1:
            return "a GGUF must be one file"
        return None

    def estimate(self, request: LoadRequest) -> int:
        """Bytes for weights, keys and values, and work."""
        return self.footprint(request).total

    def footprint(self, request: LoadRequest) -> Footprint:
        held = torch_bytes(request)
        return footprint(torch_weights(request), held, cache_bytes(request, self.options.kv_cache_bytes, held))

    def load(self, request: LoadRequest) -> Scheduler:
        """Raises LoadFailed, UnsafeFormat and DoesNotFit."""
        from hfms_engines import torch_runner
        from hfms_engines.paged import PagedScheduler
        from hfms_engines.slots import SlotScheduler
        from hfms_engines.torch_paged import PagedRunner

        model = torch_runner.read(
            request,
            threads=self.options.threads,
            max_loras=self.options.max_loras,
            max_lora_rank=self.options.max_lora_rank,
        )
        cache = cache_bytes(request, self.options.kv_cache_bytes, torch_bytes(request))
        batching, runner = self._runner(model, cache, request.device)
        template = template_text(model.tokenizer)
        info = LoadedInfo(
            engine=self.name,
            device=request.device.id,
            dtype=str(model.model.dtype).removeprefix("torch."),
            tasks=self.tasks,
            context_length=runner.context_length,
            max_batch=self.options.max_batch,
            memory_bytes=self.estimate(request),
            chat=bool(template),
            weights_bytes=model.weights_bytes(),
            template=template,
            batching=batching,
        )
        prefill, stall = self.options.prefill_on(request.device), self.options.stall_seconds
        if isinstance(runner, PagedRunner):
            share = self.options.prefix_cache == "all"
            return PagedScheduler(runner, info, prefill_tokens=prefill, stall_seconds=stall, share=share)
        if batching == "apart":
            # In pieces a prompt would be read from its beginning for each of them.
            prefill, stall = runner.context_length, _NEVER
        return SlotScheduler(runner, info, prefill_tokens=prefill, stall_seconds=stall)

    def _runner(self, runner: Runner, cache: int, device: Device) -> tuple[str, Runner | PagedRunner | ApartRunner]:
        """The model with the best kind of cache that it runs from, and the word for it. The log says where one fails.

        cache: bytes. Raises LoadFailed and DoesNotFit.
        """
        from hfms_engines.torch_apart import ApartRunner
        from hfms_engines.torch_paged import PagedRunner
        from hfms_engines.torch_runner import in_slots

        try:
            in_slots(runner, cache)
        except LoadFailed as exc:
            apart = ApartRunner(runner, cache_bytes=cache)
            log.warning(
                "%s No batch takes it: its calls run one after the other, a token of each in turn.", exc.message
            )
            return "apart", apart
        if not self.options.paged_on(device):
            return "slots", runner
        options = self.options
        try:
            share = options.prefix_cache != "off"
            return "paged", PagedRunner(runner, tokens=runner.cache.budget, share=share, graphs=options.cuda_graphs)
        except LoadFailed as exc:
            log.warning("%s It runs in slots instead.", exc.message)
            return "slots", runner
