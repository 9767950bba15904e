"""`hfms models plan`: whether a model fits, and where, before anything is fetched, loaded or unloaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hfms_cli.cli.client import Client, Refused, Unreachable, admin_key, local_url
from hfms_cli.cli.keep import router_for
from hfms_cli.cli.options import AsJson, ConfigFile, ModelArgument, ServerUrl
from hfms_cli.cli.output import print_json, print_table, printable
from hfms_cli.config import load_config
from hfms_cli.plugins import discover
from hfms_cli.sizes import human_bytes

if TYPE_CHECKING:
    from hfms_cli.models.plan import Option, Plan


def plan(name: ModelArgument, url: ServerUrl = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Tell whether a model fits into memory, on each device, by each engine and at each precision.

    Nothing is loaded, unloaded or fetched but the headers of a model that is not on this disk. Where a server runs,
    what it holds is counted, and what it would unload is named. Exit status 1 where the model fits nowhere.
    """
    import asyncio

    found, asked = asyncio.run(_plan(name, url, config))
    if as_json:
        print_json(_as_json(found, asked))
    else:
        _print(found, asked)
    if found.best is None:
        raise typer.Exit(1)


async def _plan(name: str, url: str | None, config: Path | None) -> tuple[Plan, str | None]:
    """The plan, and the server that was asked what it holds; None where none runs."""
    from hfms_cli.models import names
    from hfms_cli.models import plan as planning

    settings = load_config(config)
    plugins = discover(settings)
    router = router_for(config)
    try:
        seen = await planning.look(router, names.parse(name))
    finally:
        await router.close()
    hardware = plugins.in_use("hardware", settings)
    engines = plugins.in_use("engine", settings)
    asked: str | None = url or local_url(settings.server)
    served = planning.Served()
    try:
        rows = await _rows(asked or "")
        served = planning.served_by(rows, [d for kind in hardware for d in kind.probe().devices])
    except Unreachable:
        if url:
            raise
        asked = None
    except Refused:
        if url:
            raise
        typer.echo(f"{asked} does not say what it holds; is HFMS_ADMIN_API_KEY set?", err=True)
        asked = None
    return planning.options(seen, settings, engines, hardware, served), asked


async def _rows(url: str) -> list[dict[str, Any]]:
    async with Client(url, admin_key()) as client:
        answer = await client.get("/models")
    try:
        return [row for row in answer["data"] if row["status"]["value"]]
    except (KeyError, TypeError) as exc:
        raise Refused(f"{url} does not list models as hfms does") from exc


def _print(found: Plan, asked: str | None) -> None:
    seen = found.seen
    card = seen.card
    about = ", ".join(filter(None, [card.architecture, card.format, ", ".join(card.tasks)]))
    typer.echo(printable(f"{seen.manifest.name}: {about}"))
    where = "on this disk" if seen.here else f"{human_bytes(seen.to_fetch)} to fetch"
    typer.echo(f"weights {human_bytes(card.weights_bytes)}, {where}\n")
    if found.options:
        columns = ["DEVICE", "ENGINE", "DTYPE", "QUANTIZE", "WEIGHTS", "CACHE", "WORK", "NEEDS", "FREE", "FITS"]
        print_table(columns, [_row(o) for o in found.options])
    else:
        for reason in found.refused:
            typer.echo(printable(f"not {reason}"))
    typer.echo(printable(f"\n{_advice(found, asked)}"))


def _row(option: Option) -> list[str]:
    parts = option.parts
    shares = [human_bytes(n) for n in (parts.weights, parts.cache, parts.work)] if parts else ["-", "-", "-"]
    fits = "no" if not option.fits else f"without {', '.join(option.unload)}" if option.unload else "yes"
    numbers = [human_bytes(option.total), human_bytes(option.free)]
    return [option.device, option.engine, option.dtype, option.quantize, *shares, *numbers, fits]


def _advice(found: Plan, asked: str | None) -> str:
    """What to do, in a sentence."""
    name, best = found.seen.manifest.name, found.best
    if best is not None:
        how = "" if best.usual else f", if it is asked for dtype {best.dtype} and quantize {best.quantize}"
        after = f", once {', '.join(best.unload)} is unloaded" if best.unload else ""
        verb = f"hfms models load {name}" if asked else f"hfms serve {name}"
        return f"It fits on {best.device} by {best.engine}{how}{after}: {verb}"
    if not found.options:
        return "No engine here takes it."
    least = min(found.options, key=lambda o: o.total - o.free)
    return (
        f"It fits nowhere. The least is missing on {least.device} by {least.engine} ({least.dtype}, {least.quantize}): "
        f"{human_bytes(least.total - least.free)} more than are free. Free memory, or choose a smaller model."
    )


def _as_json(found: Plan, asked: str | None) -> dict[str, Any]:
    seen, best = found.seen, found.best
    return {
        "model": str(seen.manifest.name),
        "revision": seen.manifest.revision,
        "on_disk": seen.here,
        "to_fetch_bytes": seen.to_fetch,
        "format": seen.card.format,
        "architecture": seen.card.architecture,
        "weights_bytes": seen.card.weights_bytes,
        "server": asked,
        "fits": best is not None,
        "options": [_option_as_json(o) | {"best": o is best} for o in found.options],
        "refused": list(found.refused),
        "advice": _advice(found, asked),
    }


def _option_as_json(option: Option) -> dict[str, Any]:
    parts = option.parts
    row = {k: v for k, v in dataclasses.asdict(option).items() if k not in ("total", "parts", "free")}
    shares = {"weights": parts.weights, "cache": parts.cache, "work": parts.work} if parts else {}
    return row | {f"{k}_bytes": v for k, v in (shares | {"needs": option.total, "free": option.free}).items()}
