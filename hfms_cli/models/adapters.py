"""LoRA adapters of the pool's models by name: load, lease, unload.

An adapter is a small change to a model that is in memory. It has a name of its own, as a model has, and its calls go to
the engine of its model (its parent), in one batch with all others. Its parent's replicas bring it along when they start
again. A name is free as soon as its adapter is unloaded; calls that have begun finish with what they began with.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

from hfms_cli.engines.host import EngineHost
from hfms_cli.errors import BadRequest, ConfigError, Conflict, DoesNotFit, HfmsError, ModelNotFound
from hfms_cli.models import names
from hfms_cli.models.adapter_card import read_card
from hfms_cli.models.served import ServedModel
from hfms_cli.sizes import human_bytes
from hfms_cli.types import Adapter, Call, Chunk, LoadedInfo, Manifest

if TYPE_CHECKING:
    from hfms_cli.models.pool import Pool

__all__ = ["Adapters", "Module", "ServedAdapter", "read_module"]

log = structlog.get_logger("hfms.models")


class Module(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An adapter that is loaded at start, as vLLM's `--lora-modules` names one: `name=path`, or this as JSON."""

    name: str
    path: str
    base_model_name: str | None = None


def read_module(text: str) -> Module:
    """Raises ConfigError."""
    try:
        if text.lstrip().startswith("{"):
            return msgspec.json.decode(text, type=Module)
        name, _, path = text.partition("=")
        module = Module(name.strip(), path.strip())
        names.check(module.name)
        names.parse(module.path)
    except (msgspec.MsgspecError, BadRequest) as exc:
        raise ConfigError(
            f"`{text}` names no adapter; write `name=org/adapter`, or"
            ' {"name": ..., "path": ..., "base_model_name": ...}',
            param="lora_modules",
        ) from exc
    return module


def _set_event() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


@dataclass(eq=False)
class ServedAdapter:
    """An adapter that calls can name. To the road it is a model like any other."""

    name: str
    parent: ServedModel
    manifest: Manifest
    adapter: Adapter
    created: int = field(default_factory=lambda: int(time.time()))
    """Unix time."""
    gone: bool = False
    """It is unloaded, and at most calls that have begun still use it."""
    leases: int = 0
    """Calls in flight."""
    idle: asyncio.Event = field(default_factory=_set_event)

    @property
    def id(self) -> str:
        return self.name

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of all that decides which bytes answer. Raises LoadFailed or Unavailable."""
        return hashlib.sha256(f"{self.parent.digest}\0{self.manifest.digest}".encode()).hexdigest()

    @property
    def weights(self) -> str:
        """SHA-256, in hex, of its parent's weights and of its own. Raises LoadFailed or Unavailable."""
        return hashlib.sha256(f"{self.parent.weights}\0{self.manifest.digest}".encode()).hexdigest()

    @property
    def info(self) -> LoadedInfo:
        return self.parent.info

    def host_now(self) -> EngineHost:
        return self.parent.host_now()

    def submit(self, call: Call) -> AsyncIterator[Chunk]:
        """Send a call to its parent's engine, to be answered with the adapter."""
        return self.parent.submit(msgspec.structs.replace(call, adapter=self.adapter.id))

    @contextlib.contextmanager
    def lease(self) -> Iterator[ServedAdapter]:
        """Keep it in the engine while the block runs. Raises ModelNotFound where it was just unloaded."""
        if self.gone:
            raise ModelNotFound.named(self.name, ())
        self.leases += 1
        self.idle.clear()
        try:
            yield self
        finally:
            self.leases -= 1
            if not self.leases:
                self.idle.set()

    def describe(self) -> dict[str, Any]:
        """As `GET /models` shows it: its state is its parent's."""
        return {
            "id": self.name,
            "status": {"value": "unloading" if self.gone else self.parent.state},
            "aliases": [],
            "parent": self.parent.id,
            "storage": self.manifest.storage,
            "revision": self.manifest.revision,
            "digest": self.manifest.digest,
        }


class Adapters:
    """All adapters of a pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._served: dict[str, ServedAdapter] = {}
        self._loading: set[str] = set()
        """Names whose adapters are on their way."""
        self.begun: dict[str, asyncio.Task[ServedAdapter]] = {}
        """The loads of those that are to be there from the start, by name."""
        self._ending: set[asyncio.Task[None]] = set()

    def __iter__(self) -> Iterator[ServedAdapter]:
        return iter([*self._served.values()])

    def find(self, name: str) -> ServedAdapter | None:
        """An adapter that can be called by this name."""
        return self._served.get(self._pool.aliases.get(name, name))

    def preload(self, modules: Iterable[Module], after: Sequence[ServedModel]) -> None:
        """Begin to load what is to be there from the start, once these models have loaded or failed."""

        async def load(module: Module) -> ServedAdapter:
            if after:
                await asyncio.wait([model.ready for model in after])
            return await self.load(module.name, module.path, module.base_model_name)

        self.begun = {m.name: asyncio.create_task(load(m), name=f"load {m.name}") for m in modules}

    @property
    def starting(self) -> str | None:
        """An adapter that is to be there from the start, and that has neither loaded nor failed yet."""
        return next((name for name, task in self.begun.items() if not task.done()), None)

    async def load(self, name: str, path: str, base: str | None = None, *, replace: bool = False) -> ServedAdapter:
        """Fetch an adapter, have every replica of its base model take it, and serve it by `name`.

        path: any name of a model. base: by any of its names; None: the model that the adapter names, else the only one.
        replace: whether it may take the name of another adapter; that one's calls in flight finish with it.
        Raises BadRequest where it does not fit, Conflict, DoesNotFit, and what fetching and leases raise; then nothing
        has changed.
        """
        self._refuse_taken(name, replace=replace)
        self._loading.add(name)
        try:
            served = await self._load(name, path, base)
        finally:
            self._loading.discard(name)
        if before := self._served.get(name):
            self._retire(before)
        self._served[name] = served
        log.info("adapter loaded", adapter=name, model=served.parent.id, rank=served.adapter.card.r)
        return served

    async def _load(self, name: str, path: str, base: str | None) -> ServedAdapter:
        manifest, folder = await self._pool.loader.router.pull(names.parse(path), lambda done, total: None)
        card = await asyncio.to_thread(read_card, folder, [f.path for f in manifest.files])
        async with self._pool.lease(self._base(card.base_model_name_or_path, base)) as parent:
            if isinstance(parent, ServedAdapter):
                raise BadRequest(f"`{parent.id}` is an adapter itself.", param="base_model_name")
            self._refuse_too_large(parent, manifest)
            adapter = Adapter(uuid.uuid4().hex, str(folder), card)
            parent.adapters[adapter.id] = adapter  # from here on, a replica that starts brings it along
            try:
                await asyncio.gather(*(host.adapt(adapter) for host in parent.hosts))
            except BaseException:
                await asyncio.shield(self._withdraw(parent, adapter.id))
                raise
            return ServedAdapter(name, parent, manifest, adapter)

    def _base(self, named: str, asked: str | None) -> str:
        """The name of the model that an adapter is for. named: by the adapter itself."""
        if asked is not None:
            return asked
        models = self._pool.models()
        if named and (found := self._pool.find(named)):
            return found.id
        if len(models) == 1:
            return models[0].id
        there = ", ".join(f"`{m.id}`" for m in models) or "none"
        raise BadRequest(
            f"Which model is this adapter for? It names none of those that are loaded ({there}).",
            param="base_model_name",
            code="missing_parameter",
        )

    def _refuse_taken(self, name: str, *, replace: bool) -> None:
        """Raises BadRequest where it is no name, and Conflict where something else has it."""
        try:
            names.check(name)
        except BadRequest as exc:
            raise BadRequest(exc.message, param="lora_name", code=exc.code) from exc
        pool = self._pool
        taken = pool.find(name) or pool.catalogue.find(name) or name in pool.aliases
        if taken or name in self._loading or (name in self._served and not replace):
            raise Conflict(f"`{name}` is already the name of a model or of an adapter.", param="lora_name")

    def _refuse_too_large(self, parent: ServedModel, manifest: Manifest) -> None:
        for replica in parent.replicas:
            device = self._pool.loader.with_room(replica.placement.candidates[0].request.device)
            if manifest.size > device.free_bytes:
                raise DoesNotFit(
                    f"The adapter has {human_bytes(manifest.size)}, and {human_bytes(device.free_bytes)} are free on "
                    f"{device.id}.",
                    param="lora_path",
                )

    # Unloading.

    async def unload(self, name: str, drain_seconds: float = 30.0) -> ServedAdapter:
        """Serve it no more, and have the engines forget it once the calls in flight have ended. Raises ModelNotFound.

        drain_seconds: how long to wait for them here; they go on if they take longer.
        """
        served = self.find(name)
        if served is None:
            raise ModelNotFound.named(name, self._served)
        del self._served[served.name]
        await asyncio.wait([self._retire(served)], timeout=drain_seconds)
        return served

    def forget(self, parent: ServedModel) -> None:
        """A model is unloaded for good, and its adapters with it."""
        for served in [s for s in self if s.parent is parent]:
            served.gone = True
            del self._served[served.name]

    def _retire(self, served: ServedAdapter) -> asyncio.Task[None]:
        served.gone = True

        async def end() -> None:
            await served.idle.wait()
            await self._withdraw(served.parent, served.adapter.id)
            log.info("adapter unloaded", adapter=served.name, model=served.parent.id)

        task = asyncio.create_task(end(), name=f"unload {served.name}")
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        return task

    @staticmethod
    async def _withdraw(parent: ServedModel, adapter_id: str) -> None:
        """Have no engine keep it. One that is gone keeps nothing."""
        parent.adapters.pop(adapter_id, None)
        for outcome in await asyncio.gather(*(h.unadapt(adapter_id) for h in parent.hosts), return_exceptions=True):
            if isinstance(outcome, BaseException) and not isinstance(outcome, HfmsError):
                raise outcome

    async def close(self) -> None:
        """Wait for no load and for no call any more."""
        tasks = [*self.begun.values(), *self._ending]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
