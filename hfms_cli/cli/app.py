"""The command line: its verbs, and the one place where an error becomes a message and an exit status."""

from __future__ import annotations

import functools
import sys
from importlib import import_module
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from hfms_cli.cli.client import Unreachable
from hfms_cli.cli.output import printable
from hfms_cli.config import load_config
from hfms_cli.errors import ConfigError, HfmsError, StartupError
from hfms_cli.plugins import discover
from hfms_cli.version import __version__

EPILOG = (
    "Exit status: 0 done; 1 failed; 2 wrong usage or configuration; 3 the server cannot be reached; "
    "130 stopped by Ctrl-C."
)


VERBS = {
    "serve": ("serve:serve", "Serve models over the OpenAI API until Ctrl-C."),
    "chat": ("chat:chat", "Talk to a model, or ask it once."),
    "bench": ("bench:bench", "Measure a server: throughput, latencies, errors."),
    "conformance": ("conformance:conformance", "Check any server that speaks OpenAI's API."),
    "models": ("models:app", "List, pull, load and remove models."),
    "ipfs": ("ipfs:app", "Add, get, list and pin what has a CID."),
    "publisher": ("publisher:app", "The key that signs what is published, and the keys that are trusted."),
    "config": ("config:app", "Write, show and check the settings."),
    "plugins": ("plugins:app", "List plugins, and why one failed."),
    "hardware": ("hardware:hardware", "List devices and their memory, or why there are none."),
    "doctor": ("doctor:doctor", "Check the machine and the settings."),
}
"""Where each verb is, and its line in `hfms --help`: a verb's module is imported only when the verb is run."""


class Verbs(typer.core.TyperGroup):
    """hfms's own verbs, then those of plugins.

    Plugins are looked up only where a verb is not ours: none can replace one, or keep one from starting.
    """

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        for name, (_, line) in VERBS.items():
            self.add_command(typer.core.TyperCommand(name, help=line))

    def list_commands(self, ctx: Any) -> list[str]:
        try:
            return [*VERBS, *plugin_verbs()]
        except ConfigError:
            return list(VERBS)  # help must work where the configuration does not

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """What is listed under a name: of our own verbs no more than their lines."""
        return self.commands.get(cmd_name) or plugin_verbs().get(cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """What is run under a name."""
        name, found, rest = super().resolve_command(ctx, args)
        return name, own_verb(name) if name in VERBS else found, rest


def own_verb(name: str) -> Any:
    """A verb of ours, whole."""
    module, attribute = VERBS[name][0].split(":")
    verb = getattr(import_module(f"hfms_cli.cli.{module}"), attribute)
    holder = typer.Typer(rich_markup_mode=None)
    if isinstance(verb, typer.Typer):
        holder.add_typer(verb, name=name)
    else:
        holder.command(name)(verb)
    return typer.main.get_group(holder).commands[name]


@functools.cache
def plugin_verbs() -> dict[str, Any]:
    """Verbs that the plugins of the default configuration bring. Raises ConfigError."""
    brought = typer.Typer()
    config = load_config()
    discover(config).add_commands(brought, config)
    return dict(typer.main.get_group(brought).commands)


app = typer.Typer(
    name="hfms",
    cls=Verbs,
    help="The Hugging Face model server: OpenAI's API for the models on your own machines.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,  # rich costs as much as all the rest of `hfms --help`
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hfms {__version__}")
        raise typer.Exit


@app.callback()
def hfms(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of `hfms` itself."""


def run(args: list[str]) -> int:
    """Run one command line; every HfmsError ends here."""
    try:
        app(args, prog_name="hfms")
    except HfmsError as exc:
        print(f"error: {printable(exc.message)}", file=sys.stderr)
        return exit_status(exc)
    return 0


def exit_status(exc: HfmsError) -> int:
    """What a shell is told of an error."""
    match exc:
        case StartupError():
            return 2
        case Unreachable():
            return 3
        case _:
            return 1
