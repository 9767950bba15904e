"""The mps probe."""

from __future__ import annotations

import platform

import psutil
import pytest

from hfms_hardware.mps import Mps
from hfms_hardware.torch_build import TorchBuild

MAC_TORCH = TorchBuild("2.13.0")


def probe(system: str, machine: str, torch: TorchBuild | None = MAC_TORCH):
    return Mps(system, machine, lambda: torch).probe()


def test_apple_silicon_is_one_device_with_the_machines_memory():
    (device,) = probe("Darwin", "arm64").devices
    assert (device.id, device.kind, device.torch_device) == ("mps", "mps", "mps")
    assert 0 < device.free_bytes <= device.total_bytes <= psutil.virtual_memory().total


@pytest.mark.parametrize(("system", "machine"), [("Linux", "x86_64"), ("Darwin", "x86_64"), ("Linux", "arm64")])
def test_other_machines_have_none(system, machine):
    assert probe(system, machine).reason == f"needs macOS on Apple silicon; this is {system} on {machine}"


def test_without_torch_there_is_none():
    assert probe("Darwin", "arm64", None).reason == "torch is not installed: pip install 'hfms[transformers]'"


def test_this_machine_is_judged_by_its_own_name():
    apple = (platform.system(), platform.machine()) == ("Darwin", "arm64")
    assert bool(Mps().probe().devices) == apple
