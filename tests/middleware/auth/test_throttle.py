"""Wrong keys cost time, per address, in bounded memory."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hfms_middleware.auth.throttle import FREE_FAILURES, LONGEST_WAIT, PARDON_SECONDS, REMEMBERED, Throttle


class Clock:
    at = 0.0

    def __call__(self) -> float:
        return self.at


def test_some_wrong_keys_are_free_and_then_each_costs_twice_the_last():
    throttle = Throttle(Clock())
    waits = [throttle.failed("1.2.3.4") for _ in range(FREE_FAILURES + 8)]
    assert waits == [0.0] * FREE_FAILURES + [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


def test_another_address_does_not_pay():
    throttle = Throttle(Clock())
    for _ in range(100):
        throttle.failed("1.2.3.4")
    assert throttle.failed("1.2.3.5") == 0.0


def test_who_stops_is_forgiven():
    clock = Clock()
    throttle = Throttle(clock)
    for _ in range(1000):
        throttle.failed("1.2.3.4")
    clock.at += PARDON_SECONDS * (FREE_FAILURES + 6)
    assert [throttle.failed("1.2.3.4") for _ in range(FREE_FAILURES)] == [0.0] * FREE_FAILURES


def test_all_addresses_of_one_ipv6_network_are_one():
    throttle = Throttle(Clock())
    for i in range(FREE_FAILURES):
        throttle.failed(f"2001:db8::{i:x}")
    assert throttle.failed("2001:db8::ffff") > 0
    assert throttle.failed("2001:db8:0:1::1") == 0


def test_the_memory_is_bounded_and_keeps_the_latest():
    throttle = Throttle(Clock())
    for _ in range(FREE_FAILURES):
        throttle.failed("attacker")
    for i in range(REMEMBERED - 1):
        throttle.failed(f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}")
    assert len(throttle) == REMEMBERED
    assert throttle.failed("attacker") > 0
    throttle.failed("one more")
    assert len(throttle) == REMEMBERED


@given(st.lists(st.tuples(st.text(max_size=5), st.floats(-100, 100)), max_size=50))
def test_a_wait_is_bounded_whatever_the_clock_does(failures):
    clock = Clock()
    throttle = Throttle(clock)
    for address, passed in failures:
        clock.at += passed
        assert 0 <= throttle.failed(address) <= LONGEST_WAIT
