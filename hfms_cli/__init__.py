"""hfms, the Hugging Face model server. What is named here is the public API for plugins; nothing else is."""

import importlib
from typing import TYPE_CHECKING, Any

from hfms_cli.config import Config, load_config
from hfms_cli.errors import (
    BadRequest,
    ConfigError,
    Conflict,
    ContextLengthExceeded,
    DeadlineExceeded,
    DoesNotFit,
    EngineDied,
    EngineFault,
    FetchFailed,
    Forbidden,
    GatedModel,
    HfmsError,
    LoadFailed,
    ModelNotFound,
    NoChatTemplate,
    NotFound,
    Overloaded,
    PluginError,
    Unauthorized,
    Unavailable,
    UnsafeFormat,
    Unsupported,
    VerifyFailed,
)
from hfms_cli.hookspecs import (
    ContentStore,
    Engine,
    Exchange,
    Hardware,
    LoadedModel,
    LoadRequest,
    Middleware,
    NoOptions,
    Proceed,
    Progress,
    Provider,
    Report,
    Storage,
    exchange,
    hookimpl,
    report_nothing,
)
from hfms_cli.model_files import PICKLES, SeveralModels, choose, gguf_models, gguf_tag
from hfms_cli.settings import setting
from hfms_cli.types import (
    PRIORITIES,
    Call,
    Caller,
    CallInput,
    Chunk,
    Conversation,
    Device,
    LoadedInfo,
    Manifest,
    ModelCard,
    ModelFile,
    ModelName,
    Pair,
    Probe,
    Quality,
    Quantize,
    Sampling,
    Task,
    TokenLogprob,
)
from hfms_cli.version import __version__

if TYPE_CHECKING:
    from hfms_cli.cli.client import Client, admin_key, local_url
    from hfms_cli.cli.options import AsJson, ConfigFile, ServerUrl
    from hfms_cli.cli.output import print_json, print_table, printable
    from hfms_cli.web.body import parse, parse_fields
    from hfms_cli.web.context import caller_of, require_admin, respond

# What only verbs and routes need is imported when it is asked for: typer and aiohttp take long.
_LATER = {
    "hfms_cli.cli.client": ("Client", "admin_key", "local_url"),
    "hfms_cli.cli.options": ("AsJson", "ConfigFile", "ServerUrl"),
    "hfms_cli.cli.output": ("print_json", "print_table", "printable"),
    "hfms_cli.web.body": ("parse", "parse_fields"),
    "hfms_cli.web.context": ("caller_of", "require_admin", "respond"),
}


def __getattr__(name: str) -> Any:
    for module, names in _LATER.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "PICKLES",
    "PRIORITIES",
    "AsJson",
    "BadRequest",
    "Call",
    "CallInput",
    "Caller",
    "Chunk",
    "Client",
    "Config",
    "ConfigError",
    "ConfigFile",
    "Conflict",
    "ContentStore",
    "ContextLengthExceeded",
    "Conversation",
    "DeadlineExceeded",
    "Device",
    "DoesNotFit",
    "Engine",
    "EngineDied",
    "EngineFault",
    "Exchange",
    "FetchFailed",
    "Forbidden",
    "GatedModel",
    "Hardware",
    "HfmsError",
    "LoadFailed",
    "LoadRequest",
    "LoadedInfo",
    "LoadedModel",
    "Manifest",
    "Middleware",
    "ModelCard",
    "ModelFile",
    "ModelName",
    "ModelNotFound",
    "NoChatTemplate",
    "NoOptions",
    "NotFound",
    "Overloaded",
    "Pair",
    "PluginError",
    "Probe",
    "Proceed",
    "Progress",
    "Provider",
    "Quality",
    "Quantize",
    "Report",
    "Sampling",
    "ServerUrl",
    "SeveralModels",
    "Storage",
    "Task",
    "TokenLogprob",
    "Unauthorized",
    "Unavailable",
    "UnsafeFormat",
    "Unsupported",
    "VerifyFailed",
    "__version__",
    "admin_key",
    "caller_of",
    "choose",
    "exchange",
    "gguf_models",
    "gguf_tag",
    "hookimpl",
    "load_config",
    "local_url",
    "parse",
    "parse_fields",
    "print_json",
    "print_table",
    "printable",
    "report_nothing",
    "require_admin",
    "respond",
    "setting",
]
