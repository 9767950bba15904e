"""A circuit breaker for each model: an engine that fails time after time is left alone for a while.

closed --failures in a row--> open --seconds--> half-open --successes--> closed
                                ^----- failure -----'

Only what the engine did wrong counts. A refusal, a bad request, a full queue or a caller who left says nothing about
it, neither for nor against. Calls that were under way when one failed, and fail as well, tell nothing new: one crash is
one failure, however many it takes along. Half-open, one call at a time is let through to see.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfms_cli import Call, Chunk, EngineDied, EngineFault, Middleware, Proceed, Unavailable, setting

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Gauge

log = logging.getLogger("hfms.breaker")

STATES = {"closed": 0, "open": 1, "half-open": 2}
"""As the metric has them."""


@dataclass(frozen=True)
class BreakerOptions:
    """Options of `[middleware.breaker]`."""

    failures: int = setting(5, "Calls in a row that the engine failed, after which a model is left alone.", ge=1)
    open_seconds: float = setting(60.0, "How long it is left alone before one call is let through to see.", ge=0)
    successes: int = setting(2, "Calls let through that must succeed before all are again.", ge=1)


class Breaker:
    """One model's. `clock` gives seconds and never goes back."""

    def __init__(self, model: str, options: BreakerOptions, clock: Callable[[], float] = time.monotonic) -> None:
        self.failures = 0
        """In a row, while closed."""
        self._model = model
        self._options = options
        self._clock = clock
        self._successes = 0
        self._opened_at: float | None = None
        self._probing = False
        # Grows whenever it opens or closes: what a call of an earlier period comes to says nothing about this one.
        self._period = 0
        self._counted = 0
        """Failures that counted, ever."""

    @property
    def state(self) -> str:
        if self._opened_at is None:
            return "closed"
        return "half-open" if self._clock() >= self._opened_at + self._options.open_seconds else "open"

    def enter(self) -> tuple[int, int]:
        """Let a call through; `leave` takes what this returns. Raises Unavailable."""
        entered = self._period, self._counted
        if self._opened_at is None:
            return entered
        wait = self._opened_at + self._options.open_seconds - self._clock()
        if wait > 0 or self._probing:
            raise Unavailable(
                f"The engine of `{self._model}` failed too often and is left alone for a while; try again later.",
                code="breaker_open",
                retry_after=max(wait, 1.0),
            )
        self._probing = True
        return entered

    def leave(self, entered: tuple[int, int], good: bool | None) -> None:
        """Say how a call that was let through went; None says nothing about the engine."""
        period, counted = entered
        if period != self._period:
            return
        probe, self._probing = self._probing, False
        if good is None:
            return
        if probe:
            self._successes += good
            if not good:
                self._open()
            elif self._successes == self._options.successes:
                self._close()
        elif good:
            self.failures = 0
        elif counted == self._counted:
            self._counted += 1
            self.failures += 1
            if self.failures == self._options.failures:
                self._open()

    def _open(self) -> None:
        self._opened_at = self._clock()
        self._successes = 0
        self._period += 1
        log.warning("the breaker of %s opens for %g s", self._model, self._options.open_seconds)

    def _close(self) -> None:
        self._opened_at = None
        self.failures = self._successes = 0
        self._period += 1
        log.warning("the breaker of %s closes", self._model)


class CircuitBreaker(Middleware):
    """Stands around the call, with a `Breaker` for every model that has been called."""

    def __init__(self, options: BreakerOptions, clock: Callable[[], float] = time.monotonic) -> None:
        self._options = options
        self._clock = clock
        self._breakers: dict[str, Breaker] = {}
        self._gauge: Gauge | None = None

    async def call(self, call: Call, proceed: Proceed) -> AsyncIterator[Chunk]:
        breaker = self._breakers.get(call.model) or self._new(call.model)
        entered = breaker.enter()
        good: bool | None = None
        try:
            async for chunk in proceed(call):
                yield chunk
            good = True
        except (EngineFault, EngineDied):
            good = False
            raise
        finally:
            breaker.leave(entered, good)

    def _new(self, model: str) -> Breaker:
        """Models are named by the road, which has found them: callers cannot make up names."""
        breaker = self._breakers[model] = Breaker(model, self._options, self._clock)
        if self._gauge is not None:
            self._gauge.labels(model).set_function(lambda: STATES[breaker.state])
        return breaker

    def metrics(self, registry: CollectorRegistry) -> None:
        from prometheus_client import Gauge

        self._gauge = Gauge("hfms_breaker_state", "0 closed, 1 open, 2 half-open.", ["model"], registry=registry)

    def status(self) -> dict[str, Any]:
        return {
            "models": {
                m: {"state": b.state, "failures_in_a_row": b.failures} for m, b in self._breakers.copy().items()
            },
        }
