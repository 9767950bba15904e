"""Settings as data: a frozen dataclass a table, every value with a default, a range, a help text and its variables.

One reader serves the core's tables and every plugin's options, so a mistake in either is told in the same words:
the file, the table, the key, what is wrong, and what was probably meant.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import msgspec

from hfms_cli.errors import ConfigError, close_matches

__all__ = ["describe", "origins", "read_table", "setting", "settings_of"]

T = TypeVar("T")

# Old installations set HF_SERVER_*; the new name wins.
PREFIXES = ("HFMS_", "HF_SERVER_")
_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off", ""}


def setting(
    default: Any,
    help: str,
    *,
    env: str | None = None,
    ge: float | None = None,
    le: float | None = None,
    choices: tuple[str, ...] = (),
    secret: bool = False,
    bare: bool = False,
) -> Any:
    """A dataclass field that can be set from `hfms.toml` and from the environment.

    default: the value, or for lists and tables a function that makes it (`list`, `dict`).
    help: one sentence, shown in `hfms.toml.example`.
    env: name without prefix; `PORT` is read from HFMS_PORT, then from HF_SERVER_PORT.
    ge, le: bounds of a number, both included. choices: the strings allowed.
    secret: never printed. bare: `env` is also read without a prefix, as other programs name it.
    """
    meta = {"help": help, "env": env, "ge": ge, "le": le, "choices": choices, "secret": secret, "bare": bare}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting, as `describe` and the example file show it."""

    name: str
    type: Any
    default: Any
    help: str
    env: str | None
    ge: float | None
    le: float | None
    choices: tuple[str, ...]
    secret: bool
    bare: bool

    @property
    def variables(self) -> tuple[str, ...]:
        """The variables that it is read from, the strongest first."""
        bare = (self.env,) if self.env and self.bare else ()
        return (*(prefix + self.env for prefix in PREFIXES), *bare) if self.env else ()


def settings_of(table: type[Any]) -> Iterator[Setting]:
    """The settings of a dataclass, in the order in which they are written."""
    hints = typing.get_type_hints(table)
    for field in dataclasses.fields(table):
        if "help" not in field.metadata:
            continue
        made = field.default_factory
        default = made() if made is not dataclasses.MISSING else field.default
        yield Setting(field.name, hints[field.name], default, **field.metadata)


def describe(s: Setting) -> str:
    """What a value may be: `an integer from 1 to 65535`, `one of "json", "console"`."""
    if s.choices:
        return "one of " + ", ".join(f'"{c}"' for c in s.choices)
    names = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "a string",
        "list": "a list of strings",
        "dict": "a table of strings",
    }
    args = [a for a in typing.get_args(s.type) if a is not type(None)]
    kind = typing.get_origin(s.type) or s.type
    if kind not in (list, dict) and args:
        kind = args[0]
    text = names.get(kind) or names[kind.__name__]
    match s.ge, s.le:
        case None, None:
            return text
        case low, None:
            return f"{text} of {low} or more"
        case None, high:
            return f"{text} of {high} or less"
        case low, high:
            return f"{text} from {low} to {high}"


def read_table(
    table: type[T],
    values: Mapping[str, Any],
    *,
    where: str,
    environ: Mapping[str, str],
    overrides: Mapping[str, Any] | None = None,
) -> T:
    """Build `table` from flags, environment, file and defaults, in that order of precedence.

    values: the parsed TOML table. where: file and table, for messages (`hfms.toml [server]`).
    overrides: values given as flags; None means "not given".
    Raises ConfigError, naming the source of the bad value.
    """
    known = {s.name: s for s in settings_of(table)}
    for key in values:
        if key not in known:
            near = close_matches(key, known)
            hint = f"; did you mean `{near[0]}`?" if near else f"; known keys: {', '.join(known) or 'none'}"
            raise ConfigError(f"{where}: unknown key `{key}`{hint}", param=key)
    chosen: dict[str, Any] = {}
    overrides = overrides or {}
    for name, s in known.items():
        match _origin(s, values, environ, overrides):
            case "default":
                continue
            case "flag":
                chosen[name] = _convert(s, overrides[name], source=f"--{(s.env or name).lower().replace('_', '-')}")
            case "file":
                chosen[name] = _convert(s, values[name], source=f"{where}: `{name}`")
            case variable:
                chosen[name] = _convert(s, _from_text(s, environ[variable]), source=variable)
    return table(**chosen)


def origins(
    table: type[Any],
    values: Mapping[str, Any],
    *,
    environ: Mapping[str, str],
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Where `read_table` takes each setting from: `flag`, the name of a variable, `file` or `default`."""
    return {s.name: _origin(s, values, environ, overrides or {}) for s in settings_of(table)}


def _origin(s: Setting, values: Mapping[str, Any], environ: Mapping[str, str], overrides: Mapping[str, Any]) -> str:
    if overrides.get(s.name) is not None:
        return "flag"
    variable = next((v for v in s.variables if v in environ), None)
    return variable or ("file" if s.name in values else "default")


def _from_text(s: Setting, text: str) -> Any:
    """A variable's text as the setting's type; what cannot be read is left for `_convert` to refuse."""
    kinds = {s.type, *typing.get_args(s.type)}
    text = text.strip()
    if bool in kinds and text.lower() in _TRUE | _FALSE:
        return text.lower() in _TRUE
    if type(None) in kinds and not text:
        return None
    if typing.get_origin(s.type) is list:
        return [part.strip() for part in text.split(",") if part.strip()]
    for number in (int, float):
        if number in kinds:
            try:
                return number(text)
            except ValueError:
                continue
    return text


def _convert(s: Setting, value: Any, *, source: str) -> Any:
    shown = "(hidden)" if s.secret else repr(value)
    try:
        value = msgspec.convert(value, s.type)
    except msgspec.ValidationError:
        raise ConfigError(f"{source} is {shown}, which is not {describe(s)}", param=s.name) from None
    # bool is an int to Python, and never what an operator means by a number.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    low = number and s.ge is not None and not value >= s.ge
    high = number and s.le is not None and not value <= s.le
    if low or high or (s.choices and value not in s.choices):
        near = close_matches(str(value), s.choices)
        hint = f'; did you mean "{near[0]}"?' if near else ""
        raise ConfigError(f"{source} is {shown}, which is not {describe(s)}{hint}", param=s.name)
    return value
