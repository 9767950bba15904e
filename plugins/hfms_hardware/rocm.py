"""AMD GPUs, as the amdgpu driver shows them in sysfs: no ROCm library, and no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hfms_cli import Device, Probe
from hfms_hardware.torch_build import MISSING, TorchBuild, installed_torch
from hfms_hardware.visible import visible

AMD = "0x1002"


@dataclass(frozen=True)
class Card:
    """A GPU as the driver sees it. `uuid` is ROCm's, and empty where the card has none."""

    uuid: str
    name: str
    total_bytes: int
    free_bytes: int


class Rocm:
    """Devices as a HIP build of torch will number them, which calls them `cuda:0` and on. `root` stands for `/`."""

    name = "rocm"

    def __init__(
        self,
        root: Path = Path("/"),
        environ: Mapping[str, str] = os.environ,
        torch: Callable[[], TorchBuild | None] = installed_torch,
    ) -> None:
        self._root = root
        self._environ = environ
        self._torch = torch

    def probe(self) -> Probe:
        cards = self._cards()
        if not cards:
            return Probe(reason="no AMD GPU (none with the amdgpu driver under /sys/class/drm)")
        build = self._torch()
        if build is None:
            return Probe(reason=MISSING)
        if not build.hip:
            return Probe(
                reason=f"torch {build.version} is built without ROCm; install a ROCm build "
                "(https://pytorch.org/get-started)"
            )
        left = self._left(cards)
        if not left:
            return Probe(reason=f"the *_VISIBLE_DEVICES variables hide all {len(cards)} AMD GPUs")
        return Probe(tuple(_device(i, card) for i, card in enumerate(left)))

    def _left(self, cards: list[Card]) -> list[Card]:
        """ROCm's runtime chooses first; HIP chooses from those, and takes CUDA's variable where it has none."""
        hip = self._environ.get("HIP_VISIBLE_DEVICES", self._environ.get("CUDA_VISIBLE_DEVICES"))
        for value in (self._environ.get("ROCR_VISIBLE_DEVICES"), hip):
            cards = [cards[i] for i in visible(value, [card.uuid for card in cards])]
        return cards

    def _cards(self) -> list[Card]:
        """In the order of the PCI bus, which is ROCm's."""
        found = (self._root / "sys/class/drm").glob("card*/device")
        folders = sorted(found, key=lambda folder: (folder.resolve().name, folder.parent.name))
        return [card for card in map(_read, folders) if card is not None]


def _read(folder: Path) -> Card | None:
    """A card; None for other makers' and for those that another driver holds."""

    def text(name: str) -> str:
        return (folder / name).read_text().strip()

    try:
        if text("vendor") != AMD:
            return None
        total, used = int(text("mem_info_vram_total")), int(text("mem_info_vram_used"))
    except (OSError, ValueError):
        return None
    names = {}
    for key in ("unique_id", "product_name", "device"):
        try:
            names[key] = text(key)
        except OSError:  # not every card has these
            names[key] = ""
    uuid = f"GPU-{names['unique_id']}" if names["unique_id"] else ""
    return Card(uuid, names["product_name"] or f"AMD GPU {names['device']}".rstrip(), total, total - used)


def _device(index: int, card: Card) -> Device:
    return Device(
        id=f"rocm:{index}",
        kind="rocm",
        name=card.name,
        total_bytes=card.total_bytes,
        free_bytes=card.free_bytes,
        torch_device=f"cuda:{index}",
    )
