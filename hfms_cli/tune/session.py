"""The race: load candidates, drive them in turns, and choose.

    engines x precisions ─ race ─> the best of each profile ─ its limits, one at a time ─ race ─> the record

All candidates of a race that fit into memory are loaded at once, and each round asks every one of them the same
prompts, in changing order: what else the machine does meets them all.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from msgspec import to_builtins
from msgspec.structs import replace

from hfms_cli.bench.dataset import Dataset, Numbers, builtin
from hfms_cli.errors import BadRequest, DoesNotFit, HfmsError, LoadFailed
from hfms_cli.models.loader import Candidate, Loader, Placement, Wish, varied
from hfms_cli.models.tuned import Choice, Profile, Tuned
from hfms_cli.tune.candidates import Knobs, changes_answers, precisions
from hfms_cli.tune.roofline import Roofline
from hfms_cli.tune.trial import Trial
from hfms_cli.types import ModelName, Quantize

MARGIN = 0.03
"""A limit is changed only for a gain above this; less is noise."""
HOPELESS = 2.0
"""Whoever is so many times slower than the best at everything is not asked again."""
ALONE_PROMPTS = 2


@dataclass(frozen=True)
class Plan:
    """concurrency: sequences at once, 1 for latency only. output_len: tokens. repeats: rounds of a race."""

    concurrency: int = 16
    output_len: int = 64
    repeats: int = 3
    allow_quantized: bool = False
    seed: int = 0

    @property
    def widths(self) -> list[int]:
        """How many are asked at once."""
        return sorted({1, self.concurrency})

    @property
    def profiles(self) -> list[Profile]:
        return ["latency", "throughput"] if self.concurrency > 1 else ["latency"]


@dataclass
class Result:
    """All that was measured, and what came of it."""

    placement: Placement
    roofline: Roofline
    plan: Plan
    asked: tuple[str, Quantize]
    """dtype and quantize, as the operator has them."""
    trials: list[Trial] = field(default_factory=list)
    failures: list[tuple[Choice, str]] = field(default_factory=list)
    best: dict[Profile, Trial] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "model": str(self.placement.manifest.name),
            "revision": self.placement.manifest.revision,
            "concurrency": self.plan.concurrency,
            "output_len": self.plan.output_len,
            "repeats": self.plan.repeats,
            "roofline": to_builtins(self.roofline),
            "trials": [self.row(t) for t in self.trials],
            "failures": [{**to_builtins(choice), "reason": reason} for choice, reason in self.failures],
            "best": {profile: to_builtins(trial.choice) for profile, trial in self.best.items()},
        }

    def row(self, trial: Trial) -> dict[str, Any]:
        """What a trial came to; None for what is unknown."""
        wide, info, card = self.plan.concurrency, trial.info, self.placement.card
        alone_limit = self.roofline.one_stream(info.weights_bytes)
        wide_limit = self.roofline.batched(card.parameters, info.dtype)
        decode = trial.decode_rate()
        total = trial.total_rate(wide) if wide > 1 else None
        return {
            **to_builtins(trial.choice),
            "dtype": info.dtype,
            "quantize": info.quantize,
            "changes_answers": trial.changes_answers,
            "ttft_ms": trial.ttft() * 1000,
            "decode_tokens_per_second": decode,
            "output_tokens_per_second": trial.output_rate(wide) if wide > 1 else None,
            "total_tokens_per_second": total,
            "memory_bytes": trial.memory_bytes,
            "load_seconds": trial.load_seconds,
            "quality": to_builtins(info.quality),
            "roofline_alone": decode / alone_limit if decode and alone_limit else None,
            "roofline_batched": total / wide_limit if total and wide_limit else None,
            "best_for": [profile for profile, best in self.best.items() if best is trial],
        }


class Tuner:
    """knobs: by engine. told: takes a line for whoever waits."""

    def __init__(
        self, loader: Loader, knobs: Mapping[str, Knobs], plan: Plan, told: Callable[[str], None] = lambda line: None
    ) -> None:
        self._loader = loader
        self._knobs = knobs
        self._plan = plan
        self._told = told
        self._prompts = Dataset(builtin(plan.output_len), Numbers(plan.seed))

    async def tune(self, name: ModelName, wish: Wish, roofline: Roofline) -> Result:
        """Measure, choose and remember. Raises HfmsError where nothing can be measured, OSError where not kept."""
        self._told(f"reading {name}")
        [placement] = await self._loader.place(name, [wish], lambda done, total: None)
        if "generate" not in placement.card.tasks:
            raise BadRequest(f"`{name}` does not generate text, and only that is tuned.", param="model")
        result = Result(placement, roofline, self._plan, self._loader.asked(wish))
        candidates: dict[tuple[str, str], Candidate] = {}
        for candidate in placement.candidates:
            candidates.setdefault((candidate.engine.name, candidate.request.device.kind), candidate)
        first = await self._race([ch for c in candidates.values() for ch in precisions(c, *result.asked)], result)
        leaders = {p: t for p in self._plan.profiles if (t := self._fastest(first, p)) is not None}
        if not leaders:
            reasons = "; ".join(dict.fromkeys(f"{c.engine}: {reason}" for c, reason in result.failures))
            raise LoadFailed(f"Nothing could be measured. {reasons}")
        limits = [ch for p, t in leaders.items() for ch in self._limits(t.choice, p)]
        second = await self._race(limits, result) if len(limits) > len(leaders) else first
        for profile, leader in leaders.items():
            result.best[profile] = self._winner(second, profile, leader.choice) or leader
        self._loader.tuned.save(
            placement.manifest,
            Tuned(
                model=str(name),
                fingerprint=self._loader.fingerprint(),
                best={profile: trial.choice for profile, trial in result.best.items()},
            ),
        )
        return result

    # Choosing.

    def _speeds(self, trial: Trial, profile: Profile) -> list[float]:
        return trial.speeds(1 if profile == "latency" else self._plan.concurrency)

    def _speed(self, trial: Trial, profile: Profile) -> float:
        return median(self._speeds(trial, profile))

    def _fastest(self, trials: Sequence[Trial], profile: Profile) -> Trial | None:
        """The best that may be chosen."""
        allowed = [t for t in trials if self._plan.allow_quantized or not t.changes_answers]
        return max(allowed, key=lambda t: self._speed(t, profile), default=None)

    def _winner(self, trials: Sequence[Trial], profile: Profile, leader: Choice) -> Trial | None:
        """The best variation of a leader, or the leader where that gains too little; None where it failed.

        Noise makes one of many look better now and then, but seldom in every round.
        """
        held = next((t for t in trials if t.choice == leader), None)
        family = [t for t in trials if replace(t.choice, options=leader.options) == leader]
        best = self._fastest(family, profile)
        if best is None or held is None:
            return held
        rounds = zip(self._speeds(best, profile), self._speeds(held, profile), strict=False)
        always = all(new > old for new, old in rounds)
        return best if always and self._speed(best, profile) > (1 + MARGIN) * self._speed(held, profile) else held

    def _limits(self, choice: Choice, profile: Profile) -> list[Choice]:
        """A leader, and its variations."""
        knobs = self._knobs[choice.engine]
        return [choice, *knobs.vary(choice, self._plan.concurrency if profile == "throughput" else 1)]

    # Measuring.

    async def _race(self, choices: Sequence[Choice], result: Result) -> list[Trial]:
        """Those that answered everything. As many at once as memory has room for."""
        waiting = [choice for i, choice in enumerate(choices) if choice not in choices[:i]]
        raced: list[Trial] = []
        while waiting:
            group: list[Trial] = []
            try:
                waiting = await self._load(waiting, group, raced, result)
                await self._rounds(group)
            finally:
                for trial in group:
                    await self._release(trial)
            for trial in group:
                if trial.failure is not None:
                    result.failures.append((trial.choice, trial.failure))
            raced += [trial for trial in group if trial.failure is None]
        result.trials += raced
        return raced

    async def _load(
        self, choices: list[Choice], group: list[Trial], raced: list[Trial], result: Result
    ) -> list[Choice]:
        """Load into `group` what has room; what has none is returned, for when the others are done."""
        for i, choice in enumerate(choices):
            self._told(f"loading {describe(choice)}")
            begun = time.perf_counter()
            alone = dataclasses.replace(result.placement, candidates=[self._candidate(result.placement, choice)])
            try:
                host, reservation = await self._loader.start(f"tune {describe(choice)}", alone)
            except DoesNotFit as exc:
                if group:
                    return choices[i:]
                result.failures.append((choice, exc.message))
                continue
            except HfmsError as exc:
                result.failures.append((choice, exc.message))
                continue
            trial = Trial(
                choice,
                host,
                reservation,
                load_seconds=time.perf_counter() - begun,
                info=host.info,
                changes_answers=changes_answers(choice, host.info, result.placement.card, result.asked),
            )
            if any(_same(trial, other) for other in (*group, *raced)):
                await self._release(trial)  # `auto` was this already
            else:
                group.append(trial)
        return []

    def _candidate(self, placement: Placement, choice: Choice) -> Candidate:
        """A choice with the room that there is for it now."""
        where = (choice.engine, choice.device)
        base = next(c for c in placement.candidates if (c.engine.name, c.request.device.kind) == where)
        request = dataclasses.replace(base.request, device=self._loader.with_room(base.request.device))
        return varied(dataclasses.replace(base, request=request, tuned=None), choice)

    async def _rounds(self, trials: Sequence[Trial]) -> None:
        racing = list(trials)
        for width in self._plan.widths:
            for trial in racing:
                await trial.warm_up(self._prompts.take(width), width)
        for number in range(self._plan.repeats):
            self._told(f"round {number + 1} of {self._plan.repeats}: {len(racing)} candidates")
            for width in self._plan.widths:
                prompts = self._prompts.take(ALONE_PROMPTS if width == 1 else width)
                for trial in racing[:: -1 if number % 2 else 1]:
                    await trial.run(prompts, width)
            racing = self._promising(racing)

    def _promising(self, trials: Sequence[Trial]) -> list[Trial]:
        sound = [t for t in trials if t.failure is None]
        best = {p: max((self._speed(t, p) for t in sound), default=0.0) for p in self._plan.profiles}
        return [t for t in sound if any(HOPELESS * self._speed(t, p) > best[p] for p in best)]

    async def _release(self, trial: Trial) -> None:
        await trial.host.close()
        self._loader.ledger.release(trial.reservation)


def describe(choice: Choice) -> str:
    """A choice in few words."""
    precision = [choice.dtype, *([] if choice.quantize == "auto" else [choice.quantize])]
    limits = [f"{name}={value}" for name, value in choice.options.items()]
    return " ".join([choice.engine, choice.device, *precision, *limits])


def _same(one: Trial, other: Trial) -> bool:
    def key(trial: Trial) -> tuple[Any, ...]:
        info, choice = trial.info, trial.choice
        return info.engine, info.device, info.dtype, info.quantize, choice.options

    return key(one) == key(other)
