"""Tools and reasoning over HTTP. The echo engine says what the last message says, so a test writes the answer."""

from __future__ import annotations

import json

import pytest

from hfms_cli.web.tool_text import told

HERMES = "{% if tools %}<tool_call>{% endif %}"
THINKING = HERMES + "{{ content.split('</think>') }}"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'


def toml(template, models=""):
    return f"[models]\n{models}\n[engine.echo]\ntemplate = {json.dumps(template)}"


def chat(text, **more):
    return {"model": "echo:a", "messages": [{"role": "user", "content": text}]} | more


async def streamed(server, body):
    """The deltas of a stream, with the reason that the last one has."""
    async with server.session.post(server.url + "/v1/chat/completions", json=body | {"stream": True}) as response:
        assert response.status == 200
        events = (await response.text()).strip().split("\n\n")
    assert events.pop() == "data: [DONE]"
    choices = [json.loads(e.removeprefix("data: "))["choices"][0] for e in events]
    return [c["delta"] for c in choices], choices[-1]["finish_reason"]


def gathered(deltas):
    """The message that deltas add up to, as OpenAI's clients add them."""
    message = {"content": "", "reasoning_content": "", "tool_calls": []}
    for delta in deltas:
        message["content"] += delta.get("content") or ""
        message["reasoning_content"] += delta.get("reasoning_content") or ""
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(message["tool_calls"]):
                assert call["id"]
                assert call["type"] == "function"
                message["tool_calls"].append({"id": call["id"], "name": call["function"]["name"], "arguments": ""})
            message["tool_calls"][call["index"]]["arguments"] += call["function"]["arguments"]
    return message


async def test_a_call_in_an_answer_is_told_as_one_whole_and_streamed(serve):
    body = chat(f"Let me look.\n{CALL}\n{CALL}", tools=[WEATHER])
    async with serve("echo:a", toml=toml(HERMES)) as server:
        status, answer = await server.post("/v1/chat/completions", body)
        deltas, finish = await streamed(server, body)
    assert status == 200
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == finish == "tool_calls"
    assert choice["message"]["content"] == "Let me look."
    calls = choice["message"]["tool_calls"]
    assert [c["function"] for c in calls] == [{"name": "weather", "arguments": '{"city": "Zürich"}'}] * 2
    assert all(c["type"] == "function" and len(c["id"]) == 9 for c in calls)
    assert len({c["id"] for c in calls}) == 2
    message = gathered(deltas)
    assert message["content"] == "Let me look."
    assert [(c["name"], c["arguments"]) for c in message["tool_calls"]] == [("weather", '{"city": "Zürich"}')] * 2
    # The name comes before the arguments, and those come in pieces.
    first = [d["tool_calls"][0]["function"] for d in deltas if "tool_calls" in d and d["tool_calls"][0]["index"] == 0]
    assert first[0] == {"name": "weather", "arguments": ""}
    assert len(first) > 2


async def test_an_answer_of_calls_alone_has_no_content(serve):
    async with serve("echo:a", toml=toml(HERMES)) as server:
        _, answer = await server.post("/v1/chat/completions", chat(CALL, tools=[WEATHER]))
    assert answer["choices"][0]["message"]["content"] is None


@pytest.mark.parametrize(
    "asked",
    [{}, {"tools": [WEATHER], "tool_choice": "none"}, {"tools": [{**WEATHER, "function": {"name": "other"}}]}],
)
async def test_what_may_not_be_called_is_content(serve, asked):
    async with serve("echo:a", toml=toml(HERMES)) as server:
        _, answer = await server.post("/v1/chat/completions", chat(CALL, **asked))
    (choice,) = answer["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")
    assert "tool_calls" not in choice["message"]


async def test_without_parallel_calls_there_is_one(serve):
    body = chat(f"{CALL}\n{CALL}", tools=[WEATHER], parallel_tool_calls=False)
    async with serve("echo:a", toml=toml(HERMES)) as server:
        _, answer = await server.post("/v1/chat/completions", body)
        deltas, _ = await streamed(server, body)
    assert len(answer["choices"][0]["message"]["tool_calls"]) == 1
    assert len(gathered(deltas)["tool_calls"]) == 1


async def test_the_operator_may_name_the_format(serve):
    text = '[TOOL_CALLS]weather[ARGS]{"city": "Rome"}'
    async with serve("echo:a", toml=toml(HERMES, 'tool_parser = "mistral"')) as server:
        _, answer = await server.post("/v1/chat/completions", chat(text, tools=[WEATHER]))
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}


async def test_reasoning_is_told_apart_whole_and_streamed_and_its_tokens_are_counted(serve):
    body = chat(f"<think>\nThey ask\nfor Zürich.\n</think>\n\nWell.\n{CALL}", tools=[WEATHER])
    async with serve("echo:a", toml=toml(THINKING)) as server:
        _, answer = await server.post("/v1/chat/completions", body)
        deltas, finish = await streamed(server, body)
    message = answer["choices"][0]["message"]
    assert message["reasoning_content"] == gathered(deltas)["reasoning_content"] == "They ask\nfor Zürich."
    assert message["content"] == gathered(deltas)["content"] == "Well."
    assert len(message["tool_calls"]) == len(gathered(deltas)["tool_calls"]) == 1
    assert finish == "tool_calls"
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 5}


async def test_an_answer_that_ends_in_its_reasoning_has_no_content(serve):
    async with serve("echo:a", toml=toml(THINKING)) as server:
        _, answer = await server.post("/v1/chat/completions", chat("<think> one two three", max_tokens=3))
    (choice,) = answer["choices"]
    assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == ("one two", "")
    assert choice["finish_reason"] == "length"


async def test_reasoning_stays_content_where_the_operator_says_so(serve):
    text = "<think>hm</think> hello"
    async with serve("echo:a", toml=toml(THINKING, 'reasoning_parser = "none"')) as server:
        _, answer = await server.post("/v1/chat/completions", chat(text))
    assert answer["choices"][0]["message"]["content"] == text
    assert "completion_tokens_details" not in answer["usage"]


ASKED = {"role": "user", "content": "hi"}
MADE = {"id": "abc", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}


async def test_a_conversation_with_calls_and_what_they_gave_is_taken(serve):
    messages = [
        ASKED,
        {"role": "assistant", "content": None, "tool_calls": [MADE]},
        {"role": "tool", "tool_call_id": "abc", "content": [{"type": "text", "text": "rain"}]},
    ]
    async with serve("echo:a", toml=toml(HERMES)) as server:
        status, answer = await server.post("/v1/chat/completions", {"model": "echo:a", "messages": messages})
    assert (status, answer["choices"][0]["message"]["content"]) == (200, "rain")


def function(**more):
    return {"type": "function", "function": {"name": "f"} | more}


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "invalid_value"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_parameter"),
        ({"tools": [function(name="a b")]}, "tools[0].function.name", "invalid_value"),
        ({"tools": [function(parameters=[])]}, "tools[0].function.parameters", "invalid_value"),
        ({"tools": [function(cost=1)]}, "tools[0].function.cost", "unsupported_parameter"),
        ({"tools": [function(), function()]}, "tools", "invalid_value"),
        ({"tools": [function(name=f"f{i}") for i in range(129)]}, "tools", "invalid_value"),
        ({"tools": [function(description="x" * 300_000)]}, "tools", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"tools": [function()], "tool_choice": "maybe"}, "tool_choice", "invalid_value"),
        (
            {"tools": [function()], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
            "invalid_value",
        ),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "invalid_value"),
        ({"messages": [ASKED | {"tool_calls": [MADE]}]}, "messages[0].tool_calls", "invalid_value"),
        ({"messages": [ASKED | {"tool_call_id": "x"}]}, "messages[0].tool_call_id", "invalid_value"),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [MADE | {"function": {"name": "f", "arguments": "[1]"}}]}
                ]
            },
            "messages[0].tool_calls[0].function.arguments",
            "invalid_value",
        ),
    ],
)
async def test_tools_that_make_no_sense_are_400_and_named(serve, body, param, code):
    async with serve("echo:a", toml=toml(HERMES)) as server:
        status, answer = await server.post("/v1/chat/completions", chat("hi") | body)
    assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, param, code)


SAYS_ALL = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


async def test_a_model_whose_template_takes_no_tools_is_told_of_them_and_its_calls_are_read(serve):
    body = chat(f"Let me look.\n{CALL}", tools=[WEATHER])
    async with serve("echo:a", toml=toml(SAYS_ALL)) as server:
        status, answer = await server.post("/v1/chat/completions", body)
        deltas, finish = await streamed(server, body)
    assert status == 200
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == finish == "tool_calls"
    assert choice["message"]["content"] == gathered(deltas)["content"] == "Let me look."
    assert [c["function"]["name"] for c in choice["message"]["tool_calls"]] == ["weather"]
    assert [c["name"] for c in gathered(deltas)["tool_calls"]] == ["weather"]


USER, SYSTEM = {"role": "user", "content": "hi"}, {"role": "system", "content": "Be brief."}
PICTURED = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}


@pytest.mark.parametrize(
    ("messages", "system", "where", "kept"),
    [
        ([USER], True, "system", ""),
        ([SYSTEM, USER], True, "system", "Be brief.\n\n"),
        ([USER], False, "user", "\n\nhi"),
        ([{"role": "assistant", "content": "Hello."}], False, "user", ""),
    ],
)
def test_tools_are_told_in_the_message_that_a_template_takes(messages, system, where, kept):
    first, *others = told(messages, [WEATHER], system=system)
    assert first["role"] == where
    assert '{"type":"function","function":{"name":"weather"' in first["content"]
    assert "<tool_call>" in first["content"]
    assert first["content"].startswith(kept) if system else first["content"].endswith(kept)
    assert others == [m for m in messages if m["role"] != where]


def test_tools_are_told_beside_images():
    (first,) = told([PICTURED], [WEATHER], system=False)
    assert first["content"][1:] == PICTURED["content"]
    assert "weather" in first["content"][0]["text"]


def test_calls_and_what_came_of_them_are_told_as_text():
    made = [{"id": c, "type": "function", "function": {"name": c, "arguments": {"a": 1}}} for c in "fg"]
    results = [{"role": "tool", "tool_call_id": c, "content": f"so {c}"} for c in "fg"]
    said = told(
        [USER, {"role": "assistant", "content": "Look.", "tool_calls": made}, *results, USER], None, system=True
    )
    assert [m["role"] for m in said] == ["user", "assistant", "user", "user"]
    calls = [f'<tool_call>\n{{"name":"{c}","arguments":{{"a":1}}}}\n</tool_call>' for c in "fg"]
    assert said[1]["content"] == "\n".join(["Look.", *calls])
    assert said[1].keys() == {"role", "content"}
    assert said[2]["content"] == "\n".join(f"<tool_response>\nso {c}\n</tool_response>" for c in "fg")
