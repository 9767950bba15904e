"""Every error that a caller can meet, with the HTTP status and OpenAI code that it becomes.

    HfmsError
    ├── BadRequest 400
    │   ├── ContextLengthExceeded
    │   ├── NoChatTemplate
    │   ├── UnsafeFormat
    │   └── Unsupported
    ├── Unauthorized 401
    ├── Forbidden 403
    │   └── GatedModel
    ├── NotFound 404
    │   └── ModelNotFound
    ├── Conflict 409
    ├── Overloaded 429
    ├── DeadlineExceeded 504
    ├── EngineFault 500
    ├── FetchFailed 502
    │   └── VerifyFailed
    ├── Unavailable 503
    │   ├── EngineDied
    │   ├── LoadFailed
    │   └── DoesNotFit
    └── StartupError (exit 2; never sent over HTTP)
        ├── ConfigError
        └── PluginError

A message says what was wrong and what to do. It may be shown to any caller, so it never holds a secret, a prompt or
the text of an unexpected exception.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, ClassVar

__all__ = [
    "BadRequest",
    "ConfigError",
    "Conflict",
    "ContextLengthExceeded",
    "DeadlineExceeded",
    "DoesNotFit",
    "EngineDied",
    "EngineFault",
    "FetchFailed",
    "Forbidden",
    "GatedModel",
    "HfmsError",
    "LoadFailed",
    "ModelNotFound",
    "NoChatTemplate",
    "NotFound",
    "Overloaded",
    "PluginError",
    "StartupError",
    "Unauthorized",
    "Unavailable",
    "UnsafeFormat",
    "Unsupported",
    "VerifyFailed",
    "close_matches",
]


class HfmsError(Exception):
    """Base of all. `status`, `type` and `code` are OpenAI's; `param` names the field at fault."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: str | None = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after
        if code is not None:
            self.code = code

    def envelope(self) -> dict[str, Any]:
        """OpenAI's error body."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class BadRequest(HfmsError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class ContextLengthExceeded(BadRequest):
    """The prompt, or the prompt and the answer asked for, is longer than the model's context."""

    code = "context_length_exceeded"


class NoChatTemplate(BadRequest):
    code = "no_chat_template"


class UnsafeFormat(BadRequest):
    """The model comes as pickles or as code, and the operator has not allowed that."""

    code = "unsafe_format"


class Unsupported(BadRequest):
    """A storage was asked for what it cannot do; another one may."""

    code = "unsupported_operation"


class Unauthorized(HfmsError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class Forbidden(HfmsError):
    status = 403
    type = "invalid_request_error"
    code = "forbidden"


class GatedModel(Forbidden):
    """The hub has the model and will not hand it out without an accepted licence and a token."""

    code = "gated_model"


class NotFound(HfmsError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    """No model of this name, with the nearest names there are."""

    code = "model_not_found"

    @classmethod
    def named(cls, name: str, known: Iterable[str], why: str = "") -> ModelNotFound:
        near = close_matches(name, known)
        text = f"The model `{name}` does not exist or is not served here."
        if near:
            text += " Did you mean " + " or ".join(f"`{n}`" for n in near) + "?"
        return cls(f"{text} {why}".rstrip(), param="model")


class Conflict(HfmsError):
    status = 409
    type = "invalid_request_error"
    code = "conflict"


class Overloaded(HfmsError):
    status = 429
    type = "rate_limit_error"
    code = "overloaded"


class DeadlineExceeded(HfmsError):
    """Nobody was free in time."""

    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


class EngineFault(HfmsError):
    """The engine failed on this call and lives on."""

    code = "engine_error"


class FetchFailed(HfmsError):
    """A source did not deliver: the network, the disk, or the other side."""

    status = 502
    code = "fetch_failed"


class VerifyFailed(FetchFailed):
    """What was delivered is not what was asked for."""

    code = "verify_failed"


class Unavailable(HfmsError):
    status = 503
    code = "unavailable"

    def __init__(self, message: str, **more: Any) -> None:
        more.setdefault("retry_after", 1.0)
        super().__init__(message, **more)


class EngineDied(Unavailable):
    """The model's worker process ended, by itself or by force; it is being started again."""

    code = "engine_died"


class LoadFailed(Unavailable):
    code = "load_failed"


class DoesNotFit(Unavailable):
    """The model needs more memory than the device has free."""

    code = "insufficient_memory"


class StartupError(HfmsError):
    """What stops `hfms` before it serves; printed without a traceback, exit status 2."""


class ConfigError(StartupError):
    """`where` is the file and table or the variable or flag at fault."""


class PluginError(StartupError):
    """A plugin that the configuration uses is missing, broken or named twice."""


def close_matches(word: str, choices: Iterable[str]) -> list[str]:
    """Up to three of `choices` that `word` may have been meant as, best first."""
    table = {c.lower(): c for c in choices}
    return [table[m] for m in difflib.get_close_matches(word.lower(), table, n=3, cutoff=0.6)]


def _tree(cls: type[HfmsError]) -> Iterable[type[HfmsError]]:
    yield cls
    for sub in cls.__subclasses__():
        yield from _tree(sub)


def from_wire(
    kind: str, message: str, param: str | None, retry_after: float | None, code: str | None = None
) -> HfmsError:
    """Rebuild an error that another process sent, by its class name; unknown ones become `EngineFault`."""
    found = next((c for c in _tree(HfmsError) if c.__name__ == kind), EngineFault)
    return found(message, param=param, code=code, retry_after=retry_after)
