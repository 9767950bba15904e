"""Functions that a model may call: what clients send of them, and what that asks of a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from hfms_cli.errors import BadRequest
from hfms_cli.types import Structure

MAX_TOOLS = 128
MAX_TOOL_BYTES = 256 * 1024
Name = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Function(Struct, kw_only=True, forbid_unknown_fields=True):
    """A function that may be called. `strict` holds where a call is forced; else the model may err."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON Schema of its arguments; none: it takes none."""
    strict: bool | None = None


class Tool(Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    function: Function


class Named(Struct, forbid_unknown_fields=True):
    name: str


class NamedChoice(Struct, forbid_unknown_fields=True):
    """The function that must be called."""

    type: Literal["function"]
    function: Named


ToolChoice = Literal["none", "auto", "required"] | NamedChoice


class Called(Struct, forbid_unknown_fields=True):
    name: str
    arguments: str

    def plain(self, param: str) -> dict[str, Any]:
        """As templates take it: with the arguments as an object. Raises BadRequest."""
        try:
            arguments = msgspec.json.decode(self.arguments or "{}")
        except (msgspec.DecodeError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise BadRequest("The arguments of a call must be the JSON text of an object.", param=f"{param}.arguments")
        return {"name": self.name, "arguments": arguments}


class ToolCall(Struct, kw_only=True, forbid_unknown_fields=True):
    """A call that an answer had, as it comes back in a later request."""

    id: str
    type: Literal["function"] = "function"
    function: Called
    index: int | None = None

    def plain(self, param: str) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": self.function.plain(f"{param}.function")}


@dataclass(frozen=True)
class ToolUse:
    """What a model may call, and what it must."""

    tools: list[dict[str, Any]]
    """As templates take them."""
    functions: dict[str, dict[str, Any]]
    """JSON Schema of each one's arguments, by its name."""
    required: bool = False
    named: str | None = None
    """The one that must be called."""
    parallel: bool = True
    """There may be several calls in an answer."""

    @classmethod
    def of(cls, functions: list[Function] | None, choice: str | None, parallel: bool | None) -> ToolUse | None:
        """choice: `auto`, `none`, `required` or `=` and a name. None where nothing may be called. Raises BadRequest."""
        if not functions:
            if choice not in (None, "none", "auto"):
                raise BadRequest("`tool_choice` needs `tools`.", param="tool_choice")
            return None
        if len(functions) > MAX_TOOLS:
            raise BadRequest(f"There are more than {MAX_TOOLS} `tools`.", param="tools")
        if len(msgspec.json.encode(functions)) > MAX_TOOL_BYTES:
            raise BadRequest(f"`tools` are longer than {MAX_TOOL_BYTES} bytes.", param="tools")
        schemas = {f.name: f.parameters or {"type": "object", "properties": {}} for f in functions}
        if len(schemas) < len(functions):
            raise BadRequest("Two functions in `tools` have the same name.", param="tools")
        named = choice.removeprefix("=") if choice and choice.startswith("=") else None
        if named is not None and named not in schemas:
            raise BadRequest("`tool_choice` names a function that is not in `tools`.", param="tool_choice")
        if choice == "none":
            return None
        tools = [
            {
                "type": "function",
                "function": {"name": f.name, "description": f.description or "", "parameters": schemas[f.name]},
            }
            for f in functions
        ]
        return cls(tools, schemas, choice == "required", named, parallel is not False)

    def structure(self) -> Structure | None:
        """What a forced answer must look like: the arguments of the function named, or an array of calls."""
        if self.named:
            schema = self.functions[self.named]
        elif self.required:
            schema = self._array()
        else:
            return None
        return Structure(kind="json_schema", spec=msgspec.json.encode(schema).decode(), param="tools")

    def _array(self) -> dict[str, Any]:
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": name}, "parameters": {"$ref": f"#/$defs/{name}"}},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
            for name in self.functions
        ]
        return {
            "type": "array",
            "minItems": 1,
            **({} if self.parallel else {"maxItems": 1}),
            "items": {"anyOf": calls} if len(calls) > 1 else calls[0],
            # A schema speaks of its own parts from its root, which is here now.
            "$defs": {name: _moved(schema, f"#/$defs/{name}") for name, schema in self.functions.items()},
        }


def _moved(schema: Any, to: str) -> Any:
    """The schema with its references from another root."""
    if isinstance(schema, list):
        return [_moved(item, to) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: to + value[1:] if key == "$ref" and isinstance(value, str) and value[:1] == "#" else _moved(value, to)
        for key, value in schema.items()
    }
