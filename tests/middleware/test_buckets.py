"""Token buckets, in memory and on a real Redis, against a bucket in exact arithmetic."""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hfms_middleware.rate_limit import buckets
from hfms_middleware.rate_limit.buckets import Buckets, Limit, MemoryBuckets, RedisBuckets
from hfms_middleware.redis_link import RedisLink
from tests.middleware.conftest import Clock

CLOSE = Fraction(1, 10**6)
"""Of a token: what floating point may be off by."""

_serial = itertools.count()


@pytest.fixture(params=["memory", "redis"])
def made(request: pytest.FixtureRequest) -> Callable[[Clock], Buckets]:
    """`made(clock)`: buckets of each kind; those on Redis want a loop that runs."""
    if request.param == "memory":
        return MemoryBuckets
    url = request.getfixturevalue("redis_server").url
    return lambda clock: RedisBuckets(RedisLink(url, "store"), clock)


def owner() -> str:
    return f"key:{next(_serial)}"


@dataclass
class Model:
    """The bucket as one would explain it: so much in it, so much coming in a second, no more than it holds."""

    limit: Limit
    level: Fraction
    at: Fraction

    def now(self, now: float) -> Fraction:
        rate = Fraction(self.limit.amount, self.limit.seconds)
        return min(Fraction(self.limit.amount), self.level + max(Fraction(0), Fraction(now) - self.at) * rate)

    def take(self, amount: int, now: float) -> None:
        if amount:
            self.level, self.at = min(Fraction(self.limit.amount), self.now(now) - amount), Fraction(now)


steps = st.lists(
    st.tuples(
        st.sampled_from(["take", "take", "settle"]),
        st.integers(0, 60),
        st.one_of(st.integers(0, 40).map(lambda n: n / 8), st.sampled_from([-3600.0, 1e9, -0.125])),
    ),
    max_size=40,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(amount=st.integers(1, 50), more=st.integers(1, 50), steps=steps)
def test_a_bucket_grants_what_the_model_grants_whatever_the_clock_does(made, amount, more, steps):
    minute, day = Limit("a", amount, 60), Limit("b", amount + more, 86_400)

    async def run() -> None:
        clock, who = Clock(), owner()
        kept = made(clock)
        models = {limit: Model(limit, Fraction(limit.amount), Fraction(clock.now)) for limit in (minute, day)}
        try:
            for kind, n, wait in steps:
                clock.now += wait
                before = {limit: model.now(clock.now) for limit, model in models.items()}
                if kind == "take":
                    wants = {minute: n, day: 2 * n}
                    taken = await kept.take(who, wants)
                    short = [limit for limit, want in wants.items() if want and before[limit] < want]
                    close = any(abs(before[limit] - want) < CLOSE for limit, want in wants.items())
                    assert bool(taken.refused) == bool(short) or close
                    if taken.refused:
                        assert taken.refused in short or close
                        assert taken.wait > 0
                        wants = {}
                else:
                    wants = {minute: n - 30, day: 30 - n}
                    taken = await kept.settle(who, wants)
                for limit, want in wants.items():
                    models[limit].take(want, clock.now)
                for limit, level in taken.levels.items():
                    assert abs(Fraction(level) - models[limit].now(clock.now)) < CLOSE
                    assert level <= limit.amount
        finally:
            await kept.close()

    asyncio.run(run())


async def test_of_a_thousand_at_once_exactly_as_many_pass_as_the_bucket_holds(made, clock):
    limit, who, kept = Limit("r", 137, 60), owner(), made(clock)
    outcomes = await asyncio.gather(*(kept.take(who, {limit: 1}) for _ in range(1000)))
    assert sum(o.refused is None for o in outcomes) == 137
    await kept.close()


async def test_three_processes_on_one_redis_are_granted_exactly_what_one_bucket_holds(redis_server):
    code = (
        "import asyncio, sys\n"
        "from hfms_middleware.rate_limit.buckets import Limit, RedisBuckets\n"
        "from hfms_middleware.redis_link import RedisLink\n"
        "async def main():\n"
        "    kept = RedisBuckets(RedisLink(sys.argv[1], 'store'), lambda: 1000.0)\n"
        "    outcomes = await asyncio.gather(*(kept.take('key:a', {Limit('r', 137, 60): 1}) for _ in range(200)))\n"
        "    print(sum(o.refused is None for o in outcomes))\n"
        "    await kept.close()\n"
        "asyncio.run(main())\n"
    )
    pipe = asyncio.subprocess.PIPE
    started = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", code, redis_server.url, stdout=pipe)
        for _ in range(3)
    ]
    granted = [int((await process.communicate())[0]) for process in started]
    assert sum(granted) == 137


async def test_what_is_refused_by_one_limit_is_taken_from_none(made, clock):
    small, large, who, kept = Limit("s", 5, 60), Limit("l", 100, 60), owner(), made(clock)
    taken = await kept.take(who, {large: 10, small: 6})
    assert (taken.refused, taken.levels[large]) == (small, 100)
    assert (await kept.take(who, {large: 100})).refused is None
    await kept.close()


async def test_after_the_wait_that_it_names_a_bucket_grants_and_not_before(made, clock):
    limit, who, kept = Limit("r", 8, 64), owner(), made(clock)  # one each 8 s, so that all of it is exact
    await kept.take(who, {limit: 8})
    assert (await kept.take(who, {limit: 3})).wait == 24
    clock.now += 23.875
    assert (await kept.take(who, {limit: 3})).refused == limit
    clock.now += 0.125
    assert (await kept.take(who, {limit: 3})).refused is None
    await kept.close()


async def test_a_clock_that_goes_back_costs_nobody_what_they_had(made, clock):
    limit, who, kept = Limit("r", 10, 60), owner(), made(clock)
    await kept.take(who, {limit: 6})
    clock.now -= 3600
    assert (await kept.take(who, {limit: 4})).refused is None
    clock.now += 6
    assert (await kept.take(who, {limit: 1})).refused is None
    await kept.close()


async def test_a_debt_is_waited_for_and_idle_debtors_are_remembered(made, clock):
    limit, who, kept = Limit("t", 60, 60), owner(), made(clock)
    await kept.settle(who, {limit: 180})
    clock.now += 61
    for _ in range(5):
        await kept.take(owner(), {limit: 1})
    assert (await kept.take(who, {limit: 1})).wait == 60
    await kept.close()


@settings(max_examples=30, deadline=None)
@given(waits=st.lists(st.floats(0, 30), min_size=1, max_size=300))
def test_idle_buckets_are_forgotten(waits):
    async def run() -> None:
        clock, limit = Clock(), Limit("r", 1000, 60)
        kept = MemoryBuckets(clock)
        used: list[float] = []
        for i, wait in enumerate(waits):
            clock.now += wait
            used.append(clock.now)
            await kept.take(f"address:{i}", {limit: 1})
        # Each new one sweeps away up to two: what is left is what was used within a minute, or waits for its broom.
        clock.now += 1000
        for i in range(len(waits)):
            await kept.take(f"key:{i}", {limit: 1})
        assert len(kept) <= len(waits)
        clock.now += 1000
        for _ in waits:
            await kept.take("key:one", {limit: 1})
        assert len(kept) == 1

    asyncio.run(run())


async def test_memory_is_bounded_however_many_addresses_ask_at_once(clock, monkeypatch):
    monkeypatch.setattr(buckets, "MAX_BUCKETS", 100)
    kept, limit = MemoryBuckets(clock), Limit("r", 10, 60)
    for i in range(1000):
        await kept.take(f"address:{i}", {limit: 1})
        assert len(kept) <= 100


async def test_redis_forgets_buckets_that_are_full_again(redis_server):
    from redis.asyncio import Redis

    kept, limit = RedisBuckets(RedisLink(redis_server.url, "store")), Limit("r", 10, 60)
    await kept.take("key:a", {limit: 1})
    async with Redis.from_url(redis_server.url) as redis:
        assert 6000 < await redis.pttl("hfms:limit:{key:a}:r") <= 7000
    await kept.close()
