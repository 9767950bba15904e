"""The `llama_cpp` engine: GGUF files on CPUs, as they are, by llama.cpp. Needs neither torch nor transformers.

llama.cpp comes as one library (xllamacpp) that is loaded in the worker process; importing this module does not.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfms_cli import Device, DoesNotFit, Footprint, LoadRequest, ModelCard, Task, setting

if TYPE_CHECKING:
    from hfms_engines.llama_cpp_runner import LlamaCpp

# What a process with llama.cpp in it, and its buffers, take beside weights and cache.
WORKING_BYTES = 128 * 2**20
# Unless the operator says otherwise, the cache holds so many texts of the model's full length,
TEXTS = 4
# or takes so much of the memory that is free when the weights are in.
CACHE_SHARE = 0.25
# llama.cpp rounds the length of its cache to such pieces.
PIECE = 256
# Where a file does not say how long a text may be.
USUAL_CONTEXT = 4096


@dataclass(frozen=True)
class LlamaCppOptions:
    """Text generation by llama.cpp."""

    max_batch: int = setting(16, "Sequences that run at once.", ge=1)
    prefill_tokens: int = setting(
        512, "Prompt tokens that one step reads; more is faster, and stalls answers longer.", ge=1
    )
    kv_cache_bytes: int = setting(
        0,
        "Memory for keys and values of sequences; 0: four texts of the model's full length, or less where memory is"
        " short.",
        ge=0,
    )
    threads: int = setting(0, "Threads; 0: one for each physical core.", ge=0)
    prefix_cache: bool = setting(
        False, "Read again only what is new in a prompt; of two words that are equally likely, either may then come."
    )


class LlamaCppEngine:
    """Every decoder that llama.cpp knows, from GGUF in one file or in parts."""

    name = "llama_cpp"
    tasks: tuple[Task, ...] = ("generate",)
    packages = ("xllamacpp",)
    spins = True

    def __init__(self, options: LlamaCppOptions = LlamaCppOptions()) -> None:
        self.options = options

    def supports(self, card: ModelCard, device: Device) -> str | None:
        """None, or the reason why not. Whether llama.cpp knows the architecture, it says only when it loads."""
        if card.format != "gguf":
            return "it is no GGUF"
        if "generate" not in card.tasks:
            return f"{card.architecture} does not generate text"
        if device.kind != "cpu":
            return "this engine runs on CPUs"
        if importlib.util.find_spec("xllamacpp") is None:
            return "xllamacpp not installed; run: pip install 'hfms[llama-cpp]'"
        return None

    def estimate(self, request: LoadRequest) -> int:
        """Bytes for weights, keys and values, and work."""
        return self.footprint(request).total

    def footprint(self, request: LoadRequest) -> Footprint:
        cache = cache_tokens(request, self.options) * request.card.token_cache_bytes
        return Footprint(request.card.weights_bytes, cache, WORKING_BYTES)

    def load(self, request: LoadRequest) -> LlamaCpp:
        """Raises LoadFailed and DoesNotFit."""
        from hfms_engines import llama_cpp_runner

        tokens = cache_tokens(request, self.options)
        if tokens < PIECE:
            raise DoesNotFit(
                f"There is no room for a cache of {PIECE} tokens of this model; set [engine.llama_cpp] kv_cache_bytes,"
                " or free memory."
            )
        return llama_cpp_runner.load(
            request,
            cache_tokens=tokens,
            max_batch=self.options.max_batch,
            prefill_tokens=self.options.prefill_tokens,
            prefix_cache=self.options.prefix_cache,
            memory_bytes=self.estimate(request),
            threads=self.options.threads,
        )


def cache_tokens(request: LoadRequest, options: LlamaCppOptions) -> int:
    """Tokens of all sequences together that the cache has room for."""
    card = request.card
    context = card.context_length or USUAL_CONTEXT
    each = card.token_cache_bytes
    if options.kv_cache_bytes and each:
        tokens = min(options.kv_cache_bytes // each, options.max_batch * context)
    else:
        tokens = min(TEXTS, options.max_batch) * context
        if each:
            spare = request.device.free_bytes - card.weights_bytes - WORKING_BYTES
            tokens = min(tokens, max(0, int(spare * CACHE_SHARE)) // each)
    return tokens // PIECE * PIECE
