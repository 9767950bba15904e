"""What `hfms models tune` has found best for a model, and whether that still holds.

One small JSON file a model, named by the model's bytes. A record holds for the machine and the versions that it was
measured on; on another it is passed over, and the log says what differs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec
import structlog

from hfms_cli.hookspecs import Engine
from hfms_cli.types import Device, Manifest, Quantize
from hfms_cli.version import __version__

log = structlog.get_logger("hfms.models")

FOLDER = "tuned"
"""In the folder of what hfms knows between runs."""

Profile = Literal["latency", "throughput"]
PROFILES: tuple[Profile, ...] = ("throughput", "latency")
"""What `auto` stands for is the first that was tuned."""


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """One way to run a model."""

    engine: str
    device: str
    """Its kind."""
    dtype: str = "auto"
    quantize: Quantize = "auto"
    options: dict[str, int] = {}
    """Of the engine."""

    def keeps_to(self, dtype: str, quantize: Quantize) -> bool:
        """Whether this is nothing else than what somebody asked for; `auto` asks for nothing."""
        return dtype in ("auto", self.dtype) and quantize in ("auto", self.quantize)


class Tuned(msgspec.Struct, frozen=True, kw_only=True):
    """The best of each profile that was measured."""

    model: str
    fingerprint: dict[str, str]
    best: dict[Profile, Choice]


def fingerprint(devices: Iterable[Device], engines: Iterable[Engine]) -> dict[str, str]:
    """What a measurement depends on: devices, cores, and the versions of what engines name as their packages."""
    found = {"cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())}
    found |= {d.id: f"{d.name}, {d.total_bytes / 2**30:.0f} GiB" for d in devices}
    found["hfms"] = __version__
    for package in sorted({p for engine in engines for p in getattr(engine, "packages", ())}):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


class TunedStore:
    """The records. Each is written whole or not at all."""

    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir / FOLDER

    def save(self, manifest: Manifest, tuned: Tuned) -> Path:
        """Keep a record in the place of the one before. Raises OSError."""
        file = self._file(manifest)
        self._folder.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f".{file.name}.{os.getpid()}")
        draft.write_bytes(msgspec.json.format(msgspec.json.encode(tuned)))
        draft.replace(file)
        return file

    def find(
        self, manifest: Manifest, profile: Profile | Literal["auto"], now: dict[str, str]
    ) -> tuple[Profile, Choice] | None:
        """The best choice for a profile, and for which; None where there is none that holds.

        now: the fingerprint of today.
        """
        model = str(manifest.name)
        try:
            tuned = msgspec.json.decode(self._file(manifest).read_bytes(), type=Tuned)
        except FileNotFoundError:
            if profile != "auto":
                log.info("not tuned", model=model, profile=profile, hint=f"hfms models tune {model}")
            return None
        except (OSError, msgspec.MsgspecError) as exc:
            log.warning("what was tuned cannot be read", model=model, reason=type(exc).__name__)
            return None
        then = tuned.fingerprint
        for what in sorted(then.keys() | now.keys()):
            if then.get(what) != now.get(what):
                log.info("tuned elsewhere", model=model, what=what, then=then.get(what), now=now.get(what))
                return None
        wanted = PROFILES if profile == "auto" else (profile,)
        return next(((p, tuned.best[p]) for p in wanted if p in tuned.best), None)

    def _file(self, manifest: Manifest) -> Path:
        """Named by the model's bytes, whatever it is called."""
        told = msgspec.json.encode((manifest.revision, manifest.files))
        return self._folder / f"{hashlib.sha256(told).hexdigest()[:32]}.json"
