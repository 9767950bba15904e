"""One candidate in its real worker process: how it is asked, and what its answers come to."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from statistics import median
from typing import Any

from hfms_cli.bench.dataset import Prompt
from hfms_cli.bench.load import Load, apply
from hfms_cli.bench.measure import Outcome, Run
from hfms_cli.engines.host import EngineHost
from hfms_cli.errors import HfmsError
from hfms_cli.models.ledger import Reservation
from hfms_cli.models.tuned import Choice
from hfms_cli.types import Call, LoadedInfo, Sampling

_ids = count()


@dataclass
class Trial:
    """A candidate, and what was measured of it."""

    choice: Choice
    host: EngineHost
    reservation: Reservation
    load_seconds: float
    info: LoadedInfo
    changes_answers: bool
    memory_bytes: int = 0
    """The most that it held after a run."""
    runs: dict[int, list[Run]] = field(default_factory=dict)
    """By how many were asked at once."""

    async def run(self, prompts: Sequence[Prompt], concurrency: int) -> None:
        """Ask all, so many at once, and keep the outcomes."""
        run = Run()
        await apply(Load(concurrency), prompts, self._ask, run, lambda _: None)
        self.runs.setdefault(concurrency, []).append(run)
        self.memory_bytes = max(self.memory_bytes, self.host.held_bytes)

    async def warm_up(self, prompts: Sequence[Prompt], concurrency: int) -> None:
        """Ask without keeping the outcomes."""
        await apply(Load(concurrency), prompts, self._ask, Run(), lambda _: None)

    async def _ask(self, prompt: Prompt) -> Outcome:
        """Greedy, of full length. Never raises for what the engine does: that is the outcome."""
        # A token has at least a byte, so what has no more characters than this fits.
        room = max(1, self.info.context_length - prompt.output_len - 1)
        call = Call(
            id=f"tune-{next(_ids)}",
            model=self.host.model,
            task="generate",
            inputs=[prompt.text.encode()[:room].decode(errors="ignore")],
            sampling=Sampling(max_tokens=prompt.output_len, temperature=0.0, ignore_eos=True),
        )
        outcome = Outcome(sent=time.perf_counter(), prompt_tokens=0, output_tokens=0)
        try:
            async for chunk in self.host.submit(call):
                if chunk.tokens:  # else it only says that the prompt is being read
                    outcome.times.append(time.perf_counter())
                outcome.prompt_tokens = (outcome.prompt_tokens or 0) + chunk.prompt_tokens
                outcome.output_tokens = (outcome.output_tokens or 0) + chunk.tokens
        except HfmsError as exc:
            outcome.error, outcome.reason = type(exc).__name__, exc.message
        outcome.ended = time.perf_counter()
        return outcome

    @property
    def failure(self) -> str | None:
        """Why it is out of the race: its first failed request."""
        failed = (r for runs in self.runs.values() for run in runs for r in run.failures.values())
        return next(failed, None)

    def speeds(self, concurrency: int) -> list[float]:
        """Of each run: answers a second of those that are alone, tokens a second of those that are not."""
        if concurrency == 1:
            return [1 / median(o.e2el for o in run.completed) for run in self.runs[1]]
        return [_tokens(run, "output_tokens") / run.duration for run in self.runs[concurrency]]

    def ttft(self) -> float:
        """Seconds; median of a request that is alone."""
        return median(o.ttft for run in self.runs[1] for o in run.completed)

    def decode_rate(self) -> float | None:
        """Tokens a second after the first, of a request that is alone."""
        gaps = [tpot for run in self.runs[1] for o in run.completed if (tpot := o.tpot)]
        return 1 / median(gaps) if gaps else None

    def output_rate(self, concurrency: int) -> float:
        """Tokens written a second, median of the runs."""
        return median(self.speeds(concurrency))

    def total_rate(self, concurrency: int) -> float:
        """Tokens read and written a second, median of the runs."""
        return median(
            (_tokens(run, "output_tokens") + _tokens(run, "prompt_tokens")) / run.duration
            for run in self.runs[concurrency]
        )


def _tokens(run: Run, which: str) -> int:
    counts: list[Any] = [getattr(o, which) for o in run.completed]
    return sum(c or 0 for c in counts)
