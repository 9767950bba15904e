"""Kinds of device that hfms knows of itself. Each probe says what is free now, or why there is nothing to use."""

from __future__ import annotations

from collections.abc import Iterator

from hfms_cli import Hardware, Provider, hookimpl
from hfms_hardware.cpu import Cpu
from hfms_hardware.cuda import Cuda
from hfms_hardware.mps import Mps
from hfms_hardware.openvino import Openvino
from hfms_hardware.rocm import Rocm


@hookimpl
def hfms_hardware() -> Iterator[Provider[Hardware]]:
    yield Provider("cuda", Cuda, summary="NVIDIA GPUs, through the driver's own NVML.")
    yield Provider("rocm", Rocm, summary="AMD GPUs, for a ROCm build of torch.")
    yield Provider("mps", Mps, summary="The GPU of Apple silicon.")
    yield Provider("openvino", Openvino, summary="Intel CPUs, GPUs and NPUs, where openvino is installed.")
    yield Provider("cpu", Cpu, summary="This machine's processor and memory.")
