"""The `openvino` engine: text generation on CPUs, with paged attention. Imports nothing heavy until `load`.

The first load of a model makes an OpenVINO model of it, in a process of its own. This is kept below the cache folder
by what is in the model's files, so the next load only reads and compiles it.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hfms_cli import Device, LoadedInfo, LoadRequest, ModelCard, Task, setting
from hfms_engines.conversion import converted
from hfms_engines.generation import GGUF_ARCHITECTURES, STALL_SECONDS, WORKING_BYTES, cache_bytes, weights_bytes

if TYPE_CHECKING:
    from hfms_engines.paged import PagedScheduler

# fmt: off
# Models whose answers from this engine are tested to be transformers' own.
FAMILIES = {
    "cohere", "gemma", "gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "olmo2", "opt", "qwen2", "qwen3",
    "starcoder2",
}
# fmt: on


@dataclass(frozen=True)
class OpenVinoOptions:
    """Text generation by OpenVINO."""

    quantize: str = setting(
        "auto", "Bits of the weights; auto: those of the model itself.", choices=("auto", "none", "int8")
    )
    max_batch: int = setting(64, "Sequences that run at once.", ge=1)
    prefill_tokens: int = setting(256, "Prompt tokens that one step reads at most.", ge=1)
    stall_seconds: float = setting(
        STALL_SECONDS, "How long reading prompts may hold up answers that are under way, each step.", ge=0
    )
    speculative_tokens: int = setting(
        8, "Tokens that one step may guess from what was there before, and check; 0: none.", ge=0
    )
    kv_cache_bytes: int = setting(
        0, "Memory for keys and values of sequences; 0: a quarter of what the weights leave free.", ge=0
    )
    prefix_cache: str = setting(
        "key",
        "Keep what prompts begin with for those of the same key that begin alike, for those of all keys, or not.",
        choices=("key", "all", "off"),
    )
    cache_dir: str = setting(
        "",
        'Folder for what is fetched and what is made of it; empty: "hfms" in the user\'s cache folder.',
        env="CACHE_DIR",
    )


class OpenVinoEngine:
    """Decoders of the families that are tested, from safetensors or GGUF, on CPUs."""

    name = "openvino"
    tasks: tuple[Task, ...] = ("generate",)

    def __init__(self, options: OpenVinoOptions = OpenVinoOptions()) -> None:
        self.options = options

    def supports(self, card: ModelCard, device: Device) -> str | None:
        """None, or the reason why not."""
        needed = ["openvino", "torch", "transformers", *(["gguf", "accelerate"] if card.format == "gguf" else [])]
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if "generate" not in card.tasks:
            return f"{card.architecture or card.model_type} does not generate text"
        if device.kind != "cpu":
            return "this engine runs on CPUs"
        if card.format not in ("safetensors", "gguf"):
            return "it has no safetensors and no GGUF"
        if card.model_type not in FAMILIES:
            return f"{card.model_type} is not among the models that it is tested with"
        if missing:
            return f"{' and '.join(missing)} not installed; run: pip install 'hfms[openvino]'"
        if card.remote_code:
            return "the model has code of its own"
        if card.format == "gguf" and (card.model_type not in GGUF_ARCHITECTURES or len(card.weights) != 1):
            return "transformers cannot read this GGUF"
        return None

    def estimate(self, request: LoadRequest) -> int:
        """Bytes for weights, keys and values, and work."""
        return weights_bytes(request) + cache_bytes(request, self.options.kv_cache_bytes) + WORKING_BYTES

    def load(self, request: LoadRequest) -> PagedScheduler:
        """Raises LoadFailed, UnsafeFormat and DoesNotFit."""
        from hfms_engines import openvino_runner
        from hfms_engines.paged import PagedScheduler

        cache = cache_bytes(request, self.options.kv_cache_bytes)
        folder = self._export(request)
        request.report("compile")
        runner = openvino_runner.load(
            folder, dtype=request.dtype, cache_bytes=cache, share=self.options.prefix_cache != "off"
        )
        info = LoadedInfo(
            engine=self.name,
            device=request.device.id,
            dtype=runner.precision,
            tasks=self.tasks,
            context_length=runner.context_length,
            max_batch=self.options.max_batch,
            memory_bytes=weights_bytes(request) + cache + WORKING_BYTES,
            chat=bool(getattr(runner.tokenizer, "chat_template", None)),
        )
        return PagedScheduler(
            runner,
            info,
            prefill_tokens=self.options.prefill_tokens,
            stall_seconds=self.options.stall_seconds,
            guess_tokens=self.options.speculative_tokens,
            share=self.options.prefix_cache == "all",
        )

    def _export(self, request: LoadRequest) -> Path:
        """The folder of the converted model, which is made where there is none."""
        from hfms_engines.openvino_export import Job

        quantize: Literal["none", "int8"] = "int8" if self.options.quantize == "int8" else "none"
        job = Job(str(request.folder), request.card, request.device, quantize)
        return converted(
            request.folder, job, modules=["openvino_export"], variant=quantize, cache_dir=self.options.cache_dir
        )
