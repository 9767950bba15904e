"""Entry points -> named records. Every error of a plugin is met here, kept with its name, and shown.

A plugin that cannot be imported, misspells a hook or raises in one costs only itself: the others load, `hfms plugins
list` says why, and the start fails only where the configuration uses what is missing.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import pluggy

from hfms_cli.config import Config
from hfms_cli.errors import PluginError, StartupError, close_matches
from hfms_cli.hookspecs import KINDS, Hooks, NoOptions, Provider

if TYPE_CHECKING:
    import typer

GROUP = "hfms"


@dataclass
class PluginInfo:
    """One entry point: what it is, what it brings, and why it is off or broken."""

    name: str
    module: str
    """As its entry point names it."""
    package: str
    version: str
    provides: list[str] = field(default_factory=list)
    """`kind:name` of each record, and the names of other hooks."""
    enabled: bool = True
    error: str | None = None


class Plugins:
    """All plugins of this installation. Make one with `discover`."""

    def __init__(self) -> None:
        self.infos: list[PluginInfo] = []
        self._manager = pluggy.PluginManager("hfms")
        self._manager.add_hookspecs(Hooks)
        self._records: dict[tuple[str, str], list[tuple[Provider[Any], PluginInfo]]] = {}

    def add(self, info: PluginInfo, module: Any) -> None:
        """Register a loaded plugin and read its records; a fault is kept in `info.error`."""
        self.infos.append(info)
        try:
            self._refuse_misspelt(module)
            # Two packages may use one entry-point name; what must differ is what they provide.
            self._manager.register(module, name=f"{info.package}:{info.name}")
        except Exception as exc:
            info.error = _reason(exc)
            return
        for spec in [h for h in vars(Hooks) if h.startswith("hfms_")]:
            for impl in getattr(self._manager.hook, spec).get_hookimpls():
                if impl.plugin is not module:
                    continue
                kind = next((k for k, hook in KINDS.items() if hook == spec), None)
                if kind is None:
                    info.provides.append(spec)
                    continue
                try:
                    for record in impl.function():
                        self._add_record(kind, record, info)
                except (Exception, SystemExit) as exc:
                    info.error = f"{spec}: {_reason(exc)}"

    def _refuse_misspelt(self, module: Any) -> None:
        # pluggy's own check_pending cannot say whose hook it is, and raises for all plugins at once.
        known = [h for h in vars(Hooks) if h.startswith("hfms_")]
        found = False
        for name, value in vars(module).items():
            marked = getattr(value, "hfms_impl", None) is not None
            meant = inspect.isfunction(value) and name.startswith("hfms_")
            if (marked or meant) and name not in known:
                near = close_matches(name, known)
                hint = f"did you mean `{near[0]}`?" if near else f"hooks are {', '.join(known)}"
                raise PluginError(f"unknown hook `{name}`; {hint}")
            if meant and not marked:
                raise PluginError(f"`{name}` is not marked with @hookimpl, so it would never be called")
            found = found or marked
        if not found:
            raise PluginError(f"has no hooks; there are {', '.join(known)}")

    def _add_record(self, kind: str, record: Any, info: PluginInfo) -> None:
        if not isinstance(record, Provider):
            raise PluginError(f"yielded {type(record).__name__}, not a Provider")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", record.name):
            raise PluginError(f"{record.name!r} cannot be a name: only letters, digits, `-` and `_` can")
        info.provides.append(f"{kind}:{record.name}")
        self._records.setdefault((kind, record.name), []).append((record, info))

    def names(self, kind: str) -> list[str]:
        """Names of a kind that can be used."""
        return [n for (k, n), found in self._records.items() if k == kind and len(found) == 1]

    def record(self, kind: str, name: str, where: str = "") -> Provider[Any]:
        """The record of that name. Raises PluginError where it is missing, broken or claimed by two plugins.

        where: what names it, for the message.
        """
        return self._found(kind, name, where)[0]

    def _found(self, kind: str, name: str, where: str) -> tuple[Provider[Any], PluginInfo]:
        found = self._records.get((kind, name), [])
        if len(found) == 1:
            return found[0]
        if found:
            who = " and ".join(f"{i.name} ({i.package} {i.version})" for _, i in found)
            raise PluginError(f"{kind} `{name}` is provided by {who}; disable one under [plugins] disabled", param=name)
        near = close_matches(name, self.names(kind))
        hint = f"did you mean `{near[0]}`?" if near else f"there are: {', '.join(self.names(kind)) or 'none'}"
        broken = [f"{i.name}: {i.error}" for i in self.infos if i.error]
        also = f" (plugins that failed: {'; '.join(broken)})" if broken else ""
        raise PluginError(f"{where or f'[{kind}]'} names `{name}`, which no plugin provides; {hint}{also}", param=name)

    def create(self, kind: str, name: str, config: Config) -> Any:
        """Make the object that a record stands for, with its options checked. Raises PluginError, ConfigError."""
        record, info = self._found(kind, name, config.naming(kind, name))
        options = config.plugin_options(kind, name, record.options)
        try:
            made = record.create() if record.options is NoOptions else record.create(options)
        except StartupError:
            raise
        except (Exception, SystemExit) as exc:
            raise PluginError(f"{kind} `{name}` could not be made: {_reason(exc)}", param=name) from exc
        made.name, made.plugin = name, info.module
        return made

    def in_use(self, kind: str, config: Config) -> list[Any]:
        """Make those of a kind that the configuration names, in the operator's order. Raises as `create` does."""
        return [self.create(kind, name, config) for name in config.order(kind)]

    def faults(self, config: Config) -> Iterator[StartupError]:
        """What the configuration asks of plugins and cannot get: names in an order, tables of options, their values."""
        for kind in KINDS:
            listed = config.order(kind)
            # An empty table asks for nothing, and is what `hfms config init` writes for each plugin.
            tables = [name for k, name in config.options if k == kind and config.options[k, name]]
            for name in dict.fromkeys([*listed, *tables]):
                try:
                    record = self.record(kind, name, config.naming(kind, name))
                    config.plugin_options(kind, name, record.options)
                except StartupError as exc:
                    yield exc

    def check(self, config: Config) -> None:
        """Raise the first of `faults`, so that a start stops before anything is loaded."""
        for fault in self.faults(config):
            raise fault

    def call(self, hook: str, argument: Any) -> None:
        """Call `hfms_commands` or `hfms_routes` on each plugin; one that raises is noted and left out."""
        for impl in getattr(self._manager.hook, hook).get_hookimpls():
            try:
                impl.function(argument)
            except (Exception, SystemExit) as exc:
                info = next(i for i in self.infos if f"{i.package}:{i.name}" == impl.plugin_name)
                info.error = f"{hook}: {_reason(exc)}"

    def add_commands(self, app: typer.Typer, config: Config) -> None:
        """Add the verbs of plugins, and those of records that are in use; what raises is noted and left out."""
        self.call("hfms_commands", app)
        for kind in KINDS:
            for name in config.order(kind):
                for record, info in self._records.get((kind, name), []):
                    if record.commands is None:
                        continue
                    try:
                        record.commands(app)
                    except (Exception, SystemExit) as exc:
                        info.error = f"{kind} `{name}`: {_reason(exc)}"


def discover(config: Config, found: list[EntryPoint] | None = None) -> Plugins:
    """Load every entry point of the group, each on its own. found: these, and not all that are installed."""
    plugins = Plugins()
    points = entry_points(group=GROUP) if found is None else found
    for point in sorted(points, key=lambda p: p.name):
        package, version = (point.dist.name, point.dist.version) if point.dist else ("", "")
        info = PluginInfo(point.name, point.value, package, version)
        if point.name in config.plugins.disabled:
            info.enabled = False
            plugins.infos.append(info)
            continue
        try:
            module = point.load()
        except BaseException as exc:  # a plugin may call sys.exit at import
            if isinstance(exc, KeyboardInterrupt):
                raise
            info.error = _reason(exc)
            plugins.infos.append(info)
            continue
        plugins.add(info, module)
    return plugins


def _reason(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {exc}" if not isinstance(exc, PluginError) else exc.message
