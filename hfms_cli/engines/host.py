"""The front's side of one engine process: start it, talk to it, notice when it is gone.

A host is one process and never a second one: when it has ended it stays ended, and whoever wants the model back starts
another. What a caller sees is `submit`, an async iterator of chunks; leaving it early cancels the call in the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import structlog

from hfms_cli.engines import wire
from hfms_cli.engines.owed import Owed
from hfms_cli.errors import EngineDied, HfmsError, LoadFailed, Overloaded
from hfms_cli.hookspecs import LoadRequest, Report, report_nothing
from hfms_cli.types import Adapter, Call, Chunk, Device, LoadedInfo, Question, Reply

log = structlog.get_logger("hfms.engine")

MAX_LINE = 16_384
"""Bytes of one line of a worker's stderr that are kept."""


@dataclass(frozen=True)
class HostOptions:
    """What a host needs to know beyond the model."""

    engine: str
    engine_options: dict[str, Any]
    config_file: str
    disabled_plugins: list[str]
    max_calls: int = 256
    heartbeat_seconds: float = 60.0
    load_seconds: float = 600.0
    spins: bool = False
    """As `hookspecs.Engine` has it."""


@dataclass
class _Pending:
    """A call that the worker has."""

    queue: asyncio.Queue[Chunk | HfmsError | None]
    owed: Owed


SPINS, LONG_SPINS = "1000", "10000"
"""Of libgomp's, some tens of microseconds, and some hundreds."""
SPINNER = "\0hfms-spins"
"""A name that one process of a machine can have: its worker may spin long. Where there are no such names, none does."""


def _right_to_spin() -> socket.socket | None:
    """The right to a worker that spins long, until this is closed; None while another has it."""
    name = socket.socket(socket.AF_UNIX)
    try:
        name.bind(SPINNER)
    except OSError:
        name.close()
        return None
    return name


def worker_environ(environ: Mapping[str, str], spins: str = SPINS) -> dict[str, str]:
    """The variables of a worker process.

    It needs no key of ours, and no address of a store, which may hold a password: a model's own code could read them
    there. And it must spin a little, and not long, while it waits for its other threads: one that sleeps at once has to
    be woken hundreds of times a token, and libgomp's default keeps a core that another model or the server needs.
    What the operator has set stays. docs/architecture.md has the figures.
    """
    kept = {k: v for k, v in environ.items() if not k.endswith(("API_KEY", "_TOKEN", "_SECRET", "_STORE"))}
    if "OMP_WAIT_POLICY" not in kept:
        kept.setdefault("GOMP_SPINCOUNT", spins)
    return kept


class EngineHost:
    """A running engine process. Make one with `start`."""

    info: LoadedInfo

    def __init__(self, model: str, device: Device, options: HostOptions) -> None:
        self.model = model
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Resolves to the reason when the process is gone, expected or not."""
        self.outstanding = 0
        """Tokens that its calls still ask for."""
        self.waiting = 0
        self.memory_bytes = 0
        self.pid = 0
        self._options = options
        self._device = device
        self._calls: dict[str, _Pending] = {}
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[Reply | None]] = {}
        self._loop = asyncio.get_running_loop()
        self._last_beat = self._loop.time()
        self._stderr: deque[str] = deque(maxlen=20)
        self._closing = False
        self._tasks: list[asyncio.Task[None]] = []
        self._process: asyncio.subprocess.Process
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter | None = None
        self._unsent: list[bytes] = []
        self._stderr_task: asyncio.Task[None]
        self._spinner: socket.socket | None = None
        """Held while this is the worker of the machine that may spin long."""
        self._temporary = ""
        """The process's own folder for temporary files, which goes when it goes, however it went."""

    @classmethod
    async def start(
        cls, model: str, request: LoadRequest, options: HostOptions, report: Report = report_nothing
    ) -> EngineHost:
        """Start a process and load the model in it. Raises LoadFailed and what else the engine says."""
        host = cls(model, request.device, options)
        report("start")
        try:
            await host._spawn()
            host._send(
                wire.Load(
                    engine=options.engine,
                    folder=str(request.folder),
                    card=request.card,
                    device=request.device,
                    dtype=request.dtype,
                    quantize=request.quantize,
                    trust_remote_code=request.trust_remote_code,
                    draft=(str(request.draft.folder), request.draft.card) if request.draft else None,
                    options=options.engine_options,
                    config_file=options.config_file,
                    disabled_plugins=options.disabled_plugins,
                )
            )
            async with asyncio.timeout(options.load_seconds):
                while isinstance(frame := await host._read(), wire.Phase):
                    report(frame.name, frame.done)
        except TimeoutError:
            await host.kill("the load took too long")
            raise LoadFailed(
                f"loading {model} took longer than {options.load_seconds:g} s ([models] load_seconds)"
            ) from None
        except (asyncio.IncompleteReadError, ConnectionError):
            reason = await host._reap()
            raise LoadFailed(f"the engine process ended while it loaded {model}: {reason}") from None
        except BaseException:
            await host.kill("the load was cancelled")
            raise
        if isinstance(frame, wire.Failed):
            host._closing = True  # it ends by itself, as it should
            await host._reap()
            raise frame.fault.error()
        assert isinstance(frame, wire.Loaded)
        host.info, host.memory_bytes = frame.info, frame.memory_bytes
        host._last_beat = host._loop.time()
        host._tasks.append(asyncio.create_task(host._receive(), name=f"receive {model}"))
        host._tasks.append(asyncio.create_task(host._watch(), name=f"watch {model}"))
        return host

    # The call's side.

    async def submit(self, call: Call) -> AsyncIterator[Chunk]:
        """Chunks of all choices, as they are made. Raises what the engine raised; EngineDied if it is gone."""
        if self.ended.done():
            raise self._died()
        if self.full:
            raise Overloaded(f"{self.model} already holds {len(self._calls)} calls; try again later.", retry_after=1.0)
        pending = _Pending(asyncio.Queue(), Owed(call, self.info.context_length))
        self._calls[call.id] = pending
        self.outstanding += pending.owed.left
        finished = False
        try:
            self._send(wire.Submit(call))
            while True:
                outcome = await pending.queue.get()
                if isinstance(outcome, Chunk):
                    outcome.more = not pending.queue.empty()
                    yield outcome
                    continue
                finished = True
                if outcome is None:
                    return
                raise outcome
        finally:
            del self._calls[call.id]
            self.outstanding -= pending.owed.left
            if not finished and not self.ended.done():
                self._send(wire.Cancel(call.id))

    async def ask(self, question: Question) -> Reply:
        """What the engine says between two steps. Raises what it raised; EngineDied if it is gone."""
        reply = await self._ask(lambda number: wire.Ask(number, question))
        assert reply is not None
        return reply

    async def adapt(self, adapter: Adapter) -> None:
        """Have the engine take an adapter. Raises as `ask` does, and BadRequest where it does not fit the model."""
        await self._ask(lambda number: wire.Adapt(number, adapter))

    async def unadapt(self, adapter_id: str) -> None:
        """Have the engine forget an adapter that no call uses. Raises as `ask` does."""
        await self._ask(lambda number: wire.Unadapt(number, adapter_id))

    async def _ask(self, frame: Callable[[int], wire.Ask | wire.Adapt | wire.Unadapt]) -> Reply | None:
        if self.ended.done():
            raise self._died()
        number = next(self._numbers)
        answer: asyncio.Future[Reply | None] = self._loop.create_future()
        self._asked[number] = answer
        try:
            self._send(frame(number))
            return await answer
        finally:
            del self._asked[number]

    @property
    def running(self) -> int:
        """Calls in the worker, waiting ones too."""
        return len(self._calls)

    @property
    def full(self) -> bool:
        """Whether it would refuse one more call."""
        return len(self._calls) >= self._options.max_calls

    @property
    def held_bytes(self) -> int:
        """What the model holds of its device: of the machine's memory its process, elsewhere what its engine took."""
        return self.memory_bytes if self._device.memory == "cpu" else self.info.memory_bytes

    def alive(self) -> bool:
        """Whether the engine's own loop has been heard of lately."""
        silent = self._loop.time() - self._last_beat
        return not self.ended.done() and silent < self._options.heartbeat_seconds

    # The process's side.

    async def close(self, grace: float = 5.0) -> None:
        """Ask the process to end, and end it after `grace` seconds. All of its memory is free afterwards."""
        if self.ended.done():
            return
        self._closing = True
        self._send(wire.Close())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self.ended), grace)
        await self.kill("closed")

    async def kill(self, reason: str) -> None:
        """End the process now."""
        if not self.ended.done() and self.pid:
            self._stderr.append(reason)
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._reap()
        elif not self.pid and self._writer is not None:
            self._writer.close()  # a process that was about to start finds nobody, and ends
            self._clean_up()
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()

    async def _spawn(self) -> None:
        self._temporary = tempfile.mkdtemp(prefix="hfms-")
        self._spinner = _right_to_spin() if self._options.spins else None
        environ = worker_environ(os.environ, LONG_SPINS if self._spinner else SPINS)
        ours, theirs = socket.socketpair()
        # Connected first: from the moment there is a process, nothing else can be interrupted before it is known.
        self._reader, self._writer = await asyncio.open_connection(sock=ours)
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "hfms_cli.engines.worker", str(theirs.fileno()), self._temporary),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C in the terminal must not reach it
                env=environ | {"TMPDIR": self._temporary},
            )
        self.pid = self._process.pid
        self._stderr_task = asyncio.create_task(self._relay(), name=f"stderr {self.model}")

    def _send(self, frame: wire.ToWorker) -> None:
        """Send a frame, together with all others of this turn of the loop: a write costs more than the rest of it."""
        if not self._unsent:
            self._loop.call_soon(self._write)
        self._unsent.append(wire.pack(frame))

    def _write(self) -> None:
        assert self._writer is not None
        data = b"".join(self._unsent)
        self._unsent.clear()
        if not self._writer.is_closing():
            self._writer.write(data)

    async def _read(self) -> wire.ToFront:
        header = await self._reader.readexactly(wire.HEADER.size)
        frame: wire.ToFront = wire.decode_for_front(await self._reader.readexactly(*wire.HEADER.unpack(header)))
        return frame

    async def _receive(self) -> None:
        try:
            while True:
                step = await self._read()
                if isinstance(step, wire.Told):
                    self._tell(step)
                    continue
                assert isinstance(step, wire.Step)
                self._last_beat = self._loop.time()
                self.waiting, self.memory_bytes = step.waiting, step.memory_bytes
                for event in step.events:
                    if pending := self._calls.get(event.call_id):
                        if event.chunk:
                            self.outstanding -= pending.owed.pay(event.chunk)
                        pending.queue.put_nowait(event.fault.error() if event.fault else event.chunk)
        except (asyncio.IncompleteReadError, ConnectionError):
            await self._reap()

    def _tell(self, told: wire.Told) -> None:
        answer = self._asked.get(told.number)
        if answer is None or answer.done():  # whoever asked has left
            return
        if told.fault is not None:
            answer.set_exception(told.fault.error())
        else:
            answer.set_result(told.reply)

    async def _watch(self) -> None:
        """End a process whose loop has fallen silent: a hang looks like nothing else from here."""
        limit = self._options.heartbeat_seconds
        while (silent := self._loop.time() - self._last_beat) < limit:  # noqa: ASYNC110 - an event a step costs more
            await asyncio.sleep(limit - silent)
        await self.kill(f"its loop was silent for {limit:g} s")

    async def _reap(self) -> str:
        """Wait for the process, tell every call, and give the reason."""
        code = await self._process.wait()
        with contextlib.suppress(TimeoutError):  # a grandchild may hold the pipe open
            await asyncio.wait_for(asyncio.shield(self._stderr_task), 1.0)
        if self.ended.done():
            return self.ended.result()
        assert self._writer is not None
        self._writer.close()
        self._clean_up()
        self.ended.set_result(self._reason(code))
        if not self._closing:
            log.error("engine process ended", model=self.model, pid=self.pid, reason=self.ended.result())
        for pending in self._calls.values():
            pending.queue.put_nowait(self._died())
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(self._died())
        return self.ended.result()

    def _clean_up(self) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)
        if self._spinner is not None:
            self._spinner.close()

    def _reason(self, code: int) -> str:
        said = f": {self._stderr[-1]}" if self._stderr else ""
        if code == -signal.SIGKILL and not said:
            said = ": killed; if nobody did this, the machine was out of memory"
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return how + said

    def _died(self) -> EngineDied:
        # The reason is for the log and for operators: a worker's last line may name paths.
        return EngineDied(f"The engine of {self.model} ended before the answer was complete.", retry_after=2.0)

    async def _relay(self) -> None:
        """The worker's stderr, into our log; a line without an end is cut, not waited for."""
        assert self._process.stderr is not None
        rest = b""
        while data := await self._process.stderr.read(4096):
            *lines, rest = (rest + data).replace(b"\r", b"\n").split(b"\n")
            if len(rest) > MAX_LINE:
                lines, rest = [*lines, rest], b""
            for line in lines:
                if text := line.decode(errors="replace").rstrip():
                    self._stderr.append(text)
                    log.info("engine says", model=self.model, line=text)
