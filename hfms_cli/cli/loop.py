"""The event loop that verbs run on: uvloop's where there is one, which moves bytes faster."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    """What a verb's work comes to. Ctrl-C cancels it."""
    with asyncio.Runner(loop_factory=fast_loop()) as runner:
        return runner.run(work)


def fast_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Makes loops; None: asyncio's own are taken."""
    try:
        from uvloop import new_event_loop
    except ImportError:  # Windows
        return None
    made: Callable[[], asyncio.AbstractEventLoop] = new_event_loop
    return made
