"""Will a model fit? For each device, engine and precision, before anything is fetched, loaded or unloaded.

The numbers are those by which a load decides: `Engine.estimate`, and what devices measure of their memory.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from msgspec.structs import replace

from hfms_cli.config import Config
from hfms_cli.hookspecs import Engine, Hardware, LoadRequest
from hfms_cli.models import eviction
from hfms_cli.models.inspect import inspect
from hfms_cli.models.router import Router, stands_for
from hfms_cli.models.sketch import sketch
from hfms_cli.types import Device, Footprint, Manifest, ModelCard, ModelName, Quantize

__all__ = ["Option", "Plan", "Seen", "Served", "look", "options", "served_by"]

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Seen:
    """A model as its files tell it."""

    manifest: Manifest
    card: ModelCard
    here: bool
    """It is on this disk."""
    to_fetch: int
    """Bytes."""


@dataclass(frozen=True)
class Option:
    """One way to load a model."""

    device: str
    engine: str
    dtype: str
    quantize: Quantize
    total: int
    """Bytes of the device's memory."""
    parts: Footprint | None
    """What they are made of, where the engine tells."""
    free: int
    """Bytes of the device's memory that can be had now."""
    unload: tuple[str, ...] = ()
    """Models of the running server that would have to go first."""
    fits: bool = True
    """As it is, or once those are unloaded."""
    usual: bool = False
    """What a load without a word on that would choose."""


@dataclass(frozen=True)
class Plan:
    """Every way to load a model, the best first, and why there are no others."""

    seen: Seen
    options: Sequence[Option]
    refused: Sequence[str]

    @property
    def best(self) -> Option | None:
        """The way that a load would take: the usual one if it fits, else the first that does."""
        fitting = [o for o in self.options if o.fits]
        return next((o for o in fitting if o.usual), None) or next(iter(fitting), None)


@dataclass(frozen=True)
class Served:
    """What a running server holds."""

    held: Sequence[eviction.Held] = ()
    promised: Mapping[str, int] = field(default_factory=dict)
    """Bytes that its models may still take, by the device whose memory they are of."""


async def look(router: Router, name: ModelName) -> Seen:
    """A model's manifest and card; of what is not on this disk only the headers are fetched. Raises HfmsError."""
    here = next((m for m in await router.list() if stands_for(name, m)), None)
    if here is not None or name.scheme == "path":
        manifest, storage = (here, None) if here else await router.find(name)
        storage = storage or next(s for s in router.storages if s.name == manifest.storage)
        folder = await storage.fetch(manifest, lambda done, total: None)
        return Seen(manifest, inspect(folder, [f.path for f in manifest.files]), True, 0)
    manifest, storage = await router.find(name)
    with tempfile.TemporaryDirectory(prefix="hfms-plan-") as temp:
        await sketch(storage, manifest, Path(temp))
        return Seen(manifest, inspect(Path(temp), [f.path for f in manifest.files]), False, manifest.size)


def served_by(rows: Iterable[Mapping[str, Any]], devices: Sequence[Device]) -> Served:
    """What `GET /models` of a running server says that it holds."""
    memory = {d.id: d.memory for d in devices}
    held = []
    promised: Counter[str] = Counter()
    for row in rows:
        replicas = [r for r in row.get("replicas") or [row] if "memory_bytes" in r]
        if not replicas:
            continue
        frees: Counter[str] = Counter()
        for replica in replicas:
            frees[memory.get(str(replica.get("device")), "")] += int(replica["memory_bytes"])
        estimated = int(row.get("estimated_bytes") or 0)
        for where, size in frees.items():
            promised[where] += max(0, estimated * size // max(1, frees.total()) - size)
        held.append(
            eviction.Held(
                id=str(row["id"]),
                last_used=float(row.get("last_used") or 0),
                frees=frees,
                in_use=bool(row.get("requests_running") or row.get("requests_waiting")),
                pinned=bool(row.get("pinned")),
                steady=row["status"]["value"] == "loaded",
            )
        )
    return Served(held, promised)


def options(
    seen: Seen, config: Config, engines: Sequence[Engine], hardware: Sequence[Hardware], served: Served = Served()
) -> Plan:
    """Every way to load the model."""
    found: list[Option] = []
    refused = []
    devices = [d for kind in hardware for d in kind.probe().devices]
    for device in devices:
        free = max(0, device.free_bytes - served.promised.get(device.memory, 0))
        for engine in engines:
            if reason := engine.supports(seen.card, device):
                refused.append(f"{engine.name} on {device.id}: {reason}")
                continue
            found += _of_engine(seen, config, engine, replace(device, free_bytes=free), served)
    found.sort(key=lambda o: not o.usual)  # stable: else as the operator's orders of devices and engines have it
    return Plan(seen, found, refused)


def _of_engine(seen: Seen, config: Config, engine: Engine, device: Device, served: Served) -> list[Option]:
    """What the configuration chooses, then every other precision that makes a difference to its memory."""
    made = getattr(engine, "quantizes", ())
    usual = (config.models.dtype, config.models.quantize)
    ways = [(dtype, quantize) for quantize in ("none", *made) for dtype in DTYPES]
    found: list[Option] = []
    for dtype, quantize in [usual, *ways]:
        if quantize in ("int8", "int4") and quantize not in made:
            continue
        request = LoadRequest(
            folder=Path("/"), card=seen.card, device=device, dtype=dtype, quantize=cast("Quantize", quantize)
        )
        option = _option(engine, request, served, usual=(dtype, quantize) == usual)
        if all(o.total != option.total for o in found):
            found.append(option)
    return found


def _option(engine: Engine, request: LoadRequest, served: Served, *, usual: bool) -> Option:
    device = request.device

    def size_with(freed: eviction.Freed) -> tuple[int, int]:
        """What the engine takes where so much more is free, and how much that is: some fill what they find."""
        roomier = replace(device, free_bytes=device.free_bytes + freed.get(device.memory, 0))
        return engine.estimate(dataclasses.replace(request, device=roomier)), roomier.free_bytes

    def fits(freed: eviction.Freed) -> bool:
        total, free = size_with(freed)
        return total <= free

    leaving = eviction.choose(served.held, fits)
    freed = eviction.freed_by(leaving or ())
    total, _ = size_with(freed)
    tells = getattr(engine, "footprint", None)
    roomier = replace(device, free_bytes=device.free_bytes + freed.get(device.memory, 0))
    return Option(
        device=device.id,
        engine=engine.name,
        dtype=request.dtype,
        quantize=request.quantize,
        total=total,
        parts=tells(dataclasses.replace(request, device=roomier)) if tells else None,
        free=device.free_bytes,
        unload=tuple(model.id for model in leaving or ()),
        fits=leaving is not None,
        usual=usual,
    )
