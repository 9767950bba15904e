"""NVIDIA GPUs, asked for through NVML, the driver's own library: no torch, and nothing taken of their memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from hfms_cli import Device, Probe
from hfms_hardware.torch_build import MISSING, TorchBuild, installed_torch
from hfms_hardware.visible import visible

LIBRARY = "nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1"
VISIBLE = "CUDA_VISIBLE_DEVICES"


class Cuda:
    """Devices as torch will number them. `library` is NVML's file; tests bring their own of everything."""

    name = "cuda"

    def __init__(
        self,
        library: str = LIBRARY,
        environ: Mapping[str, str] = os.environ,
        torch: Callable[[], TorchBuild | None] = installed_torch,
    ) -> None:
        self._library = library
        self._environ = environ
        self._torch = torch

    def probe(self) -> Probe:
        try:
            with Nvml.open(self._library) as nvml:
                reason = _unusable(self._torch(), nvml.cuda_version())
                cards = [] if reason else self._cards(nvml)
                # What torch does not see, a container or the operator has hidden.
                reason = reason or ("" if cards else f"{VISIBLE} hides all {nvml.count()} NVIDIA GPUs")
        except NvmlError as exc:
            return Probe(reason=str(exc))
        return Probe(tuple(_device(i, card) for i, card in enumerate(cards)), reason or None)

    def _cards(self, nvml: Nvml) -> list[Card]:
        value = self._environ.get(VISIBLE)
        if value and value.startswith("MIG-"):
            # A slice of a GPU is known by its UUID alone, and CUDA gives a process only one.
            return [nvml.slice(value.split(",")[0].strip())]
        cards = [nvml.card(i) for i in range(nvml.count())]
        if self._environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
            # CUDA's default order is "fastest first", by a rule that is not published. This is the one of its own
            # samples, and cards of one kind stay in the order of the bus, in which NVML counts.
            cards.sort(key=lambda card: -card.speed)
        return [cards[i] for i in visible(value, [card.uuid for card in cards])]


def _unusable(build: TorchBuild | None, driver: tuple[int, int]) -> str:
    """Why the installed torch cannot use NVIDIA GPUs; empty where it can."""
    if build is None:
        return MISSING
    if build.hip:
        return f"torch {build.version} is built for ROCm, not for CUDA; its devices are those of `rocm`"
    if not build.cuda:
        return f"torch {build.version} is built without CUDA; install a CUDA build (https://pytorch.org/get-started)"
    if int(build.cuda.split(".")[0]) > driver[0]:
        has = "{}.{}".format(*driver)
        return f"torch {build.version} needs CUDA {build.cuda} and the NVIDIA driver has {has}; update the driver"
    return ""


def _device(index: int, card: Card) -> Device:
    id = f"cuda:{index}"
    return Device(
        id=id, kind="cuda", name=card.name, total_bytes=card.total_bytes, free_bytes=card.free_bytes, torch_device=id
    )


class NvmlError(Exception):
    """Why NVML has no answer, in words for people."""


@dataclass(frozen=True)
class Card:
    """A GPU as the driver sees it. `speed` is of no unit, and 0 where the driver does not say."""

    uuid: str
    name: str
    total_bytes: int
    free_bytes: int
    speed: int = 0


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class Nvml:
    """The few calls that are needed of NVML. Raises NvmlError."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.nvmlErrorString.restype = ctypes.c_char_p

    @classmethod
    @contextmanager
    def open(cls, library: str) -> Iterator[Nvml]:
        try:
            nvml = cls(ctypes.CDLL(library))
        except OSError:
            raise NvmlError(f"no NVIDIA driver ({library} not found)") from None
        nvml._call("nvmlInit_v2")
        try:
            yield nvml
        finally:
            nvml._call("nvmlShutdown")

    def count(self) -> int:
        found = ctypes.c_uint()
        self._call("nvmlDeviceGetCount_v2", ctypes.byref(found))
        if not found.value:
            raise NvmlError("there is an NVIDIA driver and no GPU")
        return found.value

    def cuda_version(self) -> tuple[int, int]:
        """The newest CUDA that the driver runs."""
        version = ctypes.c_int()
        self._call("nvmlSystemGetCudaDriverVersion_v2", ctypes.byref(version))
        return version.value // 1000, version.value % 1000 // 10

    def card(self, index: int) -> Card:
        handle = ctypes.c_void_p()
        self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
        return self._read(handle)

    def slice(self, uuid: str) -> Card:
        """A MIG instance."""
        handle = ctypes.c_void_p()
        self._call("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(handle))
        return self._read(handle)

    def _read(self, handle: ctypes.c_void_p) -> Card:
        memory = _Memory()
        self._call("nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
        name, uuid = self._text("nvmlDeviceGetName", handle), self._text("nvmlDeviceGetUUID", handle)
        return Card(uuid, name, memory.total, memory.free, self._speed(handle))

    def _text(self, function: str, handle: ctypes.c_void_p) -> str:
        buffer = ctypes.create_string_buffer(96)
        self._call(function, handle, buffer, ctypes.c_uint(len(buffer)))
        return buffer.value.decode(errors="replace")

    def _speed(self, handle: ctypes.c_void_p) -> int:
        cores, clock, sm = ctypes.c_uint(), ctypes.c_uint(), 1
        try:
            self._call("nvmlDeviceGetNumGpuCores", handle, ctypes.byref(cores))
            self._call("nvmlDeviceGetMaxClockInfo", handle, sm, ctypes.byref(clock))
        except NvmlError:  # a slice, an old card or an old driver
            return 0
        return cores.value * clock.value

    def _call(self, function: str, *arguments: object) -> None:
        try:
            code = getattr(self._library, function)(*arguments)
        except AttributeError:
            raise NvmlError(f"the NVIDIA driver is too old (it has no {function})") from None
        if code:
            text = self._library.nvmlErrorString(code).decode(errors="replace")
            raise NvmlError(f"the NVIDIA driver does not answer ({function}: {text}); `nvidia-smi` may say more")
