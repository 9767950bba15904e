"""Fetches that run in a thread, and tell the loop how far they are."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from hfms_cli import Progress, Watch


@contextmanager
def watched(progress: Progress) -> Iterator[tuple[Watch, threading.Event]]:
    """For use in the loop: what the thread tells, and what says that it is to stop. It is, when the block ends."""
    loop, stop, watch = asyncio.get_running_loop(), threading.Event(), Watch.of(progress)

    def tell(told: Callable[..., None], *what: object) -> None:
        with suppress(RuntimeError):  # the loop has ended, and nobody listens
            loop.call_soon_threadsafe(told, *what)

    try:
        yield (
            Watch(
                whole=lambda done, total: tell(watch.whole, done, total),
                file=lambda path, done, size: tell(watch.file, path, done, size),
                say=lambda text: tell(watch.say, text),
            ),
            stop,
        )
    finally:
        stop.set()  # a thread cannot be cancelled, only asked
