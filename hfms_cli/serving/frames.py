"""What a front and the owner say to each other: frames as those of engines (`engines/wire.py`), over a socket pair.

The owner is the process that has the models. For each call a front leases one (`Lease`) and asks it (`Ask`), under a
number that the front chooses; what it hears of the call has that number. A call ends with its last word, or with
`Leave`. What a front's middleware asks that of the owner (`Question`) is a conversation with one word.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct

from hfms_cli.engines.wire import HEADER, Fault
from hfms_cli.types import Call, Caller, Chunk, LoadedInfo

Headers = list[tuple[bytes, bytes]]
"""Names and values; as bytes, since what a client sends need not be text."""


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
    """Of the model that was leased under this number."""

    number: int
    call: Call
    asked: Headers
    """Of the exchange, as below."""
    answer: Headers


class Leave(Struct, tag=True):
    number: int


class Question(Struct, tag=True):
    """What a front's middleware asks that of the owner: see `hookspecs.in_owner`."""

    number: int
    middleware: str
    method: str
    arguments: bytes


class Series(Struct, tag=True):
    """A front's own metrics, as Prometheus reads them."""

    text: bytes


class Leased(Struct, array_like=True):
    """What a front knows of the model."""

    id: str
    digest: str
    weights: str
    info: LoadedInfo


class Say(Struct, array_like=True, omit_defaults=True):
    """The model, a chunk, what went wrong, a question's result, or (none of these) that the answer is complete."""

    number: int
    chunk: Chunk | None = None
    fault: Fault | None = None
    leased: Leased | None = None
    result: bytes | None = None
    answer: Headers | None = None
    """With a call's first chunk and its last word: what middlewares want on the answer."""


class Said(Struct, tag=True):
    """Everything that came in one turn of the owner's loop."""

    words: list[Say]


class Count(Struct, tag=True):
    """To a front: send your `Series`."""


ToOwner = Lease | Ask | Leave | Question | Series
ToFront = Start | Said | Count

decode_for_owner = msgspec.msgpack.Decoder(ToOwner).decode
decode_for_front = msgspec.msgpack.Decoder(ToFront).decode
_encode = msgspec.msgpack.Encoder().encode
_LOSSLESS = "utf-8", "surrogateescape"
"""As aiohttp reads headers."""


def headers_to_send(headers: Mapping[str, str]) -> Headers:
    # `str`, since a plugin that puts a number there must not stop the frame that holds its words.
    return [(str(name).encode(*_LOSSLESS), str(value).encode(*_LOSSLESS)) for name, value in headers.items()]


def headers_sent(headers: Headers) -> list[tuple[str, str]]:
    return [(name.decode(*_LOSSLESS), value.decode(*_LOSSLESS)) for name, value in headers]


def pack(frame: ToOwner | ToFront) -> bytes:
    """The frame with its length in front."""
    body = _encode(frame)
    return HEADER.pack(len(body)) + body


async def read(reader: asyncio.StreamReader) -> bytes:
    """The next frame's body. Raises IncompleteReadError or ConnectionError where the other side is gone."""
    return await reader.readexactly(*HEADER.unpack(await reader.readexactly(HEADER.size)))
