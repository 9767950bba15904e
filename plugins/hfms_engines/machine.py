"""What engines ask of this machine: its cores, and what is installed on it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable

from hfms_cli import ModelCard


def missing_packages(card: ModelCard, needed: Iterable[str]) -> str | None:
    """What is not installed of what a model needs, its format included, as words for people; None where nothing is."""
    wanted = [*needed, *(["gguf", "accelerate"] if card.format == "gguf" else [])]
    return " and ".join(name for name in wanted if importlib.util.find_spec(name) is None) or None


def physical_cores() -> int:
    """Cores that this process may use; two threads on one core share its arithmetic."""
    import psutil

    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return min(cores, allowed)
