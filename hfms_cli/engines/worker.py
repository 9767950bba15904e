"""The process that holds one model. Its life: load, then receive, step, send, until the front closes it or is gone.

One thread runs the model. A second one only reads frames, so that the front is never blocked by a long step, and ends
the process when the front's end of the socket closes, however the front died.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import psutil

from hfms_cli.config import Config
from hfms_cli.engines import wire
from hfms_cli.engines.resident import tree_bytes
from hfms_cli.errors import BadRequest, EngineFault, HfmsError, LoadFailed, StartupError
from hfms_cli.garbage import collect_rarely, settle
from hfms_cli.hookspecs import Draft, LoadedModel, LoadRequest
from hfms_cli.plugins import GROUP, discover
from hfms_cli.types import Chunk

BEAT_SECONDS = 1.0
"""How often an idle worker says that it lives."""


class Link:
    """The worker's end of the socket."""

    def __init__(self, sock: socket.socket, temporary: str) -> None:
        """temporary: this process's own folder, which goes with the front."""
        self._sock, self._temporary = sock, temporary
        self._inbox: SimpleQueue[wire.ToWorker] = SimpleQueue()
        self._process = psutil.Process()
        self._memory, self._memory_at = tree_bytes(self._process), time.monotonic()
        threading.Thread(target=self._read, name="front", daemon=True).start()

    def _read(self) -> None:
        with self._sock.makefile("rb") as stream:
            while header := stream.read(wire.HEADER.size):
                self._inbox.put(wire.decode_for_worker(stream.read(*wire.HEADER.unpack(header))))
        # The front is gone: nobody is left to answer or to clean up, and the model's memory belongs to others now.
        shutil.rmtree(self._temporary, ignore_errors=True)
        os._exit(0)

    def receive(self, timeout: float) -> list[wire.ToWorker]:
        """Frames that have arrived; waits up to `timeout` seconds for the first."""
        frames = []
        try:
            frames.append(self._inbox.get(timeout=timeout) if timeout else self._inbox.get_nowait())
            while True:
                frames.append(self._inbox.get_nowait())
        except Empty:
            return frames

    def order(self) -> wire.Load:
        """What to load, once the front says so; until then, what it says to import is imported."""
        while isinstance(frame := self._inbox.get(), wire.Import):
            for module in frame.modules:
                with contextlib.suppress(Exception):  # the load will meet it again, and tell
                    importlib.import_module(module)
        assert isinstance(frame, wire.Load)
        return frame

    def send(self, frame: wire.ToFront) -> None:
        self._sock.sendall(wire.pack(frame))

    def memory(self) -> int:
        """Resident bytes of this process and of what it has started.

        Read at most once a beat: it costs more than a small step.
        """
        if time.monotonic() - self._memory_at > BEAT_SECONDS:
            self._memory, self._memory_at = tree_bytes(self._process), time.monotonic()
        return self._memory


def load(order: wire.Load, link: Link) -> LoadedModel:
    """Make the engine by its plugin and let it load the model."""
    config = Config(
        options={("engine", order.engine): order.options},
        file=order.config_file,
        environ=os.environ,
    )
    plugins = discover(config, [EntryPoint(order.engine, order.plugin, GROUP)])
    request = LoadRequest(
        folder=Path(order.folder),
        card=order.card,
        device=order.device,
        dtype=order.dtype,
        quantize=order.quantize,
        trust_remote_code=order.trust_remote_code,
        draft=Draft(Path(order.draft[0]), order.draft[1]) if order.draft else None,
        report=lambda phase, done=None: link.send(wire.Phase(phase, done)),
    )
    engine = plugins.create("engine", order.engine, config)
    request.report("load")
    model: LoadedModel = engine.load(request)
    return model


def serve(model: LoadedModel, link: Link) -> None:
    """Receive, step, send. An exception that `step` lets out ends the process: its state cannot be trusted."""
    while True:
        events: list[wire.Event] = []
        for frame in link.receive(timeout=0 if model.busy() else BEAT_SECONDS):
            match frame:
                case wire.Submit(call):
                    try:
                        model.submit(call)
                    except Exception as exc:
                        events.append(wire.Event(call.id, fault=_fault(exc)))
                case wire.Cancel(call_id):
                    model.cancel(call_id)
                case wire.Ask() | wire.Adapt() | wire.Unadapt():
                    link.send(_told(model, frame))
                case wire.Close():
                    model.close()
                    return
        if model.busy():
            events += [_event(call_id, outcome) for call_id, outcome in model.step()]
        link.send(wire.Step(events, model.waiting(), link.memory()))


def _told(model: LoadedModel, frame: wire.Ask | wire.Adapt | wire.Unadapt) -> wire.Told:
    """What is done between two steps."""
    try:
        match frame:
            case wire.Ask(number, question):
                return wire.Told(number, reply=_able(model, "ask", "does not tell about tokens")(question))
            case wire.Adapt(number, adapter):
                _able(model, "add_adapter", "takes no LoRA adapters")(adapter)
            case wire.Unadapt(number, adapter_id):
                _able(model, "remove_adapter", "takes no LoRA adapters")(adapter_id)
        return wire.Told(number)
    except Exception as exc:
        return wire.Told(frame.number, fault=_fault(exc))


def _able(model: LoadedModel, method: str, unable: str) -> Callable[[Any], Any]:
    """One of the methods that a model may have. Raises BadRequest."""
    found: Callable[[Any], Any] | None = getattr(model, method, None)
    if found is None:
        raise BadRequest(f"The engine {model.info.engine} {unable}.", param="model")
    return found


def _event(call_id: str, outcome: Chunk | HfmsError | None) -> wire.Event:
    if isinstance(outcome, HfmsError):
        return wire.Event(call_id, fault=wire.Fault.of(outcome))
    return wire.Event(call_id, chunk=outcome)


def _fault(exc: Exception) -> wire.Fault:
    """An unexpected exception is told in the log and not to the caller: it may hold a prompt or a path."""
    if not isinstance(exc, HfmsError):
        traceback.print_exc()
        exc = EngineFault("The engine could not take this call.")
    return wire.Fault.of(exc)


def main() -> None:
    """Entry point: `python -m hfms_cli.engines.worker FD FOLDER`: a connected Unix socket, and a folder of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the front's to handle: it drains first
    collect_rarely()
    os.dup2(2, 1)  # libraries print; the front relays stderr into its log
    link = Link(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])
    try:
        model = load(link.order(), link)
    except Exception as exc:
        if not isinstance(exc, HfmsError):
            traceback.print_exc()
            exc = LoadFailed(f"{type(exc).__name__}: {exc}")
        elif isinstance(exc, BadRequest | StartupError):
            exc = LoadFailed(exc.message)
        link.send(wire.Failed(wire.Fault.of(exc)))
        sys.exit(1)
    settle()
    link.send(wire.Loaded(model.info, link.memory()))
    serve(model, link)


if __name__ == "__main__":
    main()
