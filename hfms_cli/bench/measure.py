"""What a run's timestamps come to, under the names that `vllm bench serve` gives them.

    sent ─────── first text ── text ── text ─── end
      └── TTFT ──┘        └ITL─┘  └ITL─┘        │
      │          └── (output tokens - 1) x TPOT ┘
      └────────────────── E2EL ─────────────────┘

Tokens are those of the server's `usage`. Where an answer came without one its tokens are unknown, and so is every
figure that needs them: pieces of a stream are no tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from hfms_cli.errors import ConfigError

METRICS = ("ttft", "tpot", "itl", "e2el")
LIMITED = ("ttft", "tpot", "e2el")
"""What a request can be good or bad by: it has one of each."""


@dataclass(slots=True)
class Outcome:
    """One request as its client saw it; times are seconds of one clock."""

    sent: float
    times: list[float] = field(default_factory=list)
    """When each piece of text came."""
    ended: float = 0.0
    """The last piece of text, or the answer's word that it is complete; of a failed request, when it failed."""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    error: str | None = None
    """What kind of failure, in few words, so that the same ones can be counted."""
    reason: str = ""
    """What the server said of it."""

    @property
    def e2el(self) -> float:
        return self.ended - self.sent

    @property
    def ttft(self) -> float:
        """An answer without any text is all there when it ends."""
        return (self.times[0] if self.times else self.ended) - self.sent

    @property
    def tpot(self) -> float | None:
        """None where the answer has no second token, or nobody knows whether it has."""
        if self.output_tokens is None or self.output_tokens < 2:
            return None
        return (self.e2el - self.ttft) / (self.output_tokens - 1)

    @property
    def itl(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.times)]


@dataclass
class Run:
    """Requests sent under one load. `began` and `ended` are of the clock of its outcomes.

    whole: every request was answered or failed; False for a run that was stopped.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    began: float = 0.0
    ended: float = 0.0
    whole: bool = False

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.ended - self.began

    @property
    def completed(self) -> list[Outcome]:
        return [o for o in self.outcomes if o.error is None]

    @property
    def failures(self) -> dict[str, str]:
        """Each kind of failure, and what the server said when it first happened."""
        return {o.error: o.reason for o in reversed(self.outcomes) if o.error is not None}


@dataclass(frozen=True)
class Wanted:
    """Which figures to compute. percentiles: 0 to 100. goodput: milliseconds that a good request does not exceed."""

    metrics: tuple[str, ...] = METRICS
    percentiles: tuple[float, ...] = (50, 90, 99)
    goodput: Mapping[str, float] = field(default_factory=dict)


def summarise(run: Run, wanted: Wanted, *, streamed: bool = True) -> dict[str, Any]:
    """The figures of a run, JSON throughout; None for what cannot be known.

    streamed: False for embeddings, which have no output tokens and only an end-to-end latency.
    """
    completed = run.completed
    prompt = _total([o.prompt_tokens for o in completed])
    output = _total([o.output_tokens for o in completed]) if streamed else 0
    good = sum(is_good(o, wanted.goodput) for o in completed) if wanted.goodput else None
    result: dict[str, Any] = {
        "duration": run.duration,
        "completed": len(completed),
        "failed": len(run.outcomes) - len(completed),
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": _rate(len(completed), run.duration),
        "request_goodput": _rate(good, run.duration),
        "output_throughput": _rate(output, run.duration),
        "total_token_throughput": _rate(
            None if None in (prompt, output) else (prompt or 0) + (output or 0), run.duration
        ),
    }
    values: dict[str, list[float]] = {"e2el": [o.e2el for o in completed]}
    if streamed:
        values["ttft"] = [o.ttft for o in completed]
        values["tpot"] = [tpot for o in completed if (tpot := o.tpot) is not None]
        values["itl"] = [gap for o in completed for gap in o.itl]
    for name in METRICS:
        if name in wanted.metrics and name in values:
            result |= spread(name, values[name], wanted.percentiles)
    result["errors"] = dict(Counter(o.error for o in run.outcomes if o.error is not None).most_common())
    return result


def is_good(outcome: Outcome, limits: Mapping[str, float]) -> bool:
    """Whether a request kept to every limit, in milliseconds. One that has no TPOT kept to that."""
    return all((getattr(outcome, name) or 0.0) * 1000 <= limit for name, limit in limits.items())


def spread(name: str, seconds: Sequence[float], percentiles: Sequence[float]) -> dict[str, float | None]:
    """`mean_NAME_ms`, `median_`, `std_` and `pN_` of the values; None for each where there are none."""
    keys = [f"{k}_{name}_ms" for k in ("mean", "median", "std", *(f"p{p:g}" for p in percentiles))]
    if not seconds:
        return dict.fromkeys(keys)
    ordered = sorted(1000 * s for s in seconds)
    mean = math.fsum(ordered) / len(ordered)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in ordered) / len(ordered))
    values = [mean, percentile(ordered, 50), deviation, *(percentile(ordered, p) for p in percentiles)]
    return dict(zip(keys, values, strict=True))


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The value that `percent` of 100 lie below, between two neighbours by their distance (numpy's default)."""
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    below, above = ordered[low], ordered[min(low + 1, len(ordered) - 1)]
    return below + (above - below) * (place - low)


def parse_goodput(text: str) -> dict[str, float]:
    """Limits in milliseconds from `ttft:500 tpot:50`. Raises ConfigError."""
    limits = {}
    for word in text.split():
        name, _, value = word.partition(":")
        limit = _number(value)
        if name not in LIMITED or limit is None or limit <= 0:
            raise ConfigError(
                f"--goodput has {word!r}; it takes limits such as `ttft:500`, of {', '.join(LIMITED)}, in ms"
            )
        limits[name] = limit
    return limits


def parse_metrics(text: str) -> tuple[str, ...]:
    """Names from `ttft,tpot`. Raises ConfigError."""
    names = tuple(text.split(","))
    if unknown := [n for n in names if n not in METRICS]:
        raise ConfigError(f"--percentile-metrics has {unknown[0]!r}; it takes {','.join(METRICS)}")
    return names


def parse_percentiles(text: str) -> tuple[float, ...]:
    """Numbers from `50,90,99.9`. Raises ConfigError."""
    numbers = [_number(word) for word in text.split(",")]
    good = tuple(n for n in numbers if n is not None and 0 <= n <= 100)
    if len(good) < len(numbers):
        raise ConfigError(f"--metric-percentiles is {text!r}; it takes numbers from 0 to 100, such as 50,90,99")
    return good


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _total(counts: list[int | None]) -> int | None:
    known = [c for c in counts if c is not None]
    return sum(known) if len(known) == len(counts) else None


def _rate(count: int | None, seconds: float) -> float | None:
    return None if count is None or seconds <= 0 else count / seconds
