"""The models of this server by name: load, lease, restart, unload.

A model that died is started again, with growing pauses; while it is away its callers get 503 with Retry-After.
Concurrent loads of one model are one load. Unloading waits for the calls in flight, then ends the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import structlog

from hfms_cli.engines.host import EngineHost
from hfms_cli.errors import BadRequest, Conflict, HfmsError, LoadFailed, ModelNotFound, Unavailable
from hfms_cli.models import names
from hfms_cli.models.ledger import Reservation
from hfms_cli.models.loader import Loader, Placement, Wish
from hfms_cli.models.phases import Phases
from hfms_cli.types import ModelName

log = structlog.get_logger("hfms.models")

State = Literal["loading", "loaded", "restarting", "failed", "unloading"]

NO_WISH = Wish()

RESTART_PAUSES = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds before the n-th restart in a row; the last one goes on."""
LIFE_SECONDS = 60.0
"""A process that lived so long starts the count anew."""


def _set_event() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


@dataclass
class ServedModel:
    """One model of the pool."""

    id: str
    name: ModelName
    wish: Wish
    phases: Phases
    """Of the load."""
    state: State = "loading"
    reason: str | None = None
    """Why it failed or is away, for operators."""
    aliases: set[str] = field(default_factory=set)
    placement: Placement | None = None
    host: EngineHost | None = None
    reservation: Reservation | None = None
    leases: int = 0
    """Calls in flight."""
    idle: asyncio.Event = field(default_factory=_set_event)
    restarts: int = 0
    """In a row."""
    load_seconds: float = 0.0
    created: int = field(default_factory=lambda: int(time.time()))
    """Unix time at which it was asked for."""
    ready: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Done when the first load is: with None, or with what went wrong."""
    task: asyncio.Task[None] | None = None
    """Loads the model, then watches over it."""

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of all that decides which bytes answer: model, revision, engine, precision."""
        placement, info = self.placement, self.host_now().info
        assert placement is not None
        manifest = placement.manifest
        told = (manifest.storage, str(manifest.name), manifest.revision, info.engine, info.dtype)
        return hashlib.sha256("\0".join(told).encode()).hexdigest()

    def host_now(self) -> EngineHost:
        """The running engine. Raises LoadFailed or Unavailable."""
        if self.state == "loaded" and self.host is not None and not self.host.ended.done():
            return self.host
        if self.state == "failed":
            raise LoadFailed(f"The model `{self.id}` could not be loaded: {self.reason}", retry_after=30.0)
        doing = "loading" if self.state == "loading" else "unloading" if self.state == "unloading" else "restarting"
        raise Unavailable(f"The model `{self.id}` is {doing}.", code=f"model_{doing}", retry_after=2.0)


class Pool:
    """All models that this server serves."""

    def __init__(
        self,
        loader: Loader,
        *,
        restart_limit: int = 5,
        load_on_request: bool = True,
        aliases: dict[str, str] | None = None,
        on_loaded: Callable[[ServedModel], None] = lambda model: None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.loader = loader
        self._models: dict[str, ServedModel] = {}
        self._aliases = dict(aliases or {})
        self._restart_limit = restart_limit
        self._load_on_request = load_on_request
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

    def known_as(self, name: str) -> list[str]:
        """The name, what its alias stands for, and the id of the model where it is in the pool."""
        model = self.find(name)
        return [name, self._aliases.get(name, name), *([model.id] if model else [])]

    def names(self) -> list[str]:
        """Every name that `find` takes."""
        return [n for m in self._models.values() for n in (m.id, *sorted(m.aliases))] + list(self._aliases)

    # Calls.

    @contextlib.asynccontextmanager
    async def lease(self, name: str, may_see: Callable[[str], bool] = lambda name: True) -> AsyncIterator[ServedModel]:
        """A loaded model that is not unloaded while the block runs.

        may_see: which names an error may suggest. Raises ModelNotFound, Unavailable.
        """
        model = self.find(name) or await self._load_from_disk(name, may_see)
        model.host_now()
        model.leases += 1
        model.idle.clear()
        try:
            yield model
        finally:
            model.leases -= 1
            if not model.leases:
                model.idle.set()

    async def _load_from_disk(self, name: str, may_see: Callable[[str], bool]) -> ServedModel:
        """Load a model that is on this disk already: a caller's word alone fetches nothing."""
        if self._load_on_request:
            with contextlib.suppress(BadRequest):
                wanted = names.parse(self._aliases.get(name, name))
                if wanted.scheme != "path" and await self.loader.router.has(wanted):
                    return await self.load(str(wanted))
        raise ModelNotFound.named(name, filter(may_see, self.names()))

    # Loads.

    async def load(self, name: str, wish: Wish = NO_WISH, alias: str | None = None) -> ServedModel:
        """Load a model, or join the load that is on its way. Raises what made it fail."""
        model = self.begin(name, wish, alias)
        await asyncio.shield(model.ready)
        return model

    def begin(self, name: str, wish: Wish = NO_WISH, alias: str | None = None) -> ServedModel:
        """Start to load a model and return at once; `ready` tells the outcome."""
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
            model = ServedModel(id=served_id, name=parsed, wish=wish, phases=Phases(self._clock))
            self._models[served_id] = model
            model.task = asyncio.create_task(self._live(model), name=f"model {served_id}")
        elif model.wish != wish and wish != NO_WISH:
            raise Conflict(f"`{model.id}` is already served with other settings; unload it first.", param="model")
        if alias:
            model.aliases.add(alias)
        return model

    async def _live(self, model: ServedModel) -> None:
        """A model's life: place, start, watch, start again; ends when it fails for good or is unloaded."""
        began = self._clock()

        def progress(done: int, total: int) -> None:
            model.phases("fetch", done / total if total else None)

        try:
            model.placement = await self.loader.place(model.name, model.wish, progress, model.phases)
            while True:
                began = self._clock()
                model.host, model.reservation = await self.loader.start(model.id, model.placement, model.phases)
                model.phases.end()
                model.load_seconds = self._clock() - began
                model.state, model.reason = "loaded", None
                if not model.ready.done():
                    model.ready.set_result(None)
                log.info(
                    "model loaded",
                    model=model.id,
                    seconds=round(model.load_seconds, 2),
                    pid=model.host.pid,
                    phases=model.phases.seconds(),
                )
                self._on_loaded(model)
                started = self._clock()
                model.reason = await asyncio.shield(model.host.ended)
                self._release(model)
                model.restarts = 0 if self._clock() - started > LIFE_SECONDS else model.restarts
                if model.restarts >= self._restart_limit:
                    raise LoadFailed(f"its engine ended {model.restarts + 1} times in a row: {model.reason}")
                model.state = "restarting"
                pause = RESTART_PAUSES[min(model.restarts, len(RESTART_PAUSES) - 1)]
                model.restarts += 1
                log.warning("model restarts", model=model.id, pause=pause, restarts=model.restarts)
                await asyncio.sleep(pause)
        except HfmsError as exc:
            self._fail(model, exc)
        except Exception:
            log.exception("load failed unexpectedly", model=model.id)
            self._fail(model, LoadFailed(f"The model `{model.id}` could not be loaded; the server's log says why."))

    def _fail(self, model: ServedModel, error: HfmsError) -> None:
        model.state, model.reason = "failed", error.message
        log.error("model failed", model=model.id, reason=error.message)
        if not model.ready.done():
            model.ready.set_exception(error)
            model.ready.exception()  # a load that nobody awaits is no "never retrieved"

    def _release(self, model: ServedModel) -> None:
        if model.reservation is not None:
            self.loader.ledger.release(model.reservation)
        model.host = model.reservation = None

    # Unloading.

    async def unload(self, name: str, drain_seconds: float = 30.0) -> ServedModel:
        """Let the calls in flight finish, end the process and forget the model. Raises ModelNotFound."""
        model = self.find(name)
        if model is None:
            raise ModelNotFound.named(name, self.names())
        model.state = "unloading"
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
        if not model.ready.done():
            model.ready.set_exception(Unavailable(f"The model `{model.id}` was unloaded while it loaded."))
            model.ready.exception()
        if model.host is not None:
            await model.host.close()
        self._release(model)

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
        if any(m.host is not None and m.state == "loaded" and m.host.alive() for m in self._models.values()):
            return None
        return "no engine answers: " + "; ".join(f"{m.id}: {m.reason or m.state}" for m in self._models.values())


def describe(model: ServedModel) -> dict[str, Any]:
    """A model as `GET /models` and `/status` show it."""
    status: dict[str, Any] = {"value": model.state}
    if model.reason and model.state != "loaded":
        status["reason"] = model.reason
    if model.phases.now is not None:
        status["phase"] = model.phases.now
    if model.phases.done is not None:
        status["progress"] = round(model.phases.done, 4)
    row: dict[str, Any] = {"id": model.id, "status": status, "aliases": sorted(model.aliases)}
    if (placement := model.placement) is not None:
        row |= {
            "storage": placement.manifest.storage,
            "revision": placement.manifest.revision,
            "format": placement.card.format,
            "architecture": placement.card.architecture,
            "estimated_bytes": placement.size,
        }
    if (host := model.host) is not None and hasattr(host, "info"):
        info = host.info
        row |= {
            "engine": info.engine,
            "device": info.device,
            "dtype": info.dtype,
            "tasks": list(info.tasks),
            "context_length": info.context_length,
            "memory_bytes": host.held_bytes,
            "pid": host.pid,
            "requests_running": host.running,
            "requests_waiting": host.waiting,
            "load_seconds": round(model.load_seconds, 3),
            "load_phases": model.phases.seconds(),
        }
    return row
