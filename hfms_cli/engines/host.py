"""The front's side of one engine process: start it, talk to it, notice when it is gone.

A host is one process and never a second one: when it has ended it stays ended, and whoever wants the model back starts
another. What a caller sees is `submit`, an async iterator of chunks; leaving it early cancels the call in the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import structlog

from hfms_cli.engines import wire
from hfms_cli.engines.owed import Owed
from hfms_cli.engines.process import Ahead, Process
from hfms_cli.errors import EngineDied, HfmsError, LoadFailed, Overloaded
from hfms_cli.hookspecs import LoadRequest, Report, report_nothing
from hfms_cli.types import Adapter, Call, Chunk, Device, LoadedInfo, Question, Reply

log = structlog.get_logger("hfms.engine")


@dataclass(frozen=True)
class HostOptions:
    """What a host needs to know beyond the model."""

    engine: str
    engine_options: dict[str, Any]
    config_file: str
    plugin: str
    """Which has the engine, as `hookspecs.Engine` says."""
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
        self._options = options
        self._device = device
        self._calls: dict[str, _Pending] = {}
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[Reply | None]] = {}
        self._loop = asyncio.get_running_loop()
        self._last_beat = self._loop.time()
        self._closing = False
        self._tasks: list[asyncio.Task[None]] = []
        self._process: Process | None = None
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter
        self._unsent: list[bytes] = []

    @classmethod
    async def start(
        cls,
        model: str,
        request: LoadRequest,
        options: HostOptions,
        report: Report = report_nothing,
        ahead: Ahead | None = None,
    ) -> EngineHost:
        """Start a process and load the model in it. Raises LoadFailed and what else the engine says.

        ahead: a process that may have been started already.
        """
        host = cls(model, request.device, options)
        report("start")
        try:
            begun = await ahead.take(options.engine) if ahead else None
            host._join(begun or await Process.start(spins=options.spins))
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
                    plugin=options.plugin,
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
        if self._process is not None and not self.ended.done():
            self._process.said.append(reason)
            self._process.kill()
            await self._reap()
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()

    def _join(self, process: Process) -> None:
        process.model = self.model
        self._process, self._reader, self._writer = process, process.reader, process.writer

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    def _send(self, frame: wire.ToWorker) -> None:
        """Send a frame, together with all others of this turn of the loop: a write costs more than the rest of it."""
        if not self._unsent:
            self._loop.call_soon(self._write)
        self._unsent.append(wire.pack(frame))

    def _write(self) -> None:
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
        assert self._process is not None
        code = await self._process.end()
        if self.ended.done():
            return self.ended.result()
        self.ended.set_result(self._reason(code))
        if not self._closing:
            log.error("engine process ended", model=self.model, pid=self.pid, reason=self.ended.result())
        for pending in self._calls.values():
            pending.queue.put_nowait(self._died())
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(self._died())
        return self.ended.result()

    def _reason(self, code: int) -> str:
        assert self._process is not None
        said = f": {self._process.said[-1]}" if self._process.said else ""
        if code == -signal.SIGKILL and not said:
            said = ": killed; if nobody did this, the machine was out of memory"
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return how + said

    def _died(self) -> EngineDied:
        # The reason is for the log and for operators: a worker's last line may name paths.
        return EngineDied(f"The engine of {self.model} ended before the answer was complete.", retry_after=2.0)
