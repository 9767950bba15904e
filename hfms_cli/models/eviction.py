"""Which models to unload so that another one fits. It only decides; the pool does it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

Freed = Mapping[str, int]
"""Bytes by the device whose memory they are of."""


@dataclass(frozen=True)
class Held:
    """A model in memory, as far as its eviction goes."""

    id: str
    last_used: float
    """When its last call ended, on any clock that all share."""
    frees: Freed
    """What unloading it would free."""
    in_use: bool = False
    """It has calls in flight, or calls wait for it."""
    pinned: bool = False
    steady: bool = True
    """It is loaded: neither on its way into memory nor out of it."""

    @property
    def evictable(self) -> bool:
        return self.steady and not (self.in_use or self.pinned)


def choose(held: Iterable[Held], fits: Callable[[Freed], bool]) -> list[Held] | None:
    """What to unload, the least recently used first; None where unloading all that may be would not be enough.

    fits: whether the new model fits once so much is freed; more bytes never make it fit less. None of what is chosen
    could be spared: where one large model is enough, small ones that were used before it stay.
    """
    chosen: list[Held] = []
    for model in sorted((m for m in held if m.evictable), key=lambda m: (m.last_used, m.id)):
        if fits(freed_by(chosen)):
            break
        chosen.append(model)
    if not fits(freed_by(chosen)):
        return None
    for model in reversed(list(chosen)):  # the last used is the first to be spared
        others = [m for m in chosen if m is not model]
        if fits(freed_by(others)):
            chosen = others
    return chosen


def freed_by(models: Iterable[Held]) -> Freed:
    """What unloading all of these would free."""
    freed: Counter[str] = Counter()
    for model in models:
        freed.update(model.frees)
    return freed
