"""The model's road: name -> storage -> verified files -> card -> engine and device -> memory -> process."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import structlog
from msgspec import to_builtins
from msgspec.structs import replace

from hfms_cli.config import Config
from hfms_cli.engines.host import EngineHost, HostOptions
from hfms_cli.engines.process import Ahead
from hfms_cli.errors import BadRequest, DoesNotFit, LoadFailed, UnsafeFormat
from hfms_cli.hookspecs import Draft, Engine, Hardware, LoadRequest, Progress, Report, report_nothing
from hfms_cli.models import names
from hfms_cli.models.inspect import inspect
from hfms_cli.models.ledger import Ledger, Reservation
from hfms_cli.models.router import Router
from hfms_cli.models.tuned import Choice, Profile, TunedStore, fingerprint
from hfms_cli.models.warm_up import warm_up
from hfms_cli.sizes import human_bytes
from hfms_cli.types import Device, Manifest, ModelCard, ModelName, Quantize

log = structlog.get_logger("hfms.models")


@dataclass(frozen=True)
class Wish:
    """What may be asked for one replica of a model; None leaves it to the configuration."""

    device: str | None = None
    """A kind (`cuda`) or one device (`cuda:1`)."""
    engine: str | None = None
    dtype: str | None = None
    quantize: Quantize | None = None
    draft: str | None = None
    """The name of a draft model."""


@dataclass(frozen=True)
class Candidate:
    """An engine that says that it supports the model on a device, and what it expects to take there."""

    engine: Engine
    request: LoadRequest
    size: int
    """Bytes."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the engine, beside those of the configuration."""
    tuned: Profile | None = None
    """The profile for which `hfms models tune` found it the best."""


@dataclass(frozen=True)
class Fetched:
    """A model on this disk, verified and read."""

    manifest: Manifest
    folder: Path
    card: ModelCard
    drafts: Mapping[Wish, Draft] = field(default_factory=dict)
    """Draft models for the replicas that are to have one."""


@dataclass
class Placement:
    """A verified model and where one replica of it may run, best first; `start` may be called again and again."""

    manifest: Manifest
    card: ModelCard
    candidates: list[Candidate]
    aside: Reservation | None = None
    """Its memory, from when it was placed until its process starts."""

    @property
    def fits(self) -> bool:
        """Whether there was room for it."""
        return self.size <= self.candidates[0].request.device.free_bytes

    @functools.cached_property
    def weights(self) -> str:
        """SHA-256, in hex, of the weights' names and hashes; of a file without one, its size and the revision."""
        return self.manifest.digest_of(self.card.weights)

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
        forced: Mapping[str, Mapping[str, Any]] | None = None,
        ahead: Ahead | None = None,
    ) -> None:
        """forced: options of engines, by name, that win over what the operator and a tuned choice say.

        ahead: the process that the first load may take.
        """
        self.router = router
        self.ledger = ledger or Ledger()
        self._config = config
        self._engines = engines
        self._hardware = hardware
        self._forced = forced or {}
        self._ahead = ahead
        self.tuned = TunedStore(config.state_dir)
        self._excess: dict[tuple[str, str, str], float] = {}
        """How many times its estimate a model took, by its digest, engine and kind of device."""

    async def place(
        self, name: ModelName, wishes: Sequence[Wish], progress: Progress, report: Report = report_nothing
    ) -> list[Placement]:
        """Fetch, verify and read the model, then choose for each replica. Loads nothing. Raises HfmsError."""
        return self.arrange(await self.fetch(name, wishes, progress, report), wishes)

    async def fetch(
        self, name: ModelName, wishes: Sequence[Wish], progress: Progress, report: Report = report_nothing
    ) -> Fetched:
        """Have the model on this disk, with its draft models; verify and read them. Raises HfmsError."""

        async def read(wanted: ModelName) -> Fetched:
            manifest, folder = await self.router.pull(wanted, progress, report)
            card = inspect(folder, [f.path for f in manifest.files])
            self._refuse_unsafe(card)
            return Fetched(manifest, folder, card)

        fetched = await read(name)
        configured = self._config.models.draft_models
        usual = configured.get(str(name)) or configured.get(names.served_id(name))
        drafts = {}
        for wish in set(wishes):
            if draft := wish.draft or usual:
                found = await read(names.parse(draft))
                drafts[wish] = Draft(found.folder, found.card)
        return dataclasses.replace(fetched, drafts=drafts)

    def arrange(
        self,
        fetched: Fetched,
        wishes: Sequence[Wish],
        freed: Mapping[str, int] = {},
        devices: Sequence[Device] | None = None,
    ) -> list[Placement]:
        """Choose engine and device for each replica. Where there is no room, `Placement.fits` is false.

        freed: bytes that are to be counted as free, by the device whose memory they are of. devices: as they are now.
        Raises BadRequest, LoadFailed, and DoesNotFit where there is room for some of the replicas only.
        """
        devices = self.devices() if devices is None else devices
        chosen: list[Candidate] = []
        placements = []
        for wish in wishes:
            candidates = self._choose(fetched, wish, chosen, freed, devices)
            chosen.append(candidates[0])
            placements.append(Placement(fetched.manifest, fetched.card, candidates))
        return placements

    def set_aside(self, placements: Sequence[Placement]) -> None:
        """Keep the memory of placements for them until they start, or are let go. Raises DoesNotFit; then none is."""
        try:
            for placement in placements:
                best = placement.candidates[0]
                placement.aside = self.ledger.reserve(self._now(best.request.device), best.size)
        except DoesNotFit:
            self.let_go(placements)
            raise

    def let_go(self, placements: Sequence[Placement]) -> None:
        """Keep no memory for those that have not started."""
        for placement in placements:
            if placement.aside is not None:
                self.ledger.release(placement.aside)
                placement.aside = None

    async def start(
        self, model: str, placement: Placement, report: Report = report_nothing
    ) -> tuple[EngineHost, Reservation]:
        """Start the engine's process with the memory it needs set aside. Raises DoesNotFit, LoadFailed.

        Some engines learn only while they load that they cannot take a model: then the next one is tried, and the
        first not again.
        """
        while True:
            candidate = placement.candidates[0]
            self.let_go([placement])  # and nothing is awaited until it is reserved anew
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
            options = self._host_options(candidate)
            host = await EngineHost.start(model, candidate.request, options, report, self._ahead)
            reservation.taken = lambda: host.held_bytes
            if self._config.models.warm_up:
                report("warm-up")
                await warm_up(host, self._config.models.load_seconds)
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

    def _choose(
        self,
        fetched: Fetched,
        wish: Wish,
        beside: Sequence[Candidate],
        freed: Mapping[str, int],
        everywhere: Sequence[Device],
    ) -> list[Candidate]:
        """Every engine that supports the model on a device with room, in the operator's order of both.

        beside: the choices for the model's other replicas, which will take their room too. Of one kind of device,
        those with fewer replicas come first.
        """
        card = fetched.card
        devices = [d for d in everywhere if wish.device in (None, d.kind, d.id)]
        if not devices:
            there = ", ".join(d.id for d in everywhere) or "none"
            raise BadRequest(f"There is no device `{wish.device}` here; devices: {there}.", param="device")
        engines = [e for e in self._engines if wish.engine in (None, e.name)]
        if not engines:
            there = ", ".join(e.name for e in self._engines)
            raise BadRequest(f"There is no engine `{wish.engine}` here; engines: {there}.", param="engine")
        dtype, quantize = self.asked(wish)
        draft = fetched.drafts.get(wish)
        fitting: list[Candidate] = []
        too_large: list[Candidate] = []
        reasons = []
        for device in devices:
            taken = sum(c.size for c in beside if c.request.device.memory == device.memory)
            # Engines size their caches by what is free, which is without what others were promised.
            there_is = self.ledger.available(device) + freed.get(device.memory, 0)
            device = replace(device, free_bytes=max(0, there_is - taken))
            for engine in engines:
                if reason := _why_not(engine, card, device, quantize, draft):
                    reasons.append(f"{engine.name} on {device.id}: {reason}")
                    continue
                request = LoadRequest(
                    folder=fetched.folder,
                    card=card,
                    device=device,
                    dtype=dtype,
                    trust_remote_code=self._config.models.trust_remote_code,
                    quantize=quantize,
                    draft=draft,
                )
                candidate = Candidate(engine, request, self._size(fetched.manifest, engine, request))
                (fitting if candidate.size <= device.free_bytes else too_large).append(candidate)
        if fitting:
            kinds = list(dict.fromkeys(d.kind for d in devices))
            held = Counter(c.request.device.id for c in beside)
            fitting.sort(key=lambda c: (kinds.index(c.request.device.kind), held[c.request.device.id]))
            best = self._best(fetched.manifest, fitting)
            return fitting if best is None else [best, *fitting]
        if too_large and beside:
            needs, device = too_large[0].size, too_large[0].request.device
            raise DoesNotFit(
                f"There is room for {len(beside)} replicas and not for more: the next one needs {human_bytes(needs)} "
                f"on {device.id}, which would have {human_bytes(device.free_bytes)} left.",
                param="replicas",
            )
        if too_large:  # everywhere: reserving says by how much
            return too_large[:1]
        raise LoadFailed(f"No engine here can run this model ({card.architecture}). " + "; ".join(reasons))

    def _size(self, manifest: Manifest, engine: Engine, request: LoadRequest) -> int:
        """Bytes that the model will take: as the engine says, corrected by what it took before."""
        return int(
            engine.estimate(request) * self._excess.get((manifest.digest, engine.name, request.device.kind), 1.0)
        )

    def learn(self, placement: Placement, held: int) -> None:
        """Correct the next estimates for this model by what a process of it came to hold, where that was more."""
        best = placement.candidates[0]
        if best.size and held > best.size:
            key = placement.manifest.digest, best.engine.name, best.request.device.kind
            self._excess[key] = self._excess.get(key, 1.0) * held / best.size
            log.warning(
                "model took more memory than expected",
                model=str(placement.manifest.name),
                expected=human_bytes(best.size),
                held=human_bytes(held),
            )

    def _best(self, manifest: Manifest, fitting: Sequence[Candidate]) -> Candidate | None:
        """What was found best by measuring, where it still holds and is nothing else than was asked for."""
        wanted = cast("Profile | Literal['auto']", self._config.models.profile)
        found = self.tuned.find(manifest, wanted, self.fingerprint())
        if found is None:
            return None
        profile, choice = found
        same = (c for c in fitting if (c.engine.name, c.request.device.kind) == (choice.engine, choice.device))
        base = next(same, None)  # of several devices of the kind, the one with fewer replicas
        if base is not None and choice.keeps_to(base.request.dtype, base.request.quantize):
            best = dataclasses.replace(varied(base, choice), tuned=profile)
            if best.size <= best.request.device.free_bytes:
                log.info("tuned choice", model=str(manifest.name), profile=profile, **to_builtins(choice))
                return best
        log.info("tuned choice not used", model=str(manifest.name), profile=profile, **to_builtins(choice))
        return None

    def fingerprint(self) -> dict[str, str]:
        """What measurements on this machine depend on."""
        return fingerprint(self.devices(), self._engines)

    def asked(self, wish: Wish) -> tuple[str, Quantize]:
        """dtype and quantize: those of the wish, else the configuration's."""
        models = self._config.models
        return wish.dtype or models.dtype, wish.quantize or cast("Quantize", models.quantize)

    def with_room(self, device: Device) -> Device:
        """The device with what can be had of its memory now, promises to others kept."""
        device = next((d for d in self.devices() if d.id == device.id), device)
        return replace(device, free_bytes=max(0, self.ledger.available(device)))

    def _now(self, device: Device) -> Device:
        return next((d for d in self.devices() if d.id == device.id), device)

    def set_options(self, engine: str) -> dict[str, Any]:
        """The options of an engine that the operator has set."""
        return self._config.options.get(("engine", engine), {})

    def _host_options(self, candidate: Candidate) -> HostOptions:
        config, engine = self._config, candidate.engine.name
        return HostOptions(
            engine=engine,
            engine_options={**candidate.options, **self.set_options(engine), **self._forced.get(engine, {})},
            config_file=config.file,
            plugin=candidate.engine.plugin,  # type: ignore[attr-defined]  # set by `Plugins.create`
            max_calls=config.engine.max_calls,
            heartbeat_seconds=config.engine.heartbeat_seconds,
            load_seconds=config.models.load_seconds,
            spins=getattr(candidate.engine, "spins", False),
        )


def varied(base: Candidate, choice: Choice) -> Candidate:
    """A candidate run by the precisions and options of a choice."""
    request = dataclasses.replace(base.request, dtype=choice.dtype, quantize=choice.quantize)
    return dataclasses.replace(base, request=request, size=base.engine.estimate(request), options=choice.options)


def _why_not(engine: Engine, card: ModelCard, device: Device, quantize: Quantize, draft: Draft | None) -> str | None:
    """Why an engine does not take a model, or None."""
    if draft is not None and not getattr(engine, "drafts", False):
        return "it takes no draft model"
    if quantize in ("int8", "int4") and quantize not in getattr(engine, "quantizes", ()):
        return f"it cannot make {quantize} weights"
    return engine.supports(card, device)
