"""`hfms doctor`: look at the machine, the configuration and the plugins, and say what to do."""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import os
import platform
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import typer

from hfms_cli.cli.client import Client, Refused, Unreachable, local_url
from hfms_cli.cli.hardware import first_choice, probe_all
from hfms_cli.cli.options import AsJson, ConfigFile
from hfms_cli.cli.output import console, print_json, printable
from hfms_cli.config import STORAGE_OFF, STORAGE_SWITCHES, SWITCHES, TABLES, Config, load_config
from hfms_cli.errors import ConfigError, StartupError, close_matches
from hfms_cli.hookspecs import KINDS
from hfms_cli.plugins import Plugins, discover
from hfms_cli.settings import PREFIXES, settings_of
from hfms_cli.sizes import human_bytes
from hfms_cli.version import __version__

# A small chat model with its index fits; below this a pull is likely to break off.
SCARCE_DISK_BYTES = 5 * 2**30
# `all` says nothing new, and the others are for those who work on hfms itself.
_UNREPORTED_EXTRAS = {"all", "test", "lint"}
_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


@dataclass(frozen=True)
class Finding:
    """One line of the report. `problem`: hfms will not work as configured."""

    level: Literal["ok", "warning", "problem"]
    about: str
    message: str
    advice: str = ""


def doctor(config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Check the machine and the settings.

    Looks at Python, the extras, the configuration, the plugins, devices, folders, the port and the environment, and
    says what to do. Exit status 1 where there is a problem.
    """
    findings = list(examine(config))
    if as_json:
        print_json([dataclasses.asdict(f) for f in findings])
    else:
        _print(findings)
    if any(f.level == "problem" for f in findings):
        raise typer.Exit(1)


def examine(file: Path | None) -> Iterator[Finding]:
    """Everything there is to say."""
    yield Finding("ok", "python", f"Python {platform.python_version()}, hfms {__version__}")
    yield from check_extras()
    try:
        config = load_config(file)
    except ConfigError as exc:
        yield Finding("problem", "config", exc.message, "correct it; nothing that depends on it was checked")
        return
    there = Path(config.file).exists()
    yield Finding("ok", "config", config.file if there else f"no {config.file} here: defaults and environment")
    plugins = discover(config)
    yield from check_plugins(plugins, config)
    yield from check_devices(plugins, config)
    yield from check_folders(plugins, config)
    yield from check_port(config)
    yield from check_hugging_face()
    yield from check_variables(plugins, config.environ)


def installed_version(package: str) -> str | None:
    """The version of a package, from its metadata; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_extras(version_of: Callable[[str], str | None] = installed_version) -> Iterator[Finding]:
    """Whether what the extras need is installed, by its metadata: importing torch would take seconds."""
    from packaging.requirements import Requirement

    needs: dict[str, list[Requirement]] = {}
    for text in importlib.metadata.requires("hfms") or ():
        need = Requirement(text)
        for extra in importlib.metadata.metadata("hfms").get_all("Provides-Extra") or ():
            alone = need.marker is None or need.marker.evaluate({"extra": ""})
            if not alone and need.marker and need.marker.evaluate({"extra": extra}) and need.name != "hfms":
                needs.setdefault(extra, []).append(need)
    for extra, wanted in needs.items():
        if extra in _UNREPORTED_EXTRAS:
            continue
        have = {need.name: version_of(need.name) for need in wanted}
        bad = [
            str(need.name) for need in wanted if not need.specifier.contains(have[need.name] or "", prereleases=True)
        ]
        if bad:
            message = f"extra `{extra}`: missing or too old: {', '.join(bad)}"
            yield Finding("warning", "extras", message, f"pip install 'hfms[{extra}]' if you want what it brings")
        else:
            yield Finding("ok", "extras", f"extra `{extra}`: " + ", ".join(f"{n} {v}" for n, v in have.items()))


def check_plugins(plugins: Plugins, config: Config) -> Iterator[Finding]:
    """Plugins that failed, and what the configuration asks of plugins and cannot get."""
    plugins.add_commands(typer.Typer(), config)
    for info in plugins.infos:
        who = f"{info.name} ({info.package} {info.version})"
        if not info.enabled:
            yield Finding("ok", "plugins", f"{who}: off")
        elif info.error:
            advice = f'update or uninstall {info.package}, or add "{info.name}" to [plugins] disabled'
            yield Finding("warning", "plugins", f"{who}: {info.error}", advice)
        else:
            yield Finding("ok", "plugins", f"{who}: {', '.join(info.provides)}")
    for fault in plugins.faults(config):
        yield Finding("problem", "plugins", fault.message, "correct the configuration, or install what it names")


def check_devices(plugins: Plugins, config: Config) -> Iterator[Finding]:
    """What each kind of hardware has, and whether there is anything to run on."""
    kinds = probe_all(plugins, config)
    for kind in kinds:
        for d in kind.probe.devices:
            free = f"{human_bytes(d.free_bytes)} of {human_bytes(d.total_bytes)} free"
            yield Finding("ok", "devices", f"{d.id}: {d.name}, {free}")
        if not kind.probe.devices:
            yield Finding("ok", "devices", f"{kind.name}: {kind.probe.reason or 'no device'}")
    if first_choice(kinds) is None:
        advice = "name a kind that has devices in [hardware] preferred"
        yield Finding("problem", "devices", "no device that the configuration allows", advice)


def check_folders(plugins: Plugins, config: Config) -> Iterator[Finding]:
    """Whether what is fetched can be kept, and whether the operator's folders are there."""
    for name in config.order("storage"):
        with suppress(StartupError):  # told of by check_plugins
            root: Path | None = getattr(plugins.create("storage", name, config), "root", None)
            if root is not None:
                yield cache_folder(f"[storage.{name}]", root)
    for folder in map(Path, config.models.folders):
        if not folder.expanduser().is_dir():
            yield Finding("problem", "folders", f"[models] folders names {folder}, which is no folder", "create it")


def cache_folder(what: str, folder: Path, scarce: int = SCARCE_DISK_BYTES) -> Finding:
    """Whether a folder can be written, or made, and has room."""
    home = next(p for p in (folder, *folder.absolute().parents) if p.exists())  # the root always exists
    if not home.is_dir() or not os.access(home, os.W_OK | os.X_OK):
        advice = "give this user the right to write there, or name another folder (HFMS_CACHE_DIR, HF_HOME)"
        return Finding("problem", "folders", f"{folder} (for {what}) cannot be written: {home}", advice)
    free = shutil.disk_usage(home).free
    text = f"{folder} (for {what}): {human_bytes(free)} free" + ("" if folder.exists() else ", not made yet")
    if free < scarce:
        return Finding("warning", "folders", text, "make room before you pull a model")
    return Finding("ok", "folders", text)


def check_port(config: Config) -> Iterator[Finding]:
    """Whether the port is free, and who has it where it is not."""
    host, port = config.server.host, config.server.port
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            yield _who_answers(local_url(config.server))
        else:
            advice = "choose another host or port under [server]"
            yield Finding("problem", "port", f"{host}:{port} cannot be listened on: {exc.strerror}", advice)
    else:
        yield Finding("ok", "port", f"{host}:{port} is free" if port else f"{host}: a free port will be taken")


def _who_answers(url: str) -> Finding:
    import asyncio

    async def ask() -> Any:
        async with asyncio.timeout(5), Client(url) as client:
            return await client.get("/health")

    try:
        answer = asyncio.run(ask())
    except (Unreachable, Refused, TimeoutError):
        answer = None
    if answer == {"status": "ok"}:
        return Finding("ok", "port", f"hfms answers at {url}")
    advice = "end the other program, or choose another [server] port"
    return Finding("problem", "port", f"{url} belongs to a program that is not hfms", advice)


def check_hugging_face() -> Iterator[Finding]:
    """Where the hub's files live, whether it may be asked, and whether there is a token: never its text."""
    from huggingface_hub import constants, get_token

    yield Finding("ok", "hugging face", f"HF_HOME is {constants.HF_HOME}")
    if constants.HF_HUB_OFFLINE:
        advice = "unset HF_HUB_OFFLINE to pull models from the hub"
        yield Finding("warning", "hugging face", "offline: only what is on disk can be served", advice)
    has_token = get_token() is not None
    yield Finding("ok", "hugging face", "a token is set" if has_token else "no token: gated models cannot be pulled")


def check_variables(plugins: Plugins, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Variables that look like ours and do nothing. Their values are never shown."""
    known = known_variables(plugins)
    for name in sorted(n for n in environ if n.startswith(PREFIXES) and n not in known):
        near = close_matches(name, known)
        advice = f"did you mean {near[0]}?" if near else "unset it; `hfms.toml.example` names all there are"
        yield Finding("warning", "environment", f"{name} is set, and nothing reads it", advice)


def known_variables(plugins: Plugins) -> set[str]:
    """Every variable that hfms or one of its plugins reads."""
    tables = [cls for _, cls, _ in TABLES]
    tables += [plugins.record(kind, name).options for kind in KINDS for name in plugins.names(kind)]
    named = {variable for table in tables for s in settings_of(table) for variable in s.variables}
    own = [*SWITCHES, *STORAGE_SWITCHES, *STORAGE_OFF, "API_KEY", "ADMIN_API_KEY"]
    return named | {prefix + name for prefix in PREFIXES for name in own} | {"HFMS_CONFIG"}


def _print(findings: list[Finding]) -> None:
    from rich.text import Text

    out = console()
    for f in findings:
        out.print(Text(f"{f.level:8}", style=_STYLES[f.level]), printable(f"{f.about}: {f.message}"), soft_wrap=True)
        if f.advice:
            out.print(" " * 8, printable(f"-> {f.advice}"), soft_wrap=True)
