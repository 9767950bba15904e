"""Events are the same however their bytes were cut, and whatever ends their lines."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from hfms_cli.sse import EventReader

# Data lines hold any text but line ends, which cut them, and a first space, which belongs to the field's colon.
line = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"))
event = st.lists(line, min_size=1, max_size=3)
noise = st.sampled_from([": a comment", ":", "event: message", "id: 7", "retry: 10", "unknown", "dat: no", ""])


def read(pieces: list[bytes]) -> list[str]:
    reader = EventReader()
    return [data.decode(errors="replace") for piece in pieces for data in reader.feed(piece)]


@given(
    events=st.lists(st.tuples(event, st.lists(noise, max_size=2)), max_size=5),
    ends=st.lists(st.sampled_from(["\n", "\r\n", "\r"]), min_size=1),
    bom=st.booleans(),
    cuts=st.lists(st.integers(0, 400)),
)
def test_events_survive_any_cut_any_line_end_and_comments(events, ends, bom, cuts):
    lines = []
    for data, others in events:
        lines += [*others, *[f"data: {text}" for text in data], ""]
    text = ""
    for i, written in enumerate(lines):
        end = ends[i % len(ends)]
        # LF right after CR would be the second half of one end, not an empty line.
        text += written + ("\r" if text.endswith("\r") and not written and end == "\n" else end)
    raw = (b"\xef\xbb\xbf" if bom else b"") + text.encode()
    edges = sorted({0, len(raw), *[c for c in cuts if c < len(raw)]})
    pieces = [raw[a:b] for a, b in itertools.pairwise(edges)]
    assert read(pieces) == ["\n".join(data) for data, _ in events]


@given(st.binary())
def test_no_bytes_break_the_reader_and_cutting_them_changes_nothing(raw):
    assert read([raw]) == read([raw[i : i + 1] for i in range(len(raw))])


def test_data_over_several_lines_is_one_event():
    assert read([b'data: {"a":\ndata: 1}\n\n']) == ['{"a":\n1}']


def test_crlf_cut_between_its_halves_ends_one_line():
    assert read([b"data: a\r", b"\ndata: b\r\n\r", b"\n"]) == ["a\nb"]


def test_lines_that_end_in_cr_alone_are_not_held_back():
    assert read([b"data: [DONE]\r\r"]) == ["[DONE]"]


def test_event_that_is_not_ended_is_no_event():
    assert read([b"data: a\n\ndata: b\n"]) == ["a"]


def test_data_without_a_space_after_the_colon_is_whole():
    assert read([b"data:a\n\ndata:  b\n\ndata\n\n"]) == ["a", " b", ""]
