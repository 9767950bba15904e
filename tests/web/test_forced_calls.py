"""Forced calls by a real engine with a model that knows nothing: whatever it says is a call that fits its schema."""

from __future__ import annotations

import json
from typing import Literal

import jsonschema
import openai
import pydantic
import pytest

from tests.chat_templates import TEMPLATES
from tests.engines import tiny
from tests.web.test_tools import gathered, streamed

pytest.importorskip("torch")
pytest.importorskip("llguidance")

from transformers import AutoTokenizer

TREE = {
    "type": "object",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "kind": {"enum": ["leaf", "twig"]},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["kind"],
            "additionalProperties": False,
        }
    },
    "properties": {"root": {"$ref": "#/$defs/node"}, "deep": {"type": "boolean"}},
    "required": ["root", "deep"],
    "additionalProperties": False,
}
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Zürich"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
SCHEMAS = {"grow": TREE, "weather": CITY}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]
NAMED = {"type": "function", "function": {"name": "grow"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = tiny.ARCHITECTURES["llama"]()
    config.max_position_embeddings = 4096
    folder = tiny.save(tmp_path_factory.mktemp("tools"), config)
    words = tiny.tokenizer()
    words.chat_template = TEMPLATES["qwen3"]
    words.save_pretrained(folder)
    return folder


def asked(folder, **more):
    messages = [{"role": "user", "content": "How is the weather?"}]
    return {"model": folder.name, "messages": messages, "tools": TOOLS, "max_tokens": 600, "temperature": 2} | more


def checked(calls):
    """Every call is of a function that there is, with arguments that it takes."""
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])
    return calls


@pytest.mark.parametrize("engine", ["transformers", "openvino"])
async def test_forced_calls_are_valid_whatever_the_model_would_say(serve, folder, engine):
    async with serve(str(folder), toml=f'[engine]\norder = ["{engine}"]') as server:
        for choice, parallel in (("required", True), ("required", False), (NAMED, True)):
            body = asked(folder, tool_choice=choice, parallel_tool_calls=parallel)
            whole = 0
            for seed in range(4):
                status, answer = await server.post("/v1/chat/completions", body | {"seed": seed})
                assert status == 200, answer
                (said,) = answer["choices"]
                if said["finish_reason"] == "length":
                    continue  # a list without an end is this model's right
                whole += 1
                assert said["finish_reason"] == "tool_calls"
                assert said["message"]["content"] is None
                functions = [call["function"] for call in said["message"]["tool_calls"]]
                calls = checked([(f["name"], f["arguments"]) for f in functions])
                if choice is NAMED:
                    assert [name for name, _ in calls] == ["grow"]
                if not parallel:
                    assert len(calls) == 1
                deltas, finish = await streamed(server, body | {"seed": seed})
                assert finish == "tool_calls"
                assert [(c["name"], c["arguments"]) for c in gathered(deltas)["tool_calls"]] == calls
            assert whole


async def test_the_client_gets_forced_calls_from_responses_and_its_own_stream(serve, folder):
    tools = [
        {"type": "function", "name": name, "parameters": schema, "strict": True} for name, schema in SCHEMAS.items()
    ]
    async with (
        serve(str(folder)) as server,
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        choice = {"type": "function", "name": "weather"}
        asked = {"model": folder.name, "input": "Weather?", "tools": tools, "tool_choice": choice}
        answer = await client.responses.create(**asked)
        (call,) = answer.output
        checked([(call.name, call.arguments)])
        async with client.responses.stream(**asked) as stream:
            kinds = [event.type async for event in stream]
            (call,) = (await stream.get_final_response()).output
        checked([(call.name, call.arguments)])
        assert "response.function_call_arguments.delta" in kinds


async def test_the_clients_chat_helpers_parse_forced_calls(serve, folder):
    class Weather(pydantic.BaseModel):
        city: Literal["Rome", "Zürich"]
        days: Literal[1, 2, 3]

    tool = openai.pydantic_function_tool(Weather, name="weather")
    async with (
        serve(str(folder)) as server,
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        asked = {
            "model": folder.name,
            "messages": [{"role": "user", "content": "Weather?"}],
            "tools": [tool],
            "tool_choice": {"type": "function", "function": {"name": "weather"}},
        }
        answer = await client.chat.completions.parse(**asked)
        assert isinstance(answer.choices[0].message.tool_calls[0].function.parsed_arguments, Weather)
        async with client.chat.completions.stream(**asked) as stream:
            kinds = [event.type async for event in stream]
            answer = await stream.get_final_completion()
        assert isinstance(answer.choices[0].message.tool_calls[0].function.parsed_arguments, Weather)
        assert "tool_calls.function.arguments.delta" in kinds


async def test_tokenize_counts_tools_as_the_template_writes_them(serve, folder):
    async with serve(str(folder)) as server:
        body = {key: value for key, value in asked(folder).items() if key in ("model", "messages", "tools")}
        told = [(await server.post("/tokenize", body | more))[1]["tokens"] for more in ({}, {"tools": None})]
    words = AutoTokenizer.from_pretrained(folder)
    expected = [
        words.apply_chat_template(body["messages"], tools=tools, add_generation_prompt=True, return_dict=False)
        for tools in (TOOLS, None)
    ]
    assert len(expected[0]) > len(expected[1])
    assert told[1] == expected[1]
    assert len(told[0]) >= len(expected[0])  # `description`, which our tools have not, is written as empty


async def test_a_structure_and_tools_that_may_be_called_do_not_go_together(serve, folder):
    async with serve(str(folder)) as server:
        body = asked(folder, response_format={"type": "json_object"})
        status, answer = await server.post("/v1/chat/completions", body)
        assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, "tools", "unsupported_value")
        status, _ = await server.post("/v1/chat/completions", body | {"tool_choice": "none", "max_tokens": 5})
        assert status == 200


async def test_a_schema_that_cannot_be_followed_is_400_and_says_where_it_came_from(serve, folder):
    async with serve(str(folder)) as server:
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "unheard"}}}
        body = asked(folder, tools=[tool], tool_choice="required")
        status, answer = await server.post("/v1/chat/completions", body)
        assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, "tools", "invalid_schema")
