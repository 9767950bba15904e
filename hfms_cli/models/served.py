"""One model of the pool: how it is, which of its replicas a call goes to, and how it is shown."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from hfms_cli.engines.host import EngineHost
from hfms_cli.errors import HfmsError, LoadFailed, Unavailable
from hfms_cli.models.eviction import Held
from hfms_cli.models.loader import Wish
from hfms_cli.models.phases import Phases
from hfms_cli.models.replica import Replica, ReplicaState, status
from hfms_cli.types import Adapter, Call, Chunk, LoadedInfo, Manifest, ModelName

State = ReplicaState | Literal["unloading", "unloaded"]


def _set_event() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


@dataclass
class ServedModel:
    """A model that the pool knows: in memory, on its way there, or unloaded until a call asks for it."""

    id: str
    name: ModelName
    wishes: tuple[Wish, ...]
    """One for each replica."""
    phases: Phases
    """Until there are replicas: fetch, verify."""
    replicas: list[Replica] = field(default_factory=list)
    """Empty until it is known where they go."""
    aliases: set[str] = field(default_factory=set)
    adapters: dict[str, Adapter] = field(default_factory=dict)
    """By their ids: those that its replicas have, and bring along when they start again."""
    pinned: bool = False
    """It stays in memory, whoever else needs room and however long nobody calls it."""
    idle_seconds: float = 0.0
    """How long it stays in memory without a call; 0: as long as there is room."""
    failure: HfmsError | None = None
    """Why it could not be loaded at all."""
    failures: int = 0
    """Loads in a row that failed."""
    retry_at: float = 0.0
    """From when on a call may load it again after a failure."""
    unloading: bool = False
    forgotten: bool = False
    """It is unloaded for good: the pool will not know it any more."""
    away: str | None = None
    """Why it was unloaded, where a call brings it back."""
    leases: int = 0
    """Calls in flight."""
    waiting: int = 0
    """Calls that wait for the load."""
    last_used: float = 0.0
    """When the last call ended, or else the load; by the pool's clock, and as Unix time."""
    last_used_at: float = 0.0
    idle: asyncio.Event = field(default_factory=_set_event)
    """No call is in flight."""
    ended: asyncio.Event = field(default_factory=_set_event)
    """It is not being unloaded."""
    created: int = field(default_factory=lambda: int(time.time()))
    """Unix time at which it was first asked for."""
    ready: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Done when the load is: with None, or with what went wrong."""
    task: asyncio.Task[None] | None = None
    """The load."""

    @property
    def state(self) -> State:
        """That of its best replica."""
        if self.unloading:
            return "unloading"
        if self.away is not None:
            return "unloaded"
        if self.failure is not None:
            return "failed"
        states = {replica.state for replica in self.replicas}
        order: tuple[State, ...] = ("loaded", "restarting", "loading", "failed")
        return next((state for state in order if state in states), "loading")

    @property
    def reason(self) -> str | None:
        """Why it failed or is away, for operators."""
        if self.failure is not None:
            return self.failure.message
        return self.away or "; ".join(dict.fromkeys(r.reason for r in self.replicas if r.reason)) or None

    @property
    def now(self) -> Phases:
        """What its load does now: of the replica that loads, or until there is one its own."""
        return next((r.phases for r in self.replicas if r.phases.now is not None), self.phases)

    @property
    def doing(self) -> str:
        """The same for people: `fetch, 40%`; empty where it does nothing."""
        phase, done = self.now.now, self.now.done
        return f"{phase or ''}{'' if done is None else f', {done:.0%}'}"

    @property
    def in_use(self) -> bool:
        """Whether somebody calls it, or waits to."""
        return bool(self.leases or self.waiting)

    @property
    def hosts(self) -> list[EngineHost]:
        """The engines that run now."""
        return [replica.host for replica in self.replicas if replica.host is not None]

    @property
    def host(self) -> EngineHost | None:
        """The first engine that runs now; None where there is none."""
        return next(iter(self.hosts), None)

    @property
    def manifest(self) -> Manifest | None:
        """What its storage said that it is, last time."""
        return self.replicas[0].placement.manifest if self.replicas else None

    @property
    def load_seconds(self) -> float:
        """From process to ready, of the slowest replica."""
        return max((replica.load_seconds for replica in self.replicas), default=0.0)

    @property
    def held(self) -> Held:
        """What its eviction would free, and whether it may be evicted."""
        frees: Counter[str] = Counter()
        for replica in self.replicas:
            if replica.reservation is not None:
                frees[replica.reservation.memory] += replica.reservation.held
        steady = self.state == "loaded" and self.ready.done()  # its other replicas may still be on their way
        return Held(self.id, self.last_used, frees, in_use=self.in_use, pinned=self.pinned, steady=steady)

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of all that decides which bytes answer: model, revision, engines, precisions.

        Raises LoadFailed or Unavailable.
        """
        self.host_now()
        manifest = self.replicas[0].placement.manifest
        engines = sorted({f"{host.info.engine} {host.info.dtype}" for host in self.hosts})
        told = (manifest.storage, str(manifest.name), manifest.revision, *engines)
        return hashlib.sha256("\0".join(told).encode()).hexdigest()

    @property
    def weights(self) -> str:
        """Their digest, as `Placement.weights` says. Raises LoadFailed or Unavailable."""
        self.host_now()
        return self.replicas[0].placement.weights

    def host_now(self) -> EngineHost:
        """The engine that the next call goes to. Raises what made the load fail, or Unavailable."""
        if not self.unloading and (hosts := self.hosts):
            return least_outstanding(hosts)
        state = self.state
        if state == "failed":
            raise self.failed_with(30.0)
        if state == "unloaded":
            raise Unavailable(f"The model `{self.id}` is not loaded.", code="model_unloaded", retry_after=30.0)
        doing = state if state in ("loading", "unloading") else "restarting"
        raise Unavailable(f"The model `{self.id}` is {doing}.", code=f"model_{doing}", retry_after=2.0)

    def failed_with(self, retry_after: float) -> HfmsError:
        """What made its load fail, once more."""
        cause = self.failure or LoadFailed(self.reason or "its engines ended")
        message = f"The model `{self.id}` could not be loaded: {cause.message}"
        return type(cause)(message, param=cause.param, code=cause.code, retry_after=retry_after)

    @property
    def info(self) -> LoadedInfo:
        """What its engines say of it. Raises LoadFailed or Unavailable."""
        return self.host_now().info

    def submit(self, call: Call) -> AsyncIterator[Chunk]:
        """Send a call to the engine that has least to do. Raises LoadFailed or Unavailable."""
        return self.host_now().submit(call)

    def used(self, now: float) -> None:
        """A call has ended, or the load. now: by the pool's clock."""
        self.last_used, self.last_used_at = now, time.time()

    def settle(self, error: HfmsError) -> None:
        """Tell all who wait for the load that it came to nothing."""
        if not self.ready.done():
            self.ready.set_exception(error)
            self.ready.exception()  # a load that nobody awaits is no "never retrieved"


def least_outstanding(hosts: Iterable[EngineHost]) -> EngineHost:
    """Of the engines that have room for a call (of all, where none has), the one with the fewest tokens to go."""
    return min(hosts, key=lambda host: (host.full, host.outstanding))


def describe(model: ServedModel) -> dict[str, Any]:
    """A model as `GET /models` and `/status` show it; what its replicas differ in is that of the first that runs."""
    replicas = [replica.describe() for replica in model.replicas]
    running = [row for row in replicas if "pid" in row]
    row: dict[str, Any] = {
        "id": model.id,
        "status": status(model.state, model.reason, model.now),
        "aliases": sorted(model.aliases),
        "pinned": model.pinned,
        "idle_seconds": model.idle_seconds,
        "last_used": round(model.last_used_at, 3) or None,
    }
    if model.replicas:
        placement = model.replicas[0].placement
        row |= {
            "storage": placement.manifest.storage,
            "revision": placement.manifest.revision,
            "digest": placement.manifest.digest,
            "format": placement.card.format,
            "architecture": placement.card.architecture,
            "estimated_bytes": sum(replica.placement.size for replica in model.replicas),
        }
    if running:
        row |= {key: value for key, value in running[0].items() if key != "status"}
        for total in ("memory_bytes", "requests_running", "requests_waiting", "outstanding_tokens"):
            row[total] = sum(replica[total] for replica in running)
        row["load_phases"] = model.phases.seconds() | row["load_phases"]
    if model.waiting:
        row["requests_waiting"] = row.get("requests_waiting", 0) + model.waiting
    if replicas:
        row["replicas"] = replicas
    return row
