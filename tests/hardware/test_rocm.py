"""The rocm probe on made sysfs trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from hfms_hardware.rocm import Rocm
from hfms_hardware.torch_build import TorchBuild

GB = 2**30
HIP = TorchBuild("2.9.1+rocm7.0", hip="7.0")


def add(
    root: Path, number: int, *, bus: str, vendor: str = "0x1002", total: int = 0, used: int = 0, **more: str
) -> None:
    """A card as the kernel shows it: a link to the device on its bus."""
    device = root / "sys/devices/pci0000:00" / bus
    device.mkdir(parents=True)
    values = {"vendor": vendor, "device": "0x74a1", **more}
    if total:
        values |= {"mem_info_vram_total": str(total), "mem_info_vram_used": str(used)}
    for name, value in values.items():
        (device / name).write_text(value + "\n")
    card = root / f"sys/class/drm/card{number}"
    card.mkdir(parents=True)
    (card / "device").symlink_to(device)


@pytest.fixture
def machine(tmp_path) -> Path:
    """Two AMD GPUs whose numbers are not in the order of the bus, one of Intel, and one that another driver holds."""
    add(tmp_path, 0, bus="0000:00:02.0", vendor="0x8086")
    add(tmp_path, 1, bus="0000:c3:00.0", total=192 * GB, used=92 * GB, unique_id="2222bbbb", product_name="MI300X")
    add(tmp_path, 2, bus="0000:43:00.0", total=24 * GB, used=4 * GB, unique_id="1111aaaa")
    add(tmp_path, 3, bus="0000:e3:00.0")
    return tmp_path


def probe(root: Path, torch: TorchBuild | None = HIP, **environ: str):
    return Rocm(root, environ, lambda: torch).probe()


def test_devices_are_numbered_by_the_bus_and_called_cuda_by_torch(machine):
    first, second = probe(machine).devices
    assert (first.id, first.kind, first.torch_device) == ("rocm:0", "rocm", "cuda:0")
    assert (first.name, first.total_bytes, first.free_bytes) == ("AMD GPU 0x74a1", 24 * GB, 20 * GB)
    assert (second.id, second.torch_device) == ("rocm:1", "cuda:1")
    assert (second.name, second.total_bytes, second.free_bytes) == ("MI300X", 192 * GB, 100 * GB)


@pytest.mark.parametrize(
    ("environ", "totals"),
    [
        ({"HIP_VISIBLE_DEVICES": "1"}, [192]),
        ({"HIP_VISIBLE_DEVICES": "1,0"}, [192, 24]),
        ({"CUDA_VISIBLE_DEVICES": "1"}, [192]),
        ({"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "1"}, [24]),
        ({"ROCR_VISIBLE_DEVICES": "GPU-2222bbbb"}, [192]),
        ({"ROCR_VISIBLE_DEVICES": "1,0", "HIP_VISIBLE_DEVICES": "0"}, [192]),
    ],
)
def test_visible_devices_choose_and_order(machine, environ, totals):
    found = probe(machine, **environ)
    assert [d.total_bytes // GB for d in found.devices] == totals
    assert [d.torch_device for d in found.devices] == [f"cuda:{i}" for i in range(len(totals))]


def test_devices_that_are_all_hidden_are_a_reason(machine):
    assert "hide all 2 AMD GPUs" in probe(machine, HIP_VISIBLE_DEVICES="-1").reason


def test_without_a_card_the_driver_is_asked_for(tmp_path):
    assert "amdgpu" in probe(tmp_path).reason
    add(tmp_path, 0, bus="0000:00:02.0", vendor="0x8086")
    assert "no AMD GPU" in probe(tmp_path).reason


@pytest.mark.parametrize(
    ("torch", "reason"),
    [
        (None, "torch is not installed: pip install 'hfms[transformers]'"),
        (TorchBuild("2.13.0+cpu"), "torch 2.13.0+cpu is built without ROCm; install a ROCm build"),
        (TorchBuild("2.13.0+cu128", cuda="12.8"), "built without ROCm"),
    ],
)
def test_a_torch_that_cannot_use_the_gpu_is_the_reason(machine, torch, reason):
    found = probe(machine, torch)
    assert found.devices == ()
    assert reason in found.reason
