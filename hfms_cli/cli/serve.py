"""`hfms serve`: build the server, listen, load the models, and drain when asked to stop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import tempfile
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from hfms_cli.config import Config
    from hfms_cli.models.served import ServedModel
    from hfms_cli.serving.runtime import Runtime

HEAD_START_SECONDS = 0.3
"""How long HTTP waits at most until the first load has got as far as to its process."""
LOOK_SECONDS = 0.5
"""How often a terminal is told what the loads do."""


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="Models to load: org/name, a folder, a .gguf file, package:NAME."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that answer HTTP on this port.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    replicas: Annotated[int | None, typer.Option(help="Engine processes of each model.")] = None,
    quantize: Annotated[str | None, typer.Option(help="Bits of weights: auto, none, int8 or int4.")] = None,
    draft_model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="A smaller model of the same vocabulary that guesses for those given here."),
    ] = None,
    lora_modules: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=ADAPTER", help="A LoRA adapter to load at start, served as NAME; may be repeated."),
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="What `hfms models tune` was to find: auto, latency or throughput.")
    ] = None,
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="Listen beyond loopback although no key is configured.")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    config: Annotated[Path | None, typer.Option(help="Configuration file.", metavar="FILE")] = None,
) -> None:
    """Serve models over the OpenAI API until Ctrl-C; a second Ctrl-C does not wait for calls in flight."""
    from hfms_cli.config import load_config
    from hfms_cli.garbage import collect_rarely

    collect_rarely()
    flags: dict[str, dict[str, Any]] = {
        "server": {"host": host, "port": port, "workers": workers, "insecure": insecure},
        "models": {
            "serve": models or None,
            "dtype": dtype,
            "quantize": quantize,
            "draft_models": dict.fromkeys(models, draft_model) if models and draft_model else None,
            "lora_modules": lora_modules or None,
            "profile": profile,
            "replicas": replicas,
        },
        "log": {"level": log_level},
    }
    settings = load_config(config, flags=flags)
    try:
        from uvloop import run
    except ImportError:  # not on Windows
        from asyncio import run
    run(_serve(settings, config, flags))


async def _serve(config: Config, file: Path | None, flags: dict[str, dict[str, Any]]) -> None:
    from hfms_cli.engines.process import Ahead
    from hfms_cli.errors import BadRequest, ConfigError
    from hfms_cli.models import names
    from hfms_cli.plugins import discover
    from hfms_cli.telemetry import logs

    wanted = dict.fromkeys([*config.models.serve, *(n for n in config.models.required if n != "*")])
    for name in wanted:
        try:
            names.parse(name)  # a misspelt name is told before anything starts
        except BadRequest as exc:
            raise ConfigError(exc.message, param="serve") from exc
    async with contextlib.AsyncExitStack() as opened:
        ahead = await Ahead.begin() if wanted else None
        if ahead:
            opened.push_async_callback(ahead.close)
        logs.configure(config.log)
        plugins = discover(config)
        hardware, engines = (plugins.in_use(kind, config) for kind in ("hardware", "engine"))
        if ahead and engines:
            ahead.prepare(engines[0])
        # Some takes half a second to say what it is. It is asked while the rest is imported and built.
        probing = asyncio.get_running_loop().run_in_executor(None, lambda: [kind.probe() for kind in hardware])

        from hfms_cli.models.adapters import read_module
        from hfms_cli.serving.listen import listen
        from hfms_cli.serving.runtime import Runtime

        adapters = [read_module(text) for text in config.models.lora_modules]
        runtime = Runtime.build(config, plugins, hardware, engines, ahead)
        opened.push_async_callback(runtime.close)
        try:
            own, *others = await listen(config.server.host, config.server.port, config.server.workers)
        except OSError as exc:
            raise ConfigError(
                f"cannot listen on {config.server.host}:{config.server.port}: {exc.strerror or exc}; choose another "
                "with --host and --port",
                param="port",
            ) from exc
        await probing
        stop = _on_signals()
        loads = runtime.pool.preload(wanted)
        runtime.pool.adapters.preload(adapters, loads)
        if ahead:
            # Importing what answers HTTP would hold the loads up; a fetch that takes long does not hold that up.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ahead.asked_for.wait(), HEAD_START_SECONDS)
        await asyncio.to_thread(import_module, "hfms_cli.web.app")

        from aiohttp import web
        from rich.console import Console

        from hfms_cli.garbage import settle
        from hfms_cli.serving.owner import Fronts
        from hfms_cli.web.app import build_app
        from hfms_cli.web.listener import Runner

        console = Console(emoji=False, highlight=False)  # `:a:` in a model's name is no emoji
        runner = Runner(build_app(runtime))
        await runner.setup()
        opened.push_async_callback(runner.cleanup)
        for sock in own:
            await web.SockSite(runner, sock).start()
        if others:
            # Only this user can reach the folder: what comes by it is believed to come from a front.
            folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="hfms-")))
            await web.UnixSite(runner, folder / "owner").start()
            runtime.fronts = Fronts(
                runtime,
                others,
                owner=str(folder / "owner"),
                config_file=str(file) if file else None,
                flags=flags,
            )
            runtime.fronts.start()
        host, port = own[0].getsockname()[:2]
        _panel(console, runtime, f"http://{f'[{host}]' if ':' in host else host}:{port}")
        settle()
        announce = asyncio.create_task(_announce(console, runtime, loads, stop))
        await stop.first.wait()
        announce.cancel()
        await _drain(console, runtime, stop.second, config.server.drain_seconds)
    if stop.failed:
        raise typer.Exit(1)


class _Stop:
    """Set by the first and by the second Ctrl-C or SIGTERM."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self.failed = False
        """A load that must not fail has."""

    def pressed(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


def _on_signals() -> _Stop:
    stop = _Stop()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, stop.pressed)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.pressed))
    return stop


async def _drain(console: Console, runtime: Runtime, second: asyncio.Event, seconds: float) -> None:
    """Refuse new calls and let those in flight finish, until time is up or Ctrl-C comes again."""
    runtime.draining = True
    deadline = asyncio.get_running_loop().time() + seconds
    if runtime.in_flight:
        console.print(f"Stopping: {runtime.in_flight} calls in flight; Ctrl-C again stops at once.")
    while runtime.in_flight and not second.is_set() and asyncio.get_running_loop().time() < deadline:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(second.wait(), 0.05)


async def _announce(console: Console, runtime: Runtime, loads: list[ServedModel], stop: _Stop) -> None:
    """Say how each load ended, as soon as it has; on a terminal also what those that go on are doing."""
    from rich.markup import escape

    from hfms_cli.errors import HfmsError

    pending = {asyncio.ensure_future(asyncio.wait([model.ready])): model for model in loads}
    status = console.status("") if console.is_terminal and loads else contextlib.nullcontext()
    with status as shown:
        while pending:
            done, _ = await asyncio.wait(pending, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            for model in map(pending.pop, done):
                if model.failure is not None:
                    console.print(f"[red]failed[/] {escape(model.id)}: {escape(model.failure.message)}", soft_wrap=True)
                    needed = not runtime.config.models.required or runtime.pool.is_required(model)
                    stop.failed |= runtime.config.models.exit_on_failure and needed
                elif model.hosts:
                    info = model.host_now().info
                    console.print(
                        f"[green]ready[/]  {escape(model.id)}: {info.engine} on {info.device}, {info.dtype}, context "
                        f"{info.context_length}, {_replicas(len(model.hosts))}{model.load_seconds:.1f} s",
                        soft_wrap=True,
                    )
            if shown is not None:
                shown.update(escape(", ".join(f"{m.id}: {m.doing or 'waiting'}" for m in pending.values())))
    for name, load in runtime.pool.adapters.begun.items():
        await asyncio.wait([load])
        try:
            console.print(f"[green]ready[/]  {escape(name)}: an adapter of {escape(load.result().parent.id)}")
        except HfmsError as exc:
            console.print(f"[red]failed[/] {escape(name)}: {escape(exc.message)}", soft_wrap=True)
            stop.failed |= runtime.config.models.exit_on_failure
    if stop.failed:
        console.print("[red]stopping[/] because of that ([models] exit_on_failure)")
        stop.first.set()


def _replicas(count: int) -> str:
    return f"{count} replicas, " if count > 1 else ""


def _panel(console: Console, runtime: Runtime, url: str) -> None:
    """What an operator wants to see at the start."""
    from rich.markup import escape
    from rich.panel import Panel
    from rich.table import Table

    from hfms_cli.sizes import human_bytes

    config = runtime.config
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="bold")
    rows.add_column(overflow="fold")
    rows.add_row("URL", f"{url}/v1")
    rows.add_row("Models", escape("\n".join(config.models.serve)) or "none yet: POST /models/load, or hfms models load")
    devices = [
        f"{d['id']}  {d['name']}, {human_bytes(d['free_bytes'])} free of {human_bytes(d['total_bytes'])}"
        for kind in runtime.probe()
        for d in kind["devices"]
    ]
    rows.add_row("Devices", escape("\n".join(devices)) or "none")
    rows.add_row("Middleware", " → ".join(config.middleware.order) or "none")
    rows.add_row("Config", config.file if Path(config.file).exists() else "defaults (hfms config init writes a file)")
    for warning in runtime.warnings:
        rows.add_row("[yellow]Warning[/]", escape(warning))
    console.print(Panel(rows, title="hfms", title_align="left", expand=False))
