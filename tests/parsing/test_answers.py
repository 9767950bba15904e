"""Reasoning before the answer, and calls after it: the whole of an answer, however it is cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfms_cli.parsing import AnswerParser, Arguments, CallBegins, Content, Reasoning, formats_of
from hfms_cli.parsing.calls import FORMATS
from hfms_cli.parsing.events import joined
from hfms_cli.parsing.reasoning import ReasoningReader


def read(pieces, *, calls=None, one_call=False):
    reader = FORMATS[calls]({"f": {}}) if calls else None
    parser = AnswerParser(ReasoningReader("<think>", "</think>"), reader, one_call=one_call)
    return joined([event for piece in pieces for event in parser.feed(piece)] + parser.end())


@pytest.mark.parametrize(
    ("text", "events"),
    [
        ("hello", [Content("hello")]),
        ("  hello ", [Content("  hello ")]),
        ("<think>\nhm, well\n</think>\n\nhello", [Reasoning("hm, well"), Content("hello")]),
        ("\n<think>a<b</thin</think>x</think>", [Reasoning("a<b</thin"), Content("x</think>")]),
        ("<think>\n\n</think>\n\nhello", [Content("hello")]),
        ("</think>\n\nhello", [Content("hello")]),
        ("<think>and on and on </th", [Reasoning("and on and on </th")]),
        ("<think>a</think>  ", [Reasoning("a")]),
        ("<think>", []),
        ("<thin", [Content("<thin")]),
        ("say <think>x</think>", [Content("say <think>x</think>")]),
        ("", []),
    ],
)
def test_reasoning_is_what_stands_between_the_marks_at_the_begin(text, events):
    assert read([text]) == read(text) == events


@settings(max_examples=300, deadline=None)
@given(
    text=st.lists(
        st.sampled_from(["<think>", "</think>", "<th", "</", "think>", " ", "\n", "a", "é🙂"])
        | st.just('<tool_call>{"name": "f", "arguments": {"a": "</think>"}}</tool_call>'),
        max_size=12,
    ).map("".join),
    data=st.data(),
    calls=st.sampled_from([None, *FORMATS]),
)
def test_an_answer_says_the_same_however_it_is_cut(text, data, calls):
    places = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    assert read([text[a:b] for a, b in pairwise([0, *places, len(text)])], calls=calls) == read([text], calls=calls)


def test_a_call_in_the_reasoning_is_a_thought_and_one_after_it_a_call():
    call = '<tool_call>{"name": "f"}</tool_call>'
    said = read([f"<think>{call}</think>\n{call}"], calls="hermes")
    assert said == [Reasoning(call), CallBegins("f"), Arguments("{}")]


def test_one_call_leaves_out_what_follows_it():
    call = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    assert read([f"Hi. {call}{call} there"], calls="hermes", one_call=True) == [
        Content("Hi."),
        CallBegins("f"),
        Arguments('{"a": 1}'),
    ]


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        ("{{ messages }} tools and [TOOL_CALLS]", "hermes", None),
        ("{% if tools %}<tool_call>{% endif %}", "hermes", None),
        ("{%- if tools is not none %}[TOOL_CALLS]{% endif %}", "mistral", None),
        ("{%- if tools %}x{% endif %}", "json", None),
        ("{%- if tools %}<tool_call>\n<function=a>{% endif %}</think>", "qwen3_coder", "think"),
        ("{%- for t in tools %}<|python_tag|>{% endfor %}[/THINK]", "llama3_json", "mistral"),
    ],
)
def test_the_templates_text_says_the_formats_and_a_setting_overrides_it(template, tools, reasoning):
    formats = formats_of(template)
    assert (formats.tools, formats.reasoning) == (tools, reasoning)
    overridden = formats_of(template, "mistral", "none")
    # A model that is told of tools in words is told one format.
    assert (overridden.tools, overridden.reasoning) == ("mistral" if formats.templated else "hermes", None)


@pytest.mark.parametrize(
    ("template", "system"),
    [
        ("{{ m.role }} {{ m.content }}", True),
        ("{% if m.role == 'system' %}...{% elif m.role == 'user' %}...", True),
        ("{% if m.role == 'user' %}...{% else %}{{ raise_exception('Only user and assistant roles!') }}", False),
        ("{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}", False),
        ("{% if m.role == 'system' %}...{% elif m.role != 'user' %}{{ raise_exception('Unknown role') }}", True),
    ],
)
def test_the_templates_text_says_whether_it_takes_a_system_message(template, system):
    assert formats_of(template).system == system
