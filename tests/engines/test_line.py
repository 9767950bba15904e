"""Who is next, how much a step reads, and what is guessed: policy without a model."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfms_engines.line import AGEING_SECONDS, COMPANY_SECONDS, Line
from hfms_engines.pace import Pace
from hfms_engines.speculate import Guesser


@dataclass(eq=False)
class Waiter:
    name: str
    key: str = "k"
    priority: int = 1
    since: float = 0.0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def line(clock) -> Line[Waiter]:
    return Line(clock)


def order(line: Line[Waiter]) -> str:
    """Everyone in the order in which they are let in."""
    names = ""
    while waiter := line.first():
        line.take(waiter)
        names += waiter.name
    return names


def test_of_one_key_the_first_to_come_goes_first(line, clock):
    for name in "abc":
        line.enter(Waiter(name))
        clock.now += 1
    assert order(line) == "abc"


def test_a_higher_priority_goes_before_all_lower_ones(line):
    for name, priority in zip("abcd", (0, 2, 1, 3), strict=True):
        line.enter(Waiter(name, priority=priority))
    assert order(line) == "dbca"


def test_who_waits_rises_a_priority_after_a_while_and_is_not_starved(line, clock):
    line.enter(Waiter("low", priority=0))
    clock.now += AGEING_SECONDS * 2.5
    line.enter(Waiter("normal", key="other", priority=1))
    assert line.first().name == "low"
    line.enter(Waiter("critical", key="other", priority=3))
    assert line.first().name == "critical"


def test_the_many_of_a_key_that_is_let_in_now_and_then_do_not_come_to_outrank_another_by_waiting(line, clock):
    for name in "abc":
        line.enter(Waiter(name, key="flood"))
    clock.now += AGEING_SECONDS * 0.9
    line.take(line.first())
    line.charge("flood", 10)
    clock.now += AGEING_SECONDS * 0.9
    small = Waiter("small", key="other")
    line.enter(small)
    line.charge("flood", 10)
    assert line.first() is small


def test_the_key_that_has_had_least_goes_first(line):
    line.enter(Waiter("a", key="much"))
    line.enter(Waiter("b", key="little"))
    line.charge("much", 100)
    assert order(line) == "ba"


def test_a_key_that_was_away_has_saved_nothing_up(line):
    old = Waiter("old", key="busy")
    line.enter(old)
    line.take(old)
    line.charge("busy", 1000)
    line.enter(Waiter("new", key="late"))
    assert line.had("late") == 1000


def test_of_two_keys_that_have_had_the_same_the_one_with_fewer_calls_goes_first(line, clock):
    """Else a newcomer, who starts where the lowest account is, would wait behind those whose it is."""
    flood = [Waiter(f"flood{i}", key="flood") for i in range(3)]
    for waiter in flood:
        line.enter(waiter)
    line.take(flood[0])
    line.charge("flood", 100)
    clock.now += 1
    line.enter(Waiter("new", key="late"))
    assert line.had("late") == line.had("flood")
    assert line.first().name == "new"


def test_a_key_crowds_others_while_it_has_several_calls_and_they_may_come_again(line, clock):
    one, two = Waiter("one", key="many"), Waiter("two", key="many")
    line.enter(one)
    line.enter(two)
    assert not line.crowds("many")  # it is alone
    other = Waiter("other", key="few")
    line.enter(other)
    assert line.crowds("many")
    assert not line.crowds("few")
    line.leave(other)
    clock.now += COMPANY_SECONDS
    assert line.crowds("many")
    clock.now += 0.1
    assert not line.crowds("many")
    line.leave(two)
    line.enter(other)
    assert not line.crowds("many")  # one call is no crowd


def test_nobody_makes_room_for_the_servers_own_first_call_once_it_is_over(line):
    warm_up = Waiter("warm-up", key="")
    line.enter(warm_up)
    line.leave(warm_up)
    for name in ("one", "two"):
        line.enter(Waiter(name, key="many"))
    assert not line.crowds("many")


def test_who_waits_again_is_before_those_of_its_key(line):
    one, two = Waiter("one"), Waiter("two")
    line.enter(one)
    line.enter(two)
    line.take(one)
    line.again(one)
    assert line.first() is one


def test_accounts_of_keys_that_left_are_forgotten_once_nobody_is_there(line):
    waiter = Waiter("a", key="x")
    line.enter(waiter)
    line.charge("x", 10)
    line.leave(waiter)
    assert len(line) == 0
    assert line.had("x") == 0


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.integers(1, 50)), min_size=30, max_size=90))
def test_keys_that_always_wait_are_given_alike_whatever_each_asks_for(asked):
    """The accounts of those who still wait never differ by more than the largest call."""
    line = Line(lambda: 0.0)
    costs = {}
    for key, cost in asked:
        waiter = Waiter(key, key=key)
        costs[waiter] = cost
        line.enter(waiter)
    while waiter := line.first():
        line.take(waiter)
        line.charge(waiter.key, costs[waiter])
        waiting = {w.key for w in line}
        had = [line.had(key) for key in waiting]
        if had:
            assert max(had) - min(had) <= 50


def warm(most: int, seconds: float) -> Pace:
    pace = Pace(most, seconds)
    pace.took(5.0, 3, answering=False)
    return pace


def test_the_first_piece_of_all_in_which_weights_are_laid_out_tells_nothing_of_the_next():
    pace = warm(1024, 0.2)
    assert pace.tokens(answering=True) == pace.tokens(answering=False) == 256
    pace.took(0.05, 100, answering=False)
    assert pace.tokens(answering=True) == 400


def test_a_step_reads_what_its_time_allows_and_more_where_it_stalls_nobody():
    pace = warm(1024, 0.2)
    assert pace.tokens(answering=True) == pace.tokens(answering=False) == 256  # until it is known what they cost
    pace.took(1.0, 100, answering=False)
    assert pace.tokens(answering=False) == 60
    assert pace.tokens(answering=True) == 32  # 20 would not be worth a step
    for _ in range(100):
        pace.took(0.1, 200, answering=False)
    assert pace.tokens(answering=True) == pytest.approx(400, abs=2)
    assert pace.tokens(answering=False) == 1024
    assert pace.tokens(answering=True, shared=True) == pytest.approx(40, abs=2)


def test_a_small_piece_says_little_of_what_a_token_costs():
    pace = warm(1024, 0.2)
    pace.took(0.2, 1000, answering=False)
    for _ in range(5):
        pace.took(0.02, 2, answering=False)  # most of it is what any step takes
    assert pace.tokens(answering=True) > 600


def test_what_a_step_takes_without_prompts_is_not_counted_as_theirs():
    pace = warm(256, 0.1)
    pace.took(0.5, 0, answering=True)
    pace.took(0.6, 100, answering=True)
    assert pace.tokens(answering=True) == 100


def test_a_guess_is_what_followed_the_same_tokens_last_time():
    guesser = Guesser([1, 2, 3, 4, 5, 6, 1, 2, 3], most=8)
    assert guesser.guess(8) == [4, 5]
    guesser.learn(2, 2)
    assert guesser.guess(8) == [4, 5, 6, 1]
    assert guesser.guess(3) == [4, 5, 6]
    guesser.add(9)
    assert guesser.guess(8) == []


def test_guesses_that_keep_failing_pause():
    guesser = Guesser([7] * 20, most=8)
    guesser.learn(2, 0)
    assert len(guesser.guess(8)) == 1
    guesser.learn(1, 0)
    assert guesser.guess(8) == []
    for _ in range(32):
        guesser.add(7)
    assert guesser.guess(8) == [7]
