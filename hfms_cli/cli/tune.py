"""`hfms models tune`: measures every way to run a model on this machine, and remembers the best."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfms_cli.cli.options import AsJson, ConfigFile, ModelArgument
from hfms_cli.cli.output import console, print_json, print_table, printable
from hfms_cli.config import Config, load_config
from hfms_cli.sizes import human_bytes

if TYPE_CHECKING:
    from hfms_cli.tune.session import Result


def tune(
    name: ModelArgument,
    hardware: Annotated[str | None, typer.Option(help="A kind of device (cuda) or one device (cuda:1).")] = None,
    engine: Annotated[str | None, typer.Option(help="Only this engine.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Only this precision.")] = None,
    quantize: Annotated[str | None, typer.Option(help="Only these weights: none, int8 or int4.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Calls at once for throughput; 1: latency only.")] = 16,
    output_len: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of each race.")] = 3,
    allow_quantized: Annotated[
        bool, typer.Option("--allow-quantized", help="Choose also what rounds the model and may change answers.")
    ] = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Measure the engines, precisions and limits that this machine has for a model, and remember the best.

    `hfms serve` then loads the model so; `[models] profile` says for latency or for throughput.
    """
    import asyncio

    from hfms_cli.models import names
    from hfms_cli.tune.session import Plan

    settings = load_config(config, flags={"models": {"dtype": dtype, "quantize": quantize}})
    plan = Plan(concurrency, output_len, repeats, allow_quantized)
    with _telling() as told:
        result = asyncio.run(_tune(settings, names.parse(name), hardware, engine, plan, told))
    if as_json:
        print_json(result.as_json())
        return
    report(result)


async def _tune(
    config: Config, name: Any, hardware: str | None, engine: str | None, plan: Any, told: Callable[[str], None]
) -> Result:
    import dataclasses

    from hfms_cli.models.loader import Loader, Wish
    from hfms_cli.models.router import open_router
    from hfms_cli.plugins import discover
    from hfms_cli.settings import settings_of
    from hfms_cli.telemetry import logs
    from hfms_cli.tune import roofline
    from hfms_cli.tune.candidates import Knobs
    from hfms_cli.tune.session import Tuner

    # What loads say of themselves would drown the progress.
    logs.configure(dataclasses.replace(config.log, level="error"))
    plugins = discover(config)
    plugins.check(config)
    hardwares, engines = plugins.in_use("hardware", config), plugins.in_use("engine", config)
    router = open_router(config, plugins)
    loader = Loader(config, router, engines, hardwares)
    knobs = {}
    for e in engines:
        options = {s.name: s.default for s in settings_of(plugins.record("engine", e.name).options)}
        knobs[e.name] = Knobs({k: v for k, v in options.items() if k not in loader.set_options(e.name)})
    told("measuring memory and arithmetic")
    machine = roofline.measure()
    try:
        return await Tuner(loader, knobs, plan, told).tune(name, Wish(device=hardware, engine=engine), machine)
    finally:
        await router.close()


def report(result: Result) -> None:
    """A table of what was measured, then what came of it."""
    from hfms_cli.tune.session import describe

    wide = result.plan.concurrency
    flops = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {name}" for name, rate in result.roofline.flops_per_second.items())
    print(
        printable(
            f"{result.placement.manifest.name}: memory is read at {result.roofline.bytes_per_second / 1e9:.1f} GB/s;"
            f" matrix products reach {flops or 'unknown: neither torch nor numpy is installed'}"
        )
    )
    columns = ["ENGINE", "DTYPE", "WEIGHTS", "LIMITS", "TTFT MS", "TOK/S AT 1", "ROOF"]
    columns += [f"TOK/S AT {wide}", "ROOF"] if wide > 1 else []
    columns += ["MEMORY", "LOAD S", "AGREES", "BEST FOR"]
    print_table(columns, [_cells(result.row(trial), wide) for trial in result.trials])
    for choice, reason in result.failures:
        print(printable(f"not measured: {describe(choice)}: {reason}"))
    for profile, trial in result.best.items():
        print(printable(f"best for {profile}: {describe(trial.choice)}"))
    if any(t.changes_answers for t in result.trials) and not result.plan.allow_quantized:
        print("weights and precisions that change answers were not chosen; --allow-quantized lets them be")


def _cells(row: dict[str, Any], wide: int) -> list[str]:
    limits = " ".join(f"{name}={value}" for name, value in row["options"].items())
    quality = row["quality"]
    return [
        row["engine"] if row["device"] == "cpu" else f"{row['engine']} on {row['device']}",
        row["dtype"],
        row["quantize"],
        limits or "default",
        f"{row['ttft_ms']:,.0f}",
        _number(row["decode_tokens_per_second"], "{:,.1f}"),
        _number(row["roofline_alone"], "{:.0%}"),
        *([_number(row["output_tokens_per_second"], "{:,.1f}")] if wide > 1 else []),
        *([_number(row["roofline_batched"], "{:.0%}")] if wide > 1 else []),
        human_bytes(row["memory_bytes"]),
        f"{row['load_seconds']:.1f}",
        f"{quality['agreement']:.1%}" if quality else "-",
        ", ".join(row["best_for"]) or "-",
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


@contextmanager
def _telling() -> Iterator[Callable[[str], None]]:
    """Shows what is being done, on standard error."""
    out = console(stderr=True)
    if not out.is_terminal:
        yield lambda line: print(printable(line), file=sys.stderr, flush=True)
        return
    with out.status("tuning") as status:
        yield lambda line: status.update(printable(line))
