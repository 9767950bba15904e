"""What a process and all that it has started hold of the machine's memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil


def tree_bytes(process: psutil.Process) -> int:
    """Resident bytes; pages that the processes share are counted for each."""
    total = 0
    for pid in [process.pid, *_below(process.pid)]:
        try:
            total += psutil.Process(pid).memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def _below(pid: int) -> Iterator[int]:
    """Descendants, as Linux lists them; elsewhere none are seen.

    psutil would ask every process of the machine for its parent, which is too slow between two steps.
    """
    tasks = Path(f"/proc/{pid}/task")
    for listed in tasks.glob("*/children"):
        try:
            children = [int(child) for child in listed.read_text().split()]
        except OSError:  # the thread has just ended
            continue
        for child in children:
            yield child
            yield from _below(child)
