"""What an answer must look like, as clients say it: OpenAI's `response_format`, and vLLM's names of old and new."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from hfms_cli.errors import BadRequest
from hfms_cli.types import Structure

Choices = Annotated[list[str], Meta(min_length=1)]


class TextFormat(Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    """`response_format`: anything."""


class JsonObjectFormat(Struct, tag_field="type", tag="json_object", forbid_unknown_fields=True):
    """`response_format`: a JSON object, with whatever in it."""


class NamedSchema(Struct, kw_only=True, forbid_unknown_fields=True):
    """A JSON schema and what it is called. `strict` is taken and changes nothing: the answer always fits."""

    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(Struct, tag_field="type", tag="json_schema", forbid_unknown_fields=True):
    """`response_format`: JSON that fits a schema."""

    json_schema: NamedSchema


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat


class StructuredOutputs(Struct, kw_only=True, forbid_unknown_fields=True):
    """vLLM's `structured_outputs`; exactly one of its fields."""

    json: dict[str, Any] | str | None = None
    """A JSON schema, as an object or as its text."""
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    """Lark, or GBNF (`root ::= ...`)."""
    json_object: bool | None = None

    def structure(self) -> Structure:
        """Raises BadRequest."""
        found = [
            *_guided("structured_outputs", json=self.json, regex=self.regex, choice=self.choice, grammar=self.grammar),
            *([Structure(kind="json_object", param="structured_outputs")] if self.json_object else []),
        ]
        if len(found) != 1:
            raise BadRequest(
                "`structured_outputs` takes exactly one of `json`, `regex`, `choice`, `grammar` and `json_object`.",
                param="structured_outputs",
            )
        return found[0]


class Structured(Struct, kw_only=True, forbid_unknown_fields=True):
    """The fields of a request that say what its answers must look like; at most one of them."""

    structured_outputs: StructuredOutputs | None = None
    # What vLLM called them before.
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None

    def structure(self, response_format: ResponseFormat | None = None) -> Structure | None:
        """Raises BadRequest."""
        found: list[Structure] = []
        match response_format:
            case JsonObjectFormat():
                found.append(Structure(kind="json_object"))
            case JsonSchemaFormat(named):
                found.append(Structure(kind="json_schema", spec=_text(named.schema)))
        if self.structured_outputs is not None:
            found.append(self.structured_outputs.structure())
        found += _guided("guided_json", json=self.guided_json)
        found += _guided("guided_regex", regex=self.guided_regex)
        found += _guided("guided_choice", choice=self.guided_choice)
        found += _guided("guided_grammar", grammar=self.guided_grammar)
        if len(found) > 1:
            one, other = found[0].param, found[1].param
            raise BadRequest(f"`{one}` and `{other}` both say what the answer must look like; send one.", param=other)
        return found[0] if found else None


def _guided(
    param: str,
    *,
    json: dict[str, Any] | str | None = None,
    regex: str | None = None,
    choice: list[str] | None = None,
    grammar: str | None = None,
) -> list[Structure]:
    """What is not None."""
    found = []
    if json is not None:
        found.append(Structure(kind="json_schema", spec=json if isinstance(json, str) else _text(json), param=param))
    if regex is not None:
        found.append(Structure(kind="regex", spec=regex, param=param))
    if choice is not None:
        found.append(Structure(kind="choice", spec=_text(choice), param=param))
    if grammar is not None:
        found.append(Structure(kind="grammar", spec=grammar, param=param))
    return found


def _text(value: Any) -> str:
    return msgspec.json.encode(value).decode()
