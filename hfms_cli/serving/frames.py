"""What a front and the owner say to each other: frames as those of engines (`engines/wire.py`), over a socket pair.

The owner is the process that has the models. A front leases one (`Lease`) and asks it (`Ask`), each under a number that
the front chooses; what it hears of either has that number, and `Leave` ends it.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from msgspec import Struct

from hfms_cli.engines.wire import HEADER, Fault
from hfms_cli.types import Call, Caller, Chunk, LoadedInfo


class Start(Struct, tag=True, kw_only=True):
    """To a front, first: how to become as the owner is."""

    number: int
    config_file: str | None
    flags: dict[str, dict[str, Any]]
    owner: str
    """Path of the Unix socket on which the owner takes the requests that a front passes on."""


class Lease(Struct, tag=True):
    number: int
    model: str
    caller: Caller


class Ask(Struct, tag=True):
    number: int
    lease: int
    call: Call


class Leave(Struct, tag=True):
    number: int


class Series(Struct, tag=True):
    """A front's own metrics, as Prometheus reads them."""

    text: bytes


class Leased(Struct, tag=True):
    number: int
    model: str
    """Its id."""
    digest: str
    info: LoadedInfo
    weights: str


class Say(Struct, array_like=True, omit_defaults=True):
    """A chunk, or what went wrong, or (neither) that the answer is complete."""

    number: int
    chunk: Chunk | None = None
    fault: Fault | None = None


class Said(Struct, tag=True):
    """Everything that came in one turn of the owner's loop."""

    words: list[Say]


class Count(Struct, tag=True):
    """To a front: send your `Series`."""


ToOwner = Lease | Ask | Leave | Series
ToFront = Start | Leased | Said | Count

decode_for_owner = msgspec.msgpack.Decoder(ToOwner).decode
decode_for_front = msgspec.msgpack.Decoder(ToFront).decode
_encode = msgspec.msgpack.Encoder().encode


def pack(frame: ToOwner | ToFront) -> bytes:
    """The frame with its length in front."""
    body = _encode(frame)
    return HEADER.pack(len(body)) + body


async def read(reader: asyncio.StreamReader) -> bytes:
    """The next frame's body. Raises IncompleteReadError or ConnectionError where the other side is gone."""
    return await reader.readexactly(*HEADER.unpack(await reader.readexactly(HEADER.size)))
