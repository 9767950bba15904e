"""`hfms models`: the models on this disk (list, pull, show, rm), and those of a running server (load, unload, ps)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from hfms_cli.cli.client import Client, Refused, admin_key, local_url
from hfms_cli.cli.options import AsJson, ConfigFile, ServerUrl
from hfms_cli.cli.output import console, human_bytes, print_json, print_table, printable
from hfms_cli.cli.progress import pulling
from hfms_cli.config import load_config
from hfms_cli.plugins import discover
from hfms_cli.types import Manifest, ModelCard, ModelName

if TYPE_CHECKING:
    from hfms_cli.models.router import Router

T = TypeVar("T")

app = typer.Typer(help="List, pull, load and remove models.", no_args_is_help=True)

Name = Annotated[
    str, typer.Argument(metavar="MODEL", help="org/name[@revision], package:NAME, ipfs://CID, a folder or a GGUF file.")
]


# On this disk.


@app.command("list")
def list_models(config: ConfigFile = None, as_json: AsJson = False) -> None:
    """List the models on this disk."""
    found = _run(_with(_router(config), lambda router: router.list()))
    if as_json:
        print_json([_as_json(m) for m in found])
        return
    rows = [[str(m.name), m.storage, m.revision[:12], human_bytes(m.size)] for m in found]
    print_table(["MODEL", "STORAGE", "REVISION", "SIZE"], rows)


@app.command()
def pull(name: Name, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Fetch a model to this disk and check every byte."""
    wanted = _parsed(name)
    with pulling(str(wanted)) as progress:
        manifest, folder = _run(_with(_router(config), lambda router: router.pull(wanted, progress)))
    if as_json:
        print_json(_as_json(manifest) | {"folder": str(folder)})
        return
    typer.echo(printable(f"{manifest.name} ({human_bytes(manifest.size)}, {manifest.storage}) is in {folder}"))


@app.command()
def show(name: Name, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Show what is known of a model; nothing is fetched."""
    manifest, card = _run(_with(_router(config), lambda router: _look(router, _parsed(name))))
    if as_json:
        print_json(_as_json(manifest) | {"files": _files(manifest), "card": _card(card) if card else None})
        return
    facts: dict[str, Any] = {
        "model": manifest.name,
        "storage": manifest.storage,
        "revision": manifest.revision,
        "source": manifest.source,
        "size": human_bytes(manifest.size),
        "on disk": "yes" if card else f"no; `hfms models pull {manifest.name}` fetches it",
    }
    for fact, value in (facts | (_card(card) if card else {})).items():
        typer.echo(printable(f"{fact.replace('_', ' '):16}{', '.join(value) if isinstance(value, list) else value}"))
    typer.echo("files")
    for file in manifest.files:
        typer.echo(printable(f"  {file.path}  {human_bytes(file.size)}"))


@app.command()
def rm(name: Name, config: ConfigFile = None) -> None:
    """Delete a model from this disk."""
    manifest = _run(_with(_router(config), lambda router: router.remove(_parsed(name))))
    typer.echo(printable(f"deleted {manifest.name} ({human_bytes(manifest.size)}, {manifest.storage})"))


def _router(config: Path | None) -> Router:
    """Over the storages of the configuration, in its order. Raises StartupError."""
    from hfms_cli.models.router import open_router
    from hfms_cli.telemetry import logs

    settings = load_config(config)
    logs.configure(settings.log)
    return open_router(settings, discover(settings))


async def _with(router: Router, use: Callable[[Router], Awaitable[T]]) -> T:
    """Use a router, and close it."""
    try:
        return await use(router)
    finally:
        await router.close()


def _parsed(name: str) -> ModelName:
    from hfms_cli.models import names

    return names.parse(name)


async def _look(router: Router, name: ModelName) -> tuple[Manifest, ModelCard | None]:
    """A model's manifest, and its card where its files are on this disk."""
    from hfms_cli.models.inspect import inspect
    from hfms_cli.models.router import stands_for

    manifest = next((m for m in await router.list() if stands_for(name, m)), None)
    if manifest is None:
        manifest, _ = await router.find(name)
        if name.scheme != "path":
            return manifest, None
    # What is on the disk already is not fetched again: this only asks where it is.
    storage = next(s for s in router.storages if s.name == manifest.storage)
    folder = await storage.fetch(manifest, lambda done, total: None)
    return manifest, inspect(folder, [f.path for f in manifest.files])


def _as_json(manifest: Manifest) -> dict[str, Any]:
    return {
        "model": str(manifest.name),
        "storage": manifest.storage,
        "revision": manifest.revision,
        "source": manifest.source,
        "size_bytes": manifest.size,
    }


def _files(manifest: Manifest) -> list[dict[str, Any]]:
    return [{"path": f.path, "size_bytes": f.size, "sha256": f.sha256} for f in manifest.files]


def _card(card: ModelCard) -> dict[str, Any]:
    return {
        "format": card.format,
        "architecture": card.architecture,
        "tasks": list(card.tasks),
        "parameters": card.parameters or None,
        "dtype": card.dtype or None,
        "context_length": card.context_length or None,
    }


# Of a running server.


@app.command()
def ps(url: ServerUrl = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """List the models of the running server, and how each is."""
    rows = [r for r in _run(_served(_client(url, config))) if r["status"]["value"] != "unloaded"]
    if as_json:
        print_json(rows)
        return
    columns = ["MODEL", "STATUS", "DEVICE", "ENGINE", "DTYPE", "MEMORY", "CONTEXT", "ALIASES"]
    print_table(columns, [_served_row(r) for r in rows])


@app.command()
def load(
    name: Name,
    hardware: Annotated[str | None, typer.Option(help="A kind of device (cuda) or one device (cuda:1).")] = None,
    dtype: Annotated[str | None, typer.Option(help="Precision of the weights.")] = None,
    replicas: Annotated[int | None, typer.Option(help="How many engine processes; calls go to the least busy.")] = None,
    alias: Annotated[str | None, typer.Option(help="One more name for it.")] = None,
    url: ServerUrl = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Load a model into the running server, and wait until it can answer."""
    wishes = {"hardware": hardware, "dtype": dtype, "replicas": replicas, "alias": alias}
    body = {"model": str(_parsed(name)), **{k: v for k, v in wishes.items() if v is not None}}
    with _waiting(f"loading {name} ..."):
        row = _run(_post(_client(url, config), "/models/load", body))
    if as_json:
        print_json(row)
        return
    typer.echo(printable(f"{row.get('id', name)} is {row['status']['value']} on {row.get('device', '?')}"))


@app.command()
def unload(name: Name, url: ServerUrl = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Take a model out of the running server; calls in flight may finish."""
    with _waiting(f"unloading {name} ..."):
        row = _run(_post(_client(url, config), "/models/unload", {"model": name}))
    if as_json:
        print_json(row)
        return
    typer.echo(printable(f"{row.get('id', name)} is {row['status']['value']}"))


def _client(url: str | None, config: Path | None) -> Client:
    return Client(url or local_url(load_config(config).server), admin_key())


async def _served(client: Client) -> list[dict[str, Any]]:
    async with client:
        answer = await client.get("/models")
    try:
        return [_with_status(row) for row in answer["data"]]
    except (KeyError, TypeError) as exc:
        raise Refused(f"{client.url} does not list models as hfms does") from exc


async def _post(client: Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    async with client:
        answer = await client.post(path, body)
    try:
        return _with_status(answer)
    except (KeyError, TypeError) as exc:
        raise Refused(f"{client.url} does not answer as hfms does") from exc


def _with_status(row: dict[str, Any]) -> dict[str, Any]:
    """The row itself; KeyError or TypeError where it is not one of hfms's."""
    str(row["status"]["value"])
    return row


def _served_row(row: dict[str, Any]) -> list[str]:
    status = row["status"]
    state = str(status["value"])
    if (progress := status.get("progress")) is not None:
        state += f" {progress:.0%}"
    if reason := status.get("reason"):
        state += f": {reason}"
    memory = row.get("memory_bytes")
    return [
        str(row.get("id")),
        state,
        str(row.get("device") or "-"),
        str(row.get("engine") or "-"),
        str(row.get("dtype") or "-"),
        human_bytes(memory) if memory else "-",
        str(row.get("context_length") or "-"),
        ", ".join(row.get("aliases") or ()) or "-",
    ]


def _waiting(text: str) -> AbstractContextManager[object]:
    """Something that moves while a person waits; nothing where nobody watches."""
    out = console(stderr=True)
    return out.status(printable(text)) if out.is_terminal else nullcontext()


def _run(work: Coroutine[Any, Any, T]) -> T:
    import asyncio

    return asyncio.run(work)
