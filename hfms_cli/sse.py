"""Server-sent events, as the WHATWG specification has them, from bytes that were cut anywhere."""

from __future__ import annotations

import codecs
from collections.abc import Iterator


class EventReader:
    """Turns the bytes of a `text/event-stream` into the data of its events, still bytes: JSON decoders take those.

    Knows LF, CRLF and CR as ends of lines, comments, and data over several lines. Other fields (`event`, `id`, `retry`)
    say nothing in OpenAI's API and are passed over. No byte of a longer UTF-8 character is a CR or LF, so lines may be
    cut before they are decoded.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._begun = False
        self._after_cr = False
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take the next bytes; yield the data of each event that they complete."""
        if self._after_cr and data:
            data = data.removeprefix(b"\n")  # the second half of a CRLF that was cut in two
            self._after_cr = False
        if b"\r" in data:
            self._after_cr = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *whole, self._rest = (self._rest + data).split(b"\n")
        if whole and not self._begun:
            self._begun = True
            whole[0] = whole[0].removeprefix(codecs.BOM_UTF8)  # the specification: at the start, it is no content
        for line in whole:
            if not line:
                if self._data:
                    yield b"\n".join(self._data)
                    self._data = []
            elif line.startswith(b"data:"):
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
            elif line == b"data":
                self._data.append(b"")
