"""`hfms models discover`: the models that can be served here by name, by what they can do and what can run them."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any

import typer

from hfms_cli.cli.options import AsJson, ConfigFile
from hfms_cli.cli.output import print_json, print_table, printable
from hfms_cli.config import Config, load_config
from hfms_cli.errors import BadRequest, HfmsError
from hfms_cli.hookspecs import Engine
from hfms_cli.plugins import Plugins
from hfms_cli.plugins import discover as discover_plugins
from hfms_cli.types import Device, Manifest, ModelCard

Row = dict[str, Any]


def discover(
    task: Annotated[str | None, typer.Option(help="Only models that can: generate, embed or score.")] = None,
    architecture: Annotated[
        str | None, typer.Option(metavar="GLOB", help="Only these, as their files name them: 'Llama*'.")
    ] = None,
    hardware: Annotated[str | None, typer.Option(help="Only models for this kind of device: cpu, cuda ...")] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """List the models that can be served by name: those in [models] folders, and those on this disk."""
    import asyncio

    from hfms_cli.models.catalogue import TASKS

    if task is not None and task not in TASKS:
        raise BadRequest(f"`{task}` is no task; there are {', '.join(TASKS)}.", param="task")
    rows, faults = asyncio.run(_found(load_config(config)))
    for fault in faults:
        typer.echo(printable(f"warning: {fault}"), err=True)
    rows = [
        row
        for row in rows
        if task in (None, *row["tasks"])
        and (architecture is None or fnmatchcase(row["architecture"].lower(), architecture.lower()))
        and hardware in (None, *row["hardware"])
    ]
    if as_json:
        print_json(rows)
        return
    columns = ["MODEL", "TASKS", "ARCHITECTURE", "HARDWARE", "FROM", "ALIASES"]
    print_table(columns, [[_cell(row[column.lower()]) for column in columns] for row in rows])


def _cell(value: Any) -> str:
    return (", ".join(value) if isinstance(value, list) else str(value)) or "-"


async def _found(config: Config) -> tuple[list[Row], list[str]]:
    """A row for each model, and what is wrong in the folders."""
    from hfms_cli.models import names
    from hfms_cli.models.aliases import Aliases
    from hfms_cli.models.catalogue import Catalogue
    from hfms_cli.models.router import open_router, stands_for
    from hfms_cli.telemetry import logs

    logs.configure(config.log)
    plugins = discover_plugins(config)
    devices = _devices(plugins, config)
    engines = plugins.in_use("engine", config)
    router = open_router(config, plugins)
    try:
        on_disk = [(manifest, await _card(router, manifest)) for manifest in await router.list()]
    finally:
        await router.close()
    catalogue = Catalogue(config.models.folders)
    catalogue.look()
    rows = []
    for entry in catalogue.entries:
        card = entry.read or next((card for m, card in on_disk if stands_for(entry.name, m)), None)
        row = _row(entry.id, card, engines, devices)
        said = {"tasks": list(entry.tasks), "architecture": entry.architecture, "hardware": list(entry.hardware)}
        row |= {key: value for key, value in said.items() if value}
        rows.append(row | {"from": "folder", "aliases": list(entry.aliases), "summary": entry.summary})
    seen = {row["model"] for row in rows}
    for manifest, card in on_disk:
        if (model_id := names.served_id(manifest.name)) not in seen:
            rows.append(_row(model_id, card, engines, devices) | {"from": manifest.storage})
    for alias, target in Aliases(config.models.aliases, config.state_dir).items():
        for row in rows:
            if row["model"] == target:
                row["aliases"].append(alias)
    return rows, catalogue.faults


def _row(model_id: str, card: ModelCard | None, engines: Sequence[Engine], devices: Sequence[Device]) -> Row:
    return {
        "model": model_id,
        "tasks": list(card.tasks) if card else [],
        "architecture": card.architecture if card else "",
        "hardware": _supporting(card, engines, devices) if card else [],
        "from": "",
        "aliases": [],
        "summary": "",
    }


def _supporting(card: ModelCard, engines: Sequence[Engine], devices: Sequence[Device]) -> list[str]:
    """The kinds of device of this machine on which an engine takes the model."""
    return list(dict.fromkeys(d.kind for d in devices if any(e.supports(card, d) is None for e in engines)))


def _devices(plugins: Plugins, config: Config) -> list[Device]:
    from hfms_cli.cli.hardware import probe_all

    return [device for kind in probe_all(plugins, config) if kind.preferred for device in kind.probe.devices]


async def _card(router: Any, manifest: Manifest) -> ModelCard | None:
    """What the files of a model on this disk say; None where they cannot be read."""
    from hfms_cli.cli.models import read_on_disk

    try:
        return (await read_on_disk(router, manifest))[1]
    except HfmsError:
        return None
