"""The licence that a model's own files name."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from hfms_cli.errors import HfmsError
from hfms_cli.models.gguf import read_gguf

__all__ = ["license_of"]

LONGEST = 200


def license_of(folder: Path, paths: Collection[str]) -> str:
    """As the card in `README.md` or a GGUF file's header has it; empty where neither names one."""
    from huggingface_hub.repocard import metadata_load

    try:
        card = metadata_load(folder / "README.md")
    except Exception:  # whatever a YAML reader raises: a card that cannot be read names nothing
        card = None
    named = card.get("license") or card.get("license_name") if isinstance(card, dict) else None
    if isinstance(named, str) and named:
        return named[:LONGEST]
    for path in paths:
        if path.endswith(".gguf"):
            try:
                return read_gguf(folder / path).text("general.license")[:LONGEST]
            except HfmsError:
                return ""
    return ""
