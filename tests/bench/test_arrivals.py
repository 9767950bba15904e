"""When requests are sent: by the clock that a test turns."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfms_cli.bench.dataset import Prompt
from hfms_cli.bench.load import Load, apply, arrivals, closed_loop, open_loop
from hfms_cli.bench.measure import Outcome, Run

timeless = settings(deadline=None)

PROMPTS = [Prompt(str(i), 1) for i in range(20)]


class Clock:
    """Stands still until somebody sleeps on it."""

    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        until = self.time + seconds
        await asyncio.sleep(0)  # what others do meanwhile may take time too
        self.time = max(self.time, until)


@timeless
@given(st.integers(1, 200), st.floats(0.01, 1000), st.floats(0.1, 10), st.integers())
def test_arrivals_ascend_and_fill_the_time_of_their_rate(size, rate, burstiness, seed):
    times = list(arrivals(size, rate, burstiness, random.Random(seed)))
    assert len(times) == size
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] == pytest.approx(size / rate)


def gaps(burstiness: float) -> list[float]:
    times = list(arrivals(20_000, 1.0, burstiness, random.Random(5)))
    return [b - a for a, b in itertools.pairwise([0.0, *times])]


def test_burstiness_of_one_is_a_poisson_process():
    seen = gaps(1.0)
    # Exponential gaps: deviation 1, and e to the -t of them are longer than t.
    assert statistics.pstdev(seen) == pytest.approx(1.0, rel=0.05)
    for t, share in ((0.5, 0.6065), (1.0, 0.3679), (3.0, 0.0498)):
        assert sum(g > t for g in seen) / len(seen) == pytest.approx(share, abs=0.015)


def test_less_burstiness_comes_in_bursts_and_more_evenly():
    assert statistics.pstdev(gaps(0.25)) == pytest.approx(2.0, rel=0.1)
    assert statistics.pstdev(gaps(16.0)) == pytest.approx(0.25, rel=0.1)


async def test_open_loop_sends_each_at_its_time_whatever_became_of_those_before():
    clock, sent, never = Clock(), [], asyncio.Event()

    async def send(prompt: Prompt) -> None:
        sent.append((prompt.text, clock.now() - 100))
        if len(sent) == 4:
            never.set()
        await never.wait()  # none is answered before the last is sent

    await open_loop(PROMPTS[:4], send, iter([0.5, 0.5, 2.0, 7.25]), now=clock.now, sleep=clock.sleep)
    assert sent == [("0", 0.5), ("1", 0.5), ("2", 2.0), ("3", 7.25)]


async def test_open_loop_that_is_late_does_not_wait_to_catch_up():
    clock, sent = Clock(), []

    async def send(prompt: Prompt) -> None:
        sent.append(clock.now() - 100)
        clock.time += 10  # the first takes all the time of the others

    await open_loop(PROMPTS[:3], send, iter([1.0, 2.0, 3.0]), now=clock.now, sleep=clock.sleep)
    assert sent == [1.0, 11.0, 21.0]


class Gauge:
    """Counts how many are being answered at once."""

    def __init__(self) -> None:
        self.now = self.most = self.answered = 0

    async def send(self, prompt: Prompt) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0)
        self.now -= 1
        self.answered += 1


@timeless
@given(st.integers(1, 30), st.integers(0, 20))
async def test_closed_loop_keeps_its_width_in_flight_and_asks_all(width, size):
    gauge = Gauge()
    await closed_loop(PROMPTS[:size], gauge.send, width)
    assert (gauge.most, gauge.answered) == (min(width, size), size)


@timeless
@given(st.integers(1, 30))
async def test_open_loop_keeps_to_its_limit(width):
    gauge = Gauge()
    await open_loop(PROMPTS, gauge.send, iter([0.0] * 20), width)
    assert (gauge.most, gauge.answered) == (min(width, 20), 20)


async def test_cancelled_load_keeps_what_was_answered_and_is_not_whole():
    run, third = Run(), asyncio.Event()

    async def ask(prompt: Prompt) -> Outcome:
        if prompt.text == "2":
            third.set()
            await asyncio.Event().wait()
        return Outcome(0.0, [], 1.0, 1, 1)

    task = asyncio.create_task(apply(Load(1), PROMPTS, ask, run, lambda _: None))
    await third.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (len(run.outcomes), run.whole) == (2, False)
    assert run.ended > run.began


@pytest.mark.parametrize("load", [Load(), Load(2), Load(request_rate=1e6), Load(2, 1e6)])
async def test_every_load_asks_every_prompt_once_and_tells_of_it(load):
    run, told, asked = Run(), [], []

    async def ask(prompt: Prompt) -> Outcome:
        asked.append(prompt)
        return Outcome(0.0, [], 1.0, 1, 1)

    await apply(load, PROMPTS, ask, run, told.append)
    assert sorted(p.text for p in asked) == sorted(p.text for p in PROMPTS)
    assert told == run.outcomes
    assert run.whole
