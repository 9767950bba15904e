"""What lies on this disk and nothing refers to: found with those who know, and deleted."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import structlog

from hfms_cli.models.pins import Pins
from hfms_cli.types import Leftover

__all__ = ["OLD_SECONDS", "delete", "find"]

log = structlog.get_logger("hfms.models")

OLD_SECONDS = 24 * 3600.0
"""A pull or a conversion that has written nothing for so long goes on no more."""


async def find(
    keepers: Iterable[Any], pins: Pins, *, least_age: float = OLD_SECONDS, pinned: bool = False
) -> list[Leftover]:
    """keepers: storages and engines. least_age: in seconds. pinned: also what belongs to models that are pinned."""

    def all_of(keeper: Any) -> list[Leftover]:
        try:
            return list(keeper.leftovers())
        except Exception:  # a plugin's fault, which must not keep the rest from being found
            log.exception("cannot tell what is left over", plugin=keeper.name)
            return []

    asked = [k for k in keepers if hasattr(k, "leftovers")]
    found = [left for many in await asyncio.gather(*(asyncio.to_thread(all_of, k) for k in asked)) for left in many]
    return [
        left
        for left in found
        if left.age_seconds >= least_age and (pinned or left.model is None or not pins.keeps(left.model))
    ]


def delete(found: Sequence[Leftover]) -> list[str]:
    """Delete them; what could not be deleted, and why."""
    failed = []
    for left in found:
        for path in map(Path, left.paths):
            try:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            except OSError as exc:
                failed.append(f"{path}: {exc.strerror or os.strerror(exc.errno or 0)}")
    return failed
