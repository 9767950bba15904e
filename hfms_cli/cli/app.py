"""The command line: its verbs, and the one place where an error becomes a message and an exit status."""

from __future__ import annotations

import functools
import sys
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from hfms_cli.cli import bench, chat, config, conformance, doctor, hardware, ipfs, models, plugins, publisher
from hfms_cli.cli.client import Unreachable
from hfms_cli.cli.output import printable
from hfms_cli.cli.serve import serve
from hfms_cli.config import load_config
from hfms_cli.errors import ConfigError, HfmsError, StartupError
from hfms_cli.plugins import discover
from hfms_cli.version import __version__

EPILOG = (
    "Exit status: 0 done; 1 failed; 2 wrong usage or configuration; 3 the server cannot be reached; "
    "130 stopped by Ctrl-C."
)


class Verbs(typer.core.TyperGroup):
    """hfms's own verbs, then those of plugins.

    Plugins are looked up only where a verb is not ours: none can replace one, or keep one from starting.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        try:
            return [*self.commands, *plugin_verbs()]
        except ConfigError:
            return list(self.commands)  # help must work where the configuration does not

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return self.commands.get(cmd_name) or plugin_verbs().get(cmd_name)


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
app.command()(serve)
app.command()(chat.chat)
app.command()(bench.bench)
app.command()(conformance.conformance)
app.add_typer(models.app, name="models")
app.add_typer(ipfs.app, name="ipfs")
app.add_typer(publisher.app, name="publisher")
app.add_typer(config.app, name="config")
app.add_typer(plugins.app, name="plugins")
app.command()(hardware.hardware)
app.command()(doctor.doctor)


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
