"""The models of this server by name: load, lease, balance, unload.

A model is one or more replicas (`replica.py`); a call goes to the one that has the fewest tokens outstanding. While
none runs, callers get 503 with Retry-After. Concurrent loads of one model are one load. Unloading waits for the calls
in flight, then ends every process.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import structlog

from hfms_cli.engines.host import EngineHost
from hfms_cli.errors import BadRequest, Conflict, Forbidden, HfmsError, LoadFailed, ModelNotFound, Unavailable
from hfms_cli.models import names
from hfms_cli.models.loader import Loader, Wish
from hfms_cli.models.phases import Phases
from hfms_cli.models.replica import Replica, ReplicaState, status
from hfms_cli.types import Call, Caller, Chunk, LoadedInfo, ModelName

log = structlog.get_logger("hfms.models")

State = ReplicaState | Literal["unloading"]

NO_WISH = Wish()
ANYBODY = Caller()


def _set_event() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


@dataclass
class ServedModel:
    """One model of the pool."""

    id: str
    name: ModelName
    wishes: tuple[Wish, ...]
    """One for each replica."""
    phases: Phases
    """Until there are replicas: fetch, verify."""
    replicas: list[Replica] = field(default_factory=list)
    """Empty until it is known where they go."""
    aliases: set[str] = field(default_factory=set)
    failure: str | None = None
    """Why it could not be loaded at all."""
    unloading: bool = False
    leases: int = 0
    """Calls in flight."""
    idle: asyncio.Event = field(default_factory=_set_event)
    created: int = field(default_factory=lambda: int(time.time()))
    """Unix time at which it was asked for."""
    ready: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Done when the load is: with None, or with what went wrong."""
    task: asyncio.Task[None] | None = None
    """The load."""

    @property
    def state(self) -> State:
        """That of its best replica."""
        if self.unloading:
            return "unloading"
        if self.failure is not None:
            return "failed"
        states = {replica.state for replica in self.replicas}
        order: tuple[State, ...] = ("loaded", "restarting", "loading", "failed")
        return next((state for state in order if state in states), "loading")

    @property
    def reason(self) -> str | None:
        """Why it failed or is away, for operators."""
        return self.failure or "; ".join(dict.fromkeys(r.reason for r in self.replicas if r.reason)) or None

    @property
    def hosts(self) -> list[EngineHost]:
        """The engines that run now."""
        return [replica.host for replica in self.replicas if replica.host is not None]

    @property
    def host(self) -> EngineHost | None:
        """The first engine that runs now; None where there is none."""
        return next(iter(self.hosts), None)

    @property
    def load_seconds(self) -> float:
        """From process to ready, of the slowest replica."""
        return max((replica.load_seconds for replica in self.replicas), default=0.0)

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
        """SHA-256, in hex, of the weights' names and hashes; of a file without one, its size and the revision."""
        self.host_now()
        placement = self.replicas[0].placement
        return placement.manifest.digest_of(placement.card.weights)

    def host_now(self) -> EngineHost:
        """The engine that the next call goes to. Raises LoadFailed or Unavailable."""
        if not self.unloading and (hosts := self.hosts):
            return least_outstanding(hosts)
        state = self.state
        if state == "failed":
            raise LoadFailed(f"The model `{self.id}` could not be loaded: {self.reason}", retry_after=30.0)
        doing = state if state in ("loading", "unloading") else "restarting"
        raise Unavailable(f"The model `{self.id}` is {doing}.", code=f"model_{doing}", retry_after=2.0)

    @property
    def info(self) -> LoadedInfo:
        """What its engines say of it. Raises LoadFailed or Unavailable."""
        return self.host_now().info

    def submit(self, call: Call) -> AsyncIterator[Chunk]:
        """Send a call to the engine that has least to do. Raises LoadFailed or Unavailable."""
        return self.host_now().submit(call)


def least_outstanding(hosts: Iterable[EngineHost]) -> EngineHost:
    """Of the engines that have room for a call (of all, where none has), the one with the fewest tokens to go."""
    return min(hosts, key=lambda host: (host.full, host.outstanding))


class Pool:
    """All models that this server serves."""

    def __init__(
        self,
        loader: Loader,
        *,
        restart_limit: int = 5,
        load_on_request: bool = True,
        replicas: int = 1,
        aliases: dict[str, str] | None = None,
        on_loaded: Callable[[Replica], None] = lambda replica: None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """replicas: of a model that is loaded without a word on that. on_loaded: told of each process that is ready."""
        self.loader = loader
        self._models: dict[str, ServedModel] = {}
        self._aliases = dict(aliases or {})
        self._restart_limit = restart_limit
        self._load_on_request = load_on_request
        self._replicas = replicas
        self._on_loaded = on_loaded
        self._clock = clock or asyncio.get_running_loop().time

    # Names.

    def models(self) -> list[ServedModel]:
        return list(self._models.values())

    def find(self, name: str) -> ServedModel | None:
        """A model of the pool by its id, its alias or the name that it was loaded by."""
        name = self._aliases.get(name, name)
        for model in self._models.values():
            if name in (model.id, str(model.name)) or name in model.aliases:
                return model
        return None

    def _known_as(self, name: str) -> list[str]:
        """The name, what its alias stands for, and the id of the model where it is in the pool."""
        model = self.find(name)
        return [name, self._aliases.get(name, name), *([model.id] if model else [])]

    def names(self) -> list[str]:
        """Every name that `find` takes."""
        return [n for m in self._models.values() for n in (m.id, *sorted(m.aliases))] + list(self._aliases)

    # Calls.

    @contextlib.asynccontextmanager
    async def lease(self, name: str, caller: Caller = ANYBODY) -> AsyncIterator[ServedModel]:
        """A loaded model that is not unloaded while the block runs. Raises Forbidden, ModelNotFound, Unavailable."""
        if not caller.may_use(*self._known_as(name)):
            # Before anything is loaded; and the same answer whether or not there is such a model.
            raise Forbidden(f"This key may not use the model `{name}`.", param="model", code="model_not_allowed")
        model = self.find(name) or await self._load_from_disk(name, caller)
        model.host_now()
        model.leases += 1
        model.idle.clear()
        try:
            yield model
        finally:
            model.leases -= 1
            if not model.leases:
                model.idle.set()

    async def _load_from_disk(self, name: str, caller: Caller) -> ServedModel:
        """Load a model that is on this disk already: a caller's word alone fetches nothing."""
        if self._load_on_request:
            with contextlib.suppress(BadRequest):
                wanted = names.parse(self._aliases.get(name, name))
                if wanted.scheme != "path" and await self.loader.router.has(wanted):
                    return await self.load(str(wanted))
        raise ModelNotFound.named(name, filter(caller.may_use, self.names()))

    # Loads.

    async def load(self, name: str, wishes: tuple[Wish, ...] = (), alias: str | None = None) -> ServedModel:
        """Load a model, or join the load that is on its way. Raises what made it fail.

        It fails where none of its replicas runs; one that failed beside others says why in `GET /models`.
        """
        model = self.begin(name, wishes, alias)
        await asyncio.shield(model.ready)
        return model

    def begin(self, name: str, wishes: tuple[Wish, ...] = (), alias: str | None = None) -> ServedModel:
        """Start to load a model and return at once; `ready` tells the outcome.

        wishes: one for each replica; none takes what is there, or what the configuration says.
        """
        parsed = names.parse(self._aliases.get(name, name))
        served_id = names.served_id(parsed)
        model = self.find(name) or self._models.get(served_id)
        if model is not None and model.state == "failed":
            del self._models[model.id]
            model = None
        if model is not None and model.name != parsed:
            raise Conflict(
                f"`{served_id}` is already served from {model.name.scheme or 'hub'} "
                f"{model.name.rest!r}; unload it first or give the new one an alias.",
                param="model",
            )
        if alias and (self.find(alias) not in (None, model) or alias in self._aliases):
            raise Conflict(f"`{alias}` is already the name of another model.", param="alias")
        if model is None:
            model = ServedModel(served_id, parsed, wishes or (NO_WISH,) * self._replicas, Phases(self._clock))
            self._models[served_id] = model
            model.task = asyncio.create_task(self._bring_up(model), name=f"load {served_id}")
        elif wishes not in ((), model.wishes):
            raise Conflict(f"`{model.id}` is already served with other settings; unload it first.", param="model")
        if alias:
            model.aliases.add(alias)
        return model

    async def _bring_up(self, model: ServedModel) -> None:
        """Place the model and start its replicas."""

        def progress(done: int, total: int) -> None:
            model.phases("fetch", done / total if total else None)

        try:
            placements = await self.loader.place(model.name, model.wishes, progress, model.phases)
            model.phases.end()
            model.replicas = [
                Replica(
                    model.id,
                    number,
                    placement,
                    self.loader,
                    restart_limit=self._restart_limit,
                    on_loaded=self._on_loaded,
                    clock=self._clock,
                )
                for number, placement in enumerate(placements)
            ]
            first, *others = model.replicas
            # It goes alone: it may convert the model for all, and what cannot be loaded at all is found out once.
            await first.start()
            await asyncio.gather(*(replica.start() for replica in others), return_exceptions=True)
        except HfmsError as exc:
            self._fail(model, exc)
        except Exception:
            log.exception("load failed unexpectedly", model=model.id)
            self._fail(model, LoadFailed(f"The model `{model.id}` could not be loaded; the server's log says why."))
        else:
            model.ready.set_result(None)

    def _fail(self, model: ServedModel, error: HfmsError) -> None:
        model.failure = error.message
        model.phases.end()
        log.error("model failed", model=model.id, reason=error.message)
        _settle(model, error)

    # Unloading.

    async def unload(self, name: str, drain_seconds: float = 30.0) -> ServedModel:
        """Let the calls in flight finish, end the processes and forget the model. Raises ModelNotFound."""
        model = self.find(name)
        if model is None:
            raise ModelNotFound.named(name, self.names())
        model.unloading = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(model.idle.wait(), drain_seconds)
        await self._end(model)
        self._models.pop(model.id, None)
        log.info("model unloaded", model=model.id)
        return model

    async def _end(self, model: ServedModel) -> None:
        if model.task is not None:
            model.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await model.task
        _settle(model, Unavailable(f"The model `{model.id}` was unloaded while it loaded."))
        await asyncio.gather(*(replica.close() for replica in model.replicas))

    async def close(self) -> None:
        """End every process."""
        await asyncio.gather(*(self._end(m) for m in self._models.values()))
        self._models.clear()

    # Health.

    def not_ready(self) -> str | None:
        """Why nothing, or not everything that was asked for at start, can be answered; None when it can."""
        if not self._models:
            return "no model is loaded"
        for model in self._models.values():
            if model.state in ("loading", "restarting"):
                return f"{model.id} is {model.state}"
        if any(host.alive() for m in self._models.values() if m.state == "loaded" for host in m.hosts):
            return None
        return "no engine answers: " + "; ".join(f"{m.id}: {m.reason or m.state}" for m in self._models.values())


def _settle(model: ServedModel, error: HfmsError) -> None:
    if not model.ready.done():
        model.ready.set_exception(error)
        model.ready.exception()  # a load that nobody awaits is no "never retrieved"


def describe(model: ServedModel) -> dict[str, Any]:
    """A model as `GET /models` and `/status` show it; what its replicas differ in is that of the first that runs."""
    replicas = [replica.describe() for replica in model.replicas]
    running = [row for row in replicas if "pid" in row]
    loading = next((r.phases for r in model.replicas if r.phases.now is not None), model.phases)
    row: dict[str, Any] = {
        "id": model.id,
        "status": status(model.state, model.reason, loading),
        "aliases": sorted(model.aliases),
    }
    if model.replicas:
        placement = model.replicas[0].placement
        row |= {
            "storage": placement.manifest.storage,
            "revision": placement.manifest.revision,
            "format": placement.card.format,
            "architecture": placement.card.architecture,
            "estimated_bytes": sum(replica.placement.size for replica in model.replicas),
        }
    if running:
        row |= {key: value for key, value in running[0].items() if key != "status"}
        for total in ("memory_bytes", "requests_running", "requests_waiting", "outstanding_tokens"):
            row[total] = sum(replica[total] for replica in running)
        row["load_phases"] = model.phases.seconds() | row["load_phases"]
    if replicas:
        row["replicas"] = replicas
    return row
