"""The models of this server by name: load, lease, make room, unload.

A model is one or more replicas (`replica.py`); a call goes to the one that has the fewest tokens outstanding.
Concurrent loads of one model are one load, and calls wait for it. Where a model does not fit, others that nobody uses
give way (`eviction.py`); they, and those that were idle for too long, are loaded again when they are called.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import structlog

from hfms_cli.errors import (
    BadRequest,
    Conflict,
    DeadlineExceeded,
    DoesNotFit,
    Forbidden,
    HfmsError,
    LoadFailed,
    ModelNotFound,
    Overloaded,
    Unavailable,
)
from hfms_cli.models import eviction, names
from hfms_cli.models.adapters import Adapters, ServedAdapter
from hfms_cli.models.catalogue import Catalogue, Entry
from hfms_cli.models.loader import Fetched, Loader, Placement, Wish
from hfms_cli.models.phases import Phases
from hfms_cli.models.replica import Replica
from hfms_cli.models.served import ServedModel, describe, least_outstanding
from hfms_cli.types import Caller, Manifest, ModelName

__all__ = ["ANYBODY", "NO_WISH", "Keeping", "Pool", "ServedModel", "describe", "least_outstanding"]

log = structlog.get_logger("hfms.models")

NO_WISH = Wish()
ANYBODY = Caller()

FULL_SECONDS = 5.0
"""After so long a model that did not fit may be tried again: others may be idle by then."""
LONGEST_RETRY = 3600.0

Why = Literal["asked", "idle", "evicted"]


@dataclass(frozen=True)
class Keeping:
    """How models are kept, as the operator wishes."""

    replicas: int = 1
    """Of a model that is loaded without a word on that."""
    restart_limit: int = 5
    load_on_request: bool = True
    wait_seconds: float = 60.0
    """How long a call waits for its model to load; 0: not at all."""
    patience_seconds: float = float("inf")
    """How long a call waits for anything, as the middlewares say."""
    most_waiting: int = 256
    """Calls that may wait for one model."""
    retry_seconds: float = 30.0
    """After a failed load, for so long calls hear of that failure, and no load begins; doubled by each in a row."""
    idle_seconds: float = 0.0
    pinned: Collection[str] = ()
    required: Collection[str] = ()
    """Without these, by any of their names, the server is not ready."""


class Pool:
    """All models that this server serves."""

    def __init__(
        self,
        loader: Loader,
        keeping: Keeping = Keeping(),
        *,
        aliases: Mapping[str, str] | None = None,
        catalogue: Catalogue | None = None,
        on_loaded: Callable[[Replica], None] = lambda replica: None,
        on_unloaded: Callable[[ServedModel, Why], None] = lambda model, why: None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """on_loaded: told of each process that is ready. on_unloaded: of each model that has left memory, and why."""
        self.loader = loader
        self.keeping = keeping
        self._models: dict[str, ServedModel] = {}
        self._aliases: Mapping[str, str] = {} if aliases is None else aliases
        self.catalogue = catalogue or Catalogue()
        self.adapters = Adapters(self)
        self._on_loaded = on_loaded
        self._on_unloaded = on_unloaded
        self._clock = clock or asyncio.get_running_loop().time
        self._preloaded: list[str] = []
        """Ids of what is loaded at start."""
        self._room = asyncio.Lock()
        """Held by the load that finds its place: two would unload others for the same bytes."""
        self._leaving: set[asyncio.Task[None]] = set()
        self._idle_watch: asyncio.Task[None] | None = None

    # Names.

    @property
    def aliases(self) -> Mapping[str, str]:
        """Those that stand for a name, whether or not that is loaded."""
        return self._aliases

    def models(self) -> list[ServedModel]:
        return list(self._models.values())

    def find(self, name: str) -> ServedModel | None:
        """A model of the pool by its id, its alias or the name that it was loaded by; no adapter."""
        name = self._aliases.get(name, name)
        for model in self._models.values():
            if name in (model.id, str(model.name)) or name in model.aliases:
                return model
        return None

    def called(self, name: str) -> ServedModel | ServedAdapter | None:
        """What answers calls by this name."""
        return self.adapters.find(name) or self.find(name)

    def _meant_by(self, name: str) -> Entry:
        """What a name stands for: that of the catalogue, else what it says by itself. Raises BadRequest."""
        name = self._aliases.get(name, name)
        if entry := self.catalogue.find(name):
            return entry
        parsed = names.parse(name)
        return Entry(names.served_id(parsed), parsed, listed=False)

    def _known_as(self, name: str) -> list[str]:
        """The name, what its alias stands for, and the id of the model where it is known."""
        target = self._aliases.get(name, name)
        found = self.find(name) or self.catalogue.find(target)
        return [name, target, *([found.id] if found else [])]

    def names(self) -> list[str]:
        """Every name that is known here."""
        served = [n for m in self._models.values() for n in (m.id, *sorted(m.aliases))]
        served += [adapter.name for adapter in self.adapters]
        return [*served, *self._aliases, *(n for e in self.catalogue.entries for n in (e.id, *e.aliases))]

    def _is_one_of(self, model: ServedModel, told: Collection[str]) -> bool:
        """Whether the operator means this model by one of these names."""
        return any(self._aliases.get(n, n) in (model.id, str(model.name), *model.aliases) for n in told)

    def is_required(self, model: ServedModel) -> bool:
        """Whether the server is not ready without it."""
        everything = "*" in self.keeping.required and model.id in self._preloaded
        return everything or self._is_one_of(model, self.keeping.required)

    # Calls.

    @contextlib.asynccontextmanager
    async def lease(self, name: str, caller: Caller = ANYBODY) -> AsyncIterator[ServedModel | ServedAdapter]:
        """A loaded model, or an adapter of one, that is not unloaded while the block runs; waits for its load.

        Raises Forbidden, ModelNotFound, Unavailable, DeadlineExceeded, Overloaded, or what made the load fail.
        """
        if not caller.may_use(*self._known_as(name)):
            # Before anything is loaded; and the same answer whether or not there is such a model.
            raise Forbidden(f"This key may not use the model `{name}`.", param="model", code="model_not_allowed")
        adapter = self.adapters.find(name)
        model = await self._loaded(adapter.parent.id if adapter else name, caller)
        model.leases += 1
        model.idle.clear()
        try:
            with adapter.lease() if adapter else contextlib.nullcontext(model) as called:
                yield called
        finally:
            model.leases -= 1
            model.used(self._clock())
            if not model.leases:
                model.idle.set()

    async def _loaded(self, name: str, caller: Caller) -> ServedModel:
        """The model, once it is loaded. From its last look at the model to the end it awaits nothing."""
        deadline = asyncio.get_running_loop().time() + min(self.keeping.wait_seconds, self.keeping.patience_seconds)
        model = self.find(name) or await self._load_from_disk(name, caller)
        while True:
            state = model.state
            if state == "unloading" and not model.forgotten:
                await self._wait(model, model.ended.wait, deadline)
            elif state == "loading":
                await self._wait(model, partial(asyncio.wait, [model.ready]), deadline)
                if model.forgotten:
                    raise Unavailable(f"The model `{model.id}` was unloaded while it loaded.", code="model_unloaded")
            elif state == "failed" and (left := self._retry_in(model)) > 0:
                raise model.failed_with(left)
            elif state in ("failed", "unloaded") and self.keeping.load_on_request:
                self._start(model)
            else:
                model.host_now()
                return model

    async def _wait(self, model: ServedModel, until: Callable[[], Awaitable[object]], deadline: float) -> None:
        """Wait for a model that loads, as one of those for whom it is kept."""
        if not self.keeping.wait_seconds:
            model.host_now()  # says what it does instead
        if model.waiting >= self.keeping.most_waiting:
            raise Overloaded(f"{model.waiting} calls wait for {model.id} to load; try again later.", retry_after=5.0)
        model.waiting += 1
        try:
            async with asyncio.timeout_at(deadline):
                await until()
        except TimeoutError:
            if self.keeping.patience_seconds < self.keeping.wait_seconds:
                raise DeadlineExceeded(
                    f"The model `{model.id}` was not loaded within {self.keeping.patience_seconds:g} s."
                ) from None
            model.host_now()
        finally:
            model.waiting -= 1

    async def _load_from_disk(self, name: str, caller: Caller) -> ServedModel:
        """Begin to load a model that is on this disk already: a caller's word alone fetches nothing."""
        why = ""
        if self.keeping.load_on_request:
            await self.catalogue.refresh()
            with contextlib.suppress(BadRequest):
                meant = self._meant_by(name)
                if meant.name.scheme == "path" and meant.listed:  # other paths are none of a caller's business
                    return self.begin(name)
                if meant.name.scheme != "path" and (there := await self.loader.router.on_disk(meant.name)):
                    return self._same(meant.name, there) or self.begin(name)
                if meant.listed:
                    why = f"It is not on this disk; `hfms models pull {meant.name}` fetches it."
        raise ModelNotFound.named(name, (n for n in self.names() if caller.may_use(n) and n != name), why)

    async def _by_revision(self, name: str) -> ServedModel | None:
        """The model of the pool that calls by a name with a revision go to."""
        with contextlib.suppress(BadRequest):
            meant = self._meant_by(name).name
            if meant.revision is not None and (there := await self.loader.router.on_disk(meant)):
                return self._same(meant, there)
        return None

    def _same(self, name: ModelName, there: Manifest) -> ServedModel | None:
        """The model of the pool that a name with a revision means, whatever that model is called there."""
        if name.revision is None:
            return None
        told = (there.storage, there.name.scheme, there.name.rest, there.revision)
        for model in self._models.values():
            m = model.manifest
            if m is not None and told == (m.storage, m.name.scheme, m.name.rest, m.revision):
                return model
        return None

    # Loads.

    async def load(self, name: str, wishes: tuple[Wish, ...] = (), alias: str | None = None) -> ServedModel:
        """Load a model, or join the load that is on its way. Raises what made it fail.

        It fails where none of its replicas runs; one that failed beside others says why in `GET /models`.
        """
        model = self.begin(name, wishes, alias)
        await asyncio.shield(model.ready)
        return model

    def preload(self, wanted: Collection[str]) -> list[ServedModel]:
        """Begin to load what is to be there from the start: together, and none at the cost of another."""
        loads = [self.begin(name, evict=False) for name in dict.fromkeys(wanted)]
        self._preloaded = [model.id for model in loads]
        return loads

    def begin(
        self,
        name: str,
        wishes: tuple[Wish, ...] = (),
        alias: str | None = None,
        *,
        pinned: bool | None = None,
        idle_seconds: float | None = None,
        evict: bool = True,
    ) -> ServedModel:
        """Start to load a model and return at once; `ready` tells the outcome.

        wishes: one for each replica; none takes what is there, or what the configuration says.
        pinned, idle_seconds: None leaves it as it is, at first as the configuration says.
        evict: whether models that nobody uses may be unloaded for it.
        """
        meant = self._meant_by(name)
        if self.adapters.find(meant.id):
            raise Conflict(f"`{meant.id}` is the name of an adapter.", param="model")
        model = self.find(name) or self._models.get(meant.id)
        if model is None:
            model = self._new(meant)
        self._refuse_mix_up(model, meant.name, wishes, alias)
        if alias:
            model.aliases.add(alias)
        model.pinned = model.pinned if pinned is None else pinned
        model.idle_seconds = model.idle_seconds if idle_seconds is None else idle_seconds
        if model.state == "failed":
            model.wishes, model.failures = meant.wishes(self.keeping.replicas), 0
        if model.task is None or model.away is not None or model.state == "failed":
            model.wishes = wishes or model.wishes
            self._start(model, evict=evict)
        return model

    def _new(self, meant: Entry) -> ServedModel:
        model = ServedModel(meant.id, meant.name, meant.wishes(self.keeping.replicas), Phases(self._clock))
        model.aliases |= set(meant.aliases)
        told = meant.loading
        model.pinned = told.pinned or self._is_one_of(model, self.keeping.pinned)
        model.idle_seconds = self.keeping.idle_seconds if told.idle_seconds is None else told.idle_seconds
        self._models[model.id] = model
        return model

    def _refuse_mix_up(self, model: ServedModel, name: ModelName, wishes: tuple[Wish, ...], alias: str | None) -> None:
        """Raises Conflict where the load would make another model of one that is there, or take a name away."""
        if model.name != name:
            raise Conflict(
                f"`{model.id}` is already served from {model.name.scheme or 'hub'} "
                f"{model.name.rest!r}; unload it first or give the new one an alias.",
                param="model",
            )
        in_memory = model.task is not None and model.state in ("loading", "loaded", "restarting")
        if in_memory and wishes not in ((), model.wishes):
            raise Conflict(f"`{model.id}` is already served with other settings; unload it first.", param="model")
        if model.forgotten:
            raise Conflict(f"`{model.id}` is being unloaded; load it again when that is over.", param="model")
        listed = self.catalogue.find(alias) if alias else None
        taken = self.called(alias) not in (None, model) if alias else False
        if taken or alias in self._aliases or (listed is not None and listed.id != model.id):
            raise Conflict(f"`{alias}` is already the name of another model.", param="alias")

    def _start(self, model: ServedModel, *, evict: bool = True) -> None:
        """Load a model that is not in memory."""
        model.phases = Phases(self._clock)
        model.failure = model.away = None
        if not model.unloading:
            model.replicas = []
        if model.ready.done():
            model.ready = asyncio.get_running_loop().create_future()
        model.task = asyncio.create_task(self._bring_up(model, evict), name=f"load {model.id}")

    async def _bring_up(self, model: ServedModel, evict: bool) -> None:
        """Place the model and start its replicas."""

        def progress(done: int, total: int) -> None:
            model.phases("fetch", done / total if total else None)

        placements: list[Placement] = []
        try:
            await model.ended.wait()  # where it was on its way out
            fetched = await self.loader.fetch(model.name, model.wishes, progress, model.phases)
            placements = await self._find_room(model, fetched, evict)
            model.phases.end()
            model.replicas = [
                Replica(
                    model.id,
                    number,
                    placement,
                    self.loader,
                    restart_limit=self.keeping.restart_limit,
                    on_loaded=self._on_loaded,
                    clock=self._clock,
                    adapters=model.adapters,
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
            model.failures = 0
            model.used(self._clock())
            model.ready.set_result(None)
            self._watch_idle()
        finally:
            self.loader.let_go(placements)

    def _fail(self, model: ServedModel, error: HfmsError) -> None:
        pause = self.keeping.retry_seconds * 2**model.failures
        if isinstance(error, DoesNotFit):
            pause = min(FULL_SECONDS, pause)
        else:
            model.failures += 1
        model.retry_at = self._clock() + min(pause, LONGEST_RETRY)
        model.failure = error
        model.phases.end()
        log.error("model failed", model=model.id, reason=error.message, retry_seconds=round(pause, 1))
        model.settle(error)

    def _retry_in(self, model: ServedModel) -> float:
        """Seconds until a call may load it again after a failure. That of a process after its load is noted here."""
        if model.failure is None:
            self._fail(model, LoadFailed(model.reason or "its engines ended"))
        return model.retry_at - self._clock() if self.keeping.load_on_request else self.keeping.retry_seconds

    # Room.

    async def _find_room(self, model: ServedModel, fetched: Fetched, evict: bool) -> list[Placement]:
        """Where the replicas go, their memory set aside. Unloads others only where that is sure to be enough.

        Raises what `Loader.arrange` raises, and DoesNotFit.
        """

        def fits(freed: eviction.Freed) -> bool:
            try:
                return all(p.fits for p in self.loader.arrange(fetched, model.wishes, freed, devices))
            except DoesNotFit:
                return False

        async with self._room:
            while True:
                devices = self.loader.devices()
                try:
                    placements = self.loader.arrange(fetched, model.wishes, devices=devices)
                    self.loader.set_aside(placements)
                    return placements
                except DoesNotFit:
                    chosen = eviction.choose([m.held for m in self._models.values()], fits) if evict else None
                    if not chosen:
                        raise
                    leaving = [self._models[held.id] for held in chosen]
                await asyncio.gather(*(self._leave(m, "evicted", f"made room for {model.id}") for m in leaving))

    async def unload_idle(self) -> float | None:
        """Unload what nobody has called for its `idle_seconds`; seconds until there may be more, None where not."""
        now = self._clock()
        left: dict[str, float] = {}
        for model in self._models.values():
            if model.idle_seconds and not model.pinned and model.away is None and model.state != "failed":
                used = now if model.in_use or not model.held.steady else model.last_used
                left[model.id] = used + model.idle_seconds - now
        over = [self._models[name] for name, seconds in left.items() if seconds <= 0]
        await asyncio.gather(*(self._leave(m, "idle", f"idle for {m.idle_seconds:g} s") for m in over))
        return min((seconds for seconds in left.values() if seconds > 0), default=None)

    def _watch_idle(self) -> None:
        """See to it that somebody looks for idle models while there may be one."""

        async def watch() -> None:
            while (pause := await self.unload_idle()) is not None:  # noqa: ASYNC110 - an event a call would cost more
                await asyncio.sleep(pause)

        if self._idle_watch is not None:
            self._idle_watch.cancel()  # it may sleep longer than the new model may
        self._idle_watch = asyncio.create_task(watch(), name="unload idle models")

    async def _leave(self, model: ServedModel, why: Why, reason: str) -> None:
        """Take a loaded model that nobody uses out of memory; a call brings it back. Once begun, it is seen through."""
        model.unloading, model.away = True, reason
        model.ended.clear()

        async def end() -> None:
            try:
                await asyncio.gather(*(replica.close() for replica in model.replicas))
            finally:
                model.replicas, model.unloading = [], False
                model.ended.set()
            log.info("model unloaded", model=model.id, reason=reason)
            self._on_unloaded(model, why)

        task = asyncio.create_task(end(), name=f"unload {model.id}")
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
        await asyncio.shield(task)

    # Unloading.

    async def unload(self, name: str, drain_seconds: float = 30.0) -> ServedModel:
        """Let the calls in flight finish, end the processes and forget the model. Raises ModelNotFound."""
        model = self.find(name) or await self._by_revision(name)
        if model is None:
            raise ModelNotFound.named(name, self.names())
        model.unloading = model.forgotten = True
        self.adapters.forget(model)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(model.idle.wait(), drain_seconds)
        await self._end(model)
        self._models.pop(model.id, None)
        log.info("model unloaded", model=model.id)
        self._on_unloaded(model, "asked")
        return model

    async def _end(self, model: ServedModel) -> None:
        if model.task is not None:
            model.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await model.task
        model.settle(Unavailable(f"The model `{model.id}` was unloaded while it loaded."))
        await asyncio.gather(*(replica.close() for replica in model.replicas))

    async def close(self) -> None:
        """End every process."""
        if self._idle_watch is not None:
            self._idle_watch.cancel()
        await self.adapters.close()
        await asyncio.gather(*(self._end(m) for m in self._models.values()))
        await asyncio.gather(*self._leaving)
        self._models.clear()

    # Health.

    def not_ready(self) -> str | None:
        """Why nothing, or not everything that was asked for at start, can be answered; None when it can."""
        if not self._models:
            return "no model is loaded"
        if missing := next((n for n in self.keeping.required if n != "*" and self.find(n) is None), None):
            return f"{missing} is not loaded"
        for model in self._models.values():
            required = self.is_required(model)
            if model.id not in self._preloaded and not required:
                continue
            if model.state in ("loading", "restarting"):
                return f"{model.id} is {model.state}{f' ({model.doing})' if model.doing else ''}"
            if model.state == "failed" and required:
                return f"{model.id} could not be loaded: {model.reason}"
        if starting := self.adapters.starting:
            return f"the adapter {starting} is loading"
        if any(host.alive() for m in self._models.values() if m.state == "loaded" for host in m.hosts):
            return None
        if self.keeping.load_on_request and any(m.away is not None for m in self._models.values()):
            return None  # a call brings it back, and none would come to a server that is not ready
        return "no engine answers: " + "; ".join(f"{m.id}: {m.reason or m.state}" for m in self._models.values())
