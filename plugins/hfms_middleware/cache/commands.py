"""`hfms cache`: the cache of the running server."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import typer

from hfms_cli import (
    AsJson,
    Client,
    ConfigFile,
    ServerUrl,
    admin_key,
    load_config,
    local_url,
    print_json,
    print_table,
)

cache = typer.Typer(help="Look at the cache of the running server, or empty it.", no_args_is_help=True)


@cache.command()
def stats(url: ServerUrl = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Show how often the cache had the answer, and how full it is."""
    found = asyncio.run(_ask(url, config, "GET", "/admin/cache/stats"))
    if as_json:
        print_json(found)
        return
    print_table(["WHAT", "VALUE"], found.items())


@cache.command()
def clear(url: ServerUrl = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Forget every answer that is kept."""
    found = asyncio.run(_ask(url, config, "POST", "/admin/cache/clear"))
    if as_json:
        print_json(found)
        return
    typer.echo(f"answers forgotten: {found.get('cleared')}")


async def _ask(url: str | None, config: Path | None, method: str, path: str) -> dict[str, Any]:
    async with Client(url or local_url(load_config(config).server), admin_key()) as client:
        answer: dict[str, Any] = await (client.get(path) if method == "GET" else client.post(path, {}))
        return answer
