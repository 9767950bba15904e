"""Python's search for cycles of garbage, in processes that import much and live long."""

from __future__ import annotations

import gc

COLLECT_AFTER = 10_000
"""New objects after which the young ones are looked through. Python's own 700 has it done some thousand times while
torch and transformers are imported, which is a tenth of that time."""


def collect_rarely() -> None:
    """At the start of a process."""
    gc.set_threshold(COLLECT_AFTER)


def settle() -> None:
    """What is here now stays. Without this, a look through a million imported objects comes out of some later step."""
    gc.collect()
    gc.freeze()
