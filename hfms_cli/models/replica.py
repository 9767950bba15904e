"""One engine process of a model, and its life: start, watch, start again with growing pauses.

A model may have several of these, each with a placement, memory and a heartbeat of its own; one that dies takes only
its own calls with it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import structlog
from msgspec import to_builtins

from hfms_cli.engines.host import EngineHost
from hfms_cli.errors import HfmsError, LoadFailed, Unavailable
from hfms_cli.models.ledger import Reservation
from hfms_cli.models.loader import Loader, Placement
from hfms_cli.models.phases import Phases
from hfms_cli.types import Adapter, LoadedInfo

log = structlog.get_logger("hfms.models")

ReplicaState = Literal["loading", "loaded", "restarting", "failed"]

RESTART_PAUSES = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds before the n-th restart in a row; the last one goes on."""
LIFE_SECONDS = 60.0
"""A process that lived so long starts the count anew."""


class Replica:
    """The n-th engine process of a model. `start` brings it up; from then on it keeps itself up until `close`."""

    def __init__(
        self,
        model: str,
        number: int,
        placement: Placement,
        loader: Loader,
        *,
        restart_limit: int,
        on_loaded: Callable[[Replica], None],
        clock: Callable[[], float],
        adapters: Mapping[str, Adapter] = {},
    ) -> None:
        """model: its id, for logs and messages. on_loaded: told after each start.

        adapters: by their ids, those that each start brings along, as they are by then.
        """
        self.model = model
        self.number = number
        self.placement = placement
        self.state: ReplicaState = "loading"
        self.reason: str | None = None
        """Why it failed or is away, for operators."""
        self.phases = Phases(clock)
        """Of the last start."""
        self.load_seconds = 0.0
        """From the last start of its process to ready."""
        self._loader = loader
        self._restart_limit = restart_limit
        self._on_loaded = on_loaded
        self._clock = clock
        self._adapters = adapters
        self._host: EngineHost | None = None
        self.reservation: Reservation | None = None
        """Its memory, while its process runs."""
        self._restarts = 0
        """In a row."""
        self._first_load: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[None] | None = None

    @property
    def host(self) -> EngineHost | None:
        """The engine, where it runs now."""
        host = self._host
        return host if self.state == "loaded" and host is not None and not host.ended.done() else None

    async def start(self) -> None:
        """Load the model, and go on watching over its process. Raises what made the load fail."""
        self._task = asyncio.create_task(self._live(), name=f"{self.model} replica {self.number}")
        await asyncio.shield(self._first_load)

    async def _live(self) -> None:
        try:
            while True:
                host = await self._load()
                started = self._clock()
                self.reason = await asyncio.shield(host.ended)
                self._release()
                self._restarts = 0 if self._clock() - started > LIFE_SECONDS else self._restarts
                if self._restarts >= self._restart_limit:
                    raise LoadFailed(f"its engine ended {self._restarts + 1} times in a row: {self.reason}")
                self.state = "restarting"
                pause = RESTART_PAUSES[min(self._restarts, len(RESTART_PAUSES) - 1)]
                self._restarts += 1
                log.warning("model restarts", **self._named(), pause=pause, restarts=self._restarts)
                await asyncio.sleep(pause)
        except HfmsError as exc:
            self._fail(exc)
        except Exception:
            log.exception("load failed unexpectedly", **self._named())
            self._fail(LoadFailed(f"The model `{self.model}` could not be loaded; the server's log says why."))

    async def _load(self) -> EngineHost:
        began = self._clock()
        self.phases = Phases(self._clock)
        self._host, self.reservation = await self._loader.start(self.model, self.placement, self.phases)
        await self._adapt(self._host)
        self.phases.end()
        self.load_seconds = self._clock() - began
        self.state, self.reason = "loaded", None
        log.info(
            "model loaded",
            **self._named(),
            seconds=round(self.load_seconds, 2),
            phases=self.phases.seconds(),
            pid=self._host.pid,
            **self._how(self._host.info),
        )
        if not self._first_load.done():
            self._first_load.set_result(None)
        self._on_loaded(self)
        return self._host

    async def _adapt(self, host: EngineHost) -> None:
        """Bring the adapters along, also those that are loaded meanwhile. Calls of one that fails hear of it."""
        tried: set[str] = set()
        while missing := [a for a in self._adapters.values() if a.id not in tried]:
            for adapter in missing:
                tried.add(adapter.id)
                try:
                    await host.adapt(adapter)
                except HfmsError as exc:
                    log.error("adapter is not back", **self._named(), reason=exc.message)

    def _fail(self, error: HfmsError) -> None:
        self.state, self.reason = "failed", error.message
        self.phases.end()
        log.error("replica failed", **self._named(), reason=error.message)
        self._settle(error)

    def _settle(self, error: HfmsError) -> None:
        if not self._first_load.done():
            self._first_load.set_exception(error)
            self._first_load.exception()  # a load that nobody awaits is no "never retrieved"

    def _release(self) -> None:
        if self.reservation is not None:
            self._loader.learn(self.placement, self.reservation.taken())
            self._loader.ledger.release(self.reservation)
        self._host = self.reservation = None

    def _named(self) -> dict[str, Any]:
        return {"model": self.model, "replica": self.number}

    @staticmethod
    def _how(info: LoadedInfo) -> dict[str, Any]:
        """What the model runs in, what that has cost where it was measured, and how calls run together."""
        quality = {} if info.quality is None else {"quality": to_builtins(info.quality)}
        batching = {"batching": info.batching} if info.batching else {}
        return {"dtype": info.dtype, "quantize": info.quantize, **quality, **batching}

    async def close(self) -> None:
        """End the process, and keep it ended. All of its memory is free afterwards."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._settle(Unavailable(f"The model `{self.model}` was unloaded while it loaded."))
        if self._host is not None:
            await self._host.close()
        self._release()

    def describe(self) -> dict[str, Any]:
        """The replica as `GET /models` and `/status` show it."""
        row: dict[str, Any] = {"status": status(self.state, self.reason, self.phases)}
        if (host := self.host) is not None:
            row |= {
                "engine": host.info.engine,
                "device": host.info.device,
                **self._how(host.info),
                "tasks": list(host.info.tasks),
                "context_length": host.info.context_length,
                "pid": host.pid,
                "memory_bytes": host.held_bytes,
                "requests_running": host.running,
                "requests_waiting": host.waiting,
                "outstanding_tokens": host.outstanding,
                "load_seconds": round(self.load_seconds, 3),
                "load_phases": self.phases.seconds(),
            }
            if (profile := self.placement.candidates[0].tuned) is not None:
                row["tuned"] = profile
        return row


def status(state: str, reason: str | None, phases: Phases) -> dict[str, Any]:
    """How a model or a replica is: its state, why it is away, and what its load does now."""
    shown: dict[str, Any] = {"value": state}
    if reason and state != "loaded":
        shown["reason"] = reason
    if phases.now is not None:
        shown["phase"] = phases.now
    if phases.done is not None:
        shown["progress"] = round(phases.done, 4)
    return shown
