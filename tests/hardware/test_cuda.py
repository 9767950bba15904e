"""The cuda probe, against this machine and against an NVML compiled here and loaded as the real one is."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfms_hardware.cuda import LIBRARY, Cuda
from hfms_hardware.torch_build import TorchBuild
from hfms_hardware.visible import visible

GB = 2**30
COMPILER = shutil.which("cc")
CUDA_TORCH = TorchBuild("2.13.0+cu128", cuda="12.8")

OLD = ("GPU-aaaa1111", "NVIDIA T4", 16 * GB, 15 * GB, 2560, 1590, 0)
NEW = ("GPU-aaaa2222", "NVIDIA H100 80GB HBM3", 80 * GB, 70 * GB, 16896, 1980, 0)
TWIN = ("GPU-bbbb3333", "NVIDIA H100 80GB HBM3", 80 * GB, 10 * GB, 16896, 1980, 0)
SLICE = ("MIG-cccc4444", "NVIDIA H100 MIG 1g.10gb", 10 * GB, 9 * GB, 0, 0, 0)
LOST = ("GPU-dddd5555", "NVIDIA H100", 80 * GB, 0, 16896, 1980, 15)


@pytest.fixture
def driver(tmp_path):
    """Compile an NVML that knows these cards."""
    if COMPILER is None:
        pytest.skip("no C compiler (cc) to make an NVML with")

    def make(*cards, init: int = 0, cuda: int = 12080, old: bool = False) -> str:
        rows = ", ".join('{{"{}", "{}", {}ull, {}ull, {}, {}, {}}}'.format(*card) for card in cards)
        macros = [f"-DCARDS={rows or '{0}'}", f"-DINIT={init}", f"-DDRIVER={cuda}", *(["-DOLD_DRIVER"] if old else [])]
        library = tmp_path / f"nvml{len(list(tmp_path.iterdir()))}.so"
        source = Path(__file__).with_name("fake_nvml.c")
        command = [COMPILER, "-shared", "-fPIC", "-w", *macros, "-o", str(library), str(source)]
        subprocess.run(command, check=True)
        return str(library)

    return make


def probe(library: str, torch: TorchBuild | None = CUDA_TORCH, **environ: str):
    return Cuda(library, environ, lambda: torch).probe()


def names(found) -> list[str]:
    return [device.name for device in found.devices]


def test_devices_come_with_their_memory_and_torchs_names(driver):
    first, second = probe(driver(NEW, TWIN)).devices
    assert (first.id, first.torch_device, first.kind) == ("cuda:0", "cuda:0", "cuda")
    assert (first.name, first.total_bytes, first.free_bytes) == ("NVIDIA H100 80GB HBM3", 80 * GB, 70 * GB)
    assert (second.id, second.free_bytes) == ("cuda:1", 10 * GB)


def test_the_faster_card_is_first_unless_the_order_is_that_of_the_bus(driver):
    library = driver(OLD, NEW, TWIN)
    assert [d.free_bytes // GB for d in probe(library).devices] == [70, 10, 15]
    assert [d.free_bytes // GB for d in probe(library, CUDA_DEVICE_ORDER="PCI_BUS_ID").devices] == [15, 70, 10]


def test_a_driver_that_does_not_tell_speeds_keeps_the_order_of_the_bus(driver):
    assert [d.free_bytes // GB for d in probe(driver(OLD, NEW, old=True)).devices] == [15, 70]


@pytest.mark.parametrize(
    ("value", "free"),
    [
        ("1", [10]),
        ("2,0", [15, 70]),
        ("GPU-bbbb", [10]),
        ("GPU-aaaa1111,GPU-bbbb3333", [15, 10]),
        ("gpu-AAAA2222", [70]),
        ("0,7,1", [70]),
        ("MIG-cccc4444,0", [9]),
    ],
)
def test_visible_devices_choose_and_order(driver, value, free):
    found = probe(driver(OLD, NEW, TWIN, SLICE), CUDA_VISIBLE_DEVICES=value)
    assert [d.free_bytes // GB for d in found.devices] == free
    assert [d.torch_device for d in found.devices] == [f"cuda:{i}" for i in range(len(free))]


@pytest.mark.parametrize("value", ["", "-1", "3", "0,0", "GPU-aaaa", "GPU-zzzz", "none"])
def test_devices_that_are_all_hidden_are_a_reason(driver, value):
    found = probe(driver(OLD, NEW, TWIN), CUDA_VISIBLE_DEVICES=value)
    assert found.devices == ()
    assert found.reason == "CUDA_VISIBLE_DEVICES hides all 3 NVIDIA GPUs"


@pytest.mark.parametrize(
    ("torch", "reason"),
    [
        (None, "torch is not installed: pip install 'hfms[transformers]'"),
        (TorchBuild("2.13.0+cpu"), "torch 2.13.0+cpu is built without CUDA; install a CUDA build"),
        (TorchBuild("2.13.0+rocm7.0", hip="7.0"), "built for ROCm"),
        (TorchBuild("2.13.0+cu130", cuda="13.0"), "needs CUDA 13.0 and the NVIDIA driver has 12.8; update the driver"),
    ],
)
def test_a_torch_that_cannot_use_the_gpu_is_the_reason(driver, torch, reason):
    found = probe(driver(NEW), torch)
    assert found.devices == ()
    assert reason in found.reason


def test_a_driver_without_an_answer_is_the_reason(driver):
    assert "nvmlInit_v2: Driver Not Loaded" in probe(driver(NEW, init=9)).reason
    assert "nvmlDeviceGetMemoryInfo: GPU is lost" in probe(driver(NEW, LOST)).reason
    assert probe(driver(SLICE)).reason == "there is an NVIDIA driver and no GPU"
    assert "nvmlDeviceGetHandleByUUID" in probe(driver(NEW), CUDA_VISIBLE_DEVICES="MIG-gone").reason


def test_nvml_is_closed_again_whatever_happened(driver):
    for library in (driver(NEW), driver(LOST)):
        probe(library)
        assert ctypes.CDLL(library).opened() == 0


def test_without_a_driver_the_library_is_named():
    assert probe("libnvidia-ml-none.so.1").reason == "no NVIDIA driver (libnvidia-ml-none.so.1 not found)"


def test_this_machine_has_cuda_devices_or_a_reason():
    found = Cuda().probe()
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        assert found.reason == f"no NVIDIA driver ({LIBRARY} not found)"
    assert bool(found.devices) != bool(found.reason)
    assert all(0 <= d.free_bytes <= d.total_bytes for d in found.devices)


words = st.one_of(st.integers(-2, 6).map(str), st.sampled_from(["GPU-a", "GPU-ab", "GPU-b", " 1 ", "", "x", "GPU-"]))


@given(st.none() | st.lists(words, max_size=6).map(",".join), st.permutations(["GPU-ab1", "GPU-ab2", "GPU-b3", ""]))
def test_what_is_visible_is_a_choice_without_doubles(value, uuids):
    chosen = visible(value, uuids)
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= set(range(4))
    if value is None:
        assert chosen == [0, 1, 2, 3]
