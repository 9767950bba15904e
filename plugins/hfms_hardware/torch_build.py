"""Which torch is installed, read from its files: importing it would take a second and half a gigabyte."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

MISSING = "torch is not installed: pip install 'hfms[transformers]'"


@dataclass(frozen=True)
class TorchBuild:
    """A version and what it was built for; `cuda` and `hip` are versions, or None."""

    version: str
    cuda: str | None = None
    hip: str | None = None


def installed_torch(search: Sequence[str] | None = None) -> TorchBuild | None:
    """The torch that `import torch` would find, or that is along `search`; None where there is none."""
    spec = importlib.util.find_spec("torch") if search is None else PathFinder.find_spec("torch", search)
    if spec is None or not spec.submodule_search_locations:
        return None
    try:
        text = (Path(spec.submodule_search_locations[0]) / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    # Lines such as `cuda: Optional[str] = '12.8'`.
    found = dict(re.findall(r"^(\w+)(?:\s*:[^=\n]*)?\s*=\s*['\"]([^'\"]*)['\"]", text, re.MULTILINE))
    return TorchBuild(found.get("__version__", "of unknown version"), found.get("cuda"), found.get("hip"))
