"""`hfms conformance`: what clients of OpenAI's API rely on, checked against any server, or several side by side."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from itertools import zip_longest
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfms_cli.cli.bench import key_of
from hfms_cli.cli.chat import DEFAULT_KEY_ENV
from hfms_cli.cli.client import Client, Refused
from hfms_cli.cli.options import AsJson
from hfms_cli.cli.output import console, print_json, print_table, printable
from hfms_cli.errors import ConfigError

if TYPE_CHECKING:
    from hfms_cli.conformance.server import Server
    from hfms_cli.conformance.suite import Check, Verdict

Judged = list[tuple["Check", list["Verdict"]]]
SIGNS = {"green": "ok", "red": "FAILED", "skipped": "skipped"}


def conformance(
    url: Annotated[str, typer.Argument(help="The server, with or without /v1.")],
    model: Annotated[str | None, typer.Option(help="The model; by default the first of /v1/models.")] = None,
    embedding_model: Annotated[str | None, typer.Option(help="The model of the checks of embeddings.")] = None,
    rerank_model: Annotated[str | None, typer.Option(help="The model of the checks of rerankers.")] = None,
    key_env: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"The environment variable with the key.  [default: {DEFAULT_KEY_ENV}]"),
    ] = None,
    group: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this group; may be repeated.")] = None,
    compare: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="A server for a column beside it; may be repeated.")
    ] = None,
    compare_model: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Its model; by default its first.")
    ] = None,
    compare_key_env: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="The environment variable with its key.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check any server that speaks OpenAI's API.

    Each check is something that clients rely on. ok: so it is; FAILED: the server does otherwise, and what; skipped:
    there is nothing to check, and why. With --compare all servers are asked the same. The exit status is 1 where a
    check of the first server failed.
    """
    import asyncio

    from hfms_cli.conformance import checks
    from hfms_cli.conformance.suite import all_checks

    if unknown := set(group or ()) - set(checks.GROUPS):
        raise ConfigError(f"--group takes {', '.join(checks.GROUPS)}; not {', '.join(sorted(unknown))}")
    compare, models, keys = compare or [], compare_model or [], compare_key_env or []
    if len(compare) < max(len(models), len(keys)):
        raise ConfigError("--compare-model and --compare-key-env go with a --compare URL each, in the same order")
    first_key = key_of("--key-env", key_env) if key_env else os.environ.get(DEFAULT_KEY_ENV)
    wanted = [(Client(url, first_key), model)]
    # Never the default key: it is meant for another server.
    wanted += [
        (Client(other, key_of("--compare-key-env", env) if env else None), name)
        for other, name, env in zip_longest(compare, models, keys)
    ]
    chosen = [c for c in all_checks() if not group or c.group in group]
    servers, judged = asyncio.run(_judge(wanted, chosen, embedding_model, rerank_model))
    if as_json:
        print_json(as_data(servers, judged))
    else:
        show(servers, judged)
    if any(verdicts[0].colour == "red" for _, verdicts in judged):
        raise typer.Exit(1)


async def _judge(
    wanted: Sequence[tuple[Client, str | None]],
    chosen: list[Check],
    embedding_model: str | None,
    rerank_model: str | None,
) -> tuple[list[Server], Judged]:
    from hfms_cli.conformance.server import Server
    from hfms_cli.conformance.suite import judge

    async with AsyncExitStack() as stack:
        servers = []
        for client, name in wanted:
            server = Server(
                client.url,
                name or await _first_model(client),
                key=client.key,
                embedding_model=embedding_model,
                rerank_model=rerank_model,
            )
            servers.append(await stack.enter_async_context(server))
        judged: Judged = []
        async for check, verdicts in judge(chosen, servers):
            judged.append((check, verdicts))
            if sys.stderr.isatty():
                print(f"\r{len(judged)} of {len(chosen)}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r", end="", file=sys.stderr)
    return servers, judged


async def _first_model(client: Client) -> str:
    """The first model that a server lists. Raises Unreachable, Refused."""
    async with client:
        names = await client.models()
    if not names:
        raise Refused(f"{client.url} serves no model; load one, or name it with --model")
    return names[0]


def as_data(servers: Sequence[Server], judged: Judged) -> dict[str, Any]:
    """All of it as JSON; `results` are in the order of `servers`."""
    return {
        "servers": [{"url": s.url, "model": s.model, **counts(judged, i)} for i, s in enumerate(servers)],
        "checks": [
            {
                "group": check.group,
                "name": check.name,
                "results": [{"verdict": str(v.colour), "why": v.why} for v in verdicts],
            }
            for check, verdicts in judged
        ],
    }


def counts(judged: Judged, column: int) -> dict[str, int]:
    """How many checks of a server are green, red and skipped."""
    colours = [str(verdicts[column].colour) for _, verdicts in judged]
    return {colour: colours.count(colour) for colour in SIGNS}


def show(servers: Sequence[Server], judged: Judged) -> None:
    """The table, and a line for each server."""
    titles = [s.url.partition("://")[2] for s in servers]
    why = len(servers) == 1
    if sys.stdout.isatty():
        _show_coloured(titles, judged, why=why)
    else:
        columns = ["GROUP", "CHECK", *titles, *(["WHY"] if why else [])]
        print_table(
            columns,
            [
                [c.group, c.name, *(SIGNS[v.colour] for v in verdicts), *([verdicts[0].why] if why else [])]
                for c, verdicts in judged
            ],
        )
    if not why:
        for check, verdicts in judged:
            for title, verdict in zip(titles, verdicts, strict=True):
                if verdict.why:
                    print(printable(f"{title}: {check.group}: {check.name}: {SIGNS[verdict.colour]}, {verdict.why}"))
    for i, (title, server) in enumerate(zip(titles, servers, strict=True)):
        told = counts(judged, i)
        print(
            printable(f"{title} ({server.model}): {told['green']} ok, {told['red']} failed, {told['skipped']} skipped")
        )


def _show_coloured(titles: Sequence[str], judged: Judged, *, why: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    styles = {"green": "green", "red": "bold red", "skipped": "yellow"}
    table = Table("GROUP", "CHECK", *titles, *(["WHY"] if why else []), box=None, pad_edge=False, header_style="bold")
    group = ""
    for check, verdicts in judged:
        signs = [Text(SIGNS[v.colour], style=styles[v.colour]) for v in verdicts]
        reason = [printable(verdicts[0].why)] if why else []
        table.add_row(check.group if check.group != group else "", check.name, *signs, *reason)
        group = check.group
    console().print(table)
