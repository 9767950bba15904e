"""`hfms.toml` as frozen dataclasses. A setting exists when it is written here; nothing else is read.

Precedence: flag > HFMS_* > HF_SERVER_* > file > default. Options of plugins live in a table named after the plugin
(`[middleware.auth]`, `[engine.transformers]`) and are read by the plugin's own dataclass when it is created.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfms_cli.errors import ConfigError, close_matches
from hfms_cli.parsing import REASONING_FORMATS, TOOL_FORMATS
from hfms_cli.settings import PREFIXES, origins, read_table, setting

__all__ = ["Config", "load_config"]


@dataclass(frozen=True)
class ServerConfig:
    """The HTTP server."""

    host: str = setting("127.0.0.1", "Address to listen on.", env="HOST")
    port: int = setting(8000, "Port to listen on; 0 takes a free one.", env="PORT", ge=0, le=65535)
    workers: int = setting(
        1, "Processes that answer HTTP on this port; they share the engine processes.", env="WORKERS", ge=1
    )
    insecure: bool = setting(False, "Listen beyond loopback although no key is configured.", env="INSECURE")
    metrics: bool = setting(True, "Serve /metrics for Prometheus.", env="ENABLE_METRICS")
    share_models: bool = setting(
        False, "Serve what `hfms models publish` has published to other hfms servers.", env="SHARE_MODELS"
    )
    state_dir: str = setting(
        "", 'Where hfms keeps what it knows between runs; empty: "hfms" in the user\'s state folder.', env="STATE_DIR"
    )
    max_body_bytes: int = setting(32 * 2**20, "Longest request body, in bytes.", ge=1024)
    drain_seconds: float = setting(30.0, "How long calls in flight may go on after Ctrl-C or SIGTERM.", ge=0)
    keep_alive_seconds: float = setting(
        15.0, "A stream that has been silent for so long sends a comment, lest a proxy cut it; 0: never.", ge=0
    )

    @property
    def loopback_only(self) -> bool:
        """Whether only this machine can reach `host`."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True)
class LogConfig:
    """Logs. Prompts, answers and secrets are never logged."""

    level: str = setting("info", "Least level shown.", env="LOG_LEVEL", choices=("debug", "info", "warning", "error"))
    format: str = setting(
        "auto",
        "Lines for people or for machines; auto: console on a terminal.",
        env="LOG_FORMAT",
        choices=("auto", "console", "json"),
    )


@dataclass(frozen=True)
class ModelsConfig:
    """Which models are served, and what is allowed of them."""

    serve: list[str] = setting(list, "Models to load at start, as `hfms serve` takes them.", env="MODELS")
    replicas: int = setting(1, "Engine processes of each model.", env="REPLICAS", ge=1, le=256)
    aliases: dict[str, str] = setting(dict, "More names for models: alias = model.")
    folders: list[str] = setting(
        list,
        "Folders of models, and of cards that describe models; all of them are served by name.",
        env="MODEL_FOLDERS",
    )
    dtype: str = setting(
        "auto",
        "Precision of weights; auto: float32 on CPU, the model's own elsewhere.",
        env="DTYPE",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantize: str = setting(
        "auto",
        "Bits of weights; auto: as the engine's own options say.",
        env="QUANTIZE",
        choices=("auto", "none", "int8", "int4"),
    )
    draft_models: dict[str, str] = setting(
        dict, "Smaller models of the same vocabulary that guess for larger ones: model = draft model."
    )
    lora_modules: list[str] = setting(
        list,
        'LoRA adapters to load at start: "name=org/adapter", or {"name", "path", "base_model_name"} as JSON.',
    )
    profile: str = setting(
        "auto",
        "Which of the choices of `hfms models tune` to load a model by; auto: throughput, else latency.",
        env="PROFILE",
        choices=("auto", "latency", "throughput"),
    )
    tool_parser: str = setting(
        "auto",
        "How calls of functions are read from answers; auto: as each model's chat template says.",
        env="TOOL_PARSER",
        choices=TOOL_FORMATS,
    )
    reasoning_parser: str = setting(
        "auto",
        "Marks around a model's reasoning: <think> or [THINK]; auto: as each model's chat template says.",
        env="REASONING_PARSER",
        choices=REASONING_FORMATS,
    )
    load_on_request: bool = setting(True, "Load a model that is on disk when a call asks for it.")
    load_wait_seconds: float = setting(
        60.0, "How long a call waits for its model to load; then, and with 0 at once, it is answered 503.", ge=0
    )
    load_seconds: float = setting(600.0, "Longest time that a load may take.", ge=1)
    retry_seconds: float = setting(
        30.0, "How long after a failed load calls hear of it, before one may try again; doubled each time.", ge=0
    )
    warm_up: bool = setting(True, "Have a model answer a short call before it counts as loaded.")
    idle_seconds: float = setting(0.0, "Unload models that nobody has called for so long; 0: never.", ge=0)
    pinned: list[str] = setting(
        list, "Models that are never unloaded to make room, nor when idle.", env="PINNED_MODELS"
    )
    required: list[str] = setting(
        list, 'Models without which /ready answers 503; loaded at start. "*": all of `serve`.', env="REQUIRED_MODELS"
    )
    exit_on_failure: bool = setting(
        False, "End with status 1 where a model of `required`, or without one of `serve`, cannot be loaded at start."
    )
    allow_pickle: bool = setting(False, "Serve models that come only as pickles (read with weights_only).")
    trust_remote_code: bool = setting(False, "Run Python code that a model brings along.")


@dataclass(frozen=True)
class EngineConfig:
    """Engine processes: one a loaded model."""

    order: list[str] = setting(
        lambda: ["openvino", "transformers", "llama_cpp", "embeddings", "speech", "vision", "echo"],
        "Engines to try for a model, in this order.",
    )
    batching: bool = setting(
        True, "Run several sequences of a model at once; false: one after another.", env="ENABLE_BATCHING"
    )
    max_calls: int = setting(256, "Calls that one engine process may hold; more are answered 429.", ge=1)
    heartbeat_seconds: float = setting(
        60.0, "An engine whose loop is silent for so long is ended and started again.", ge=1
    )
    restart_limit: int = setting(
        5, "Restarts in a row, without a minute of life, after which a model counts as failed.", ge=0
    )


@dataclass(frozen=True)
class HardwareConfig:
    """Devices."""

    preferred: list[str] = setting(
        lambda: ["cuda", "rocm", "mps", "openvino", "cpu"],
        "Kinds of device, best first.",
        env="HARDWARE",
    )


@dataclass(frozen=True)
class StorageConfig:
    """Where models come from."""

    order: list[str] = setting(
        lambda: ["local", "package", "echo", "ipfs_kit", "hf_cache", "kubo"],
        "Storages to ask, in this order.",
        env="STORAGE_ORDER",
    )
    backend: str = setting(
        "", "Storage to ask first for what has a CID; empty: as in the order.", env="IPFS_BACKEND", bare=True
    )
    block_seconds: float = setting(30.0, "Longest time that a storage may take for one block.", ge=0.1)
    trusted_publishers: list[str] = setting(
        list, 'Whose signatures count, for which names: "org/* ed25519:KEY"; see `hfms publisher`.'
    )
    cache_dir: str = setting(
        "",
        'Folder for what is fetched and what is made of it; empty: "hfms" in the user\'s cache folder.',
        env="CACHE_DIR",
    )


@dataclass(frozen=True)
class MiddlewareConfig:
    """What stands between a request and its engine."""

    order: list[str] = setting(
        lambda: ["auth", "rate_limit", "queue", "breaker"],
        "Middlewares, outermost first; what is not listed is off.",
        env="MIDDLEWARE",
    )


@dataclass(frozen=True)
class PluginsConfig:
    """Plugins that other packages bring."""

    disabled: list[str] = setting(list, "Entry points that are not to be loaded.", env="DISABLED_PLUGINS")


# Table name in the file, attribute of Config, and whether plugins' own tables live below it.
TABLES: tuple[tuple[str, type[Any], bool], ...] = (
    ("server", ServerConfig, False),
    ("log", LogConfig, False),
    ("models", ModelsConfig, False),
    ("engine", EngineConfig, True),
    ("hardware", HardwareConfig, True),
    ("storage", StorageConfig, True),
    ("middleware", MiddlewareConfig, True),
    ("plugins", PluginsConfig, False),
)

# ENABLE_x = true puts a middleware into the order at its usual place, which is its place here; false takes it out.
SWITCHES = {
    "ENABLE_AUTH": "auth",
    "ENABLE_RATE_LIMITING": "rate_limit",
    "ENABLE_CACHING": "cache",
    "ENABLE_REQUEST_QUEUE": "queue",
    "ENABLE_CIRCUIT_BREAKER": "breaker",
}


# The same for storages; these are also read without a prefix, as the original system has them.
STORAGE_SWITCHES = {"ENABLE_IPFS_KIT": "ipfs_kit", "ENABLE_HF_CACHE": "hf_cache"}
STORAGE_OFF = {"IPFS_KIT_DISABLE": "ipfs_kit"}
"""These take a storage out when they are true, whatever else is said."""


@dataclass(frozen=True)
class Config:
    """All settings, checked. `options` holds the plugins' own tables, as (kind, name) -> values, not yet read."""

    server: ServerConfig = ServerConfig()
    log: LogConfig = LogConfig()
    models: ModelsConfig = ModelsConfig()
    engine: EngineConfig = EngineConfig()
    hardware: HardwareConfig = HardwareConfig()
    storage: StorageConfig = StorageConfig()
    middleware: MiddlewareConfig = MiddlewareConfig()
    plugins: PluginsConfig = PluginsConfig()
    options: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    file: str = "hfms.toml"
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)
    origins: dict[tuple[str, str], str] = field(default_factory=dict, repr=False)
    """(table, key) -> where the value comes from: `flag`, variables, `file` or `default`."""

    def order(self, kind: str) -> list[str]:
        """Names of the plugins of a kind that are in use, in the operator's order."""
        if kind == "hardware":
            return self.hardware.preferred
        first = self.storage.backend if kind == "storage" else ""
        order = list(getattr(self, kind).order)
        return [first, *order] if first and first not in order else order

    def naming(self, kind: str, name: str) -> str:
        """Where a plugin is named, for messages: the file or the variable, the table and the key."""
        if name not in self.order(kind):
            return f"{self.file} [{kind}.{name}]"
        key = "preferred" if kind == "hardware" else "order"
        if kind == "storage" and name == self.storage.backend:
            key = "backend"
        origin = self.origins.get((kind, key), "default").replace("file", self.file)
        return f"[{kind}] {key}" if origin == "default" else f"{origin} [{kind}] {key}"

    @property
    def state_dir(self) -> Path:
        """Where hfms keeps what it knows between runs: what it has verified, for one."""
        base = self.environ.get("XDG_STATE_HOME") or "~/.local/state"
        return Path(self.server.state_dir or Path(base) / "hfms").expanduser()

    def plugin_options(self, kind: str, name: str, table: type[Any]) -> Any:
        """The options of one plugin, read by its own dataclass. Raises ConfigError."""
        values = self.options.get((kind, name), {})
        return read_table(table, values, where=f"{self.file} [{kind}.{name}]", environ=self.environ)


def load_config(
    file: Path | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Mapping[str, Any]] | None = None,
) -> Config:
    """Read the configuration.

    file: must exist where given; otherwise HFMS_CONFIG, then `hfms.toml` here, then no file.
    flags: table -> key -> value, from the command line; None values are "not given".
    Raises ConfigError.
    """
    environ = os.environ if environ is None else environ
    path, raw = _read_file(file, environ)
    known = [name for name, _, _ in TABLES]
    for name in raw:
        if name not in known:
            near = close_matches(name, known)
            hint = f"did you mean `[{near[0]}]`?" if near else "known tables: " + ", ".join(known)
            raise ConfigError(f"{path}: unknown table `[{name}]`; {hint}", param=name)
    tables: dict[str, Any] = {}
    options: dict[tuple[str, str], dict[str, Any]] = {}
    sources: dict[tuple[str, str], str] = {}
    for name, cls, has_plugins in TABLES:
        values = raw.get(name, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: `{name}` must be a table, written `[{name}]`", param=name)
        if has_plugins:
            sub = {k: v for k, v in values.items() if isinstance(v, dict)}
            options |= {(name, k): v for k, v in sub.items()}
            values = {k: v for k, v in values.items() if k not in sub}
        given = (flags or {}).get(name)
        tables[name] = read_table(cls, values, where=f"{path} [{name}]", environ=environ, overrides=given)
        found = origins(cls, values, environ=environ, overrides=given)
        sources |= {(name, key): origin for key, origin in found.items()}
    usual = StorageConfig().order
    for name, order, switches in (
        ("middleware", *_switched(tables["middleware"].order, environ, SWITCHES, list(SWITCHES.values()))),
        ("storage", *_switched(tables["storage"].order, environ, STORAGE_SWITCHES, usual, off=STORAGE_OFF, bare=True)),
    ):
        tables[name] = dataclasses.replace(tables[name], order=order)
        sources[name, "order"] = ", ".join([sources[name, "order"], *switches])
    return Config(**tables, options=options, file=str(path), environ=environ, origins=sources)


def _read_file(file: Path | None, environ: Mapping[str, str]) -> tuple[Path, dict[str, Any]]:
    named = file or (Path(environ["HFMS_CONFIG"]) if environ.get("HFMS_CONFIG") else None)
    path = named or Path("hfms.toml")
    if named is None and not path.exists():
        return path, {}
    try:
        return path, tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {exc.start})") from exc
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{path}: is not valid TOML: {exc}") from exc


def _switched(
    order: list[str],
    environ: Mapping[str, str],
    switches: Mapping[str, str],
    usual: list[str],
    *,
    off: Mapping[str, str] = {},
    bare: bool = False,
) -> tuple[list[str], list[str]]:
    """The order after the switches of the original system, and the variables that were set.

    switches: true puts the name in at its place in `usual`, false takes it out. off: true takes it out.
    """
    seen = []
    for switch, name in (*switches.items(), *off.items()):
        variable = next((p + switch for p in (*PREFIXES, *[""] * bare) if p + switch in environ), None)
        if variable is None:
            continue
        seen.append(variable)
        text = environ[variable].strip().lower()
        if text not in ("1", "true", "yes", "on", "0", "false", "no", "off"):
            raise ConfigError(f"{variable} is {text!r}, which is not true or false")
        wanted = text in ("1", "true", "yes", "on")
        if switch in off:
            order = [n for n in order if n != name or not wanted]
        elif not wanted:
            order = [n for n in order if n != name]
        elif name not in order:
            before = usual[: usual.index(name)]
            at = max((order.index(n) + 1 for n in before if n in order), default=0)
            order = [*order[:at], name, *order[at:]]
    return order, seen
