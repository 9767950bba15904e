"""A worker's process, before it is known which model it is for and after: started, listened to, cleaned up after.

Starting Python and importing an engine takes about as long as the server takes to find out what to load. So the first
process may be begun `Ahead` of that, and import what the likeliest engine needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hfms_cli.engines import wire

if TYPE_CHECKING:
    from hfms_cli.hookspecs import Engine

MAX_LINE = 16_384
"""Bytes of one line of a worker's stderr that are kept."""
SPINS, LONG_SPINS = "1000", "10000"
"""Of libgomp's, some tens of microseconds, and some hundreds."""
SPINNER = "\0hfms-spins"
"""A name that one process of a machine can have: its worker may spin long. Where there are no such names, none does."""


def worker_environ(environ: Mapping[str, str], spins: str = SPINS) -> dict[str, str]:
    """The variables of a worker process.

    It needs no key of ours, and no address of a store, which may hold a password: a model's own code could read them
    there. And it must spin a little, and not long, while it waits for its other threads: one that sleeps at once has to
    be woken hundreds of times a token, and libgomp's default keeps a core that another model or the server needs.
    numpy's own threads are left out: engines have theirs, and these spin for a tenth of a second when they begin.
    What the operator has set stays. docs/architecture.md has the figures.
    """
    kept = {k: v for k, v in environ.items() if not k.endswith(("API_KEY", "_TOKEN", "_SECRET", "_STORE"))}
    kept.setdefault("OPENBLAS_NUM_THREADS", "1")
    if "OMP_WAIT_POLICY" not in kept:
        kept.setdefault("GOMP_SPINCOUNT", spins)
    return kept


class Process:
    """A process that waits to be told, by its socket, what to load. Make one with `start`."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, spinner: socket.socket | None
    ) -> None:
        self.reader, self.writer = reader, writer
        self.model = ""
        """What it is for, in the log."""
        self.said: deque[str] = deque(maxlen=20)
        """The last lines of its stderr."""
        self._spinner = spinner
        """Held while this is the worker of the machine that may spin long."""
        self._temporary = tempfile.mkdtemp(prefix="hfms-")
        """The process's own folder for temporary files, which goes when it goes, however it went."""
        self._process: asyncio.subprocess.Process
        self._relaying: asyncio.Task[None]

    @classmethod
    async def start(cls, *, spins: bool = False) -> Process:
        """spins: as `hookspecs.Engine` has it."""
        ours, theirs = socket.socketpair()
        # Connected first: from the moment there is a process, nothing else can be interrupted before it is known.
        made = cls(*await asyncio.open_connection(sock=ours), _right_to_spin() if spins else None)
        try:
            with theirs:
                await made._spawn(theirs.fileno())
        except BaseException:
            made.writer.close()  # a process that was about to start finds nobody, and ends
            made.clean_up()
            raise
        return made

    async def _spawn(self, fd: int) -> None:
        environ = worker_environ(os.environ, LONG_SPINS if self._spinner else SPINS)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "hfms_cli.engines.worker", str(fd), self._temporary),
            pass_fds=[fd],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in the terminal must not reach it
            env=environ | {"TMPDIR": self._temporary},
        )
        self._relaying = asyncio.create_task(self._relay(), name=f"stderr {self.pid}")

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def end(self) -> int:
        """Wait for the process, clean up after it, and return its exit status; below 0: the signal that ended it."""
        code = await self._process.wait()
        with contextlib.suppress(TimeoutError):  # a grandchild may hold the pipe open
            await asyncio.wait_for(asyncio.shield(self._relaying), 1.0)
        self.writer.close()
        self.clean_up()
        return code

    def clean_up(self) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)
        if self._spinner is not None:
            self._spinner.close()

    async def _relay(self) -> None:
        """The worker's stderr, into our log; a line without an end is cut, not waited for."""
        import structlog  # which takes longer than to begin a process, and one is begun first of all

        log = structlog.get_logger("hfms.engine")
        assert self._process.stderr is not None
        rest = b""
        while data := await self._process.stderr.read(4096):
            *lines, rest = (rest + data).replace(b"\r", b"\n").split(b"\n")
            if len(rest) > MAX_LINE:
                lines, rest = [*lines, rest], b""
            for line in lines:
                if text := line.decode(errors="replace").rstrip():
                    self.said.append(text)
                    log.info("engine says", model=self.model, line=text)


class Ahead:
    """A process begun before anything is known of its model. Make one with `begin`."""

    def __init__(self, process: Process) -> None:
        self._process: Process | None = process
        self._engine = ""
        self.asked_for = asyncio.Event()
        """Whether a load has come as far as to need a process."""

    @classmethod
    async def begin(cls) -> Ahead:
        return cls(await Process.start())

    def prepare(self, engine: Engine) -> None:
        """Have it import what that engine needs, the likeliest; then it is of no use to another."""
        # How a process spins is said when it starts.
        if self._process is not None and not getattr(engine, "spins", False):
            self._engine = engine.name
            self._process.writer.write(wire.pack(wire.Import(list(getattr(engine, "imports", ())))))

    async def take(self, engine: str) -> Process | None:
        """The process, the first time that one is asked for, if it is of that engine."""
        self.asked_for.set()
        if engine != self._engine:
            await self.close()
        process, self._process = self._process, None
        return process

    async def close(self) -> None:
        """End the process, if nobody has taken it."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            await process.end()


def _right_to_spin() -> socket.socket | None:
    """The right to a worker that spins long, until this is closed; None while another has it."""
    name = socket.socket(socket.AF_UNIX)
    try:
        name.bind(SPINNER)
    except OSError:
        name.close()
        return None
    return name
