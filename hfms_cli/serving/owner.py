"""The owner's side of `workers = N`: it starts the other fronts, and sees their calls through.

The owner is the first process: it has the models and serves like any front. The others listen on the same port, and one
that dies takes only its own connections with it. A call comes from a front as frames, and goes through the middlewares
to the engine from here, so what they count is one truth, and leases, balancing, drains and unloads stay exact.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import socket
import subprocess
import sys
import time
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any

import structlog
from multidict import CIMultiDict

from hfms_cli.engines.wire import Fault
from hfms_cli.errors import HfmsError
from hfms_cli.hookspecs import InOwner, begin_exchange, exchange
from hfms_cli.models.replica import LIFE_SECONDS, RESTART_PAUSES
from hfms_cli.serving import frames
from hfms_cli.serving.road import open_stretch
from hfms_cli.telemetry.metrics import summed

if TYPE_CHECKING:
    from hfms_cli.serving.runtime import Runtime

log = structlog.get_logger("hfms.fronts")

FRONT = "hfms_cli.web.front"
"""The module that a front runs."""
COUNT_SECONDS = 2.0
"""How long a front may take to tell its metrics."""


class Fronts:
    """The fronts beside this one. `start` brings them up, and they are kept up until `close`."""

    def __init__(
        self,
        runtime: Runtime,
        sockets: Sequence[Sequence[socket.socket]],
        *,
        owner: str,
        config_file: str | None,
        flags: dict[str, dict[str, Any]],
    ) -> None:
        """sockets: those that each front listens on. The rest: see `frames.Start`."""
        self._runtime = runtime
        self._sockets = sockets
        self._starts = [
            frames.Start(number=number, config_file=config_file, flags=flags, owner=owner)
            for number in range(1, len(sockets) + 1)
        ]
        self._open: dict[int, Front] = {}
        self._retired = b""
        """Series of fronts that are gone: what they counted has happened."""
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._keep(start, [s.fileno() for s in sockets]), name=f"front {start.number}")
            for start, sockets in zip(self._starts, self._sockets, strict=True)
        ]

    @property
    def pids(self) -> list[int]:
        return [front.pid for front in self._open.values()]

    async def _keep(self, start: frames.Start, listening: Sequence[int]) -> None:
        """Start a front, and again when it ends, with growing pauses."""
        restarts = 0
        while True:
            began = time.monotonic()
            front = await Front.start(self._runtime, start, listening)
            self._open[start.number] = front
            try:
                await front.serve()
            except Exception:
                log.exception("front failed", front=start.number)
                await front.end()
            finally:
                del self._open[start.number]
                self._retired = summed([self._retired, front.series])
            restarts = 0 if time.monotonic() - began > LIFE_SECONDS else restarts
            pause = RESTART_PAUSES[min(restarts, len(RESTART_PAUSES) - 1)]
            restarts += 1
            log.warning("front restarts", front=start.number, pid=front.pid, pause=pause)
            await asyncio.sleep(pause)

    async def series(self) -> list[bytes]:
        """What each front has counted, those included that are gone."""
        return [self._retired, *await asyncio.gather(*(front.count() for front in self._open.values()))]

    async def close(self) -> None:
        """End the fronts; they send what they have, and go."""
        fronts = list(self._open.values())
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(front.end() for front in fronts))
        for sock in (s for sockets in self._sockets for s in sockets):
            sock.close()


class Front:
    """One front, as the owner sees it."""

    def __init__(
        self,
        runtime: Runtime,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.pid = process.pid
        self.series = b""
        """Its metrics, as last told."""
        self._runtime = runtime
        self._process = process
        self._reader, self._writer = reader, writer
        self._tasks: dict[int, asyncio.Task[None]] = {}
        """Of calls and questions, by their numbers."""
        self._leased: dict[int, asyncio.Future[frames.Ask]] = {}
        """Calls that have their model, and are about to be asked."""
        self._words: list[frames.Say] = []
        self._counted = asyncio.Event()

    @classmethod
    async def start(cls, runtime: Runtime, start: frames.Start, listening: Sequence[int]) -> Front:
        """Start a front's process."""
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=ours)
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", FRONT, str(theirs.fileno()), *map(str, listening)),
                pass_fds=[theirs.fileno(), *listening],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in the terminal is the owner's to handle
            )
        front = cls(runtime, process, reader, writer)
        front._send(start)
        return front

    async def serve(self) -> None:
        """Do what the front asks for, until it is gone."""
        try:
            while True:
                match frames.decode_for_owner(await frames.read(self._reader)):
                    case frames.Lease(number) as lease:
                        self._begin(number, self._answer(lease))
                    case frames.Ask(number) as ask:
                        self._leased[number].set_result(ask)
                    case frames.Question(number) as question:
                        self._begin(number, self._reply(question))
                    case frames.Leave(number):
                        if task := self._tasks.get(number):
                            task.cancel()
                    case frames.Series(text):
                        self.series = text
                        self._counted.set()
        except (asyncio.IncompleteReadError, ConnectionError):
            await self._process.wait()
        finally:
            for task in self._tasks.values():
                task.cancel()

    def _begin(self, number: int, work: Coroutine[Any, Any, frames.Say]) -> None:
        self._tasks[number] = task = asyncio.create_task(self._see_through(number, work), name=f"for front {self.pid}")
        task.add_done_callback(lambda _: self._tasks.pop(number))

    async def _see_through(self, number: int, work: Coroutine[Any, Any, frames.Say]) -> None:
        """Do it, and say the last word."""
        try:
            last = await work
        except HfmsError as exc:
            last = frames.Say(number, fault=Fault.of(exc))
        except Exception:
            log.exception("call failed", front=self.pid)
            error = HfmsError("The server had an error while processing your request.")
            last = frames.Say(number, fault=Fault.of(error))
        last.answer = frames.headers_to_send(exchange().answer) or None
        self._say(last)

    async def _answer(self, lease: frames.Lease) -> frames.Say:
        """A call: lend the model, and when the front has asked it, say the chunks."""
        number, runtime = lease.number, self._runtime
        with runtime.admit():
            async with runtime.pool.lease(lease.model, lease.caller) as model, contextlib.AsyncExitStack() as opened:
                asking = self._leased[number] = asyncio.get_running_loop().create_future()
                self._say(frames.Say(number, leased=frames.Leased(model.id, model.digest, model.weights, model.info)))
                try:
                    ask = await asking
                finally:
                    del self._leased[number]
                asked, answer = CIMultiDict(frames.headers_sent(ask.asked)), dict(frames.headers_sent(ask.answer))
                begin_exchange(asked, answer)
                told = False
                async for chunk in open_stretch(opened, runtime.road.through(model), ask.call):
                    headers = None if told else frames.headers_to_send(answer)
                    self._say(frames.Say(number, chunk, answer=headers))
                    told = True
        return frames.Say(number)

    async def _reply(self, question: frames.Question) -> frames.Say:
        middleware = next(m for m in self._runtime.middlewares if m.name == question.middleware)
        method = inspect.getattr_static(middleware, question.method)
        assert isinstance(method, InOwner)
        return frames.Say(question.number, result=await method.answer(middleware, question.arguments))

    def _say(self, word: frames.Say) -> None:
        """Whatever is said in one turn of the loop goes in one frame."""
        if not self._words:
            asyncio.get_running_loop().call_soon(self._speak)
        self._words.append(word)

    def _speak(self) -> None:
        words, self._words = self._words, []
        self._send(frames.Said(words))

    def _send(self, frame: frames.ToFront) -> None:
        self._writer.write(frames.pack(frame))

    async def count(self) -> bytes:
        """Its metrics; what it told last, where it does not answer."""
        self._counted.clear()
        self._send(frames.Count())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._counted.wait(), COUNT_SECONDS)
        return self.series

    async def end(self) -> None:
        """Close the socket, which tells the front to go; end it where it does not."""
        self._writer.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), 5.0)
            return
        self._process.kill()
        await self._process.wait()
