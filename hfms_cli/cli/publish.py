"""`hfms models publish` and `unpublish`: a model under one CID, signed, for other hfms servers and for IPFS."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfms_cli.cli.options import AsJson, ConfigFile, ModelArgument
from hfms_cli.cli.output import print_json, printable
from hfms_cli.cli.progress import pulling
from hfms_cli.config import Config, load_config
from hfms_cli.errors import Forbidden, HfmsError
from hfms_cli.plugins import discover
from hfms_cli.sizes import human_bytes
from hfms_cli.types import Terms

if TYPE_CHECKING:
    from hfms_cli.models.publish import Published
    from hfms_cli.models.router import Router
    from hfms_cli.types import Manifest


def publish(
    name: ModelArgument,
    published_as: Annotated[
        str | None, typer.Option("--as", metavar="ORG/NAME", help="The name to publish it under; by default its own.")
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="STORAGE", help="Where its blocks are kept: kubo, hf_cache, ...")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Also where the model is not everybody's to pass on.")] = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Give a model one CID, sign for it, and offer it to other servers. What is not on this disk is pulled first."""
    import asyncio

    from hfms_cli.models import names

    settings = load_config(config)
    wanted = names.parse(name)
    given = names.parse(published_as) if published_as else wanted
    done, terms = asyncio.run(_publish(settings, wanted, given, to, yes))
    said, cid = done.manifest, done.cid
    if not terms.license:
        print(
            f"warning: {printable(str(given))} names no license: say under what terms others may use it.",
            file=sys.stderr,
        )
    if as_json:
        print_json(
            {
                "model": said.name,
                "revision": said.revision,
                "cid": cid,
                "size_bytes": sum(f.size for f in said.files),
                "license": said.license or None,
                "publisher": said.publisher,
                "sequence": done.index.sequence,
                "backend": done.receipt.backend,
                "tried": done.receipt.tried,
            }
        )
        return
    typer.echo(cid)
    size = human_bytes(sum(f.size for f in said.files))
    tried = "; ".join(f"{backend}: {why.rstrip('.')}" for backend, why in done.receipt.tried.items())
    print(
        printable(
            f"{said.name}@{said.revision[:12]} ({size}, {said.license or 'no license named'}) is kept by "
            f"{done.receipt.backend}{f'; not by {tried}' if tried else ''}, signed by {said.publisher}"
        ),
        file=sys.stderr,
    )


def unpublish(name: ModelArgument, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Offer a model no longer; without a revision, none of its revisions."""
    import asyncio

    from hfms_cli.models import names
    from hfms_cli.models.publications import Publications
    from hfms_cli.models.signing import Signer

    settings = load_config(config)
    signer = Signer.load(settings.state_dir)
    gone, stores = Publications(settings.state_dir).withdraw(signer, names.parse(name))
    if as_json:
        print_json([{"model": o.name, "revision": o.revision, "cid": o.cid} for o in gone])
    else:
        for offer in gone:
            typer.echo(printable(f"{offer.name}@{offer.revision[:12]} is not offered any more"))
    asyncio.run(_unpin(settings, stores))


async def _publish(settings: Config, wanted: Any, given: Any, to: str | None, yes: bool) -> tuple[Published, Terms]:
    from hfms_cli.models.publications import Publications
    from hfms_cli.models.publish import publish, refuse_name
    from hfms_cli.models.signing import Signer

    signer = Signer.load(settings.state_dir)  # first: without a key and a name nothing has to be fetched
    refuse_name(given)
    router = _router(settings)
    try:
        if to is not None:
            router.content.named(to)
        with pulling(str(wanted)) as progress:
            manifest, folder = await router.pull(wanted, progress)
        terms = await _terms(router, manifest, folder)
        if terms.restricted and not yes:
            raise Forbidden(
                f"`{manifest.name}` may not be everybody's: {terms.restricted}. Whoever reaches what you publish can "
                "have it. If you may pass it on to them, say so with --yes."
            )
        with pulling(f"publishing {given}") as progress:
            done = await publish(
                manifest,
                folder,
                router.content,
                Publications(settings.state_dir),
                signer,
                name=given,
                license=terms.license,
                store=to,
                progress=progress,
            )
        return done, terms
    finally:
        await router.close()


async def _unpin(settings: Config, stores: dict[str, str]) -> None:
    """Let the stores delete what is published no more; one that is away keeps it, and how to free it later is told."""
    router = _router(settings)
    try:
        for cid, store in stores.items():
            try:
                await router.content.named(store).unpin(cid)
            except HfmsError as exc:
                kept = f"warning: {store} still keeps {cid}: {exc.message} Once it is back: hfms ipfs unpin {cid}"
                print(printable(kept), file=sys.stderr)
    finally:
        await router.close()


async def _terms(router: Router, manifest: Manifest, folder: Path) -> Terms:
    """What the storage knows, and what the model's own card says."""
    from hfms_cli.models.terms import license_of

    storage: Any = next(s for s in router.storages if s.name == manifest.storage)
    terms: Terms = await storage.terms(manifest) if hasattr(storage, "terms") else Terms()
    return Terms(terms.license or license_of(folder, [f.path for f in manifest.files]), terms.restricted)


def _router(settings: Config) -> Router:
    from hfms_cli.models.router import open_router
    from hfms_cli.telemetry import logs

    logs.configure(settings.log)
    return open_router(settings, discover(settings))
