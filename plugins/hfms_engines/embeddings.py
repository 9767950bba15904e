"""Embeddings by torch, equal to sentence-transformers'; inputs of all calls share forward passes.

The road of a call: `submit` tokenises and checks every input, `step` takes inputs of similar length from the calls in
turn and runs them, and each vector goes out as soon as it is there.
"""

from __future__ import annotations

import importlib.util
import logging
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hfms_cli import (
    BadRequest,
    Call,
    Chunk,
    Device,
    DoesNotFit,
    EngineFault,
    HfmsError,
    LoadedInfo,
    LoadFailed,
    LoadRequest,
    ModelCard,
    Task,
    UnsafeFormat,
    setting,
)
from hfms_engines.sentence_encoder import Encoder, Input
from hfms_engines.sentence_files import Recipe

log = logging.getLogger(__name__)

WIDTH = {"float32": 4, "float16": 2, "bfloat16": 2}
# Measured with MiniLM and a BERT-large on CPU: what a worker process holds beside the weights, and what a token of a
# batch takes while it passes through.
PROCESS_BYTES = 640 * 2**20
TOKEN_BYTES = 96 * 2**10


@dataclass(frozen=True)
class EmbeddingsOptions:
    """Options of `[engine.embeddings]`."""

    batch_size: int = setting(32, "Inputs in one forward pass.", ge=1, le=4096)
    batch_tokens: int = setting(
        0,
        "Tokens in one forward pass, padding included; 0: 2048 on the CPU, where more is not faster, else 8192.",
        ge=0,
    )

    def tokens_on(self, device: Device) -> int:
        return self.batch_tokens or (2048 if device.torch_device == "cpu" else 8192)


class Embeddings:
    """The engine. `find` says whether a package is installed."""

    name = "embeddings"
    tasks: tuple[Task, ...] = ("embed",)

    def __init__(
        self,
        options: EmbeddingsOptions = EmbeddingsOptions(),
        find: Callable[[str], object] = importlib.util.find_spec,
    ) -> None:
        self._options = options
        self._find = find

    def supports(self, card: ModelCard, device: Device) -> str | None:
        if "embed" not in card.tasks:
            return "it makes no embeddings"
        if card.format not in ("safetensors", "pickle"):
            return f"its weights are {card.format}, and this engine reads safetensors"
        if device.torch_device is None:
            return f"torch cannot use {device.id}"
        if self._find("torch") is None or self._find("transformers") is None:
            return "torch and transformers are not installed: pip install 'hfms[transformers]'"
        return None

    def estimate(self, request: LoadRequest) -> int:
        card, width = request.card, WIDTH[_dtype(request)]
        weights = card.parameters * width or card.weights_bytes * width // WIDTH.get(card.dtype, width)
        return weights + self._options.tokens_on(request.device) * TOKEN_BYTES + PROCESS_BYTES

    def load(self, request: LoadRequest) -> EmbeddingModel:
        import torch

        recipe, dtype = Recipe.read(request.folder), _dtype(request)
        try:
            encoder = Encoder(recipe, request, dtype)
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
            dtype=dtype,
            tasks=self.tasks,
            context_length=encoder.max_length,
            max_batch=self._options.batch_size,
            memory_bytes=encoder.memory_bytes,
            dimensions=encoder.dimensions,
        )
        return EmbeddingModel(info, encoder, self._options.batch_size, self._options.tokens_on(request.device))


def _dtype(request: LoadRequest) -> str:
    """The precision that `auto` stands for: float32 on the CPU, the model's own elsewhere."""
    if request.dtype != "auto":
        return request.dtype
    own = request.card.dtype if request.card.dtype in WIDTH else "float32"
    return "float32" if request.device.torch_device == "cpu" else own


class Job:
    """A call and those of its inputs that are still to be done, shortest first."""

    def __init__(self, call: Call, inputs: list[Input]) -> None:
        self.id = call.id
        self.dimensions = call.dimensions
        self.pending = sorted(inputs, key=len)
        self._total = len(inputs)

    @property
    def begun(self) -> bool:
        return len(self.pending) < self._total

    def take(self, longest: int) -> Input | None:
        """The longest input of at most `longest` tokens; None where it would be more padding than text."""
        at = bisect_right(self.pending, longest, key=len) - 1
        if at < 0 or 2 * len(self.pending[at]) < longest:
            return None
        return self.pending.pop(at)


class EmbeddingModel:
    """A loaded model. One step is one forward pass over inputs of similar length, one a call in turn."""

    def __init__(self, info: LoadedInfo, encoder: Encoder, batch_size: int, batch_tokens: int) -> None:
        self.info = info
        self._encoder = encoder
        self._batch_size = batch_size
        self._batch_tokens = batch_tokens
        self._jobs: dict[str, Job] = {}  # in the order in which they lead a step

    def submit(self, call: Call) -> None:
        if call.task != "embed":
            raise BadRequest(f"The model `{call.model}` makes embeddings and cannot generate text.", param="model")
        if not call.inputs:
            raise BadRequest("There is nothing to embed: the list is empty.", param="input")
        size = self.info.dimensions
        if call.dimensions is not None and not 1 <= call.dimensions <= size:
            raise BadRequest(f"dimensions is {call.dimensions}; this model's are 1 to {size}.", param="dimensions")
        self._jobs[call.id] = Job(call, self._encoder.read(call.inputs))

    def cancel(self, call_id: str) -> None:
        self._jobs.pop(call_id, None)

    def busy(self) -> bool:
        return bool(self._jobs)

    def waiting(self) -> int:
        return sum(not job.begun for job in self._jobs.values())

    def step(self) -> list[tuple[str, Chunk | HfmsError | None]]:
        if not self._jobs:
            return []
        batch = self._next_batch()
        jobs = {job.id: job for job, _ in batch}
        try:
            vectors = self._encoder.encode([item for _, item in batch])
            said: list[tuple[str, Chunk | HfmsError | None]] = [
                (job.id, Chunk(item.index, vector=_packed(vector, job.dimensions), prompt_tokens=len(item)))
                for (job, item), vector in zip(batch, vectors, strict=True)
            ]
            done = [job.id for job in jobs.values() if not job.pending]
            said += [(id, None) for id in done]
        except Exception:
            log.exception("a batch of %d inputs failed", len(batch))
            done = list(jobs)
            said = [(id, EngineFault("The model failed on this batch of inputs; the log says why.")) for id in done]
        for id in done:
            del self._jobs[id]
        return said

    def close(self) -> None:
        self._jobs.clear()
        del self._encoder

    def _next_batch(self) -> list[tuple[Job, Input]]:
        """Each call leads in turn: its longest input sets the length, then one input a call and round fills the rest.

        So a call of one input waits for at most as many steps as there are calls, however long their lists are.
        """
        turns = deque(self._jobs.values())
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


def _packed(vector: Any, dimensions: int | None) -> bytes:
    if dimensions is not None:
        vector = vector[:dimensions]
        vector = vector / vector.norm().clamp(min=1e-12)
    data: bytes = vector.numpy().astype("<f4").tobytes()
    return data
