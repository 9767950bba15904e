"""`hfms models`: the models on this disk (list, pull, show, rm), and those of a running server (load, unload, ps).

Verbs of other modules join them: `plan.py`, `keep.py` (verify, gc, pin, unpin, alias) and `tune.py`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from msgspec import to_builtins

from hfms_cli.cli.client import Client, Refused, Unreachable, admin_key, local_url
from hfms_cli.cli.discover import discover as discover_models
from hfms_cli.cli.keep import Force, alias, gc, pin, router_for, unpin, verify
from hfms_cli.cli.options import AsJson, ConfigFile, ModelArgument, ServerUrl
from hfms_cli.cli.output import console, print_json, print_table, printable
from hfms_cli.cli.plan import plan
from hfms_cli.cli.progress import pulling
from hfms_cli.cli.publish import publish, unpublish
from hfms_cli.cli.tune import tune
from hfms_cli.config import load_config
from hfms_cli.errors import HfmsError
from hfms_cli.plugins import discover
from hfms_cli.sizes import human_bytes
from hfms_cli.types import Manifest, ModelCard, ModelName, Quality, Task

if TYPE_CHECKING:
    from hfms_cli.models.router import Router

T = TypeVar("T")

PHASE_SECONDS = 1.0
"""How often a load is asked what it does."""

app = typer.Typer(help="List, pull, load and remove models.", no_args_is_help=True)


# On this disk.


@app.command("list")
def list_models(config: ConfigFile = None, as_json: AsJson = False) -> None:
    """List the models on this disk."""
    found = _run(_with(router_for(config), _listed))
    if as_json:
        print_json([_as_json(m) | {"tasks": tasks} for m, tasks in found])
        return
    rows = [
        [str(m.name), m.storage, m.revision[:12], human_bytes(m.size), ", ".join(tasks) or "-"] for m, tasks in found
    ]
    print_table(["MODEL", "STORAGE", "REVISION", "SIZE", "TASKS"], rows)


@app.command()
def pull(name: ModelArgument, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Fetch a model to this disk and check every byte."""
    wanted = _parsed(name)
    with pulling(str(wanted)) as progress:
        manifest, folder = _run(_with(router_for(config), lambda router: router.pull(wanted, progress)))
    if as_json:
        print_json(_as_json(manifest) | {"folder": str(folder)})
        return
    typer.echo(printable(f"{manifest.name} ({human_bytes(manifest.size)}, {manifest.storage}) is in {folder}"))


@app.command()
def show(name: ModelArgument, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Show what is known of a model; nothing is fetched."""
    manifest, folder, card = _run(_with(router_for(config), lambda router: _look(router, _parsed(name))))
    quality = _quality(config, folder) if folder else {}
    if as_json:
        more = {"quality": {q: to_builtins(found) for q, found in quality.items()}}
        print_json(_as_json(manifest) | {"files": _files(manifest), "card": _card(card) if card else None} | more)
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
    for quantize, found in quality.items():
        typer.echo(
            f"{quantize:16}perplexity {found.perplexity:.2f}, {found.perplexity_before:.2f} before; "
            f"{found.agreement:.1%} of first choices are the same"
        )
    typer.echo("files")
    for file in manifest.files:
        typer.echo(printable(f"  {file.path}  {human_bytes(file.size)}"))


@app.command()
def rm(name: ModelArgument, force: Force = False, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Delete a model from this disk."""
    manifest = _run(_with(router_for(config), lambda router: router.remove(_parsed(name), force=force)))
    if as_json:
        print_json(_as_json(manifest))
        return
    typer.echo(printable(f"deleted {manifest.name} ({human_bytes(manifest.size)}, {manifest.storage})"))


app.command()(publish)
app.command()(unpublish)
app.command()(plan)
app.command()(verify)
app.command()(gc)
app.command()(pin)
app.command()(unpin)
app.command()(alias)
app.command()(tune)
app.command()(discover_models)


async def _with(router: Router, use: Callable[[Router], Awaitable[T]]) -> T:
    """Use a router, and close it."""
    try:
        return await use(router)
    finally:
        await router.close()


def _parsed(name: str) -> ModelName:
    from hfms_cli.models import names

    return names.parse(name)


def _quality(config: Path | None, folder: Path) -> dict[str, Quality]:
    """What quantisation has cost a model, as the engines in use have measured."""
    settings = load_config(config)
    plugins = discover(settings)
    found: dict[str, Quality] = {}
    for name in settings.order("engine"):
        engine = plugins.create("engine", name, settings)
        if hasattr(engine, "quality"):
            found |= engine.quality(folder)
    return found


async def _look(router: Router, name: ModelName) -> tuple[Manifest, Path | None, ModelCard | None]:
    """A model's manifest, and its folder and card where its files are on this disk."""
    from hfms_cli.models.router import stands_for

    manifest = next((m for m in await router.list() if stands_for(name, m)), None)
    if manifest is None:
        manifest, _ = await router.find(name)
        if name.scheme != "path":
            return manifest, None, None
    return manifest, *await read_on_disk(router, manifest)


async def _listed(router: Router) -> list[tuple[Manifest, tuple[Task, ...]]]:
    """The models on this disk, and what each can do; nothing where its files cannot be read."""
    found: list[tuple[Manifest, tuple[Task, ...]]] = []
    for manifest in await router.list():
        try:
            _, card = await read_on_disk(router, manifest)
        except HfmsError:
            found.append((manifest, ()))
        else:
            found.append((manifest, card.tasks))
    return found


async def read_on_disk(router: Router, manifest: Manifest) -> tuple[Path, ModelCard]:
    """The folder and the card of a model on this disk. Raises HfmsError."""
    from hfms_cli.models.inspect import inspect

    # What is on the disk already is not fetched again: this only asks where it is.
    storage = next(s for s in router.storages if s.name == manifest.storage)
    folder = await storage.fetch(manifest, lambda done, total: None)
    return folder, inspect(folder, [f.path for f in manifest.files])


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
    name: ModelArgument,
    hardware: Annotated[str | None, typer.Option(help="A kind of device (cuda) or one device (cuda:1).")] = None,
    dtype: Annotated[str | None, typer.Option(help="Precision of the weights.")] = None,
    replicas: Annotated[int | None, typer.Option(help="How many engine processes; calls go to the least busy.")] = None,
    quantize: Annotated[str | None, typer.Option(help="Bits of the weights: auto, none, int8 or int4.")] = None,
    draft_model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A smaller model of the same vocabulary that guesses for it.")
    ] = None,
    alias: Annotated[str | None, typer.Option(help="One more name for it.")] = None,
    pinned: Annotated[
        bool | None, typer.Option("--pinned/--not-pinned", help="Never unload it to make room, nor when idle.")
    ] = None,
    idle_seconds: Annotated[float | None, typer.Option(help="Unload it when idle for so long; 0: never.")] = None,
    url: ServerUrl = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Load a model into the running server, and wait until it can answer."""
    wishes = {
        "hardware": hardware,
        "dtype": dtype,
        "quantize": quantize,
        "replicas": replicas,
        "draft_model": draft_model,
        "alias": alias,
        "pinned": pinned,
        "idle_seconds": idle_seconds,
    }
    body = {"model": str(_parsed(name)), **{k: v for k, v in wishes.items() if v is not None}}
    with _waiting(f"loading {name} ...") as show_phase:
        row = _run(_load(_client(url, config), body, show_phase))
    if as_json:
        print_json(row)
        return
    typer.echo(printable(f"{row.get('id', name)} is {row['status']['value']} on {row.get('device', '?')}"))


@app.command("load-lora")
def load_lora(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What clients name as their model.")],
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="org/name[@revision], ipfs://CID or a folder: PEFT's format.")
    ],
    base_model_name: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model it is for; by default the one that it names itself.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Take the name of an adapter that is there.")] = False,
    url: ServerUrl = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Load a LoRA adapter into the running server, beside its model; `hfms models unload NAME` takes it out."""
    body = {"lora_name": name, "lora_path": str(_parsed(adapter)), "load_inplace": replace}
    if base_model_name is not None:
        body["base_model_name"] = base_model_name
    with _waiting(f"loading {name} ..."):
        row = _run(_post(_client(url, config), "/v1/load_lora_adapter", body))
    if as_json:
        print_json(row)
        return
    typer.echo(printable(f"{row.get('id', name)} is {row['status']['value']}, an adapter of {row.get('parent', '?')}"))


@app.command()
def unload(name: ModelArgument, url: ServerUrl = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Take a model or an adapter out of the running server; calls in flight may finish."""
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


async def _load(client: Client, body: dict[str, Any], show_phase: Callable[[str], None] | None) -> dict[str, Any]:
    """Load a model, and show what that does meanwhile."""
    import asyncio

    from hfms_cli.models import names

    if show_phase is None:
        return await _post(client, "/models/load", body)
    load = asyncio.create_task(_post(client, "/models/load", body))
    served_id = names.served_id(names.parse(body["model"]))
    watcher = Client(client.url, client.key)
    while not (await asyncio.wait([load], timeout=PHASE_SECONDS))[0]:
        with suppress(Refused, Unreachable):  # the load itself tells what is wrong
            rows = await _served(watcher)
            status: dict[str, Any] = next((r["status"] for r in rows if r["id"] == served_id), {})
            if phase := status.get("phase"):
                progress = status.get("progress")
                show_phase(f"{phase} {progress:.0%}" if progress is not None else str(phase))
    return await load


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
    if phase := status.get("phase"):
        state += f" ({phase})"
    if (progress := status.get("progress")) is not None:
        state += f" {progress:.0%}"
    if reason := status.get("reason"):
        state += f": {reason}"
    if parent := row.get("parent"):
        state += f", an adapter of {parent}"
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


@contextmanager
def _waiting(text: str) -> Iterator[Callable[[str], None] | None]:
    """Something that moves while a person waits, and takes what is being done; None where nobody watches."""
    out = console(stderr=True)
    if not out.is_terminal:
        yield None
        return
    with out.status(printable(text)) as status:
        yield lambda phase: status.update(printable(f"{text} {phase}"))


def _run(work: Coroutine[Any, Any, T]) -> T:
    from hfms_cli.cli import loop

    return loop.run(work)
