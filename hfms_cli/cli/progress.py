"""How far a pull is: a bar for each file and one for all on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hfms_cli.cli.output import console, printable
from hfms_cli.hookspecs import Watch
from hfms_cli.sizes import human_bytes


@contextmanager
def pulling(name: str) -> Iterator[Watch]:
    """Something that is told of bytes. Shows on standard error, so that output stays clean."""
    if sys.stderr.isatty():
        with _bars(name) as watch:
            yield watch
    else:
        yield _lines(name)


@contextmanager
def _bars(name: str) -> Iterator[Watch]:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(stderr=True)) as bars:
        all_files = bars.add_task(printable(name), total=None)
        files: dict[str, TaskID] = {}

        def whole(done: int, total: int) -> None:
            bars.update(all_files, completed=done, total=total or None)

        def file(path: str, done: int, size: int) -> None:
            if path not in files:
                files[path] = bars.add_task(f"  {printable(path)}", total=size)
            # Of a hundred files only those that are on their way are of interest.
            bars.update(files[path], completed=done, visible=done < size or len(files) <= 8)

        yield Watch(whole, file, lambda text: bars.console.print(printable(text)))


def _lines(name: str, clock: Callable[[], float] = time.monotonic) -> Watch:
    """A line at the start and at every tenth of the whole: a log is not to fill with them."""
    shown = -1
    began: tuple[float, int] | None = None

    def whole(done: int, total: int) -> None:
        nonlocal shown, began
        now = clock()
        began = began or (now, done)
        tenth = done * 10 // total if total else 0
        if tenth > shown:
            shown = tenth
            seconds, came = now - began[0], done - began[1]
            pace = ""
            if came and seconds > 0:
                rate = came / seconds
                pace = f", {human_bytes(int(rate))}/s, {(total - done) / rate:.0f} s left"
            say(f"{name}: {human_bytes(done)} of {human_bytes(total)}{pace}")

    def say(text: str) -> None:
        print(printable(text), file=sys.stderr, flush=True)

    return Watch(whole, say=say)
