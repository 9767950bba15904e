"""Embeddings and scores of pairs, equal to sentence-transformers'; inputs of all calls share forward passes.

The road of a call: `submit` takes it, each `step` makes tokens of a slice of what has come, takes inputs of similar
length from the calls in turn and runs them, and each vector or score goes out as soon as it is there.
"""

from __future__ import annotations

import importlib.util
import logging
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from hfms_cli import (
    BadRequest,
    Call,
    CallInput,
    Chunk,
    Device,
    DoesNotFit,
    EngineFault,
    Footprint,
    HfmsError,
    LoadedInfo,
    LoadFailed,
    LoadRequest,
    ModelCard,
    Pair,
    Quantize,
    Task,
    UnsafeFormat,
    setting,
)
from hfms_engines.sentence_encoder import Encoder, Input, Runner
from hfms_engines.sentence_files import Recipe

log = logging.getLogger(__name__)

WIDTH = {"float32": 4, "float16": 2, "bfloat16": 2}
# Measured with MiniLM and a BERT-large on CPU: what a worker process holds beside the weights, and what a token of a
# batch takes while it passes through.
PROCESS_BYTES = 640 * 2**20
TOKEN_BYTES = 96 * 2**10
# Formats that OpenVINO runs as they are.
GRAPHS = ("openvino", "onnx")
# What is made into tokens between two forward passes: some milliseconds' work.
SLICE_TEXTS = 256
SLICE_CHARACTERS = 2**16
# Models whose vectors or scores by OpenVINO are tested to be those by torch.
# fmt: off
TRACED = {
    "albert", "bert", "camembert", "deberta-v2", "distilbert", "electra", "ernie", "eurobert", "modernbert", "mpnet",
    "nomic_bert", "roberta", "xlm-roberta",
}
# fmt: on

Said = list[tuple[str, Chunk | HfmsError | None]]


@dataclass(frozen=True)
class EmbeddingsOptions:
    """Options of `[engine.embeddings]`."""

    runner: str = setting(
        "auto",
        "What runs the model; auto: OpenVINO on CPUs where it is installed and can take the model, else torch.",
        choices=("auto", "openvino", "torch"),
    )
    quantize: str = setting(
        "none", "Bits of the weights, by OpenVINO; int8 takes less memory.", choices=("none", "int8")
    )
    batch_size: int = setting(32, "Inputs in one forward pass.", ge=1, le=4096)
    batch_tokens: int = setting(
        0,
        "Tokens in one forward pass, padding included; 0: 2048 on the CPU, where more is not faster, else 8192.",
        ge=0,
    )
    cache_dir: str = setting(
        "",
        'Folder for what is fetched and what is made of it; empty: "hfms" in the user\'s cache folder.',
        env="CACHE_DIR",
    )

    def tokens_on(self, device: Device) -> int:
        return self.batch_tokens or (2048 if device.torch_device == "cpu" else 8192)


class Embeddings:
    """The engine. `find` says whether a package is installed."""

    name = "embeddings"
    tasks: tuple[Task, ...] = ("embed", "score")
    quantizes: tuple[Quantize, ...] = ("int8",)

    def __init__(
        self,
        options: EmbeddingsOptions = EmbeddingsOptions(),
        find: Callable[[str], object] = importlib.util.find_spec,
    ) -> None:
        self._options = options
        self._find = find

    def supports(self, card: ModelCard, device: Device) -> str | None:
        if not {*card.tasks} & {*self.tasks}:
            return "it makes no embeddings and scores no pairs"
        if card.format in GRAPHS:
            return self._why_not_graph(device)
        if card.format not in ("safetensors", "pickle"):
            return f"its weights are {card.format}, and this engine reads safetensors, OpenVINO's and ONNX"
        if device.torch_device is None:
            return f"torch cannot use {device.id}"
        if self._find("torch") is None or self._find("transformers") is None:
            return "torch and transformers are not installed: pip install 'hfms[transformers]'"
        return None

    def estimate(self, request: LoadRequest) -> int:
        return self.footprint(request).total

    def footprint(self, request: LoadRequest) -> Footprint:
        card, width = request.card, WIDTH[_dtype(request)]
        weights = card.parameters * width or card.weights_bytes * width // WIDTH.get(card.dtype, width)
        return Footprint(weights, 0, self._options.tokens_on(request.device) * TOKEN_BYTES + PROCESS_BYTES)

    def load(self, request: LoadRequest) -> EmbeddingModel:
        import torch

        task: Task = "score" if "score" in request.card.tasks else "embed"
        recipe = Recipe.read(request.folder, task)
        try:
            encoder = Encoder(recipe, request, self._load_runner(recipe, request))
        except HfmsError:
            raise
        except (MemoryError, torch.OutOfMemoryError) as exc:
            raise DoesNotFit(f"{request.device.id} has not enough free memory for this model.") from exc
        except Exception as exc:
            log.exception("loading failed")
            if request.card.remote_code and not request.trust_remote_code:
                raise UnsafeFormat("The model runs only with its own code, and that is not allowed here.") from exc
            raise LoadFailed(f"This {request.card.model_type} model cannot be loaded; the log says why.") from exc
        info = LoadedInfo(
            engine=self.name,
            device=request.device.id,
            dtype=encoder.precision,
            quantize=self._quantize(request),
            tasks=(task,),
            context_length=encoder.max_length,
            max_batch=self._options.batch_size,
            memory_bytes=encoder.memory_bytes,
            dimensions=encoder.dimensions,
        )
        return EmbeddingModel(info, encoder, self._options.batch_size, self._options.tokens_on(request.device))

    def _load_runner(self, recipe: Recipe, request: LoadRequest) -> Runner:
        """OpenVINO where it can run the model, else torch; what was asked for by name is never replaced."""
        options = self._options
        quantize = self._quantize(request)
        if request.card.format in GRAPHS:
            if request.quantize == "int8":
                raise LoadFailed("A model as OpenVINO or ONNX keeps the bits that it was made with; load it without.")
            from hfms_engines import sentence_graph

            return sentence_graph.load(recipe, request)
        reason = "[engine.embeddings] runner is torch"
        if options.runner != "torch":
            reason = self._why_not_openvino(request) or ""
            try:
                if not reason:
                    from hfms_engines import sentence_openvino

                    return sentence_openvino.load(request, quantize, options.cache_dir)
            except LoadFailed as exc:
                reason = exc.message
        if options.runner == "openvino" or quantize != "none":
            raise LoadFailed(f"OpenVINO does not run this model, and that was asked for: {reason}")
        if options.runner == "auto" and request.device.kind == "cpu":
            log.warning("torch runs this model and not OpenVINO, which is faster: %s", reason)
        from hfms_engines import sentence_torch

        return sentence_torch.load(recipe, request, _dtype(request))

    def _quantize(self, request: LoadRequest) -> Literal["none", "int8"]:
        """What the load asks for, else what the options say."""
        if request.card.format in GRAPHS:
            return "none"
        asked = self._options.quantize if request.quantize == "auto" else request.quantize
        return "int8" if asked == "int8" else "none"

    def _why_not_graph(self, device: Device) -> str | None:
        """Why a model that comes as a graph cannot be run there, or None."""
        if self._options.runner == "torch":
            return "torch reads neither OpenVINO's format nor ONNX, and [engine.embeddings] runner asks for it"
        if device.kind != "cpu":
            return "models as OpenVINO or ONNX run on CPUs alone"
        missing = [package for package in ("openvino", "torch", "transformers") if self._find(package) is None]
        return f"{' and '.join(missing)} not installed: pip install 'hfms[openvino]'" if missing else None

    def _why_not_openvino(self, request: LoadRequest) -> str | None:
        if request.device.kind != "cpu":
            return "it is used on CPUs alone"
        if self._find("openvino") is None:
            return "it is not installed: pip install 'hfms[openvino]'"
        if request.card.model_type not in TRACED:
            return f"{request.card.model_type} is not among the models that are tested with it"
        return "the model has code of its own" if request.card.remote_code else None


def _dtype(request: LoadRequest) -> str:
    """The precision that torch takes `auto` for: float32 on the CPU, the model's own elsewhere."""
    if request.dtype != "auto":
        return request.dtype
    own = request.card.dtype if request.card.dtype in WIDTH else "float32"
    return "float32" if request.device.torch_device == "cpu" else own


class Job:
    """A call and those of its inputs that are still to be done: unread ones in order, then tokens, shortest first."""

    def __init__(self, call: Call) -> None:
        self.id = call.id
        self.dimensions = call.dimensions
        self.unread: deque[tuple[int, CallInput]] = deque(enumerate(call.inputs))
        self.pending: list[Input] = []
        self.begun = False

    @property
    def done(self) -> bool:
        return not self.unread and not self.pending

    def take(self, longest: int) -> Input | None:
        """The longest input of at most `longest` tokens; None where it would be more padding than text."""
        at = bisect_right(self.pending, longest, key=len) - 1
        if at < 0 or 2 * len(self.pending[at]) < longest:
            return None
        self.begun = True
        return self.pending.pop(at)


class EmbeddingModel:
    """A loaded model. One step is one slice of texts made into tokens, and one forward pass over inputs of similar
    length; both take one input a call in turn."""

    def __init__(self, info: LoadedInfo, encoder: Encoder, batch_size: int, batch_tokens: int) -> None:
        self.info = info
        self._encoder = encoder
        self._batch_size = batch_size
        self._batch_tokens = batch_tokens
        self._jobs: dict[str, Job] = {}  # in the order in which they lead a step

    def submit(self, call: Call) -> None:
        if call.task not in self.info.tasks:
            can = {"embed": "makes embeddings", "score": "scores pairs of texts"}[self.info.tasks[0]]
            raise BadRequest(f"The model `{call.model}` {can} and does nothing else.", param="model")
        if not call.inputs:
            raise BadRequest("There is no input: the list is empty.", param="input")
        size = self.info.dimensions
        if call.dimensions is not None and not 1 <= call.dimensions <= size:
            raise BadRequest(f"dimensions is {call.dimensions}; this model's are 1 to {size}.", param="dimensions")
        self._jobs[call.id] = Job(call)

    def cancel(self, call_id: str) -> None:
        self._jobs.pop(call_id, None)

    def busy(self) -> bool:
        return bool(self._jobs)

    def waiting(self) -> int:
        return sum(not job.begun for job in self._jobs.values())

    def step(self) -> Said:
        return [*self._read_slice(), *self._run_batch()]

    def close(self) -> None:
        self._jobs.clear()
        del self._encoder

    # --- texts into tokens ---

    def _read_slice(self) -> Said:
        """Make tokens of some texts, so that a call of thousands delays the others by no more than this."""
        taken = self._next_slice()
        if not taken:
            return []
        try:
            read = self._encoder.read([given for _, given in taken])
        except Exception:
            log.exception("%d inputs could not be made into tokens", len(taken))
            return self._end({job.id for job, _ in taken}, EngineFault("The tokenizer failed; the log says why."))
        said: Said = []
        for (job, _), found in zip(taken, read, strict=True):
            if isinstance(found, Input):
                job.pending.append(found)
            elif job.id in self._jobs:
                said += self._end({job.id}, found)
        for job in {job.id: job for job, _ in taken}.values():
            job.pending.sort(key=len)
        return said

    def _next_slice(self) -> list[tuple[Job, tuple[int, CallInput]]]:
        turns = deque(job for job in self._jobs.values() if job.unread)
        taken: list[tuple[Job, tuple[int, CallInput]]] = []
        room = SLICE_CHARACTERS
        while turns and room > 0 and len(taken) < SLICE_TEXTS:
            job = turns.popleft()
            index, item = job.unread.popleft()
            taken.append((job, (index, item)))
            room -= _characters(item)
            if job.unread:
                turns.append(job)
        return taken

    # --- tokens into vectors ---

    def _run_batch(self) -> Said:
        batch = self._next_batch()
        if not batch:
            return []
        try:
            made = self._encoder.encode([item for _, item in batch])
        except Exception:
            log.exception("a batch of %d inputs failed", len(batch))
            fault = EngineFault("The model failed on this batch of inputs; the log says why.")
            return self._end({job.id for job, _ in batch}, fault)
        said: Said = [(job.id, self._chunk(job, item, one)) for (job, item), one in zip(batch, made, strict=True)]
        return said + self._end({job.id for job, _ in batch if job.done}, None)

    def _end(self, calls: set[str], how: HfmsError | None) -> Said:
        for id in calls:
            del self._jobs[id]
        return [(id, how) for id in calls]

    def _chunk(self, job: Job, item: Input, made: Any) -> Chunk:
        if self.info.tasks == ("score",):
            return Chunk(item.index, score=float(made), prompt_tokens=len(item))
        return Chunk(item.index, vector=_packed(made, job.dimensions), prompt_tokens=len(item))

    def _next_batch(self) -> list[tuple[Job, Input]]:
        """Each call leads in turn: its longest input sets the length, then one input a call and round fills the rest.

        So a call of one input waits for at most as many steps as there are calls, however long their lists are.
        """
        turns = deque(job for job in self._jobs.values() if job.pending)
        if not turns:
            return []
        lead = turns[0]
        self._jobs[lead.id] = self._jobs.pop(lead.id)
        longest = len(lead.pending[-1])
        rows = max(1, min(self._batch_size, self._batch_tokens // longest))
        batch: list[tuple[Job, Input]] = []
        while turns and len(batch) < rows:
            job = turns.popleft()
            item = job.take(longest)
            if item is not None:
                batch.append((job, item))
                turns.append(job)
        return batch


def _characters(item: CallInput) -> int:
    """Roughly what it costs to make tokens of an input."""
    if isinstance(item, Pair):
        return len(item.query) + len(item.document)
    return len(item) if isinstance(item, str) else 0


def _packed(vector: Any, dimensions: int | None) -> bytes:
    if dimensions is not None:
        vector = vector[:dimensions]
        vector = vector / vector.norm().clamp(min=1e-12)
    data: bytes = vector.numpy().astype("<f4").tobytes()
    return data
