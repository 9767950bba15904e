"""The `openvino` engine: text generation on CPUs, with paged attention. Imports nothing heavy until `load`.

The first load of a model makes an OpenVINO model of it, in a process of its own. This is kept below the cache folder
by what is in the model's files, so the next load only reads and compiles it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from hfms_cli import (
    Device,
    Footprint,
    Leftover,
    LoadedInfo,
    LoadFailed,
    LoadRequest,
    ModelCard,
    Quality,
    Quantize,
    Task,
    setting,
)
from hfms_engines.conversion import NOTES, TEXTS, converted, folder_of, leftovers, quality_of
from hfms_engines.generation import GGUF_ARCHITECTURES, STALL_SECONDS
from hfms_engines.machine import missing_packages
from hfms_engines.memory import (
    cache_bytes,
    footprint,
    openvino_bytes,
    openvino_weights,
    parameters,
)
from hfms_engines.text import template_text

if TYPE_CHECKING:
    from hfms_engines.openvino_export import Made
    from hfms_engines.openvino_runner import Runner
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
        "auto",
        "Bits of the weights, where a load does not say; auto: those of the model itself.",
        choices=("auto", "none", "int8", "int4"),
    )
    max_batch: int = setting(32, "Sequences that run at once.", ge=1)
    prefill_tokens: int = setting(1024, "Prompt tokens that one step reads at most.", ge=1)
    stall_seconds: float = setting(
        STALL_SECONDS, "How long reading prompts may hold up answers that are under way, each step.", ge=0
    )
    speculative_tokens: int = setting(
        8, "Tokens that one step may guess from what was there before, and check; 0: none.", ge=0
    )
    kv_cache_bytes: int = setting(
        0, "Memory for keys and values of sequences; 0: a quarter of what the weights leave free.", ge=0
    )
    kv_cache_dtype: str = setting(
        "auto",
        "What keys and values are kept in; auto: what the engine computes in. int8 takes a half to a quarter of that, "
        "and may change answers.",
        choices=("auto", "int8"),
    )
    threads: int = setting(0, "Threads; 0: one for each physical core.", ge=0)
    prefix_cache: str = setting(
        "key",
        "Keep what prompts begin with for those of the same key that begin alike, for those of all keys, or not.",
        choices=("key", "all", "off"),
    )
    max_loras: int = setting(
        0, "LoRA adapters of a model that may be loaded at once; with any, each pass takes a little longer.", ge=0
    )
    max_lora_rank: int = setting(256, "Highest rank of a LoRA adapter.", ge=1)
    cache_dir: str = setting(
        "",
        'Folder for what is fetched and what is made of it; empty: "hfms" in the user\'s cache folder.',
        env="CACHE_DIR",
    )


class OpenVinoEngine:
    """Decoders of the families that are tested, from safetensors, GGUF or OpenVINO's own format, on CPUs."""

    name = "openvino"
    tasks: tuple[Task, ...] = ("generate",)
    packages = ("openvino", "torch", "transformers")
    imports = ("hfms_engines.openvino_runner", "hfms_engines.paged")
    quantizes: tuple[Quantize, ...] = ("int8", "int4")
    drafts = True

    def __init__(self, options: OpenVinoOptions = OpenVinoOptions()) -> None:
        self.options = options

    def supports(self, card: ModelCard, device: Device) -> str | None:
        """None, or the reason why not."""
        if "generate" not in card.tasks:
            return f"{card.architecture or card.model_type} does not generate text"
        if device.kind != "cpu":
            return "this engine runs on CPUs"
        if card.format not in ("safetensors", "gguf", "openvino"):
            return f"its weights are {card.format}, and this engine reads safetensors, GGUF and OpenVINO's"
        # What came as OpenVINO's is compared with itself, whatever its family.
        if card.format != "openvino" and card.model_type not in FAMILIES:
            return f"{card.model_type} is not among the models that it is tested with"
        if missing := missing_packages(card, self.packages):
            return f"{missing} not installed; run: pip install 'hfms[openvino]'"
        if card.remote_code:
            return "the model has code of its own"
        if card.format == "gguf" and (card.model_type not in GGUF_ARCHITECTURES or len(card.weights) != 1):
            return "transformers cannot read this GGUF"
        return None

    def estimate(self, request: LoadRequest) -> int:
        """Bytes for weights, keys and values, and work."""
        return self.footprint(request).total

    def footprint(self, request: LoadRequest) -> Footprint:
        held = self._held(request)
        weights = sum(openvino_weights(r, self._quantize(request)) for r in (request, _draft_of(request)) if r)
        return footprint(weights, held, cache_bytes(request, self.options.kv_cache_bytes, held))

    def _held(self, request: LoadRequest) -> int:
        """Bytes beside keys and values, those of a draft model with them."""
        # Adapters are torch's.
        held = openvino_bytes(request, self._quantize(request), torch=self.options.max_loras > 0)
        if draft := _draft_of(request):
            held += openvino_weights(draft, self._quantize(request))
        return held

    def quality(self, folder: Path) -> dict[Quantize, Quality]:
        """What quantisation has cost a model, for each that has been made of it."""
        found = {
            quantize: quality_of(folder_of(folder, TEXTS, quantize, self.options.cache_dir))
            for quantize in self.quantizes
        }
        return {quantize: quality for quantize, quality in found.items() if quality is not None}

    def leftovers(self) -> Iterable[Leftover]:
        """Conversions that no installed version would take any more, for embeddings too."""
        return leftovers(self.options.cache_dir)

    def load(self, request: LoadRequest) -> PagedScheduler:
        """Raises LoadFailed, UnsafeFormat and DoesNotFit."""
        from hfms_engines import openvino_runner
        from hfms_engines.paged import PagedScheduler

        quantize = self._quantize(request)
        cache = cache_bytes(request, self.options.kv_cache_bytes, self._held(request))
        folder = self._export(request, quantize)
        draft, draft_folder, draft_cache = _draft_of(request), None, 0
        if draft:
            if reason := self.supports(draft.card, draft.device):
                raise LoadFailed(f"The draft model cannot be used: {reason}.")
            # So that both have room for about as many tokens.
            share = parameters(draft.card) / (parameters(draft.card) + parameters(request.card))
            draft_folder, draft_cache = self._export(draft, quantize), int(cache * share)
        request.report("compile")

        def compiled(of: LoadRequest, folder: Path, cache: int, *, share: bool, max_loras: int = 0) -> Runner:
            return openvino_runner.load(
                folder,
                graph=of.folder / of.card.weights[0] if of.card.format == "openvino" else None,
                dtype=request.dtype,
                cache_bytes=cache,
                cache_dtype=self.options.kv_cache_dtype,
                share=share,
                threads=self.options.threads,
                max_loras=max_loras,
                max_lora_rank=self.options.max_lora_rank,
            )

        share = self.options.prefix_cache != "off"
        runner = compiled(request, folder, cache - draft_cache, share=share, max_loras=self.options.max_loras)
        drafter = compiled(draft, draft_folder, draft_cache, share=False) if draft and draft_folder else None
        if drafter and drafter.tokenizer.get_vocab() != runner.tokenizer.get_vocab():
            raise LoadFailed("The draft model has another vocabulary; only one with the same tokens can guess.")
        template = template_text(runner.tokenizer)
        info = LoadedInfo(
            engine=self.name,
            device=request.device.id,
            dtype=runner.precision,
            tasks=self.tasks,
            context_length=runner.context_length,
            max_batch=self.options.max_batch,
            memory_bytes=self.estimate(request),
            chat=bool(template),
            quantize=quantize,
            quality=quality_of(folder),
            weights_bytes=_read_bytes(folder, request.card, quantize, runner.precision),
            template=template,
            batching="paged",
        )
        return PagedScheduler(
            runner,
            info,
            prefill_tokens=self.options.prefill_tokens,
            stall_seconds=self.options.stall_seconds,
            guess_tokens=self.options.speculative_tokens,
            draft=drafter,
            share=self.options.prefix_cache == "all",
        )

    def _quantize(self, request: LoadRequest) -> Made:
        """What the load asks for, else what the options say; what came as OpenVINO's keeps its bits."""
        if request.card.format == "openvino":
            return "none"
        asked = (q for q in (request.quantize, self.options.quantize) if q != "auto")
        return cast("Made", next(asked, "none"))

    def _export(self, request: LoadRequest, quantize: Made) -> Path:
        """The folder of the converted model, which is made where there is none."""
        from hfms_engines.openvino_export import Job

        as_it_is = request.card.format == "openvino"
        if as_it_is and request.quantize not in ("auto", "none"):
            raise LoadFailed("A model as OpenVINO's keeps the bits that it was made with; load it without `quantize`.")
        return converted(
            request.folder,
            Job(str(request.folder), request.card, request.device, quantize),
            modules=NOTES if as_it_is else TEXTS,
            variant="notes" if as_it_is else quantize,
            cache_dir=self.options.cache_dir,
            report=request.report,
        )


def _draft_of(request: LoadRequest) -> LoadRequest | None:
    """How the draft model is loaded: as the model is."""
    if request.draft is None:
        return None
    return replace(request, folder=request.draft.folder, card=request.draft.card, draft=None)


def _read_bytes(folder: Path, card: ModelCard, quantize: Made, precision: str) -> int:
    """Bytes of weights that a token reads: as they were made, or as they are laid out for the precision."""
    from hfms_engines import openvino_export

    if card.format == "openvino" and card.dtype in ("int8", "int4"):
        return card.weights_bytes
    if quantize != "none":
        return openvino_export.weights_bytes(folder)
    return card.parameters * (2 if precision == "bfloat16" else 4)
