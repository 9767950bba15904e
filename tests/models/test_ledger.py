"""Memory is promised once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfms_cli.errors import DoesNotFit
from hfms_cli.models.ledger import Ledger
from hfms_cli.types import Device


def device(free: int, device_id: str = "cpu") -> Device:
    return Device(id=device_id, kind="cpu", name="d", total_bytes=2**40, free_bytes=free)


def test_two_loads_cannot_both_count_on_the_same_bytes():
    ledger = Ledger()
    ledger.reserve(device(100), 60)
    with pytest.raises(DoesNotFit, match="60 bytes on cpu, which has 40 bytes left"):
        ledger.reserve(device(100), 60)


def test_what_a_model_has_taken_is_not_counted_twice():
    ledger = Ledger()
    reservation = ledger.reserve(device(100), 60)
    reservation.taken = lambda: 50
    assert ledger.available(device(50)) == 40  # the device itself says that 50 are gone; 10 are still promised


def test_a_load_that_fails_gives_its_bytes_back():
    ledger = Ledger()
    with pytest.raises(ZeroDivisionError), ledger.reserved_if_loaded(device(100), 60):
        raise ZeroDivisionError
    assert ledger.available(device(100)) == 100


def test_devices_that_share_a_memory_share_its_promises():
    ledger = Ledger()
    ledger.reserve(device(100), 60)
    integrated = Device(id="mps", kind="mps", name="d", total_bytes=2**40, free_bytes=100, shares="cpu")
    assert ledger.available(integrated) == 40


def test_devices_do_not_share_a_ledger():
    ledger = Ledger()
    ledger.reserve(device(100, "cuda:0"), 100)
    ledger.reserve(device(100, "cuda:1"), 100)
    assert (ledger.available(device(100, "cuda:0")), ledger.available(device(100, "cpu"))) == (0, 100)


@given(st.lists(st.tuples(st.integers(0, 120), st.booleans())))
def test_promises_never_exceed_the_device_and_all_come_back(steps):
    ledger, held = Ledger(), []
    for size, release in steps:
        if release and held:
            ledger.release(held.pop(0))
            continue
        try:
            held.append(ledger.reserve(device(100), size))
        except DoesNotFit:
            assert sum(r.size for r in held) + size > 100
        assert sum(r.size for r in held) <= 100
    for reservation in held:
        ledger.release(reservation)
    assert ledger.available(device(100)) == 100
