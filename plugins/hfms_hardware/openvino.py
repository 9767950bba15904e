"""Intel's CPUs, GPUs and NPUs, where openvino is installed; torch cannot use them under these names."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from importlib.machinery import PathFinder

import msgspec
from msgspec import Struct

from hfms_cli import Device, Probe
from hfms_hardware.cpu import host_memory, processor

DRIVERS = ("/dev/dri", "/dev/accel", "/dev/dxg")
"""Through these Linux has GPUs and NPUs, the last one within Windows. Without any there is the CPU alone."""

# Importing openvino takes a second, and a broken driver may hang or crash: both happen in a process of their own.
ASK = """
import json, openvino
core = openvino.Core()
def ask(device, key):
    try:
        return core.get_property(device, key)
    except Exception:
        return None
print(json.dumps([{
    "id": device,
    "name": str(ask(device, "FULL_DEVICE_NAME") or device),
    "memory": int(ask(device, "GPU_DEVICE_TOTAL_MEM_SIZE") or ask(device, "NPU_DEVICE_TOTAL_MEM_SIZE") or 0),
    "shared": "discrete" not in str(ask(device, "DEVICE_TYPE")).lower(),
} for device in core.available_devices]))
"""


class Found(Struct):
    """A device as openvino sees it: its bytes, or 0, and whether they are the machine's."""

    id: str
    name: str
    memory: int
    shared: bool


class Openvino:
    """Devices named `openvino:CPU`, `openvino:GPU.0`. They are asked for once, their memory at every probe.

    search: where to look for openvino, in place of `sys.path`. seconds: how long it may take to answer.
    drivers: paths of which there is one where openvino may find more than a CPU, on Linux.
    """

    name = "openvino"

    def __init__(
        self, search: Sequence[str] | None = None, seconds: float = 20.0, drivers: Sequence[str] = DRIVERS
    ) -> None:
        self._search = sys.path if search is None else search
        self._seconds = seconds
        self._drivers = drivers
        self._answer: list[Found] | str | None = None
        self._asking = threading.Lock()

    def probe(self) -> Probe:
        if PathFinder.find_spec("openvino", self._search) is None:
            return Probe(reason="openvino is not installed: pip install openvino")
        with self._asking:
            if self._answer is None:
                self._answer = self._ask()
        if isinstance(self._answer, str):
            return Probe(reason=self._answer)
        return Probe(tuple(map(_device, self._answer)))

    def _ask(self) -> list[Found] | str:
        """The devices, or why there are none."""
        if sys.platform == "linux" and not any(map(os.path.exists, self._drivers)):
            return [Found("CPU", processor(), memory=0, shared=True)]
        path = os.pathsep.join(p for p in self._search if p)
        try:
            # -P: the folder that hfms was started in is no place to import from.
            run = subprocess.run(
                [sys.executable, "-P", "-c", ASK],
                env={**os.environ, "PYTHONPATH": path},
                capture_output=True,
                timeout=self._seconds,
                check=True,
            )
            return msgspec.json.decode(run.stdout, type=list[Found]) or "openvino is installed and finds no device"
        except subprocess.TimeoutExpired:
            return f"openvino is installed and did not answer within {self._seconds:g} s"
        except subprocess.CalledProcessError as exc:
            last = exc.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            return f"openvino is installed and does not start: {last or f'exit status {exc.returncode}'}"
        except msgspec.MsgspecError:
            return "openvino is installed and its answer was not understood"


def _device(found: Found) -> Device:
    host = host_memory()
    # How much of a card's own memory others have taken, openvino cannot say.
    total = found.memory or host.total
    return Device(
        id=f"openvino:{found.id}",
        kind="openvino",
        name=found.name,
        total_bytes=total,
        free_bytes=min(total, host.free) if found.shared else total,
        shares="cpu" if found.shared else None,
    )
