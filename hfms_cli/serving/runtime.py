"""Everything a running server is made of, built once from the configuration and the plugins."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import psutil

from hfms_cli.config import Config
from hfms_cli.engines.process import Ahead
from hfms_cli.errors import ConfigError, Unavailable
from hfms_cli.hookspecs import Engine, Hardware, Middleware
from hfms_cli.models.aliases import Aliases
from hfms_cli.models.catalogue import Catalogue
from hfms_cli.models.loader import Loader
from hfms_cli.models.pool import Keeping, Pool, describe
from hfms_cli.models.router import Router, open_router
from hfms_cli.plugins import Plugins
from hfms_cli.serving.road import Road
from hfms_cli.settings import settings_of
from hfms_cli.telemetry.metrics import Metrics, summed
from hfms_cli.version import __version__

if TYPE_CHECKING:
    from hfms_cli.serving.owner import Fronts


class Named(Protocol):
    """A model with its id."""

    @property
    def id(self) -> str: ...


class Finds(Protocol):
    """Knows models by the names that callers use."""

    def called(self, name: str) -> Named | None: ...


class Serving(Protocol):
    """What answering calls takes: a whole `Runtime`, or in a further front what it has of one."""

    @property
    def config(self) -> Config: ...

    @property
    def middlewares(self) -> Sequence[Middleware]: ...

    @property
    def pool(self) -> Finds: ...

    @property
    def road(self) -> Road: ...

    @property
    def metrics(self) -> Metrics: ...

    def admit(self) -> AbstractContextManager[None]:
        """Let one model call in, for as long as it takes. Raises Unavailable."""
        ...


@dataclass
class Runtime:
    """Made by `build`; the event loop must run."""

    config: Config
    plugins: Plugins
    hardware: Sequence[Hardware]
    middlewares: Sequence[Middleware]
    router: Router
    pool: Pool
    road: Road
    metrics: Metrics
    warnings: list[str]
    started: float = field(default_factory=time.time)
    draining: bool = False
    in_flight: int = 0
    fronts: Fronts | None = None
    """Those beside this process, where `workers` asks for some."""

    @classmethod
    def build(
        cls,
        config: Config,
        plugins: Plugins,
        hardware: Sequence[Hardware],
        engines: Sequence[Engine],
        ahead: Ahead | None = None,
    ) -> Runtime:
        """Create what the configuration names. Raises ConfigError, PluginError. ahead: as `Loader` has it."""
        plugins.check(config)
        middlewares = plugins.in_use("middleware", config)
        _refuse_divided_state(config, middlewares)
        warnings = [w for m in middlewares for w in m.check(config)]
        warnings += _refuse_open_door(config, any(m.guards() for m in middlewares))
        metrics = Metrics()
        for middleware in middlewares:
            middleware.metrics(metrics.registry)
        router = open_router(config, plugins, observe=metrics.storage)
        catalogue = Catalogue(config.models.folders)
        catalogue.look()
        warnings += catalogue.faults
        pool = Pool(
            Loader(
                config,
                router,
                engines,
                hardware,
                forced={} if config.engine.batching else _one_at_a_time(config, plugins),
                ahead=ahead,
            ),
            _keeping(config, middlewares),
            aliases=Aliases(config.models.aliases, config.state_dir),
            catalogue=catalogue,
            on_loaded=lambda r: metrics.load_duration.labels(r.model).observe(r.load_seconds),
            on_unloaded=lambda model, why: metrics.unloads.labels(model.id, why).inc(),
        )
        road = Road(pool, middlewares, metrics)
        return cls(config, plugins, hardware, middlewares, router, pool, road, metrics, warnings)

    @property
    def guarded(self) -> bool:
        """Whether a middleware keeps strangers out."""
        return any(m.guards() for m in self.middlewares)

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Let one model call in, and count it until the block ends. Raises Unavailable while draining."""
        if self.draining:
            raise Unavailable("The server is shutting down.", code="draining", retry_after=5.0)
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    def not_ready(self) -> str | None:
        """Why nothing can be answered now; None when it can."""
        return "the server is shutting down" if self.draining else self.pool.not_ready()

    def status(self) -> dict[str, Any]:
        """The body of `/status`."""
        return {
            "version": __version__,
            "uptime_seconds": round(time.time() - self.started, 1),
            "ready": self.not_ready() is None,
            "draining": self.draining,
            "requests_in_flight": self.in_flight,
            "fronts": self.fronts.pids if self.fronts else [],
            "models": [describe(m) for m in self.pool.models()],
            "hardware": self.probe(),
            "plugins": [
                {"name": i.name, "package": i.package, "version": i.version, "enabled": i.enabled, "error": i.error}
                for i in self.plugins.infos
            ],
            "folders": {"models": len(self.pool.catalogue.entries), "faults": self.pool.catalogue.faults},
            "storage": {"order": self.config.order("storage"), "content": self.router.content.status()},
            "middleware": {m.name: m.status() for m in self.middlewares},
            "warnings": self.warnings,
        }

    def probe(self) -> list[dict[str, Any]]:
        """Each kind of hardware: its devices with their memory now, or why there are none."""
        found = []
        for hardware in self.hardware:
            probe = hardware.probe()
            devices = [
                {"id": d.id, "name": d.name, "total_bytes": d.total_bytes, "free_bytes": d.free_bytes}
                for d in probe.devices
            ]
            found.append({"name": hardware.name, "devices": devices, "reason": probe.reason})
        return found

    def refresh_metrics(self) -> None:
        """Set the gauges to what is true now."""
        m = self.metrics
        for gauge in (m.running, m.waiting, m.outstanding, m.replicas, m.model_memory):
            gauge.clear()
        models = self.pool.models()
        m.models_loaded.set(sum(x.state == "loaded" for x in models))
        for model in models:
            if model.waiting:
                m.waiting.labels(model.id).inc(model.waiting)
            for replica in model.replicas:
                m.replicas.labels(model.id, replica.state).inc()
            for host in model.hosts:
                m.running.labels(model.id).inc(host.running - host.waiting)
                m.waiting.labels(model.id).inc(host.waiting)
                m.outstanding.labels(model.id).inc(host.outstanding)
                m.model_memory.labels(model.id).inc(host.held_bytes)
        for device in self.pool.loader.devices():
            used = device.total_bytes - device.free_bytes
            m.memory_used.labels(device.id).set(used)
            m.memory_limit.labels(device.id).set(device.total_bytes)
            m.memory_ratio.labels(device.id).set(used / device.total_bytes if device.total_bytes else 0)
            if device.kind == "cpu":
                m.hardware_utilization.labels(device.id).set(psutil.cpu_percent() / 100)

    async def render_metrics(self) -> bytes:
        """The text that Prometheus reads: gauges as they are now, and counters of every front."""
        await asyncio.to_thread(self.refresh_metrics)
        own = self.metrics.render()
        return summed([own, *await self.fronts.series()]) if self.fronts else own

    async def close(self) -> None:
        if self.fronts is not None:
            await self.fronts.close()
        await self.pool.close()
        for middleware in self.middlewares:
            await middleware.close()
        await self.router.close()


def _refuse_divided_state(config: Config, middlewares: Sequence[Middleware]) -> None:
    """Each front has a middleware of its own around HTTP, and some cannot do with that."""
    if config.server.workers == 1:
        return
    for middleware in middlewares:
        if reason := middleware.needs_one_front():
            raise ConfigError(f"the middleware `{middleware.name}` needs `workers = 1`: {reason}", param="workers")


def _keeping(config: Config, middlewares: Sequence[Middleware]) -> Keeping:
    """How the operator wishes models to be kept."""
    models = config.models
    return Keeping(
        replicas=models.replicas,
        restart_limit=config.engine.restart_limit,
        load_on_request=models.load_on_request,
        wait_seconds=models.load_wait_seconds,
        patience_seconds=min((p for m in middlewares if (p := m.patience()) is not None), default=float("inf")),
        most_waiting=config.engine.max_calls,
        retry_seconds=models.retry_seconds,
        idle_seconds=models.idle_seconds,
        pinned=models.pinned,
        required=models.required,
    )


def _one_at_a_time(config: Config, plugins: Plugins) -> dict[str, dict[str, int]]:
    """What keeps each engine from running sequences together, by the name that its options have for it."""
    bounds = ("max_batch", "batch_size")
    return {
        name: {s.name: 1 for s in settings_of(plugins.record("engine", name).options) if s.name in bounds}
        for name in config.engine.order
    }


def _refuse_open_door(config: Config, guarded: bool) -> list[str]:
    """Without a key nobody but this machine may call, unless the operator says so on purpose."""
    if guarded or config.server.loopback_only:
        return []
    if not config.server.insecure:
        raise ConfigError(
            f"no key is configured, so hfms does not listen on {config.server.host}: make one with `hfms keys create "
            "--admin`, set HFMS_API_KEY or HFMS_ADMIN_API_KEY, or allow it with --insecure ([server] insecure = true)",
            param="host",
        )
    return [f"anybody who reaches {config.server.host} can use every model: no key is configured"]
