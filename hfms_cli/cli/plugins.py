"""`hfms plugins`: what is installed, what it brings, and why something is off."""

from __future__ import annotations

from typing import Any

import typer

from hfms_cli.cli.options import AsJson, ConfigFile
from hfms_cli.cli.output import print_json, print_table
from hfms_cli.config import Config, load_config
from hfms_cli.plugins import PluginInfo, discover

app = typer.Typer(help="List plugins, and why one failed.", no_args_is_help=True)


@app.callback()
def plugins() -> None:
    """Keeps `list` a verb of its own although it is the only one."""


@app.command("list")
def list_plugins(config: ConfigFile = None, as_json: AsJson = False) -> None:
    """List every plugin: package, version, what it provides, whether it is in use, and why it failed."""
    settings = load_config(config)
    found = discover(settings)
    found.add_commands(typer.Typer(), settings)  # for show: a plugin whose verb cannot be added is to say so
    rows = [describe(info, settings) for info in found.infos]
    if as_json:
        print_json(rows)
        return
    print_table(
        ["PLUGIN", "PACKAGE", "VERSION", "STATE", "PROVIDES"],
        [[r["name"], r["package"], r["version"], state(r), _provided(r)] for r in rows],
    )


def describe(info: PluginInfo, config: Config) -> dict[str, Any]:
    """One plugin as JSON. `in_use`: the records that the configuration lists, and the hooks that are always called."""
    in_use = [p for p in info.provides if _is_used(p, config)]
    return {
        "name": info.name,
        "module": info.module,
        "package": info.package,
        "version": info.version,
        "enabled": info.enabled,
        "provides": info.provides,
        "in_use": in_use,
        "error": info.error,
    }


def state(row: dict[str, Any]) -> str:
    """The state of a described plugin, in a word or a reason."""
    if not row["enabled"]:
        return "off"
    if row["error"]:
        return f"failed: {row['error']}"
    return "in use" if row["in_use"] else "not in use"


def _is_used(provided: str, config: Config) -> bool:
    kind, _, name = provided.partition(":")
    return not name or name in config.order(kind)


def _provided(row: dict[str, Any]) -> str:
    """What it provides; in brackets what the configuration does not list."""
    return ", ".join(p if p in row["in_use"] else f"({p})" for p in row["provides"])
