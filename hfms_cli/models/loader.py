"""The model's road: name -> storage -> verified files -> card -> engine and device -> memory -> process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog

from hfms_cli.config import Config
from hfms_cli.engines.host import EngineHost, HostOptions
from hfms_cli.errors import BadRequest, DoesNotFit, LoadFailed, UnsafeFormat
from hfms_cli.hookspecs import Engine, Hardware, LoadRequest, Progress, Report, report_nothing
from hfms_cli.models.inspect import inspect
from hfms_cli.models.ledger import Ledger, Reservation, human
from hfms_cli.models.router import Router
from hfms_cli.types import Device, Manifest, ModelCard, ModelName

log = structlog.get_logger("hfms.models")


@dataclass(frozen=True)
class Wish:
    """What may be asked for one replica of a model; None leaves it to the configuration."""

    device: str | None = None
    """A kind (`cuda`) or one device (`cuda:1`)."""
    engine: str | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Candidate:
    """An engine that says that it supports the model on a device, and what it expects to take there."""

    engine: Engine
    request: LoadRequest
    size: int
    """Bytes."""


@dataclass
class Placement:
    """A verified model and where one replica of it may run, best first; `start` may be called again and again."""

    manifest: Manifest
    card: ModelCard
    candidates: list[Candidate]

    @property
    def size(self) -> int:
        """Bytes that the model is expected to take."""
        return self.candidates[0].size


class Loader:
    """Takes a model from its name to a running engine process."""

    def __init__(
        self,
        config: Config,
        router: Router,
        engines: Sequence[Engine],
        hardware: Sequence[Hardware],
        ledger: Ledger | None = None,
    ) -> None:
        self.router = router
        self.ledger = ledger or Ledger()
        self._config = config
        self._engines = engines
        self._hardware = hardware

    async def place(
        self, name: ModelName, wishes: Sequence[Wish], progress: Progress, report: Report = report_nothing
    ) -> list[Placement]:
        """Fetch, verify and read the model, then choose for each replica. Loads nothing. Raises HfmsError."""
        manifest, folder = await self.router.pull(name, progress, report)
        card = inspect(folder, [f.path for f in manifest.files])
        self._refuse_unsafe(card)
        chosen: list[Candidate] = []
        placements = []
        for wish in wishes:
            candidates = self._choose(folder, card, wish, chosen)
            chosen.append(candidates[0])
            placements.append(Placement(manifest, card, candidates))
        return placements

    async def start(
        self, model: str, placement: Placement, report: Report = report_nothing
    ) -> tuple[EngineHost, Reservation]:
        """Start the engine's process with the memory it needs set aside. Raises DoesNotFit, LoadFailed.

        Some engines learn only while they load that they cannot take a model: then the next one is tried, and the
        first not again.
        """
        while True:
            candidate = placement.candidates[0]
            try:
                return await self._start(model, candidate, report)
            except LoadFailed as exc:
                if len(placement.candidates) == 1:
                    raise
                placement.candidates.pop(0)
                log.warning("engine cannot load", model=model, engine=candidate.engine.name, reason=exc.message)

    async def _start(self, model: str, candidate: Candidate, report: Report) -> tuple[EngineHost, Reservation]:
        device = self._now(candidate.request.device)
        with self.ledger.reserved_if_loaded(device, candidate.size) as reservation:
            options = self._host_options(candidate.engine)
            host = await EngineHost.start(model, candidate.request, options, report)
            reservation.taken = lambda: host.held_bytes
            return host, reservation

    def devices(self) -> list[Device]:
        """Every device, best kind first, with its memory as it is now."""
        return [device for hardware in self._hardware for device in hardware.probe().devices]

    def _refuse_unsafe(self, card: ModelCard) -> None:
        if card.format == "pickle" and not self._config.models.allow_pickle:
            raise UnsafeFormat(
                "This model comes only as pickled weights, which can hide code. Ask its makers for safetensors, or "
                "set [models] allow_pickle = true."
            )
        if card.remote_code and not self._config.models.trust_remote_code:
            raise UnsafeFormat(
                "This model asks to run Python code of its own. Read that code, then set [models] "
                "trust_remote_code = true."
            )

    def _choose(self, folder: Path, card: ModelCard, wish: Wish, beside: Sequence[Candidate]) -> list[Candidate]:
        """Every engine that supports the model on a device with room, in the operator's order of both.

        beside: the choices for the model's other replicas, which will take their room too. Of one kind of device,
        those with fewer replicas come first.
        """
        devices = [d for d in self.devices() if wish.device in (None, d.kind, d.id)]
        if not devices:
            there = ", ".join(d.id for d in self.devices()) or "none"
            raise BadRequest(f"There is no device `{wish.device}` here; devices: {there}.", param="device")
        engines = [e for e in self._engines if wish.engine in (None, e.name)]
        if not engines:
            there = ", ".join(e.name for e in self._engines)
            raise BadRequest(f"There is no engine `{wish.engine}` here; engines: {there}.", param="engine")
        fitting: list[Candidate] = []
        too_large: list[Candidate] = []
        reasons = []
        for device in devices:
            taken = sum(c.size for c in beside if c.request.device.memory == device.memory)
            device = msgspec.structs.replace(device, free_bytes=max(0, device.free_bytes - taken))
            for engine in engines:
                if reason := engine.supports(card, device):
                    reasons.append(f"{engine.name} on {device.id}: {reason}")
                    continue
                request = LoadRequest(
                    folder=folder,
                    card=card,
                    device=device,
                    dtype=wish.dtype or self._config.models.dtype,
                    trust_remote_code=self._config.models.trust_remote_code,
                )
                candidate = Candidate(engine, request, engine.estimate(request))
                (fitting if candidate.size <= self.ledger.available(device) else too_large).append(candidate)
        if fitting:
            kinds = list(dict.fromkeys(d.kind for d in devices))
            held = Counter(c.request.device.id for c in beside)
            return sorted(fitting, key=lambda c: (kinds.index(c.request.device.kind), held[c.request.device.id]))
        if too_large and beside:
            needs, device = too_large[0].size, too_large[0].request.device
            raise DoesNotFit(
                f"There is room for {len(beside)} replicas and not for more: the next one needs {human(needs)} on "
                f"{device.id}, which would have {human(max(0, self.ledger.available(device)))} left.",
                param="replicas",
            )
        if too_large:  # everywhere: reserving says by how much
            return too_large[:1]
        raise LoadFailed(f"No engine here can run this model ({card.architecture}). " + "; ".join(reasons))

    def _now(self, device: Device) -> Device:
        return next((d for d in self.devices() if d.id == device.id), device)

    def _host_options(self, engine: Engine) -> HostOptions:
        config = self._config
        return HostOptions(
            engine=engine.name,
            engine_options=config.options.get(("engine", engine.name), {}),
            config_file=config.file,
            disabled_plugins=config.plugins.disabled,
            max_calls=config.engine.max_calls,
            heartbeat_seconds=config.engine.heartbeat_seconds,
            load_seconds=config.models.load_seconds,
        )
