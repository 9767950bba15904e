"""Asks the storages for a model, in the operator's order, and falls back from one to the next at every step."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

import structlog

from hfms_cli.config import Config
from hfms_cli.errors import (
    BadRequest,
    ConfigError,
    Conflict,
    FetchFailed,
    GatedModel,
    HfmsError,
    ModelNotFound,
    NotFound,
    VerifyFailed,
)
from hfms_cli.hookspecs import Progress, Report, Storage, report_nothing
from hfms_cli.ipfs.fetch import Observe
from hfms_cli.models.content import Content, is_content_store
from hfms_cli.models.index import Seen
from hfms_cli.models.ipfs import IpfsModels, cache_folder
from hfms_cli.models.neighbours import Neighbours, Offering
from hfms_cli.models.pins import Pins
from hfms_cli.models.trust import Trust
from hfms_cli.models.verify import RECEIPTS, examine, verify
from hfms_cli.plugins import Plugins
from hfms_cli.receipts import Receipts
from hfms_cli.types import Manifest, ModelName

__all__ = ["Observe", "Router", "open_router", "stands_for"]

log = structlog.get_logger("hfms.models")

T = TypeVar("T")

LOOK_SECONDS = 5.0
"""How old the router's knowledge of the disk may be when a call names a model."""

# Of several storages that failed, the one whose error says most about what to do is heard.
_TELLING = (GatedModel, BadRequest, FetchFailed)


class Router:
    """The model's road from a name to verified files."""

    def __init__(
        self,
        storages: Sequence[Storage],
        *,
        content: Content | None = None,
        receipts: Receipts | None = None,
        observe: Observe | None = None,
        pins: Pins | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """content: the stores of what has a CID. receipts: hashes of files that were verified before.
        observe: told of every operation. pins: what is not to be removed.
        """
        self.storages = tuple(storages)
        self.content = content or Content(())
        self._receipts = receipts or Receipts()
        self._observe = observe
        self.pins = pins
        self._clock = clock
        self._there: Sequence[Manifest] = ()
        self._looked = -float("inf")

    async def find(self, name: ModelName) -> tuple[Manifest, Storage]:
        """What the name stands for, and the storage that has it. Fetches no weights.

        Raises ModelNotFound, or what kept a storage from answering: GatedModel, FetchFailed.
        """
        return await self._first(name, lambda storage: self._find(storage, name))

    async def pull(self, name: ModelName, progress: Progress, report: Report = report_nothing) -> tuple[Manifest, Path]:
        """The model's folder on this disk, with every file checked. Raises as `find` does, and VerifyFailed."""

        async def fetched(storage: Storage) -> tuple[Manifest, Path] | None:
            report("fetch")
            manifest = await self._find(storage, name)
            if manifest is None:
                return None
            folder = await self._ask(storage, "fetch", storage.fetch(manifest, progress))
            if hasattr(storage, "hashed"):
                self._receipts.add(storage.hashed())
            if not manifest.files:  # some storages know the files only once they have them
                manifest = await self._find(storage, name) or manifest
            report("verify")
            await self._ask(storage, "verify", verify(manifest, folder, receipts=self._receipts))
            return manifest, folder

        found, _ = await self._first(name, fetched)
        return found

    async def list(self) -> list[Manifest]:
        """What is on this disk, in the order of the storages. One that fails is left out, and the log says why."""

        async def listed(storage: Storage) -> Sequence[Manifest]:
            try:
                return await self._ask(storage, "list", storage.list())
            except HfmsError as exc:
                log.warning("storage cannot list", storage=storage.name, error=exc.message)
                return ()

        return [m for found in await asyncio.gather(*map(listed, self.storages)) for m in found]

    async def on_disk(self, name: ModelName) -> Manifest | None:
        """The model, where it is on this disk. Reads the disk anew at most once in `LOOK_SECONDS`.

        Clients can ask for any name they like, and a large cache takes long to read.
        """
        if self._clock() - self._looked > LOOK_SECONDS:
            self._there, self._looked = await self.list(), self._clock()
        return next((m for m in self._there if stands_for(name, m)), None)

    async def remove(self, name: ModelName, *, force: bool = False) -> Manifest:
        """Delete a model from this disk, and answer what it was.

        force: also one that is pinned. Raises ModelNotFound, BadRequest, and Conflict where it is pinned.
        """
        manifest, storage = await self.kept(name)
        if not force and self.pins is not None and self.pins.keeps(manifest.name, manifest.revision):
            raise Conflict(f"`{manifest.name}` is pinned: `hfms models unpin {manifest.name}` first, or add --force.")
        await self._ask(storage, "remove", storage.remove(manifest))
        return manifest

    async def kept(self, name: ModelName) -> tuple[Manifest, Storage]:
        """The one model on this disk that the name means. Raises ModelNotFound, BadRequest."""
        there = await self.list()
        found = [m for m in there if stands_for(name, m)]
        exact = [m for m in found if m.name == name]
        if not found:
            known = [str(m.name) for m in there]
            raise ModelNotFound.named(str(name), known, "It is not among what hfms has fetched to this disk.")
        if len(found) > 1 and len(exact) != 1:
            choices = ", ".join(f"`{m.name.rest}@{m.revision}` ({m.storage})" for m in found)
            raise BadRequest(f"`{name}` is on this disk several times; say which: {choices}.", param="model")
        (manifest,) = found if len(found) == 1 else exact
        return manifest, next(s for s in self.storages if s.name == manifest.storage)

    async def examine(
        self, name: ModelName, progress: Progress, *, repair: bool = False
    ) -> tuple[Manifest, dict[str, VerifyFailed]]:
        """Hash every file of a model on this disk anew. The files that are wrong, and how.

        repair: fetch those again, and only those where the storage can; what is wrong after that is answered.
        Raises ModelNotFound, BadRequest, and what keeps a storage from fetching.
        """
        if name.scheme == "path":
            manifest, storage = await self.find(name)
        else:
            manifest, storage = await self.kept(name)
        folder = await self._ask(storage, "fetch", storage.fetch(manifest, lambda done, total: None))
        bad = await self._ask(storage, "verify", examine(manifest, folder, force=True, progress=progress))
        if bad and repair:
            if hasattr(storage, "discard"):
                await self._ask(storage, "discard", storage.discard(manifest, [*bad]))
            else:
                await self._ask(storage, "remove", storage.remove(manifest))
            manifest, folder = await self.pull(manifest.name, progress)
            bad = await self._ask(storage, "verify", examine(manifest, folder, force=True))
        return manifest, bad

    async def close(self) -> None:
        """Let go of what the storages hold open."""
        await self.content.close()

    async def _first(self, name: ModelName, attempt: Callable[[Storage], Awaitable[T | None]]) -> tuple[T, Storage]:
        """The first storage that claims the name and for which `attempt` answers something."""
        asked = [s for s in self.storages if s.claims(name)]
        failures: list[tuple[Storage, HfmsError]] = []
        for storage in asked:
            try:
                found = await attempt(storage)
            except HfmsError as exc:
                failures.append((storage, exc))
            else:
                if found is not None:
                    return found, storage
        raise await self._none(name, asked, failures)

    async def _none(
        self, name: ModelName, asked: Sequence[Storage], failures: Sequence[tuple[Storage, HfmsError]]
    ) -> HfmsError:
        """Why no storage had it."""
        if not asked:
            forms = f"names that begin with `{name.scheme}:`" if name.scheme not in ("", "path") else "such names"
            return ModelNotFound(f"No storage that is in use takes {forms}: `{name}`.", param="model")
        reasons = {s.name: "has no such model" for s in asked} | {s.name: e.message for s, e in failures}
        telling = [(s, e) for s, e in failures if not isinstance(e, NotFound)]
        if not telling:
            why = "; ".join(f"{storage}: {reason.rstrip('.')}" for storage, reason in reasons.items())
            return ModelNotFound.named(str(name), [str(m.name) for m in await self.list()], f"Asked: {why}.")
        storage, error = min(telling, key=lambda f: [not isinstance(f[1], kind) for kind in _TELLING])
        others = "; ".join(f"{s}: {r.rstrip('.')}" for s, r in reasons.items() if s != storage.name)
        if not others:
            return error
        message = f"{error.message} Also asked: {others}."
        return type(error)(message, param=error.param, code=error.code, retry_after=error.retry_after)

    async def _find(self, storage: Storage, name: ModelName) -> Manifest | None:
        return await self._ask(storage, "find", storage.find(name))

    async def _ask(self, storage: Storage, operation: str, work: Awaitable[T]) -> T:
        """One operation of a storage, counted. Whatever is no HfmsError is a fault of the storage's, and hidden."""
        start, status = time.perf_counter(), "error"
        try:
            result = await work
            status = "missing" if result is None and operation == "find" else "ok"
            return result
        except NotFound:
            status = "missing"
            raise
        except HfmsError:
            raise
        except Exception as exc:
            log.exception("storage failed", storage=storage.name, operation=operation)
            raise FetchFailed(f"The storage `{storage.name}` failed at `{operation}`; the log says why.") from exc
        finally:
            if self._observe is not None:
                self._observe(storage.name, operation, status, time.perf_counter() - start)


def open_router(config: Config, plugins: Plugins, *, observe: Observe | None = None) -> Router:
    """The router over the storages that the configuration names. Raises ConfigError, PluginError.

    Those with content-addressed verbs answer for `ipfs://CID` together, where the first of them stands; one that knows
    what neighbours offer answers for names, too.
    """
    made = {name: plugins.create("storage", name, config) for name in config.order("storage")}
    backend = config.storage.backend
    stores = sorted((s for s in made.values() if is_content_store(s)), key=lambda s: s.name != backend)
    if backend and not (stores and stores[0].name == backend):
        raise ConfigError(f"IPFS_BACKEND is `{backend}`, a storage that keeps nothing with a CID", param="backend")
    content = Content(stores, patience=config.storage.block_seconds, observe=observe)
    models: list[Storage] = []
    for storage in made.values():
        if is_content_store(storage) and not any(isinstance(m, IpfsModels) for m in models):
            models.append(IpfsModels(content, cache_folder(config.storage.cache_dir)))
        if hasattr(storage, "indexes"):
            models.append(_neighbours(config, storage, content))
        if not is_content_store(storage) or hasattr(storage, "find"):
            models.append(storage)
    return Router(
        models,
        content=content,
        receipts=Receipts(config.state_dir / RECEIPTS),
        observe=observe,
        pins=Pins(config.state_dir),
    )


def _neighbours(config: Config, offering: Offering, content: Content) -> Neighbours:
    trust = Trust.load(config.storage.trusted_publishers, config.state_dir)
    root = cache_folder(config.storage.cache_dir).with_name("neighbours")
    return Neighbours(offering, content, trust, root, seen=Seen(config.state_dir / "indexes.json"))


def stands_for(name: ModelName, manifest: Manifest) -> bool:
    """Whether a name means a model on the disk; without a revision it means any."""
    own = manifest.name
    same = (name.scheme, name.rest) == (own.scheme, own.rest)
    return same and name.revision in (None, own.revision, manifest.revision)
