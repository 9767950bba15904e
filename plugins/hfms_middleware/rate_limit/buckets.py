"""Token buckets: what each owner may still use, kept in this process or on one Redis for several servers.

A bucket holds `Limit.amount` and fills evenly, from empty to full in `Limit.seconds`. Who takes from several buckets
takes from all of them or from none. What was set aside and not used is given back; who used more than was set aside
leaves a bucket below nothing, and it fills from there. A bucket that is full again is forgotten.

The arithmetic is our own: throttled-py takes from one bucket at a time, gives nothing back, and knows no debt.
"""

from __future__ import annotations

import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from hfms_middleware.redis_link import RedisLink

if TYPE_CHECKING:
    from redis.asyncio import Redis

MAX_BUCKETS = 100_000
"""Of one period, in this process: some 20 MB. Beyond, the one that was used longest ago is forgotten."""


@dataclass(frozen=True)
class Limit:
    """What a bucket holds, and in how many seconds it fills."""

    name: str
    """The setting's: `requests_per_minute`."""
    amount: int
    seconds: int

    def filled(self, level: float, elapsed: float) -> float:
        """The level after so many seconds. A clock that went back has filled nothing."""
        return min(self.amount, level + max(0.0, elapsed) * self.amount / self.seconds)

    def until(self, wanted: float, level: float) -> float:
        """Seconds until a bucket at `level` holds `wanted`."""
        return max(0.0, wanted - level) * self.seconds / self.amount


class Taken(NamedTuple):
    """How it went, and what each bucket holds now."""

    levels: dict[Limit, float]
    refused: Limit | None = None
    """The limit that held it up longest; None where all was granted."""
    wait: float = 0.0
    """Seconds until the same would be granted, if nobody else took."""


class Buckets(Protocol):
    """Where buckets are kept. `wants` says how much of each limit; 0 only asks."""

    async def take(self, owner: str, wants: Mapping[Limit, float]) -> Taken:
        """All of `wants`, or nothing. May raise RedisGone."""
        ...

    async def settle(self, owner: str, differences: Mapping[Limit, float]) -> Taken:
        """Take what was used beyond what was set aside, or give back what was not. May raise RedisGone."""
        ...

    async def close(self) -> None: ...


def judged(wants: Mapping[Limit, float], levels: dict[Limit, float]) -> Taken:
    """Whether there is enough of everything, by the levels from before."""
    waits = {limit: limit.until(want, levels[limit]) for limit, want in wants.items() if want > 0}
    longest = max(waits, key=lambda limit: waits[limit], default=None)
    if longest is None or waits[longest] == 0:
        return Taken(levels)
    return Taken(levels, longest, waits[longest])


class MemoryBuckets:
    """Buckets of this process. Nothing here waits, so that each call of a method is one step to everybody else."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # By period, each in the order of last use: those that are full again are found at the front.
        self._kept: defaultdict[int, OrderedDict[tuple[str, str], tuple[float, float]]] = defaultdict(OrderedDict)

    def __len__(self) -> int:
        return sum(len(kept) for kept in list(self._kept.values()))

    async def take(self, owner: str, wants: Mapping[Limit, float]) -> Taken:
        now = self._clock()
        outcome = judged(wants, {limit: self._level(owner, limit, now) for limit in wants})
        return outcome if outcome.refused else self._put(owner, outcome.levels, wants, now)

    async def settle(self, owner: str, differences: Mapping[Limit, float]) -> Taken:
        now = self._clock()
        levels = {limit: self._level(owner, limit, now) for limit in differences}
        return self._put(owner, levels, differences, now)

    def _level(self, owner: str, limit: Limit, now: float) -> float:
        level, at = self._kept[limit.seconds].get((owner, limit.name), (limit.amount, now))
        return limit.filled(level, now - at)

    def _put(self, owner: str, levels: Mapping[Limit, float], taken: Mapping[Limit, float], now: float) -> Taken:
        left = dict(levels)
        for limit, amount in taken.items():
            if not amount:
                continue
            left[limit] = min(limit.amount, levels[limit] - amount)
            kept = self._kept[limit.seconds]
            kept[owner, limit.name] = (left[limit], now)
            kept.move_to_end((owner, limit.name))
            self._forget_full(kept, limit, now)
        return Taken(left)

    @staticmethod
    def _forget_full(kept: OrderedDict[tuple[str, str], tuple[float, float]], limit: Limit, now: float) -> None:
        """A step or two of a sweep that never ends: as many go, at the least, as come."""
        for _ in range(2):
            level, at = next(iter(kept.values()))
            # Whatever it holds when full, it has been long enough for a bucket that was not below nothing.
            idle = now - at > limit.seconds and level >= 0
            if not idle and len(kept) <= MAX_BUCKETS:
                return
            kept.popitem(last=False)
            if not kept:
                return

    async def close(self) -> None:
        self._kept.clear()


class RedisBuckets:
    """Buckets that several servers share. A script does all of it in one step, by the clock of Redis unless told."""

    SCRIPT = """
    local forced = ARGV[1] == '1'
    local time = redis.call('TIME')
    local now = tonumber(ARGV[2]) or time[1] + time[2] / 1e6
    local levels, granted = {}, true
    for i, key in ipairs(KEYS) do
        local amount, seconds, want = tonumber(ARGV[3 * i]), tonumber(ARGV[3 * i + 1]), tonumber(ARGV[3 * i + 2])
        local kept = redis.call('HMGET', key, 'level', 'at')
        local level, at = tonumber(kept[1] or amount), tonumber(kept[2] or now)
        levels[i] = math.min(amount, level + math.max(0, now - at) * amount / seconds)
        granted = granted and (want <= 0 or levels[i] >= want)
    end
    local out = {}
    for i, key in ipairs(KEYS) do
        local amount, seconds, want = tonumber(ARGV[3 * i]), tonumber(ARGV[3 * i + 1]), tonumber(ARGV[3 * i + 2])
        if (granted or forced) and want ~= 0 then
            levels[i] = math.min(amount, levels[i] - want)
            redis.call('HSET', key, 'level', string.format('%.17g', levels[i]), 'at', string.format('%.17g', now))
            redis.call('PEXPIRE', key, math.ceil((amount - levels[i]) * seconds / amount * 1000) + 1000)
        end
        out[i] = string.format('%.17g', levels[i])
    end
    return {granted and 1 or 0, out}
    """

    def __init__(self, link: RedisLink, clock: Callable[[], float] | None = None) -> None:
        self._link = link
        self._clock = clock

    async def take(self, owner: str, wants: Mapping[Limit, float]) -> Taken:
        granted, levels = await self._run(owner, wants, forced=False)
        return Taken(levels) if granted else judged(wants, levels)

    async def settle(self, owner: str, differences: Mapping[Limit, float]) -> Taken:
        _, levels = await self._run(owner, differences, forced=True)
        return Taken(levels)

    async def _run(self, owner: str, wants: Mapping[Limit, float], *, forced: bool) -> tuple[bool, dict[Limit, float]]:
        # The braces keep an owner's buckets together on a cluster.
        keys = [f"hfms:limit:{{{owner}}}:{limit.name}" for limit in wants]
        now = "" if self._clock is None else repr(self._clock())
        numbers = [str(n) for limit, want in wants.items() for n in (limit.amount, limit.seconds, want)]

        async def run(redis: Redis) -> list[object]:
            script = redis.register_script(self.SCRIPT)
            found: list[object] = await script(keys, ["1" if forced else "0", now, *numbers])
            return found

        granted, levels = await self._link.ask(run)
        return bool(granted), dict(zip(wants, map(float, levels), strict=True))  # type: ignore[call-overload]

    async def close(self) -> None:
        await self._link.close()
