"""A server's process while it is measured: started, asked until it answers, weighed and ended."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import psutil

from tests.benchmarks.peers import Start

READY_SECONDS = 1800.0
STOP_SECONDS = 20.0


class Process:
    """A contender's processes, from the first to all that it started."""

    def __init__(self, start: Start, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        pipe = subprocess.PIPE if start.alone else None
        with log.open("w") as out:
            self.popen = subprocess.Popen(
                start.command,
                stdin=pipe or subprocess.DEVNULL,
                stdout=pipe or out,
                stderr=out,
                env={**os.environ, "PYTHONPATH": "", **start.env},
            )
        self.began = time.perf_counter()

    async def ready(self, answers: Callable[[], Awaitable[bool]]) -> float:
        """Wait until it has answered once; seconds since its start. Raises RuntimeError where it never does."""
        while time.perf_counter() - self.began < READY_SECONDS:
            if self.popen.poll() is not None:
                raise RuntimeError(f"ended with {self.popen.returncode}; see {self.log}")
            if await answers():
                return time.perf_counter() - self.began
            await asyncio.sleep(0.1)
        raise RuntimeError(f"did not answer within {READY_SECONDS:g} s; see {self.log}")

    def tree(self) -> list[psutil.Process]:
        """The process and its descendants."""
        try:
            first = psutil.Process(self.popen.pid)
            return [first, *first.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def memory(self) -> dict[str, float]:
        """Megabytes of all its processes: `rss` counts what they share once for each, `pss` once."""
        rss = pss = 0
        for process in self.tree():
            with suppress(psutil.NoSuchProcess):
                info = process.memory_full_info()
                rss, pss = rss + info.rss, pss + getattr(info, "pss", info.rss)
        return {"rss_mb": rss / 1e6, "pss_mb": pss / 1e6}

    def cpu_seconds(self) -> float:
        """CPU time that its living processes have had."""
        total = 0.0
        for process in self.tree():
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def stop(self) -> None:
        """End it, and whatever of it does not end."""
        family = self.tree()
        self.popen.terminate()
        _, alive = psutil.wait_procs(family, timeout=STOP_SECONDS)
        for process in alive:
            print(f"# killed {process.pid}, which had not ended after {STOP_SECONDS:g} s", file=sys.stderr)
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.popen.wait()
        for stream in (self.popen.stdin, self.popen.stdout):
            if stream is not None:
                stream.close()
