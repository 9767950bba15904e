"""What is said in recordings, by Whisper and torch. Imports nothing heavy until `load`.

    submit   what no sound could make right is refused; the call stands in the line
    begin    the first in line begins, while fewer than `max_batch` are under way
    step     one of those under way goes on by one piece: some sound decoded, or a token made
    leave    its segments are told, or it is cancelled

transformers' `generate` does a whole recording in one call; `turns.Turns` lets it run a token at a time. Calls take
turns, so that a short recording does not wait for a long one.
"""

from __future__ import annotations

import importlib.util
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hfms_cli import (
    BadRequest,
    Call,
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
    Recording,
    Segment,
    Speech,
    Task,
    setting,
)
from hfms_engines.calls import Choice, OpenCall, Prompt
from hfms_engines.line import Line
from hfms_engines.memory import MIB, footprint, torch_bytes, torch_weights
from hfms_engines.turns import Turns

if TYPE_CHECKING:
    from hfms_engines.whisper import Whisper

log = logging.getLogger("hfms.engine")

PACKAGES = ("torch", "transformers", "soundfile", "soxr")
# What a second of sound takes while it is worked on: samples, twice while they are joined, and the model's inputs.
SECOND_BYTES = 16_000 * 4 * 3 + 100 * 128 * 4
WINDOW_BYTES = 64 * MIB
"""Of one call under way: the encoder's states, keys and values."""

Said = list[tuple[str, Chunk | HfmsError | None]]


@dataclass(frozen=True)
class SpeechOptions:
    """Options of `[engine.speech]`."""

    max_batch: int = setting(4, "Recordings that are worked on in turns.", ge=1)
    max_seconds: float = setting(7200.0, "Longest recording, in seconds.", ge=1)
    threads: int = setting(0, "Threads on the CPU; 0: one for each physical core.", ge=0)


class SpeechEngine:
    """Whisper models, from safetensors, wherever torch runs. `find` says whether a package is installed."""

    name = "speech"
    tasks: tuple[Task, ...] = ("transcribe",)
    packages = ("torch", "transformers")

    def __init__(
        self,
        options: SpeechOptions = SpeechOptions(),
        find: Callable[[str], object] = importlib.util.find_spec,
    ) -> None:
        self._options = options
        self._find = find

    def supports(self, card: ModelCard, device: Device) -> str | None:
        if "transcribe" not in card.tasks:
            return f"{card.architecture or card.model_type} does not write down speech"
        if card.format not in ("safetensors", "pickle"):
            return f"its weights are {card.format}, and this engine reads safetensors"
        if card.model_type != "whisper":
            return f"{card.model_type} is no Whisper"
        if device.torch_device is None:
            return f"torch cannot use {device.id}"
        if missing := " and ".join(name for name in PACKAGES if self._find(name) is None):
            return f"{missing} not installed; run: pip install 'hfms[audio]'"
        return None

    def estimate(self, request: LoadRequest) -> int:
        return self.footprint(request).total

    def footprint(self, request: LoadRequest) -> Footprint:
        work = int(self._options.max_seconds * SECOND_BYTES) + self._options.max_batch * WINDOW_BYTES
        return footprint(torch_weights(request), torch_bytes(request) + work, 0)

    def load(self, request: LoadRequest) -> SpeechModel:
        """Raises LoadFailed and DoesNotFit."""
        import torch

        from hfms_engines.whisper import Whisper

        try:
            whisper = Whisper(request, self._options.threads)
        except HfmsError:
            raise
        except (MemoryError, torch.OutOfMemoryError) as exc:
            raise DoesNotFit(f"{request.device.id} has not enough free memory for this model.") from exc
        except Exception as exc:
            log.exception("loading failed")
            raise LoadFailed(f"This {request.card.model_type} model cannot be loaded; the log says why.") from exc
        info = LoadedInfo(
            engine=self.name,
            device=request.device.id,
            dtype=whisper.dtype,
            tasks=self.tasks,
            context_length=whisper.context_length,
            max_batch=self._options.max_batch,
            memory_bytes=self.estimate(request),
            weights_bytes=whisper.weights_bytes(),
        )
        return SpeechModel(info, whisper, self._options)


@dataclass(eq=False)
class Job(Choice):
    """A recording on its way."""

    speech: Speech
    temperature: float
    turns: Turns | None = None
    told: list[Chunk] = field(default_factory=list)
    """Not sent yet."""


class SpeechModel:
    """A loaded model."""

    def __init__(self, info: LoadedInfo, whisper: Whisper, options: SpeechOptions) -> None:
        self.info = info
        self._whisper = whisper
        self._options = options
        self._line: Line[Job] = Line()
        self._under_way: deque[Job] = deque()
        """The first has the next turn."""

    def submit(self, call: Call) -> None:
        if call.task not in self.info.tasks:
            raise BadRequest(f"The model `{call.model}` writes down speech and does nothing else.", param="model")
        (speech,) = call.inputs
        if not isinstance(speech, Speech):
            raise BadRequest("The input must be a recording.", param="file")
        self._whisper.check(speech)
        job = Job(OpenCall.of(call), 0, Prompt([]), 0, speech=speech, temperature=call.sampling.temperature)
        self._line.enter(job)

    def cancel(self, call_id: str) -> None:
        for job in [job for job in (*self._line, *self._under_way) if job.call.id == call_id]:
            self._leave(job)

    def busy(self) -> bool:
        return bool(self._line or self._under_way)

    def waiting(self) -> int:
        return len(self._line)

    def step(self) -> Said:
        while len(self._under_way) < self._options.max_batch and (job := self._line.first()) is not None:
            self._line.take(job)
            job.turns = Turns(lambda pause, job=job: self._work(job, pause))  # type: ignore[misc]
            self._under_way.append(job)
        if not self._under_way:
            return []
        job = self._under_way[0]
        self._under_way.rotate(-1)
        assert job.turns is not None
        end: list[HfmsError | None] = []
        try:
            if job.turns.go_on():
                end = [None]
        except HfmsError as exc:
            end = [exc]
        except MemoryError:
            end = [DoesNotFit("The device ran out of memory; try again, or with less.")]
        except Exception:
            log.exception("a recording could not be written down")
            end = [EngineFault("The model failed on this recording.")]
        told, job.told = job.told, []
        if end:
            self._leave(job)
        return [(job.call.id, outcome) for outcome in (*told, *end)]

    def close(self) -> None:
        for job in [*self._line, *self._under_way]:
            self._leave(job)

    def _leave(self, job: Job) -> None:
        if job.turns is not None:
            job.turns.drop()
            self._under_way.remove(job)
        self._line.leave(job)

    def _work(self, job: Job, pause: Callable[[], None]) -> None:
        """All of a call, with a pause between its pieces."""
        import numpy

        from hfms_engines import sound
        from hfms_engines.whisper import TOKENS_A_SECOND

        pieces = []
        for piece in sound.decoded(job.speech.data, rate=self._whisper.rate, longest=self._options.max_seconds):
            pieces.append(piece)
            pause()
        samples = numpy.concatenate(pieces)
        if not len(samples):
            raise BadRequest("There is no sound in the file.", param="file", code="invalid_audio")

        def begin(recording: Recording) -> None:
            tokens = max(1, round(recording.seconds * TOKENS_A_SECOND))
            self._line.charge(job.key, tokens)
            job.told.append(Chunk(prompt_tokens=tokens, recording=recording))

        def hear(segment: Segment, tokens: int) -> None:
            self._line.charge(job.key, tokens)
            job.told.append(Chunk(text=segment.text, tokens=tokens, segment=segment))

        self._whisper.transcribe(job.speech, samples, job.temperature, begin, hear, pause)
        job.told.append(Chunk(finish_reason="stop"))
