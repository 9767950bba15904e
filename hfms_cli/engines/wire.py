"""The frames between the front and an engine's process: four bytes of length, then msgpack.

One `Step` carries everything that one forward pass produced for all calls, so the cost of the wire does not grow with
the number of tokens in a step. A `Step` without events is a heartbeat.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec
from msgspec import Struct

from hfms_cli.errors import HfmsError, from_wire
from hfms_cli.types import Adapter, Call, Chunk, Device, LoadedInfo, ModelCard, Quantize, Question, Reply

HEADER = struct.Struct("<I")


class Import(Struct, tag=True):
    """May come before `Load`: modules that it will need."""

    modules: list[str]


class Load(Struct, tag=True, kw_only=True):
    """Which engine, and which model. The plugins' settings come along, since flags may have set them."""

    engine: str
    folder: str
    card: ModelCard
    device: Device
    dtype: str
    quantize: Quantize
    trust_remote_code: bool
    draft: tuple[str, ModelCard] | None
    """Folder and card of a draft model."""
    options: dict[str, Any]
    """The table `[engine.<name>]`, unread."""
    config_file: str
    plugin: str
    """As `hookspecs.Engine` says."""


class Submit(Struct, tag=True):
    call: Call


class Cancel(Struct, tag=True):
    call_id: str


class Ask(Struct, tag=True):
    """Something that is answered between two steps. number: the answer's."""

    number: int
    question: Question


class Adapt(Struct, tag=True):
    """An adapter that calls may name from now on. number: of the `Told` that answers."""

    number: int
    adapter: Adapter


class Unadapt(Struct, tag=True):
    """An adapter that no call names any more. number: of the `Told` that answers."""

    number: int
    id: str


class Close(Struct, tag=True):
    """Finish: the worker closes its model and exits with status 0."""


class Fault(Struct, array_like=True):
    """An HfmsError on its way to another process."""

    kind: str
    message: str
    param: str | None = None
    retry_after: float | None = None
    code: str | None = None

    @classmethod
    def of(cls, error: HfmsError) -> Fault:
        return cls(type(error).__name__, error.message, error.param, error.retry_after, error.code)

    def error(self) -> HfmsError:
        return from_wire(self.kind, self.message, self.param, self.retry_after, self.code)


class Event(Struct, array_like=True, omit_defaults=True):
    """About one call: a chunk, or the fault that ended it, or (neither) that it is done."""

    call_id: str
    chunk: Chunk | None = None
    fault: Fault | None = None


class Phase(Struct, tag=True):
    """What a load is doing now; any number of these may come before `Loaded` or `Failed`."""

    name: str
    done: float | None = None
    """Share of the phase that is done, 0 to 1; None where nobody knows."""


class Loaded(Struct, tag=True):
    info: LoadedInfo
    memory_bytes: int
    """As in `Step`."""


class Told(Struct, tag=True):
    """The reply to an `Ask`, or what went wrong. An `Adapt` or `Unadapt` that went well has neither."""

    number: int
    reply: Reply | None = None
    fault: Fault | None = None


class Failed(Struct, tag=True):
    """The model could not be loaded; the worker exits."""

    fault: Fault


class Step(Struct, tag=True):
    events: list[Event]
    waiting: int
    """Calls that have not begun."""
    memory_bytes: int
    """Resident memory of the worker's process and of what it has started."""


ToWorker = Import | Load | Submit | Cancel | Ask | Adapt | Unadapt | Close
ToFront = Phase | Loaded | Failed | Step | Told

_encoder = msgspec.msgpack.Encoder()
decode_for_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_for_front = msgspec.msgpack.Decoder(ToFront).decode


def pack(frame: ToWorker | ToFront) -> bytes:
    """The frame with its length in front."""
    body = _encoder.encode(frame)
    return HEADER.pack(len(body)) + body
