"""Who is next: the highest priority, then the key that has had least, then who waits longest.

Fairness is by tokens. Each key has an account of what it was given, prompts and answers alike; of those that wait
with one priority, the key with the lowest account goes first, and where two have had the same, the one with fewer
calls. A key that comes after a pause starts where the lowest of those present is, so that nobody saves up. What waits
of a key with one priority rises by a priority for every `AGEING_SECONDS` in which none of it was let in, so that nobody
waits for ever; a key that floods is let in all the while, so its many do not come to outrank others by waiting.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

AGEING_SECONDS = 30.0
COMPANY_SECONDS = 10.0
"""So long after its last call a key is expected to come again."""
HIGHEST = 3

# Accounts of keys that are away are kept up to this number.
_ACCOUNTS = 4096


class Waiter(Protocol):
    """Who stands in a line."""

    since: float
    """When it began to wait; the line sets it."""

    @property
    def priority(self) -> int:
        """0 LOW, 1 NORMAL, 2 HIGH, 3 CRITICAL."""
        ...

    @property
    def key(self) -> str:
        """Whose it is; empty: the server's own, its first call after a load."""
        ...


W = TypeVar("W", bound=Waiter)


class Line(Generic[W]):
    """Those who wait, and the accounts of their keys. A waiter enters once and leaves once, and may wait repeatedly."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lanes: dict[tuple[int, str], deque[W]] = {}
        self._let_in: dict[tuple[int, str], float] = {}
        """When one of a lane was let in last, or the lane began."""
        self._present: Counter[str] = Counter()
        """Waiters of each key that have entered and not left."""
        self._had: dict[str, float] = {}
        self._left: dict[str, float] = {}
        """When the last call of a key left, the earliest first; of keys that were here a moment ago."""

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def __iter__(self) -> Iterator[W]:
        for lane in self._lanes.values():
            yield from lane

    def enter(self, waiter: W) -> None:
        """Wait for the first time, behind those of the same key."""
        if not self._present[waiter.key]:
            self._had[waiter.key] = max(self.had(waiter.key), self._least())
        self._present[waiter.key] += 1
        self._lane(waiter).append(waiter)

    def again(self, waiter: W) -> None:
        """Wait again, before those of the same key."""
        self._lane(waiter).appendleft(waiter)

    def first(self) -> W | None:
        """Who is next."""
        now = self._clock()
        heads = (lane[0] for lane in self._lanes.values())
        return min(
            heads, key=lambda w: (-self._aged(w, now), self.had(w.key), self._present[w.key], w.since), default=None
        )

    def take(self, waiter: W) -> None:
        """Let one go that is first of its priority and key."""
        lane = self._lanes[waiter.priority, waiter.key]
        first = lane.popleft()
        assert first is waiter
        self._let_in[waiter.priority, waiter.key] = self._clock()
        self._drop_empty(waiter)

    def leave(self, waiter: W) -> None:
        """Be done, or give up; from wherever it is."""
        lane = self._lanes.get((waiter.priority, waiter.key))
        if lane and waiter in lane:
            lane.remove(waiter)
            self._drop_empty(waiter)
        self._present[waiter.key] -= 1
        if not self._present[waiter.key]:
            del self._present[waiter.key]
            self._left.pop(waiter.key, None)
            if waiter.key:  # the server itself does not come again
                self._left[waiter.key] = self._clock()
            if not self._present or len(self._had) > _ACCOUNTS:
                self._had = {key: self._had[key] for key in self._present}

    def crowds(self, key: str) -> bool:
        """Whether a key has several calls here, and another has some or had a moment ago."""
        return self._present[key] > 1 and self._in_company()

    def _in_company(self) -> bool:
        long_ago = self._clock() - COMPANY_SECONDS
        while self._left and next(iter(self._left.values())) < long_ago:
            del self._left[next(iter(self._left))]
        return len(self._present) > 1 or any(key not in self._present for key in self._left)

    def charge(self, key: str, tokens: float) -> None:
        """A key was given so many tokens."""
        self._had[key] = self.had(key) + tokens

    def had(self, key: str) -> float:
        """Tokens on a key's account."""
        return self._had.get(key, 0.0)

    def _least(self) -> float:
        return min((self.had(key) for key in self._present), default=0.0)

    def _aged(self, waiter: W, now: float) -> int:
        passed_over = now - self._let_in[waiter.priority, waiter.key]
        return min(HIGHEST, waiter.priority + int(passed_over / AGEING_SECONDS))

    def _lane(self, waiter: W) -> deque[W]:
        waiter.since = self._clock()
        self._let_in.setdefault((waiter.priority, waiter.key), waiter.since)
        return self._lanes.setdefault((waiter.priority, waiter.key), deque())

    def _drop_empty(self, waiter: W) -> None:
        lane = waiter.priority, waiter.key
        if not self._lanes[lane]:
            del self._lanes[lane], self._let_in[lane]
