"""`hfms publisher`: this machine's key, and whose signatures count here."""

from __future__ import annotations

from typing import Annotated

import typer

from hfms_cli.cli.options import AsJson, ConfigFile
from hfms_cli.cli.output import print_json, print_table, printable
from hfms_cli.config import load_config
from hfms_cli.errors import NotFound
from hfms_cli.sizes import human_bytes

app = typer.Typer(help="The key that signs what is published, and the keys that are trusted.", no_args_is_help=True)

Key = Annotated[str, typer.Argument(metavar="KEY", help="A public key, as `hfms publisher show` prints it.")]


@app.command()
def init(config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Make this machine's key, and print its public half."""
    from hfms_cli.models.signing import KEY_FILE, Signer

    state_dir = load_config(config).state_dir
    public = Signer.make(state_dir).public
    if as_json:
        print_json({"key": public, "file": str(state_dir / KEY_FILE)})
        return
    typer.echo(public)
    typer.echo(
        printable(f"The private key is in {state_dir / KEY_FILE}: keep a copy of it, and keep it to yourself."),
        err=True,
    )


@app.command()
def show(config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Print this machine's public key, and what it has published."""
    from hfms_cli.models.publications import Publications
    from hfms_cli.models.signing import Signer

    state_dir = load_config(config).state_dir
    public, index = Signer.load(state_dir).public, Publications(state_dir).index()
    offers = index.offers if index else ()
    if as_json:
        rows = [
            {"model": o.name, "revision": o.revision, "tag": o.tag, "cid": o.cid, "size_bytes": o.size} for o in offers
        ]
        expires = index.expires_at.isoformat() if index else None
        print_json({"key": public, "sequence": index.sequence if index else 0, "expires_at": expires, "offers": rows})
        return
    typer.echo(public)
    if offers:
        print_table(
            ["MODEL", "REVISION", "SIZE", "CID"],
            [[o.name, o.tag or o.revision[:12], human_bytes(o.size), o.cid] for o in offers],
        )


@app.command()
def trust(
    key: Key,
    names: Annotated[
        list[str], typer.Option("--for", metavar="NAMES", help="What it may speak for: org/name, org/*, or * for all.")
    ],
    config: ConfigFile = None,
) -> None:
    """Take what a publisher has signed, for some names."""
    from hfms_cli.models import trust as trusting

    new = trusting.Trusted.parse(f"{','.join(names)} {key}")
    trusting.add(load_config(config).state_dir, new)
    typer.echo(printable(f"{new.key} is trusted for {', '.join(new.patterns)}"))


@app.command()
def untrust(key: Key, config: ConfigFile = None) -> None:
    """Take nothing more that a publisher has signed."""
    from hfms_cli.models import trust as trusting

    settings = load_config(config)
    configured = any(trusting.Trusted.parse(line).key == key for line in settings.storage.trusted_publishers)
    try:
        trusting.remove(settings.state_dir, key)
    except NotFound:
        if not configured:
            raise
    if configured:
        raise NotFound(f"`{key}` is trusted by {settings.file} ([storage] trusted_publishers): take it out there.")
    typer.echo(printable(f"{key} is not trusted any more"))


@app.command("list")
def list_trusted(config: ConfigFile = None, as_json: AsJson = False) -> None:
    """List the keys that are trusted, and for which names."""
    from hfms_cli.models import trust as trusting

    settings = load_config(config)
    rows = [(t, settings.file) for t in map(trusting.Trusted.parse, settings.storage.trusted_publishers)]
    rows += [(t, str(settings.state_dir / trusting.TRUSTED_FILE)) for t in trusting.read_file(settings.state_dir)]
    if as_json:
        print_json([{"key": t.key, "names": list(t.patterns), "from": where} for t, where in rows])
        return
    print_table(["KEY", "NAMES", "FROM"], [[t.key, ", ".join(t.patterns), where] for t, where in rows])
