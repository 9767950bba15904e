"""Where the seconds of a load go.

    fetch -> verify -> start -> load -> ... -> warm-up

`start` is the process, its imports and its plugins; what follows is for the engine to say (`convert`, `compile`), and
is `load` until it does. `warm-up` is a first short call.
"""

from __future__ import annotations

from collections.abc import Callable


class Phases:
    """A `Report` that keeps the time: each phase ends where the next one begins."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since = 0.0
        self._seconds: dict[str, float] = {}
        self.now: str | None = None
        """The phase that runs; None before the first and after the last."""
        self.done: float | None = None
        """Share of it that is done, where it is known."""

    def __call__(self, phase: str, done: float | None = None) -> None:
        if phase != self.now:
            self.end()
            self.now, self._since = phase, self._clock()
        self.done = done

    def end(self) -> None:
        """No phase runs any more."""
        if self.now is not None:
            self._seconds[self.now] = self._seconds.get(self.now, 0.0) + self._clock() - self._since
        self.now = self.done = None

    def seconds(self) -> dict[str, float]:
        """Of each phase that is over; of one that came again, in all."""
        return {phase: round(seconds, 3) for phase, seconds in self._seconds.items()}
