"""The openvino probe: with the real package where it is installed, else with a package made here.

Either way it runs in a process of its own, as it does on a user's machine that may have a GPU.
"""

from __future__ import annotations

import importlib.util
import sys

import psutil
import pytest

from hfms_hardware.cpu import Cpu
from hfms_hardware.openvino import Openvino

GB = 2**30
SOME = ["/"]
"""Of drivers, one that is there."""

MADE = """
class Core:
    available_devices = ["CPU", "GPU.0", "GPU.1"]

    def get_property(self, device, key):
        known = {
            ("CPU", "FULL_DEVICE_NAME"): "Some CPU",
            ("GPU.0", "FULL_DEVICE_NAME"): "Iris (iGPU)",
            ("GPU.0", "GPU_DEVICE_TOTAL_MEM_SIZE"): %d,
            ("GPU.0", "DEVICE_TYPE"): "Type.INTEGRATED",
            ("GPU.1", "FULL_DEVICE_NAME"): "Arc (dGPU)",
            ("GPU.1", "GPU_DEVICE_TOTAL_MEM_SIZE"): %d,
            ("GPU.1", "DEVICE_TYPE"): "Type.DISCRETE",
        }
        if (device, key) not in known:
            raise RuntimeError("unsupported property")
        return known[device, key]
"""


@pytest.fixture
def package(tmp_path):
    """Put a package named openvino on the way, and count how often it is imported."""

    def make(text: str) -> list[str]:
        (tmp_path / "openvino").mkdir(exist_ok=True)
        count = f"open({str(tmp_path / 'imports')!r}, 'a').write('x')\n"
        (tmp_path / "openvino" / "__init__.py").write_text(count + text)
        return [str(tmp_path)]

    return make


def test_devices_have_openvinos_names_and_none_of_torchs(package):
    cpu, integrated, discrete = Openvino(package(MADE % (2**50, 16 * GB)), drivers=SOME).probe().devices
    machine = psutil.virtual_memory().total
    assert [d.id for d in (cpu, integrated, discrete)] == ["openvino:CPU", "openvino:GPU.0", "openvino:GPU.1"]
    assert {d.torch_device for d in (cpu, integrated, discrete)} == {None}
    assert (cpu.name, cpu.kind) == ("Some CPU", "openvino")
    assert 0 < cpu.free_bytes <= cpu.total_bytes <= machine
    assert 0 < integrated.free_bytes <= machine
    assert (discrete.total_bytes, discrete.free_bytes) == (16 * GB, 16 * GB)


def test_openvino_is_started_once_however_often_it_is_probed(package, tmp_path):
    probe = Openvino(package(MADE % (GB, GB)), drivers=SOME).probe
    assert [len(probe().devices) for _ in range(3)] == [3, 3, 3]
    assert (tmp_path / "imports").read_text() == "x"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("class Core:\n    available_devices = []", "finds no device"),
        ("raise ImportError('libtbb.so.12: cannot open')", "does not start: ImportError: libtbb.so.12"),
        ("import os\nos.abort()", "does not start: exit status -6"),
        ("print('hello')\nclass Core:\n    available_devices = []", "not understood"),
    ],
)
def test_a_broken_openvino_is_a_reason_and_costs_nothing_else(package, text, reason):
    found = Openvino(package(text), drivers=SOME).probe()
    assert found.devices == ()
    assert reason in found.reason


def test_an_openvino_that_hangs_is_given_up(package):
    found = Openvino(package("import threading\nthreading.Event().wait()"), seconds=0.5, drivers=SOME).probe()
    assert found.reason == "openvino is installed and did not answer within 0.5 s"


def test_without_openvino_the_reason_says_how_to_get_it(tmp_path):
    assert Openvino([str(tmp_path)]).probe().reason == "openvino is not installed: pip install openvino"


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
def test_the_real_openvino_has_this_machines_processor():
    found = {d.id: d for d in Openvino(drivers=SOME).probe().devices}
    assert found["openvino:CPU"].total_bytes <= psutil.virtual_memory().total


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere drivers are no files")
def test_without_a_driver_openvino_has_the_cpu_alone_and_is_not_started(package, tmp_path):
    (only,) = Openvino(package(MADE % (GB, GB)), drivers=[str(tmp_path / "dri")]).probe().devices
    (cpu,) = Cpu().probe().devices
    assert (only.id, only.name, only.total_bytes, only.shares) == ("openvino:CPU", cpu.name, cpu.total_bytes, "cpu")
    assert not (tmp_path / "imports").exists()
