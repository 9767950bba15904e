"""Which ways to run a model are worth measuring: first engines and precisions, then the limits of the best."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from hfms_cli.models.loader import Candidate
from hfms_cli.models.tuned import Choice
from hfms_cli.types import LoadedInfo, ModelCard, Quantize

DTYPES = ("auto", "float32", "bfloat16")
PREFILLS = (64, 128, 256, 512)


@dataclass(frozen=True)
class Knobs:
    """What can be turned of one engine, and the operator has left alone: names of options with their defaults."""

    defaults: Mapping[str, Any]

    def vary(self, choice: Choice, concurrency: int) -> Iterator[Choice]:
        """The same choice with one limit changed at a time."""
        cores = usable_cores()
        values = {
            # A thread for each core that can be had, half as many, and one.
            "threads": [n for n in dict.fromkeys((cores, cores // 2, 1)) if n > 0],
            "prefill_tokens": list(PREFILLS) if concurrency > 1 else [],
            "max_batch": [n for n in (concurrency, concurrency // 2) if n > 1],
        }
        for name, some in values.items():
            for value in some if name in self.defaults else []:
                if value != self.defaults[name]:
                    yield replace(choice, options={**choice.options, name: value})


def usable_cores() -> int:
    """Logical cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def precisions(candidate: Candidate, dtype: str, quantize: Quantize) -> Iterator[Choice]:
    """Every precision of one engine on one kind of device, its own first.

    dtype, quantize: what the operator asks for; anything but `auto` is not varied.
    """
    engine, kind = candidate.engine, candidate.request.device.kind
    quantizes: list[Quantize] = ["auto", *getattr(engine, "quantizes", ())] if quantize == "auto" else [quantize]
    for q in quantizes:
        for d in DTYPES if dtype == "auto" else (dtype,):
            yield Choice(engine=engine.name, device=kind, dtype=d, quantize=q)


def changes_answers(choice: Choice, info: LoadedInfo, card: ModelCard, asked: tuple[str, Quantize]) -> bool:
    """Whether a choice rounds a model more than the model itself, its engine unasked, or the operator does.

    asked: the operator's dtype and quantize.
    """
    dtype, quantize = asked
    rounded = choice.quantize not in ("auto", quantize) and info.quantize != "none"
    return rounded or choice.dtype not in ("auto", "float32", dtype, card.dtype)
