"""What a client sent as a type, or a 400 that names the field as OpenAI does."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from hfms_cli.errors import BadRequest

T = TypeVar("T")
_AT = re.compile(r" - at `\$\.?([^`]*)`$")
_UNKNOWN = re.compile(r"^Object contains unknown field `([^`]*)`")
_MISSING = re.compile(r"^Object missing required field `([^`]*)`")


def parse(kind: type[T], body: bytes) -> T:
    """A JSON body as `kind`. Raises BadRequest, naming the field as OpenAI does (`messages[0].role`)."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as exc:
        raise _naming_the_field(exc) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise BadRequest(f"The body is not valid JSON: {exc}.", code="invalid_json") from None


def parse_fields(kind: type[T], fields: Mapping[str, Any]) -> T:
    """A form or a query, whose values are all text, as `kind`. Raises BadRequest as `parse` does."""
    try:
        return msgspec.convert(dict(fields), type=kind, strict=False)
    except msgspec.ValidationError as exc:
        raise _naming_the_field(exc) from None


def _naming_the_field(exc: msgspec.ValidationError) -> BadRequest:
    text = str(exc)
    at = _AT.search(text)
    path = at[1].replace("[...]", "") if at else ""
    message = _AT.sub("", text)
    if unknown := _UNKNOWN.match(message):
        path = f"{path}.{unknown[1]}" if path else unknown[1]
        return BadRequest(f"Unsupported parameter: `{path}`.", param=path, code="unsupported_parameter")
    if missing := _MISSING.match(message):
        path = f"{path}.{missing[1]}" if path else missing[1]
        return BadRequest(f"Missing required parameter: `{path}`.", param=path, code="missing_parameter")
    return BadRequest(f"Invalid value for `{path or 'the body'}`: {message}.", param=path or None)
