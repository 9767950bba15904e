"""The `transformers` engine: text generation with continuous batching. Imports nothing heavy until `load`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfms_cli import Device, Footprint, LoadedInfo, LoadRequest, ModelCard, Task, setting
from hfms_engines.machine import missing_packages
from hfms_engines.memory import cache_bytes, footprint, torch_bytes, torch_weights
from hfms_engines.text import template_text

if TYPE_CHECKING:
    from hfms_engines.slots import SlotScheduler

# A pause that a reader hardly sees.
STALL_SECONDS = 0.2

# fmt: off
# Models with a state that is not keys and values. `load` finds out by itself; this is to say so before anything runs.
_RECURRENT = {
    "bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2",
    "lfm2_moe", "mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen35", "qwen35moe", "qwen3_5",
    "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "recurrent_gemma", "rwkv", "xlstm", "zamba",
    "zamba2",
}
# GGUF architectures that transformers can unpack.
GGUF_ARCHITECTURES = {
    "bloom", "deci", "falcon", "gemma2", "gemma3", "gemma4", "gpt-oss", "gpt2", "llama", "minimax-m2", "mistral",
    "nemotron", "phi3", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "stablelm", "starcoder2",
}
# fmt: on


@dataclass(frozen=True)
class GenerationOptions:
    """Text generation by torch and transformers."""

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

    max_loras: int = setting(8, "LoRA adapters of a model that may be loaded at once.", ge=0)
    max_lora_rank: int = setting(256, "Highest rank of a LoRA adapter.", ge=1)

    def prefill_on(self, device: Device) -> int:
        return self.prefill_tokens or (128 if device.torch_device == "cpu" else 512)


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
        if card.model_type in _RECURRENT:
            return f"{card.model_type} keeps a recurrent state; this engine runs attention models"
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

    def load(self, request: LoadRequest) -> SlotScheduler:
        """Raises LoadFailed, UnsafeFormat and DoesNotFit."""
        from hfms_engines import torch_runner
        from hfms_engines.slots import SlotScheduler

        cache = cache_bytes(request, self.options.kv_cache_bytes, torch_bytes(request))
        runner = torch_runner.load(
            request,
            cache_bytes=cache,
            threads=self.options.threads,
            max_loras=self.options.max_loras,
            max_lora_rank=self.options.max_lora_rank,
        )
        template = template_text(runner.tokenizer)
        info = LoadedInfo(
            engine=self.name,
            device=request.device.id,
            dtype=str(runner.model.dtype).removeprefix("torch."),
            tasks=self.tasks,
            context_length=runner.context_length,
            max_batch=self.options.max_batch,
            memory_bytes=self.estimate(request),
            chat=bool(template),
            weights_bytes=runner.weights_bytes(),
            template=template,
        )
        return SlotScheduler(
            runner,
            info,
            prefill_tokens=self.options.prefill_on(request.device),
            stall_seconds=self.options.stall_seconds,
        )
