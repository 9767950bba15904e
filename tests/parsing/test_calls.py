"""Calls in text: every format, however the text is cut, and nothing lost."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfms_cli.parsing import Arguments, CallBegins, Content
from hfms_cli.parsing.calls import FORMATS, Forced

FUNCTIONS = {"weather": {}, "add-up_2": {"properties": {"code": {"type": "string"}}}}


def told(events):
    """Content, and each call as its name and the text of its arguments."""
    content, calls = "", []
    for event in events:
        match event:
            case Content(text):
                content += text
            case CallBegins(name):
                calls.append([name, ""])
            case Arguments(text):
                calls[-1][1] += text
    return content, [tuple(call) for call in calls]


def parsed(kind, *pieces):
    reader = FORMATS[kind](FUNCTIONS)
    return told([event for piece in pieces for event in reader.feed(piece)] + reader.end())


def cut(text, places):
    return [text[a:b] for a, b in pairwise([0, *sorted(places), len(text)])]


NAMES = st.sampled_from(sorted(FUNCTIONS))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda v: st.lists(v) | st.dictionaries(st.text(), v),
)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(st.text(max_size=5), VALUES, max_size=3)), min_size=1, max_size=3)
PROSE = st.text(st.characters(exclude_characters="<[{;,", codec="utf-8"), max_size=12).map(str.strip)
ENCODE = st.sampled_from([json.dumps, lambda v: json.dumps(v, indent=1), lambda v: json.dumps(v, ensure_ascii=False)])


def hermes(prose, calls, dumps):
    objects = [dumps({"name": name, "arguments": arguments}) for name, arguments in calls]
    return prose + "\n".join(f"\n<tool_call>\n{o}\n</tool_call>" for o in objects)


def llama3(prose, calls, dumps):
    objects = [dumps({"type": "function", "name": n, "parameters": a}) for n, a in calls]
    return ("\n" if not prose else prose + "<|python_tag|>") + "; ".join(objects)


def mistral_old(prose, calls, dumps):
    return f"{prose}[TOOL_CALLS] {dumps([{'name': n, 'arguments': a, 'id': 'abc123def'} for n, a in calls])}"


def mistral_new(prose, calls, dumps):
    return prose + "".join(f"[TOOL_CALLS]{name}[CALL_ID]abc123def[ARGS]{dumps(a)}" for name, a in calls)


def mistral_plain(prose, calls, dumps):
    return prose + "".join(f"[TOOL_CALLS]{name}{dumps(a)}" for name, a in calls)


def array(prose, calls, dumps):
    return dumps([{"name": name, "arguments": a} for name, a in calls])


WRITERS = [
    ("hermes", hermes),
    ("llama3_json", llama3),
    ("mistral", mistral_old),
    ("mistral", mistral_new),
    ("mistral", mistral_plain),
    ("json", array),
]


@pytest.mark.parametrize(("kind", "write"), WRITERS)
@settings(max_examples=60, deadline=None)
@given(prose=PROSE, calls=CALLS, dumps=ENCODE, data=st.data())
def test_what_a_format_writes_is_read_back_however_it_is_cut(kind, write, prose, calls, dumps, data):
    if kind == "json":
        prose = ""
    text = write(prose, calls, dumps)
    pieces = cut(text, data.draw(st.sets(st.integers(0, len(text)))))
    content, made = parsed(kind, *pieces)
    assert content == prose
    assert [(name, json.loads(text)) for name, text in made] == calls
    assert (content, made) == parsed(kind, text) == parsed(kind, *text)


# fmt: off
# Scraps of all formats, so that texts are nearly calls.
SCRAPS = st.lists(
    st.text(max_size=3) | st.sampled_from([
        "<tool_call>", "</tool_call>", "<tool", "</", "[TOOL_CALLS]", "[TOOL", "[ARGS]", "<|python_tag|>", "{", "}",
        "[", "]", ":", ",", ";", '"', "\\", " ", "\n", "weather", "1.5", "null", "é🙂", '"name"', '"arguments": {',
        '{"name": "weather"', '{"name": "nobody"', '"parameters": "{\\', "\\ud83d", "\\ude00", "\\u00",
        "<function=weather>", "<parameter=a>", "</parameter>", "</function>",
        '{"name": "weather", "arguments": {"a": 1}}',
    ]),
    max_size=25,
).map("".join)
# fmt: on


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=300, deadline=None)
@given(text=SCRAPS, data=st.data())
def test_scraps_say_the_same_however_they_are_cut_and_without_calls_nothing_is_lost(kind, text, data):
    whole = parsed(kind, text)
    assert parsed(kind, *cut(text, data.draw(st.sets(st.integers(0, len(text)))))) == whole
    assert parsed(kind, *text) == whole
    content, calls = whole
    if not calls:
        assert content == text
    assert {name for name, _ in calls} <= FUNCTIONS.keys()


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_arguments_so_far_are_valid_as_soon_as_they_are_closed(text):
    """So never half an escape, and no half of a pair."""
    reader = FORMATS["hermes"](FUNCTIONS)
    so_far = ""
    for character in '<tool_call>{"name": "weather", "arguments": {"a": ' + json.dumps(text)[:-1]:
        for event in reader.feed(character):
            if isinstance(event, Arguments):
                so_far += event.text
                if so_far.count('"') > 2:
                    assert text.startswith(json.loads(so_far + '"}')["a"])


@pytest.mark.parametrize(
    ("kind", "text", "content", "calls"),
    [
        ("hermes", "plain text", "plain text", []),
        ("hermes", "  \n", "  \n", []),
        ("hermes", "a < b <tool", "a < b <tool", []),
        ("hermes", "<<tool_call>{}</tool_call>", "<<tool_call>{}</tool_call>", []),
        ("hermes", '<tool_call>{"name": "weather"}</tool_call>', "", [("weather", "{}")]),
        ("hermes", '<tool_call>{"name": "weather"}', "", [("weather", "{}")]),
        ("hermes", '<tool_call>{"name": "no"}</tool_call>', '<tool_call>{"name": "no"}</tool_call>', []),
        (
            "hermes",  # arguments before the name, more keys, and the second call's end is missing
            '<tool_call>{"id": [1], "arguments": {"a": "}"}, "name": "weather"}</tool_call>\n<tool_call>'
            '{"name": "weather", "arguments": {"b"',
            "",
            [("weather", '{"a": "}"}'), ("weather", '{"b"')],
        ),
        ("hermes", '<tool_call>{"name": "weather"}</tool_call>\nDone.', "\nDone.", [("weather", "{}")]),
        (
            "hermes",  # as text in a string, which is how OpenAI has it
            r'<tool_call>{"name": "weather", "arguments": "{\"a\": \"\u00e9\ud83d\ude00\\n\"}"}</tool_call>',
            "",
            [("weather", '{"a": "é😀\\n"}')],
        ),
        (
            "hermes",
            '<tool_call>{"name": "weather", "arguments": {}} and more</tool_call>',
            " and more</tool_call>",
            [("weather", "{}")],
        ),
        ("llama3_json", '{"name": "Bob", "parameters": {}}', '{"name": "Bob", "parameters": {}}', []),
        ("llama3_json", '{"name": "weather", "age": 3}', '{"name": "weather", "age": 3}', []),
        ("llama3_json", '{"name": "weather"}', '{"name": "weather"}', []),
        ("llama3_json", 'So: {"name": "weather", "parameters": {}}', 'So: {"name": "weather", "parameters": {}}', []),
        ("llama3_json", '<|python_tag|>search.call(q="x")', '<|python_tag|>search.call(q="x")', []),
        (
            "llama3_json",
            '{"name": "weather", "parameters": {}}\n{"name": "weather", "parameters": {"a": 1}} ok',
            " ok",
            [("weather", "{}"), ("weather", '{"a": 1}')],
        ),
        ("mistral", "[TOOL_CALLS]nobody[ARGS]{}", "[TOOL_CALLS]nobody[ARGS]{}", []),
        ("json", "[1, 2]", "[1, 2]", []),
        ("json", "", "", []),
        (
            "qwen3_coder",
            "Look:\n\n<tool_call>\n<function=add-up_2>\n<parameter=code>\n12\n</parameter>\n<parameter=n>\n12\n"
            "</parameter>\n<parameter=t>\na\nb\n</parameter>\n</function>\n</tool_call>",
            "Look:",
            [("add-up_2", '{"code": "12", "n": 12, "t": "a\\nb"}')],
        ),
        ("qwen3_coder", "<tool_call>\n<function=weather>\n</function>\n</tool_call>", "", [("weather", "{}")]),
    ],
)
def test_what_is_a_call_and_what_is_content(kind, text, content, calls):
    assert parsed(kind, text) == (content, calls)


@settings(max_examples=50, deadline=None)
@given(arguments=st.dictionaries(st.text(), VALUES), data=st.data())
def test_a_forced_answer_is_the_arguments_of_its_function(arguments, data):
    text = json.dumps(arguments)
    reader = Forced("weather")
    events = [e for piece in cut(text, data.draw(st.sets(st.integers(0, len(text))))) for e in reader.feed(piece)]
    assert told([*events, *reader.end()]) == ("", [("weather", text)])


def test_the_name_is_told_first_and_arguments_as_they_come():
    reader = FORMATS["hermes"](FUNCTIONS)
    assert reader.feed('Hi.\n<tool_call>{"name": "weather", ') == [Content("Hi.")]
    assert reader.feed('"arguments": {"city": "Par') == [CallBegins("weather"), Arguments('{"city": "Par')]
    assert reader.feed("is\\") == [Arguments("is")]
    assert reader.feed('n"') == [Arguments('\\n"')]
    assert reader.feed("}}</tool_call>") == [Arguments("}")]
    assert reader.end() == []
