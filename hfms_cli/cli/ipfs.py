"""`hfms ipfs`: files and folders by their CIDs, through the storages of this machine; no server is needed.

The thing asked for goes to standard output; who served it, and why others did not, to standard error.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from hfms_cli.cli.options import AsJson, ConfigFile
from hfms_cli.cli.output import print_json, print_table, printable
from hfms_cli.cli.progress import pulling
from hfms_cli.config import load_config
from hfms_cli.errors import BadRequest, FetchFailed
from hfms_cli.plugins import discover
from hfms_cli.sizes import human_bytes

if TYPE_CHECKING:
    from hfms_cli.ipfs import Fetch
    from hfms_cli.models.content import Content, Receipt

T = TypeVar("T")

app = typer.Typer(help="Add, get, list and pin what has a CID.", no_args_is_help=True)

CID = Annotated[str, typer.Argument(metavar="CID", help="A CID, CID/path/in/it, or ipfs://CID.")]
Backend = Annotated[str | None, typer.Option("--backend", metavar="NAME", help="The storage to ask first.")]
Pin = Annotated[bool, typer.Option("--pin/--no-pin", help="Keep it when what nobody pinned is deleted.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", metavar="PATH", help="Where to write it.")]


@app.command()
def add(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A file, or with -r a folder.")],
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Add a folder with all that is in it.")] = False,
    pin: Pin = True,
    chunker: Annotated[str, typer.Option(help="How files are cut: size-N, with N in bytes.")] = "size-262144",
    backend: Backend = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Add a file or a folder, and print its CID."""
    if not path.exists():
        raise BadRequest(f"There is no `{path}`.", param="path")
    total = _size(path)

    async def work(content: Content) -> tuple[str, Receipt]:
        with pulling(path.name) as progress:
            done = 0

            def read(size: int) -> None:
                nonlocal done
                done += size
                progress(min(done, total), total)

            return await content.add_path(path, recursive=recursive, pin=pin, chunker=chunker, progress=read)

    cid, receipt = _with(config, backend, work)
    _answer(as_json, {"cid": cid, "size_bytes": total}, cid, _kept_by(receipt))


@app.command()
def get(
    cid: CID, output: Output = None, backend: Backend = None, config: ConfigFile = None, as_json: AsJson = False
) -> None:
    """Write a file or a folder to this disk, every block checked."""
    from hfms_cli.ipfs import walk

    async def work(content: Content) -> tuple[Path, int, Fetch]:
        fetch = content.fetch()
        name = await content.resolve(fetch, cid)
        target = output or Path(str(name))
        with pulling(str(name)) as progress:
            return target, await walk.save(fetch, name, target, progress), fetch

    target, size, fetch = _with(config, backend, work)
    told = {"path": str(target), "size_bytes": size}
    _answer(as_json, told, f"{target} ({human_bytes(size)})", _served_by(fetch))


@app.command("ls")
def list_folder(cid: CID, backend: Backend = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """List a folder."""
    from hfms_cli.ipfs import walk

    async def work(content: Content) -> tuple[list[walk.Entry], Fetch]:
        fetch = content.fetch()
        return await walk.ls(fetch, await content.resolve(fetch, cid)), fetch

    entries, fetch = _with(config, backend, work)
    if as_json:
        rows = [{"name": e.name, "cid": e.cid, "kind": e.kind, "size_bytes": e.size} for e in entries]
        print_json({"entries": rows} | _served_by(fetch))
        return
    print_table(["CID", "SIZE", "NAME"], [[e.cid, _shown_size(e), e.name] for e in entries])
    _tell(_served_by(fetch))


@app.command()
def cat(cid: CID, backend: Backend = None, config: ConfigFile = None) -> None:
    """Write a file's bytes to standard output."""
    from hfms_cli.ipfs import walk

    async def work(content: Content) -> Fetch:
        fetch = content.fetch()
        await _to_stdout(walk.cat(fetch, await content.resolve(fetch, cid)))
        return fetch

    _tell(_served_by(_with(config, backend, work)))


@app.command()
def pin(cid: CID, backend: Backend = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Keep everything below a CID until it is unpinned."""
    name, receipt = _with(config, backend, lambda content: _pinning(content, cid, content.pin))
    _answer(as_json, {"cid": name}, f"pinned {name}", _kept_by(receipt))


@app.command()
def unpin(cid: CID, backend: Backend = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Allow what is below a CID to be deleted."""
    name, receipt = _with(config, backend, lambda content: _pinning(content, cid, content.unpin))
    _answer(as_json, {"cid": name}, f"unpinned {name}", _kept_by(receipt))


@app.command("export")
def export_car(
    cid: CID, output: Output = None, backend: Backend = None, config: ConfigFile = None, as_json: AsJson = False
) -> None:
    """Write everything below a CID as a CAR; without -o to standard output."""
    from hfms_cli.ipfs import walk

    async def work(content: Content) -> tuple[int, Fetch]:
        fetch = content.fetch()
        chunks = walk.export(fetch, await content.resolve(fetch, cid))
        return (await _to_file(chunks, output) if output else await _to_stdout(chunks)), fetch

    size, fetch = _with(config, backend, work)
    if output:
        told = {"path": str(output), "size_bytes": size}
        _answer(as_json, told, f"{output} ({human_bytes(size)})", _served_by(fetch))
    else:
        _tell(_served_by(fetch))


@app.command("import")
def import_car(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A CAR, version 1.")],
    pin: Pin = True,
    backend: Backend = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Add what is in a CAR, every block checked, and print its roots."""
    if not file.is_file():
        raise BadRequest(f"There is no file `{file}`.", param="path")
    roots, receipt = _with(config, backend, lambda content: content.dag_import(lambda: _read(file), pin=pin))
    _answer(as_json, {"roots": list(roots)}, "\n".join(roots), _kept_by(receipt))


@app.command()
def gc(config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Delete from this disk what nobody pinned."""

    async def work(content: Content) -> dict[str, int]:
        return {store.name: await store.gc() for store in content.stores if hasattr(store, "gc")}

    freed = _with(config, None, work)
    if as_json:
        print_json({"freed_bytes": freed})
        return
    for name, size in freed.items():
        typer.echo(printable(f"{name}: freed {human_bytes(size)}"))


def _with(config: Path | None, backend: str | None, work: Callable[[Content], Awaitable[T]]) -> T:
    """Open the storages, work with them, and close them."""
    import dataclasses

    from hfms_cli.cli import loop
    from hfms_cli.models.router import open_router
    from hfms_cli.telemetry import logs

    settings = load_config(config)
    logs.configure(settings.log)
    if backend:
        settings = dataclasses.replace(settings, storage=dataclasses.replace(settings.storage, backend=backend))
    router = open_router(settings, discover(settings))

    async def run() -> T:
        try:
            return await work(router.content)
        finally:
            await router.close()

    return loop.run(run())


async def _pinning(content: Content, cid: str, verb: Callable[[str], Awaitable[Receipt]]) -> tuple[str, Receipt]:
    name = str(await content.resolve(content.fetch(), cid))
    return name, await verb(name)


def _answer(as_json: bool, told: Mapping[str, Any], text: str, receipt: Mapping[str, Any]) -> None:
    if as_json:
        print_json({**told, **receipt})
        return
    typer.echo(printable(text))
    _tell(receipt)


def _tell(receipt: Mapping[str, Any]) -> None:
    """Who did it, for people."""
    sizes = receipt.get("served_bytes", {})
    who = ", ".join(
        f"{name} ({blocks} blocks, {human_bytes(sizes[name])})" for name, blocks in receipt.get("served", {}).items()
    )
    tried = "; ".join(f"{name}: {why.rstrip('.')}" for name, why in receipt["tried"].items())
    text = f"by {receipt.get('backend') or who or 'nobody: it is in the CID'}" + (f"; not by {tried}" if tried else "")
    print(printable(text), file=sys.stderr)


def _kept_by(receipt: Receipt) -> dict[str, Any]:
    return {"backend": receipt.backend, "tried": receipt.tried}


def _served_by(fetch: Fetch) -> dict[str, Any]:
    return {"served": dict(fetch.served), "served_bytes": dict(fetch.served_bytes), "tried": fetch.tried}


def _shown_size(entry: Any) -> str:
    return human_bytes(entry.size) if entry.kind == "file" else entry.kind


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    hidden = len(path.parts)
    return sum(f.stat().st_size for f in files if f.is_file() and not any(p.startswith(".") for p in f.parts[hidden:]))


async def _to_stdout(chunks: AsyncGenerator[bytes, None]) -> int:
    from contextlib import aclosing

    size = 0
    async with aclosing(chunks):
        async for chunk in chunks:
            size += sys.stdout.buffer.write(chunk)
    sys.stdout.buffer.flush()
    return size


async def _to_file(chunks: AsyncGenerator[bytes, None], target: Path) -> int:
    """Write a file that is not there yet, whole or not at all."""
    import asyncio
    import secrets
    from contextlib import aclosing

    draft = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}")
    try:
        size = 0
        async with aclosing(chunks):
            with draft.open("xb") as file:
                async for chunk in chunks:
                    size += file.write(chunk)
        if await asyncio.to_thread(target.exists):
            raise BadRequest(f"`{target}` is there already, and nothing is written over.", param="path")
        draft.rename(target)
        return size
    except OSError as exc:
        raise FetchFailed(f"`{target}` could not be written: {exc.strerror}.") from exc
    finally:
        draft.unlink(missing_ok=True)


async def _read(file: Path) -> AsyncGenerator[bytes, None]:
    import asyncio

    with file.open("rb") as opened:
        while chunk := await asyncio.to_thread(opened.read, 2**20):
            yield chunk
