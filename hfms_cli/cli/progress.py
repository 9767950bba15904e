"""How far a pull is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hfms_cli.cli.output import console, human_bytes, printable
from hfms_cli.hookspecs import Progress


@contextmanager
def pulling(name: str) -> Iterator[Progress]:
    """A function that takes bytes so far and bytes in all. Shows on standard error, so that output stays clean."""
    with _bar(name) if sys.stderr.isatty() else _lines(name) as progress:
        yield progress


@contextmanager
def _bar(name: str) -> Iterator[Progress]:
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console(stderr=True)) as bar:
        task = bar.add_task(printable(name), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total or None)


@contextmanager
def _lines(name: str) -> Iterator[Progress]:
    """A line at the start and at every tenth of the whole: a log is not to fill with them."""
    shown = -1

    def progress(done: int, total: int) -> None:
        nonlocal shown
        tenth = done * 10 // total if total else 0
        if tenth > shown:
            shown = tenth
            print(f"{printable(name)}: {human_bytes(done)} of {human_bytes(total)}", file=sys.stderr, flush=True)

    yield progress
