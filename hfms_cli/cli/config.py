"""`hfms config`: write an example, show what is in force and why, check a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from hfms_cli.cli.options import AsJson, ConfigFile
from hfms_cli.cli.output import print_json
from hfms_cli.config import TABLES, Config, load_config
from hfms_cli.errors import BadRequest, ConfigError
from hfms_cli.plugins import Plugins, discover
from hfms_cli.settings import Setting, describe, origins, settings_of

app = typer.Typer(help="Write, show and check the settings.", no_args_is_help=True)

HEADER = """\
# Settings of hfms. Every setting is here with its default, commented out: take away the `#` to change one.
# A flag wins over HFMS_*, that over HF_SERVER_*, that over this file, and this file over the default.
# `hfms config check` finds mistakes, `hfms config show --origin` says where each value comes from.
"""


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("hfms.toml"),
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
) -> None:
    """Write a file with every setting, its meaning, its range and its default."""
    if path.exists() and not force:
        raise BadRequest(f"{path} is there already; --force replaces it")
    _write_whole(path, example(discover(Config())))
    typer.echo(f"wrote {path}")


@app.command()
def show(
    config: ConfigFile = None,
    origin: Annotated[bool, typer.Option("--origin", help="Say where each value comes from.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the settings in force. Secrets are hidden."""
    settings = load_config(config)
    tables = list(effective(settings, discover(settings)))
    if as_json:
        print_json(_as_json(tables, origin))
        return
    typer.echo(f"# {settings.file}" if Path(settings.file).exists() else f"# no {settings.file}")
    for table in tables:
        typer.echo(f"\n[{table.name}]")
        for value in table.values:
            typer.echo(value.line() + (f"  # {value.origin}" if origin else ""))


@app.command()
def check(
    file: Annotated[Path | None, typer.Argument(help="File to check; by default $HFMS_CONFIG or ./hfms.toml.")] = None,
) -> None:
    """Read all of a configuration, with the options of plugins; exit status 2 where something is wrong."""
    settings = load_config(file)
    faults = list(discover(settings).faults(settings))
    if faults:
        raise ConfigError("\n".join(fault.message for fault in faults))
    there = Path(settings.file).exists()
    typer.echo(f"{settings.file}: ok" if there else f"no {settings.file} here; defaults and environment: ok")


@dataclass(frozen=True)
class Value:
    """A setting in force."""

    setting: Setting
    value: Any
    origin: str

    @property
    def shown(self) -> Any:
        """The value, or `(hidden)` for a secret that is set."""
        return "(hidden)" if self.setting.secret and self.value else self.value

    def line(self) -> str:
        """As a line of TOML, which has no word for None and is not to hold secrets."""
        if self.value is None:
            return f"# {self.setting.name} is not set"
        line = f"{self.setting.name} = {toml(self.shown)}"
        return line if self.shown is self.value else f"# {line}"


@dataclass(frozen=True)
class Table:
    """A table of settings in force."""

    name: str
    values: list[Value]


def effective(config: Config, plugins: Plugins) -> Iterator[Table]:
    """Every table of the core and of each plugin, with the values in force. Raises ConfigError."""
    for name, cls, has_plugins in TABLES:
        table = getattr(config, name)
        yield Table(
            name,
            [Value(s, getattr(table, s.name), config.origins[name, s.name]) for s in settings_of(cls)],
        )
        for plugin in plugins.names(name) if has_plugins else ():
            options = plugins.record(name, plugin).options
            read = config.plugin_options(name, plugin, options)
            found = origins(options, config.options.get((name, plugin), {}), environ=config.environ)
            values = [Value(s, getattr(read, s.name), found[s.name]) for s in settings_of(options)]
            if values:
                yield Table(f"{name}.{plugin}", values)


def example(plugins: Plugins, *, package: str | None = None) -> str:
    """The text of an `hfms.toml` that changes nothing: the core's settings, and those of the plugins.

    package: only plugins of this package; `hfms.toml.example` is made with `hfms`.
    """
    listed = {p for info in plugins.infos if package in (None, info.package) for p in info.provides}
    parts = [HEADER]
    for name, cls, has_plugins in TABLES:
        parts += [_example_table(name, cls)]
        for plugin in plugins.names(name) if has_plugins else ():
            record = plugins.record(name, plugin)
            if f"{name}:{plugin}" in listed and any(settings_of(record.options)):
                parts += [_example_table(f"{name}.{plugin}", record.options, record.summary)]
    return "\n".join(parts)


def _example_table(name: str, cls: type[Any], summary: str = "") -> str:
    meaning = summary or (cls.__doc__ or "").strip().splitlines()[0]
    lines = [f"\n# {meaning}", f"[{name}]"]
    for s in settings_of(cls):
        lines += ["", f"# {s.help}", f"# {_sentence(describe(s))}" + _variables(s), "#" + _default_line(s)]
    return "\n".join(lines) + "\n"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _variables(s: Setting) -> str:
    return f" Variables: {', '.join(s.variables)}." if s.env else ""


def _default_line(s: Setting) -> str:
    return f" {s.name} is not set." if s.default is None else f"{s.name} = {toml(s.default)}"


def toml(value: Any) -> str:
    """A value as TOML, on one line."""
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(_pair({key: item}) for key, item in value.items()) + "}"
    return _pair({"x": value}).removeprefix("x = ")


def _pair(pair: dict[str, Any]) -> str:
    import tomli_w

    return tomli_w.dumps(pair).strip()


def _as_json(tables: list[Table], with_origin: bool) -> dict[str, Any]:
    """Tables as they nest in TOML."""
    found: dict[str, Any] = {}
    for table in tables:
        head, _, plugin = table.name.partition(".")
        values = {
            v.setting.name: {"value": v.shown, "origin": v.origin} if with_origin else v.shown for v in table.values
        }
        if plugin:
            found[head][plugin] = values
        else:
            found[head] = values
    return found


def _write_whole(path: Path, text: str) -> None:
    """Write a file so that it is never there in part. Raises BadRequest."""
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        half.write_text(text, encoding="utf-8")
        half.replace(path)
    except OSError as exc:
        half.unlink(missing_ok=True)
        raise BadRequest(f"{path} cannot be written: {exc.strerror}") from exc
