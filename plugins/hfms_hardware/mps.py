"""The GPU of Apple silicon. It shares the machine's memory, so its bytes are those of the machine."""

from __future__ import annotations

import platform
from collections.abc import Callable

from hfms_cli import Device, Probe
from hfms_hardware.cpu import host_memory
from hfms_hardware.torch_build import MISSING, TorchBuild, installed_torch


class Mps:
    """At most one device. `system` and `machine` are as `platform` names them."""

    name = "mps"

    def __init__(
        self,
        system: str = platform.system(),
        machine: str = platform.machine(),
        torch: Callable[[], TorchBuild | None] = installed_torch,
    ) -> None:
        self._system = system
        self._machine = machine
        self._torch = torch

    def probe(self) -> Probe:
        if (self._system, self._machine) != ("Darwin", "arm64"):
            return Probe(reason=f"needs macOS on Apple silicon; this is {self._system} on {self._machine}")
        if self._torch() is None:
            return Probe(reason=MISSING)
        memory = host_memory()
        device = Device(
            id="mps",
            kind="mps",
            name="Apple GPU (shares the machine's memory)",
            total_bytes=memory.total,
            free_bytes=memory.free,
            torch_device="mps",
            shares="cpu",
        )
        return Probe((device,))
