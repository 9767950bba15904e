"""The `transformers` engine: text generation with continuous batching. Imports nothing heavy until `load`."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfms_cli import Device, LoadedInfo, LoadRequest, ModelCard, Task, setting

if TYPE_CHECKING:
    from hfms_engines.slots import SlotScheduler

# What a process with torch in it, and activations, take beside weights and cache.
WORKING_BYTES = 512 * 2**20
# A pause that a reader hardly sees.
STALL_SECONDS = 0.2
# Of the memory that is free when the weights are in, so much may go to keys and values.
CACHE_SHARE = 0.25

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
    prefill_tokens: int = setting(512, "Prompt tokens that one step reads at most.", ge=1)
    stall_seconds: float = setting(
        STALL_SECONDS, "How long reading prompts may hold up answers that are under way, each step.", ge=0
    )
    kv_cache_bytes: int = setting(
        0, "Memory for keys and values of running sequences; 0: a quarter of what the weights leave free.", ge=0
    )


class GenerationEngine:
    """Decoders that transformers' AutoModelForCausalLM knows, from safetensors or GGUF, wherever torch runs."""

    name = "transformers"
    tasks: tuple[Task, ...] = ("generate",)

    def __init__(self, options: GenerationOptions = GenerationOptions()) -> None:
        self.options = options

    def supports(self, card: ModelCard, device: Device) -> str | None:
        """None, or the reason why not."""
        needed = ["torch", "transformers", *(["gguf", "accelerate"] if card.format == "gguf" else [])]
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if "generate" not in card.tasks:
            return f"{card.architecture or card.model_type} does not generate text"
        if card.format == "none":
            return "the model has no weights"
        if device.torch_device is None:
            return f"torch cannot use {device.id}"
        if missing:
            return f"{' and '.join(missing)} not installed; run: pip install 'hfms[transformers]'"
        if card.model_type in _RECURRENT:
            return f"{card.model_type} keeps a recurrent state; this engine runs attention models"
        if card.format == "gguf" and card.model_type not in GGUF_ARCHITECTURES:
            return f"transformers cannot read {card.model_type} from GGUF"
        if card.format == "gguf" and len(card.weights) != 1:
            return "a GGUF must be one file"
        return None

    def estimate(self, request: LoadRequest) -> int:
        """Bytes for weights, keys and values, and work."""
        return weights_bytes(request) + cache_bytes(request, self.options.kv_cache_bytes) + WORKING_BYTES

    def load(self, request: LoadRequest) -> SlotScheduler:
        """Raises LoadFailed, UnsafeFormat and DoesNotFit."""
        from hfms_engines import torch_runner
        from hfms_engines.slots import SlotScheduler

        cache = cache_bytes(request, self.options.kv_cache_bytes)
        runner = torch_runner.load(request, cache_bytes=cache)
        info = LoadedInfo(
            engine=self.name,
            device=request.device.id,
            dtype=str(runner.model.dtype).removeprefix("torch."),
            tasks=self.tasks,
            context_length=runner.context_length,
            max_batch=self.options.max_batch,
            memory_bytes=runner.weights_bytes() + cache + WORKING_BYTES,
            chat=bool(getattr(runner.tokenizer, "chat_template", None)),
        )
        return SlotScheduler(
            runner, info, prefill_tokens=self.options.prefill_tokens, stall_seconds=self.options.stall_seconds
        )


def weights_bytes(request: LoadRequest) -> int:
    """Bytes of the weights once they are loaded, by the card alone."""
    card = request.card
    on_cpu = request.device.torch_device in (None, "cpu")
    unpacked = card.format == "gguf"
    dtype = request.dtype
    if dtype == "auto":
        dtype = "float32" if on_cpu else "bfloat16" if unpacked else card.dtype
    width = 4 if dtype == "float32" else 2
    if card.parameters:
        return card.parameters * width
    # Unknown: files hold two bytes a parameter, or five bits of a GGUF.
    return int(card.weights_bytes * width / (5 / 8 if unpacked else 4 if card.dtype == "float32" else 2))


def cache_bytes(request: LoadRequest, asked: int) -> int:
    """Bytes for keys and values: what the operator asked for, or a share of what the weights leave free."""
    spare = request.device.free_bytes - weights_bytes(request) - WORKING_BYTES
    return asked or max(0, int(spare * CACHE_SHARE))
