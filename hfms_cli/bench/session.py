"""All that one `hfms bench` measures: each load on each server, two servers in turns, and the results as JSON."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from hfms_cli.bench.compare import medians, ratios
from hfms_cli.bench.dataset import Prompts
from hfms_cli.bench.load import Endpoint, Load, Sender, apply
from hfms_cli.bench.measure import Outcome, Run, Wanted, summarise
from hfms_cli.version import __version__

NAMES = "AB"
Told = Callable[[Outcome], None]
Showing = Callable[[str, int], AbstractContextManager[Told]]
"""Takes what a run is called and how many requests it has; gives what is told of each outcome."""


@dataclass(frozen=True)
class Target:
    """A model of a server. url: its root. key: sent as a bearer token."""

    url: str
    model: str
    key: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Measured:
    """One run on one target, both by number."""

    target: int
    repeat: int
    load: Load
    run: Run = field(default_factory=Run)


@dataclass
class Session:
    """Targets, loads, and what to ask. `measured` grows while it runs, so that a Ctrl-C leaves something."""

    targets: list[Target]
    endpoint: Endpoint
    sampling: dict[str, Any]
    loads: list[Load]
    repeats: int
    num_prompts: int
    num_warmups: int
    prompts: Prompts
    wanted: Wanted
    measured: list[Measured] = field(default_factory=list)
    length_unit: str = "tokens"

    async def measure(self, showing: Showing) -> None:
        """Run every load on every target. Both targets of a pair are asked the same. Raises ConfigError."""
        async with AsyncExitStack() as stack:
            senders = [
                await stack.enter_async_context(
                    Sender(t.url, self.endpoint, t.model, key=t.key, sampling=self.sampling)
                )
                for t in self.targets
            ]
            dataset, self.length_unit = await self.prompts.prepare(senders[0].send)
            gc.collect()
            gc.freeze()  # so that a collection in mid-run has little to look at
            for load in self.loads:
                for sender in senders:
                    warmups = dataset.take(self.num_warmups)
                    await apply(Load(load.max_concurrency), warmups, sender.send, Run(), lambda _: None)
                for repeat in range(self.repeats):
                    prompts = dataset.take(self.num_prompts)
                    for i, sender in enumerate(senders):
                        measured = Measured(i, repeat, load)
                        self.measured.append(measured)
                        with showing(self.label(measured), len(prompts)) as told:
                            await apply(load, prompts, sender.send, measured.run, told)

    @property
    def begun(self) -> list[Measured]:
        """The runs with at least one outcome."""
        return [m for m in self.measured if m.run.outcomes]

    @property
    def loads_begun(self) -> list[Load]:
        """The loads with at least one outcome."""
        return [load for load in self.loads if any(m.load is load for m in self.begun)]

    def label(self, measured: Measured) -> str:
        """A run in few words."""
        which = f" {NAMES[measured.target]} {measured.repeat + 1}/{self.repeats}" if len(self.targets) > 1 else ""
        return measured.load.label + which

    def figures(self, measured: Measured) -> dict[str, Any]:
        """What a run came to."""
        return summarise(measured.run, self.wanted, streamed=self.endpoint is not Endpoint.EMBEDDINGS)

    def result(self, measured: Measured) -> dict[str, Any]:
        """What a run came to, and under which conditions."""
        target, load = self.targets[measured.target], measured.load
        return {
            "date": f"{datetime.now(UTC):%Y%m%d-%H%M%S}",
            "backend": self.endpoint.backend,
            "base_url": target.url,
            "model_id": target.model,
            "num_prompts": self.num_prompts,
            "num_warmups": self.num_warmups,
            **_conditions(load),
            "burstiness": load.burstiness,
            "dataset_name": self.prompts.name,
            "length_unit": self.length_unit,
            "unique_prompts": self.prompts.unique,
            "seed": self.prompts.seed,
            **self.sampling,
            "hfms_version": __version__,
            **self.figures(measured),
        }

    def results(self) -> Any:
        """Everything, as JSON: of one run an object, of several an array; of two targets all runs and `comparison`."""
        results = [self.result(m) for m in self.begun]
        if len(self.targets) == 1:
            return results[0] if len(self.loads) == 1 else results
        named = [{"target": NAMES[m.target], "repeat": m.repeat + 1} for m in self.begun]
        return {
            "runs": [name | result for name, result in zip(named, results, strict=True)],
            "comparison": [self.compared(load) for load in self.loads_begun],
        }

    def compared(self, load: Load) -> dict[str, Any]:
        """Medians of both targets under a load, and the median of their ratios, A through B."""
        of_load = [m for m in self.begun if m.load is load]  # two loads may be alike
        # A run that was stopped counts only where there is no other.
        counted = [m for m in of_load if m.run.whole] or of_load
        a, b = ({m.repeat: self.figures(m) for m in counted if m.target == i} for i in range(2))
        pairs = [(a[repeat], b[repeat]) for repeat in sorted(a.keys() & b.keys())]
        return {
            **_conditions(load),
            "pairs": len(pairs),
            "A": medians(list(a.values())),
            "B": medians(list(b.values())),
            "ratio": ratios(pairs),
        }


def _conditions(load: Load) -> dict[str, Any]:
    rate = load.request_rate
    return {"request_rate": "inf" if math.isinf(rate) else rate, "max_concurrency": load.max_concurrency}
