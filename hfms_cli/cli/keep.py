"""`hfms models verify|gc|pin|unpin|alias`: look after the models on this disk."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfms_cli.cli.options import AsJson, ConfigFile, ModelArgument
from hfms_cli.cli.output import print_json, print_table, printable
from hfms_cli.cli.progress import pulling
from hfms_cli.config import load_config
from hfms_cli.plugins import discover
from hfms_cli.sizes import human_bytes

if TYPE_CHECKING:
    from hfms_cli.models.pins import Pins
    from hfms_cli.models.router import Router
    from hfms_cli.types import Leftover

Force = Annotated[bool, typer.Option("--force", help="Also what is pinned.")]


def verify(
    name: ModelArgument,
    repair: Annotated[bool, typer.Option("--repair", help="Fetch the files again that are wrong.")] = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Hash every file of a model on this disk anew, and say which are wrong.

    Exit status 1 where one is, and stays so.
    """
    import asyncio

    from hfms_cli.models import names

    wanted, router = names.parse(name), router_for(config)

    async def examine() -> Any:
        try:
            return await router.examine(wanted, watch, repair=repair)
        finally:
            await router.close()

    with pulling(f"verify {wanted}") as watch:
        manifest, bad = asyncio.run(examine())
    proven = [f for f in manifest.files if f.path not in bad and (f.sha256 or f.oid)]
    unproven = [f.path for f in manifest.files if not (f.sha256 or f.oid)]
    if as_json:
        print_json(
            {
                "model": str(manifest.name),
                "revision": manifest.revision,
                "ok": not bad,
                "files": [
                    {"path": f.path, "size_bytes": f.size, "wrong": bad[f.path].message if f.path in bad else None}
                    for f in manifest.files
                ],
            }
        )
    else:
        for error in bad.values():
            typer.echo(printable(error.message))
        if not bad:
            size = human_bytes(sum(f.size for f in proven))
            typer.echo(printable(f"{manifest.name}: {len(proven)} files, {size}, are what they should be"))
        if unproven:
            typer.echo(printable(f"no hash is known of {', '.join(unproven)}; only their lengths were compared"))
    if bad:
        raise typer.Exit(1)


def gc(
    now: Annotated[bool, typer.Option("--now", help="Also what is younger than a day. Not while a pull runs.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    force: Force = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Delete what nothing refers to.

    That is what broken pulls and conversions have left, what other versions have converted, blobs without a name, and
    revisions that no branch or tag means any more.
    """
    import asyncio

    from hfms_cli.models import leftovers

    router = router_for(config)

    async def find() -> list[Leftover]:
        try:
            keepers = [*router.storages, *_engines(config)]
            least = 0.0 if now else leftovers.OLD_SECONDS
            return await leftovers.find(keepers, _pins(config), least_age=least, pinned=force)
        finally:
            await router.close()

    found = asyncio.run(find())
    size = sum(left.size for left in found)
    if found and not as_json:
        rows = [[left.about, human_bytes(left.size), _age(left.age_seconds)] for left in found]
        print_table(["LEFT OVER", "SIZE", "AGE"], rows)
    failed: list[str] = []
    if found and not dry_run:
        if not yes:
            _ask(f"Delete these {len(found)} ({human_bytes(size)})?")
        failed = leftovers.delete(found)
    if as_json:
        print_json(
            {
                "leftovers": [
                    {"about": left.about, "size_bytes": left.size, "age_seconds": round(left.age_seconds)}
                    for left in found
                ],
                "size_bytes": size,
                "deleted": bool(found) and not dry_run and not failed,
                "failed": failed,
            }
        )
    elif not found:
        typer.echo("nothing is left over")
    elif dry_run:
        typer.echo(f"{human_bytes(size)} would be freed")
    else:
        typer.echo(f"{human_bytes(size)} freed" if not failed else "not all could be deleted:")
        for line in failed:
            typer.echo(printable(f"  {line}"), err=True)
    if failed:
        raise typer.Exit(1)


def pin(
    name: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="None: list what is pinned.")] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Keep a model on this disk: neither `rm` nor `gc` deletes it without --force."""
    from hfms_cli.models import names

    pins = _pins(config)
    if name is not None:
        pins.add(names.parse(name))
        if not as_json:
            typer.echo(printable(f"pinned {name}"))
            return
    if as_json:
        print_json([str(n) for n in pins])
    else:
        for pinned in pins:
            typer.echo(printable(str(pinned)))


def unpin(name: ModelArgument, config: ConfigFile = None) -> None:
    """Let a model that was pinned be deleted again."""
    from hfms_cli.models import names

    _pins(config).remove(names.parse(name))
    typer.echo(printable(f"unpinned {name}"))


def alias(
    alias: Annotated[str | None, typer.Argument(metavar="[ALIAS]", help="None: list all.")] = None,
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="What it is to stand for.")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take the alias away.")] = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Give a model one more name. A running server takes it at once; those of hfms.toml stay as they are there."""
    from hfms_cli.models.aliases import Aliases

    settings = load_config(config)
    aliases = Aliases(settings.models.aliases, settings.state_dir)
    if remove and alias and not model:
        aliases.remove(alias)
    elif alias and model and not remove:
        aliases.add(alias, model)
    elif remove or alias:
        raise typer.BadParameter("name the alias and the model, or the alias and --remove, or nothing for a list")
    if as_json:
        print_json(dict(aliases))
    elif alias:
        typer.echo(printable(f"removed {alias}" if remove else f"{alias} stands for {aliases[alias]}"))
    else:
        origin = {name: "hfms.toml" if name in aliases.configured else "alias" for name in aliases}
        print_table(["ALIAS", "MODEL", "FROM"], [[a, m, origin[a]] for a, m in sorted(aliases.items())])


def router_for(config: Path | None) -> Router:
    """Over the storages of the configuration, in its order. Raises StartupError."""
    from hfms_cli.models.router import open_router
    from hfms_cli.telemetry import logs

    settings = load_config(config)
    logs.configure(settings.log)
    return open_router(settings, discover(settings))


def _engines(config: Path | None) -> list[Any]:
    settings = load_config(config)
    plugins = discover(settings)
    return plugins.in_use("engine", settings)


def _pins(config: Path | None) -> Pins:
    from hfms_cli.models.pins import Pins

    return Pins(load_config(config).state_dir)


def _ask(question: str) -> None:
    """Go on only where a person says so."""
    if not sys.stdin.isatty():
        typer.echo("Nobody is here to be asked: add --yes to delete, or --dry-run to look.", err=True)
        raise typer.Exit(2)
    if not typer.confirm(question):
        raise typer.Exit(1)


def _age(seconds: float) -> str:
    for length, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} seconds"
