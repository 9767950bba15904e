"""Server-sent events, as the WHATWG specification has them, from bytes that were cut anywhere."""

from __future__ import annotations

import codecs
from collections.abc import Iterator


class EventReader:
    """Turns the bytes of a `text/event-stream` into the data of its events.

    Knows LF, CRLF and CR as ends of lines, comments, data over several lines, and characters cut in two. Other fields
    (`event`, `id`, `retry`) say nothing in OpenAI's API and are passed over.
    """

    def __init__(self) -> None:
        # The specification: a leading byte order mark is no content, and broken characters do not end the stream.
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self._rest = ""
        self._after_cr = False
        self._data: list[str] = []

    def feed(self, data: bytes) -> Iterator[str]:
        """Take the next bytes; yield the data of each event that they complete."""
        text = self._decoder.decode(data)
        if self._after_cr and text:
            text = text.removeprefix("\n")  # the second half of a CRLF that was cut in two
            self._after_cr = False
        self._after_cr = self._after_cr or text.endswith("\r")
        *whole, self._rest = (self._rest + text).replace("\r\n", "\n").replace("\r", "\n").split("\n")
        for line in whole:
            if line == "":
                if self._data:
                    yield "\n".join(self._data)
                self._data = []
            elif line == "data" or line.startswith("data:"):
                self._data.append(line[5:].removeprefix(" "))
