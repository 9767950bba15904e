"""`/v1/responses`, over the echo engine: what items become, what events tell, what is refused; by the openai client."""

from __future__ import annotations

import json
import os
import signal

import openai
import pytest

from hfms_cli.types import Caller
from hfms_cli.web.body import parse
from hfms_cli.web.responses import ResponsesRequest
from hfms_cli.web.schemas import ChatRequest
from tests.web.test_tools import CALL, HERMES, THINKING, toml

TOOL = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}


def client(server):
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


async def streamed(server, body):
    """Each event's name and data."""
    async with server.session.post(server.url + "/v1/responses", json={"model": "echo:a", "stream": True} | body) as r:
        assert r.status == 200
        assert r.headers["Content-Type"].startswith("text/event-stream")
        frames = (await r.text()).removesuffix("\n\n").split("\n\n")
    told = []
    for frame in frames:
        name, data = frame.split("\n")
        told.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {told[-1]['type']}"
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    return told


async def test_a_text_is_answered_with_a_message(serve):
    async with serve("echo:a") as server, client(server) as api:
        answer = await api.responses.create(
            model="echo:a", input="one two three", instructions="Be brief.", metadata={"a": "b"}, store=False
        )
    assert answer.id.startswith("resp-")
    assert (answer.status, answer.object, answer.output_text) == ("completed", "response", "one two three")
    assert (answer.instructions, answer.metadata, answer.store) == ("Be brief.", {"a": "b"}, False)
    (message,) = answer.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens) == (3, 3, 6)
    assert answer.error is None
    assert answer.incomplete_details is None


async def test_an_answer_that_is_cut_off_is_incomplete_and_says_why(serve):
    async with serve("echo:a") as server, client(server) as api:
        answer = await api.responses.create(model="echo:a", input="one two three", max_output_tokens=2)
        told = await streamed(server, {"input": "one two three", "max_output_tokens": 2})
    assert (answer.status, answer.incomplete_details.reason, answer.output_text) == (
        "incomplete",
        "max_output_tokens",
        "one two",
    )
    assert answer.output[0].status == "incomplete"
    assert told[-1]["type"] == "response.incomplete"
    assert told[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


async def test_a_stream_tells_reasoning_message_and_call_item_by_item(serve):
    text = f"<think>\nHm, well.\n</think>\n\nLet me see.\n{CALL}"
    async with serve("echo:a", toml=toml(THINKING)) as server:
        told = await streamed(server, {"input": text, "tools": [TOOL]})
        _, whole = await server.post("/v1/responses", {"model": "echo:a", "input": text, "tools": [TOOL]})
    kinds = [event["type"].removeprefix("response.") for event in told]
    pieces = {"reasoning_text.delta", "output_text.delta", "function_call_arguments.delta"}
    assert [kind for i, kind in enumerate(kinds) if kind not in pieces or kinds[i - 1] != kind] == [
        "created",
        "in_progress",
        *("output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done"),
        *("content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta", "output_text.done"),
        *("content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    assert told[0]["response"]["status"] == "in_progress"
    assert told[0]["response"]["output"] == []
    done = told[-1]["response"]
    items = [event["item"] for event in told if event["type"] == "response.output_item.done"]
    assert done["output"] == items
    assert [item["type"] for item in items] == ["reasoning", "message", "function_call"]
    assert items[0]["content"] == [{"type": "reasoning_text", "text": "Hm, well."}]
    assert items[1]["content"][0]["text"] == "Let me see."
    assert (items[2]["name"], json.loads(items[2]["arguments"])) == ("weather", {"city": "Zürich"})
    for index, item in enumerate(items):
        deltas = "".join(e["delta"] for e in told if e.get("output_index") == index and e["type"].endswith(".delta"))
        assert deltas == (item.get("arguments") or item["content"][0]["text"])
        assert {e["item_id"] for e in told if e.get("output_index") == index and "item_id" in e} == {item["id"]}
    assert done["usage"]["output_tokens_details"] == {"reasoning_tokens": 3}
    # The same as one object, but for what is made up each time.
    made_up = {"id", "created_at", "completed_at", "output"}
    assert {k: v for k, v in whole.items() if k not in made_up} == {k: v for k, v in done.items() if k not in made_up}
    assert [i["type"] for i in whole["output"]] == [i["type"] for i in items]


async def test_the_clients_own_stream_gathers_the_answer(serve):
    async with (
        serve("echo:a", toml=toml(HERMES)) as server,
        client(server) as api,
        api.responses.stream(model="echo:a", input=f"Look. {CALL}", tools=[TOOL]) as stream,
    ):
        kinds = [event.type async for event in stream]
        answer = await stream.get_final_response()
    assert kinds[-1] == "response.completed"
    assert answer.output_text == "Look."
    assert json.loads(answer.output[1].arguments) == {"city": "Zürich"}


async def test_what_an_answer_said_may_come_back_with_what_its_call_gave(serve):
    async with serve("echo:a", toml=toml(THINKING)) as server, client(server) as api:
        first = await api.responses.create(model="echo:a", input=f"<think>hm</think>Look.{CALL}", tools=[TOOL])
        assert [item.type for item in first.output] == ["reasoning", "message", "function_call"]
        call = first.output[-1]
        dialogue = [
            {"role": "user", "content": [{"type": "input_text", "text": "How is it?"}]},
            *first.output,
            {"type": "function_call_output", "call_id": call.call_id, "output": "it rains"},
        ]
        second = await api.responses.create(model="echo:a", input=dialogue, tools=[TOOL])
    assert second.output_text == "it rains"


def test_items_become_the_conversation_that_messages_would():
    made = {"call_id": "c", "name": "f", "arguments": '{"a": 1}'}
    items = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "input_text", "text": "one"}, {"type": "input_text", "text": "two"}]},
        {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "So.", "annotations": []}],
        },
        {"type": "function_call", **made, "status": "completed"},
        {"type": "function_call", **made, "call_id": "d"},
        {"type": "function_call_output", "call_id": "c", "output": "1"},
        {"type": "function_call_output", "call_id": "d", "output": [{"type": "input_text", "text": "2"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "again"}]},
        {"type": "function_call", **made, "call_id": "e"},
    ]
    function = {"name": "f", "arguments": '{"a": 1}'}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {
            "role": "assistant",
            "content": "So.",
            "reasoning_content": "hm",
            "tool_calls": [{"id": id, "type": "function", "function": function} for id in "cd"],
        },
        {"role": "tool", "tool_call_id": "c", "content": "1"},
        {"role": "tool", "tool_call_id": "d", "content": "2"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "again",
            "tool_calls": [{"id": "e", "type": "function", "function": function}],
        },
    ]
    told = parse(ResponsesRequest, json.dumps({"model": "m", "instructions": "Be brief.", "input": items}).encode())
    chat = parse(ChatRequest, json.dumps({"model": "m", "messages": messages}).encode())
    assert told.call("a", Caller()).inputs == chat.call("a", Caller()).inputs


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"input": []}, "input", "invalid_value"),
        ({}, "input", "missing_parameter"),
        ({"input": "a", "store": True}, "store", "unsupported_parameter"),
        ({"input": "a", "previous_response_id": "resp_1"}, "previous_response_id", "unsupported_parameter"),
        ({"input": "a", "background": True}, "background", "unsupported_parameter"),
        ({"input": "a", "include": ["reasoning.encrypted_content"]}, "include", "unsupported_parameter"),
        ({"input": "a", "truncation": "auto"}, "truncation", "unsupported_parameter"),
        ({"input": "a", "frobnicate": 1}, "frobnicate", "unsupported_parameter"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools[0].type", "invalid_value"),
        (
            {"input": "a", "tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}},
            "tool_choice",
            "invalid_value",
        ),
        ({"input": "a", "temperature": 3}, "temperature", "invalid_value"),
        ({"input": "a", "reasoning": {"effort": "high"}}, "reasoning.effort", "unsupported_value"),
        ({"input": "a", "reasoning": {"summary": "auto"}}, "reasoning.summary", "invalid_value"),
        (
            {"input": "a", "text": {"format": {"type": "json_schema", "name": "x"}}},
            "text.format.schema",
            "invalid_value",
        ),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "invalid_value"),
        ({"input": [{"content": "x"}]}, "input[0].role", "invalid_value"),
        ({"input": [{"role": "user"}]}, "input[0].content", "missing_parameter"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].image_url",
            "invalid_image_url",
        ),
        (
            {
                "input": [
                    {"role": "system", "content": [{"type": "input_image", "image_url": "data:image/png;base64,"}]}
                ]
            },
            "input[0].content[0].type",
            "unsupported_value",
        ),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id", "missing_parameter"),
        (
            {"input": [{"type": "function_call", "name": "f", "call_id": "c", "arguments": "{"}]},
            "input[0].arguments",
            "invalid_value",
        ),
        ({"input": "w " * 40_000}, "input", "context_length_exceeded"),
    ],
)
async def test_what_cannot_be_done_is_400_and_named(serve, body, param, code):
    async with serve("echo:a", toml=toml(HERMES)) as server:
        for stream in (False, True):
            status, answer = await server.post("/v1/responses", {"model": "echo:a", "stream": stream} | body)
            assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, param, code)


async def test_kill_9_mid_stream_ends_with_response_failed(serve):
    async with serve("echo:a", toml="[engine.echo]\nstep_ms = 5") as server:
        (model,) = server.runtime.pool.models()
        body = {"model": "echo:a", "input": "w " * 20_000, "stream": True}
        async with server.session.post(server.url + "/v1/responses", json=body) as response:
            assert response.status == 200
            await response.content.readline()
            os.kill(model.host.pid, signal.SIGKILL)
            last = (await response.text()).strip().split("\n\n")[-1]
    event = json.loads(last.split("\n")[1].removeprefix("data: "))
    assert event["type"] == "response.failed"
    assert (event["response"]["status"], event["response"]["error"]["code"]) == ("failed", "engine_died")
    assert event["response"]["output"][0]["status"] == "incomplete"
