"""The hooks, and the contracts of what they yield. This file is all that a plugin author has to read.

A plugin is a module named in the entry-point group `hfms`. Its hooks yield `Provider` records: a name, a factory, and
the options that the factory takes. `hfms.toml` says which are on and in what order. Hooks are called once, at start;
none is on the hot path. See `docs/plugins.md` for whole examples.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import GenericAlias
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, TypeVarTuple, get_type_hints

import msgspec
import pluggy

from hfms_cli.config import Config
from hfms_cli.types import (
    Call,
    Caller,
    Chunk,
    Device,
    LoadedInfo,
    Manifest,
    ModelCard,
    ModelName,
    Probe,
    Quantize,
    Task,
)

if TYPE_CHECKING:
    import typer
    from aiohttp import web
    from prometheus_client import CollectorRegistry

    from hfms_cli.errors import HfmsError
    from hfms_cli.ipfs import Entry

hookspec = pluggy.HookspecMarker("hfms")
hookimpl = pluggy.HookimplMarker("hfms")

T = TypeVar("T", covariant=True)
Proceed = Callable[[Call], AsyncIterator[Chunk]]
Progress = Callable[[int, int], None]
"""Bytes so far and bytes in all."""


@dataclass(frozen=True)
class Watch:
    """A Progress that also wants to know of each file. `Watch.of` makes one of any."""

    whole: Progress
    file: Callable[[str, int, int], None] = lambda path, done, size: None
    """Path, bytes so far, bytes in all."""
    say: Callable[[str], None] = lambda text: None
    """Something that whoever waits should know."""

    def __call__(self, done: int, total: int) -> None:
        self.whole(done, total)

    @staticmethod
    def of(progress: Progress) -> Watch:
        return progress if isinstance(progress, Watch) else Watch(progress)


class Report(Protocol):
    """Told what a load is doing now."""

    def __call__(self, phase: str, done: float | None = None) -> None:
        """phase: one word, such as `compile`. done: the share of it that is done, 0 to 1; None where nobody knows."""
        ...


def report_nothing(phase: str, done: float | None = None) -> None:
    """For loads that nobody watches."""


@dataclass(frozen=True)
class NoOptions:
    """A plugin without options."""


@dataclass(frozen=True)
class Provider(Generic[T]):
    """A named record that a hook yields.

    create: takes an instance of `options` where there are any, else nothing; called once, and only if in use.
    options: a frozen dataclass whose fields are made by `hfms_cli.setting`; read from `[<kind>.<name>]`.
    commands: adds verbs to the command line; called only where the operator's order lists the record.
    """

    name: str
    create: Callable[..., T]
    options: type[Any] = NoOptions
    summary: str = ""
    commands: Callable[[typer.Typer], None] | None = None


class Storage(Protocol):
    """A place that models come from. Every method may raise an HfmsError, and nothing else.

    A storage may also have
    - `hashed() -> Iterable[tuple[Path, os.stat_result, str]]`: files that it hashed while it fetched them, as they were
      then, with the SHA-256 (or git's SHA-1) that it found. They are not read once more;
    - `discard(manifest, paths)`: a coroutine that deletes some of a model's files, so that `fetch` brings just them;
    - `peek(manifest, path, first, count) -> bytes`: a coroutine; some bytes of a file that need not be on this disk;
    - `terms(manifest) -> Terms`: a coroutine; under what terms a model of its may be passed on;
    - `leftovers() -> Iterable[Leftover]`: what lies on this disk and nothing refers to.
    """

    name: str

    @property
    def root(self) -> Path | None:
        """The folder in which it keeps what it fetched; None where it keeps nothing."""
        ...

    def claims(self, name: ModelName) -> bool:
        """Whether a name could be one of this storage's, judged by its form alone."""
        ...

    async def find(self, name: ModelName) -> Manifest | None:
        """What the name stands for; None where this storage does not have it. Fetches no weights."""
        ...

    async def fetch(self, manifest: Manifest, progress: Progress) -> Path:
        """The model's folder on this disk, with every file of the manifest in it, whole.

        Verification against the manifest's hashes is the caller's. An interrupted fetch leaves nothing that looks
        whole.
        """
        ...

    async def list(self) -> Sequence[Manifest]:
        """What is on this disk already."""
        ...

    async def remove(self, manifest: Manifest) -> None:
        """Delete a model of `list()`'s from this disk."""
        ...


class ContentStore(Protocol):
    """Keeps bytes under CIDs: names that are made of the bytes. A storage of models may be one as well.

    `cid` is any CID in text, made by hfms from its bytes: it never begins with `-` and never holds a `/`. What is read
    is checked by hfms, whatever the store says. Every method may raise an HfmsError, and nothing else: NotFound where
    the store does not have something, Unsupported where it cannot do something. `hfms_cli.ipfs.BlockStore` is a base
    that brings all of this for stores which can get and keep single blocks.

    A store may also have `indexes() -> Awaitable[Sequence[tuple[str, bytes | HfmsError]]]`: of each server behind it
    its name and its signed index of models (docs/publishing.md), or why there is none. hfms checks them.
    """

    name: str

    async def add_bytes(self, data: bytes, *, pin: bool = True) -> str:
        """Keep a file with these bytes; its CID."""
        ...

    async def add_path(
        self, path: Path, *, recursive: bool = False, pin: bool = True, chunker: str = "size-262144"
    ) -> str:
        """Keep a file, or a folder with all that is in it; its CID."""
        ...

    async def cat(self, cid: str) -> bytes:
        """A file's bytes."""
        ...

    async def get_to_path(self, cid: str, *, output_path: Path) -> None:
        """Write a file or a folder to a path where there is nothing yet, whole or not at all."""
        ...

    async def ls(self, cid: str) -> Sequence[Entry]:
        """What is in a folder."""
        ...

    async def pin(self, cid: str) -> None:
        """Keep everything below a CID until it is unpinned."""
        ...

    async def unpin(self, cid: str) -> None: ...

    async def block_put(self, data: bytes, *, codec: str = "raw") -> str:
        """Keep one block; its CID. codec: `raw`, `dag-pb` or `dag-cbor`."""
        ...

    async def block_get(self, cid: str) -> bytes: ...

    def dag_export(self, cid: str) -> AsyncIterator[bytes]:
        """Everything below a CID as a CAR (version 1), in chunks of any size."""
        ...

    async def dag_import(self, car: AsyncIterator[bytes], *, pin: bool = True) -> Sequence[str]:
        """Keep all blocks of a CAR; its roots."""
        ...


class Hardware(Protocol):
    """A kind of device."""

    name: str

    def probe(self) -> Probe:
        """Devices with their memory as it is now, or why there are none. Quick, and imports nothing heavy."""
        ...


@dataclass(frozen=True)
class Draft:
    """A smaller model with the same vocabulary, which guesses what a larger one will say."""

    folder: Path
    card: ModelCard


@dataclass(frozen=True)
class LoadRequest:
    """What an engine is to load. Built in the front, used in the worker process."""

    folder: Path
    card: ModelCard
    device: Device
    dtype: str = "auto"
    trust_remote_code: bool = False
    quantize: Quantize = "auto"
    """auto: what the engine's own options say."""
    draft: Draft | None = None
    """For engines that say that they take one (`drafts`)."""
    report: Report = report_nothing
    """`Engine.load` may tell here what it does; until it does, that is `load`."""


class LoadedModel(Protocol):
    """A model inside its worker process, driven by one thread: receive, step, send.

    No method may block on anything but the device. `step` does a bounded piece of work (one forward pass), so that
    cancels, new calls and heartbeats are seen between two steps.

    A model with a tokenizer may also have `ask(question: Question) -> Reply`, which is answered between two steps.

    One that takes LoRA adapters has, too, between two steps:
    - `add_adapter(adapter: Adapter)`: from now on calls may name its id (`Call.adapter`), and run in one batch with
      others. One that is there already is left alone. Raises BadRequest where it does not fit the model; then nothing
      has changed;
    - `remove_adapter(id: str)`: no call names it any more. Unknown ids are ignored.
    """

    info: LoadedInfo

    def submit(self, call: Call) -> None:
        """Take a call. Raises BadRequest and its kin where the call can never be answered."""
        ...

    def cancel(self, call_id: str) -> None:
        """Forget a call; unknown ids are ignored."""
        ...

    def busy(self) -> bool:
        """Whether `step` would have work to do."""
        ...

    def step(self) -> list[tuple[str, Chunk | HfmsError | None]]:
        """One step. For each call id: chunks in order, then None when the call is done, or the error that ended it."""
        ...

    def waiting(self) -> int:
        """Calls that were submitted and have not begun."""
        ...

    def close(self) -> None: ...


class Engine(Protocol):
    """Runs models of some formats on some devices.

    An engine may also have
    - `quantizes`: which of `int8` and `int4` it can make of a model's weights; without it, it is asked for neither;
    - `drafts`: true where it can use `LoadRequest.draft`; without it, it is never given one;
    - `quality(folder) -> dict[Quantize, Quality]`: what quantisation has cost a model, where it was measured;
    - `footprint(request) -> Footprint`: what its estimate is made of;
    - `leftovers() -> Iterable[Leftover]`: what it keeps on this disk and does not need any more;
    - `imports`: modules that take long to import and that every load needs: the first worker may import them before it
      is known what it is to load;
    - `spins`: true where its threads wait for each other by OpenMP hundreds of times a token; of such workers one on a
      machine may wait busily for longer;
    - `packages`: the Python packages by whose versions it is faster or slower. Where one changes, what `hfms models
      tune` found is measured anew. Options named `threads`, `max_batch` and `prefill_tokens` are tuned by these names.

    hfms sets `name`, and `plugin`: where its entry point says that it is. A worker loads that plugin and no other.
    """

    name: str
    tasks: tuple[Task, ...]

    def supports(self, card: ModelCard, device: Device) -> str | None:
        """None, or the reason why not, for people."""
        ...

    def estimate(self, request: LoadRequest) -> int:
        """Bytes of the device's memory that the model will take: weights, cache and working space."""
        ...

    def load(self, request: LoadRequest) -> LoadedModel:
        """Called in the worker process. Raises LoadFailed, UnsafeFormat or DoesNotFit."""
        ...


@functools.cache
def caller_key() -> web.RequestKey[Caller]:
    """Under which a request holds who sent it; made on first use, since aiohttp takes long to import."""
    from aiohttp import web

    return web.RequestKey("caller", Caller)


@dataclass(frozen=True)
class Exchange:
    """The headers of the HTTP request that a call came with, and those that its answer is to have.

    So a middleware's `call`, which sees no HTTP, can obey `Cache-Control` and say `x-cache`. What is put into `answer`
    before the first chunk goes out with every kind of answer, streams and errors too.
    """

    asked: Mapping[str, str] = field(default_factory=dict)
    """As the client sent them; looked up without regard to case, and never to be believed."""
    answer: dict[str, str] = field(default_factory=dict)


_exchange: ContextVar[Exchange] = ContextVar("exchange")


def exchange() -> Exchange:
    """The exchange that is going on; one without headers where a call did not come by HTTP."""
    return _exchange.get(None) or Exchange()


def begin_exchange(asked: Mapping[str, str], answer: dict[str, str] | None = None) -> Exchange:
    """The server's own: what this task does from here on answers that request."""
    begun = Exchange(asked, {} if answer is None else answer)
    _exchange.set(begun)
    return begun


AskOwner = Callable[[str, str, bytes], Awaitable[bytes]]
"""Asks the owner: a middleware's name, a method's, and its arguments. Returns what the method returned."""
Ts = TypeVarTuple("Ts")
R = TypeVar("R")


class InOwner(Generic[*Ts, R]):
    """See `in_owner`."""

    def __init__(self, method: Callable[[Any, *Ts], Awaitable[R]]) -> None:
        hints: dict[str, Any] = get_type_hints(method)
        _, *names = inspect.signature(method).parameters
        if missing := [name for name in (*names, "return") if name not in hints]:
            raise TypeError(f"{method.__name__} is `in_owner` and needs type hints for {', '.join(missing)}")
        self.__doc__ = method.__doc__
        self._method = method
        self._name = method.__name__
        self._encode = msgspec.msgpack.Encoder().encode
        arguments: Any = GenericAlias(tuple, tuple(hints[name] for name in names))
        self._decode_arguments = msgspec.msgpack.Decoder(arguments).decode
        self._decode_result: Callable[[bytes], R] = msgspec.msgpack.Decoder(hints["return"]).decode

    def __get__(self, middleware: Middleware, kind: type[Middleware]) -> Callable[[*Ts], Awaitable[R]]:
        async def called(*arguments: *Ts) -> R:
            if middleware.owner is None:
                return await self._method(middleware, *arguments)
            return self._decode_result(await middleware.owner(middleware.name, self._name, self._encode(arguments)))

        return called

    async def answer(self, middleware: Middleware, arguments: bytes) -> bytes:
        """In the owner: what a front asked for."""
        return self._encode(await self._method(middleware, *self._decode_arguments(arguments)))


in_owner = InOwner
"""Marks an async method of a middleware that runs in the owner, whichever front calls it.

So what the method keeps in `self` is one truth, also with `[server] workers` above 1. Its arguments, given by position,
and its result have type hints and are what msgspec can carry; of errors, an HfmsError comes back as it was. In a front
a call costs a trip over a socket, some 0.1 ms; elsewhere, next to nothing.
"""


class Middleware:
    """Stands around the HTTP handler, around the call, or both. Override what you need; the rest costs nothing.

    With `[server] workers` above 1 there are several processes: the owner, which has the models, and further fronts.
    `call` runs in the owner, whichever front a request came to, and so do `status` and `routes`: what they keep in
    memory is one truth. `http` runs in the process that the request came to, with a middleware of its own (`check`,
    `metrics` and `close` go with it); what it must share is for methods marked `in_owner`.
    """

    name: str = ""
    owner: AskOwner | None = None
    """Set in fronts, for `in_owner`."""

    async def http(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Around every HTTP request. Raise an HfmsError to refuse."""
        return await handler(request)

    def call(self, call: Call, proceed: Proceed) -> AsyncIterator[Chunk]:
        """Around every model call: an async generator that goes on with `proceed(call)`."""
        return proceed(call)

    @staticmethod
    def identify(request: web.Request, caller: Caller) -> None:
        """Say who sent a request; everything further down believes it."""
        request[caller_key()] = caller

    def guards(self) -> bool:
        """Whether this middleware keeps strangers out. Without one that does, the server stays on loopback."""
        return False

    def needs_one_front(self) -> str | None:
        """Why this middleware's `http` must not run in several processes; `hfms serve --workers 2` is then refused.

        None: it keeps nothing between requests, or does so in methods marked `in_owner` or elsewhere (Redis, say).
        """
        return None

    def patience(self) -> float | None:
        """Seconds that a call may wait in all, its model's load included; None: this middleware does not bound it."""
        return None

    def check(self, config: Config) -> Iterable[str]:
        """Warnings for the start panel. Raise ConfigError to refuse to start."""
        return ()

    def status(self) -> dict[str, Any]:
        """This middleware's section of `/status`."""
        return {}

    def routes(self, app: web.Application) -> None:
        """Add routes that come and go with this middleware; they stand behind it as all others do."""

    def document(self, document: dict[str, Any]) -> None:
        """Add to `/openapi.json` what is so because of this middleware: security, headers, statuses.

        document: all of it, with every route; made anew for each request.
        """

    def metrics(self, registry: CollectorRegistry) -> None:
        """Add series to `/metrics`. Called once, at start."""

    async def close(self) -> None:
        """The server ends: let go of what you hold."""


class Hooks:
    """Every hook there is."""

    @hookspec
    def hfms_storages(self) -> Iterable[Provider[Storage | ContentStore]]:  # type: ignore[empty-body]
        """Places that models come from, and places that keep what has a CID."""

    @hookspec
    def hfms_hardware(self) -> Iterable[Provider[Hardware]]:  # type: ignore[empty-body]
        """Kinds of device."""

    @hookspec
    def hfms_engines(self) -> Iterable[Provider[Engine]]:  # type: ignore[empty-body]
        """Engines."""

    @hookspec
    def hfms_middlewares(self) -> Iterable[Provider[Middleware]]:  # type: ignore[empty-body]
        """Middlewares."""

    @hookspec
    def hfms_commands(self, app: typer.Typer) -> None:
        """Add verbs to the command line."""

    @hookspec
    def hfms_routes(self, app: web.Application) -> None:
        """Add routes to the server. They stand behind the same middlewares as all others."""


# Hooks that yield records: kind, as it is called in `hfms.toml`, and hook.
KINDS = {
    "storage": "hfms_storages",
    "hardware": "hfms_hardware",
    "engine": "hfms_engines",
    "middleware": "hfms_middlewares",
}
