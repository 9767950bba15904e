"""Forced calls by a real engine with a model that knows nothing: whatever it says is a call that fits its schema."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import jsonschema
import openai
import pydantic
import pytest

from tests.chat_templates import TEMPLATES
from tests.conftest import SMOLLM2
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
        body = asked(folder, tools=[tool], tool_choice="required", parallel_tool_calls=False)
        status, answer = await server.post("/v1/chat/completions", body)
        assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, "tools", "invalid_schema")


# --- a real model, whose template takes no tools ---

REAL_ENGINES = ["llama_cpp", "openvino", "transformers"]


class Trip(pydantic.BaseModel):
    """What an answer must be."""

    city: Literal["Rome", "Zürich"]
    days: Literal[1, 2, 3]
    why: Annotated[str, pydantic.Field(max_length=20)]


def order(engine):
    return f'[engine]\norder = ["{engine}"]'


@pytest.mark.real_model
@pytest.mark.parametrize("engine", REAL_ENGINES)
async def test_forced_calls_of_a_real_model_are_valid_whole_and_streamed(serve, engine):
    async with serve(SMOLLM2, toml=order(engine)) as server:
        body = {
            "model": SMOLLM2,
            "messages": [{"role": "user", "content": "How is the weather in Zürich for the next 3 days?"}],
            "tools": [TOOLS[1]],
            "max_tokens": 200,
            "temperature": 0,
        }
        forced = {"type": "function", "function": {"name": "weather"}}
        for choice, parallel in (("required", False), (forced, True)):
            asked = body | {"tool_choice": choice, "parallel_tool_calls": parallel}
            status, answer = await server.post("/v1/chat/completions", asked)
            assert status == 200, answer
            (said,) = answer["choices"]
            assert said["finish_reason"] == "tool_calls"
            assert said["message"]["content"] is None
            functions = [call["function"] for call in said["message"]["tool_calls"]]
            ((name, arguments),) = checked([(f["name"], f["arguments"]) for f in functions])
            assert name == "weather"
            deltas, finish = await streamed(server, asked)
            assert finish == "tool_calls"
            assert [(c["name"], c["arguments"]) for c in gathered(deltas)["tool_calls"]] == [(name, arguments)]
        status, answer = await server.post("/v1/chat/completions", body | {"max_tokens": 5})
        assert (status, answer["usage"]["completion_tokens"]) == (200, 5)
        # It was told of them.
        prompt = answer["usage"]["prompt_tokens"]
        _, answer = await server.post("/v1/chat/completions", body | {"max_tokens": 5, "tool_choice": "none"})
        assert answer["usage"]["prompt_tokens"] < prompt / 2


@pytest.mark.real_model
@pytest.mark.parametrize("engine", REAL_ENGINES)
async def test_the_client_parses_what_a_real_model_says(serve, engine):
    messages = [{"role": "user", "content": "Plan a trip to Zürich for 2 days."}]
    tool = openai.pydantic_function_tool(Trip, name="travel")
    asked = {"model": SMOLLM2, "messages": messages, "max_tokens": 200, "temperature": 0}
    async with (
        serve(SMOLLM2, toml=order(engine)) as server,
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        answer = await client.chat.completions.parse(**asked, response_format=Trip)
        whole = answer.choices[0].message.parsed
        assert isinstance(whole, Trip)
        async with client.chat.completions.stream(**asked, response_format=Trip) as stream:
            async for _ in stream:
                continue
            assert (await stream.get_final_completion()).choices[0].message.parsed == whole
        answer = await client.chat.completions.parse(
            **asked, tools=[tool], tool_choice="required", parallel_tool_calls=False
        )
        for call in answer.choices[0].message.tool_calls:
            assert isinstance(call.function.parsed_arguments, Trip)
        told = {
            "model": SMOLLM2,
            "input": "Plan a trip to Zürich for 2 days.",
            "max_output_tokens": 200,
            "temperature": 0,
        }
        answer = await client.responses.parse(**told, text_format=Trip)
        assert isinstance(answer.output_parsed, Trip)
        async with client.responses.stream(**told, text_format=Trip) as stream:
            async for _ in stream:
                continue
            assert (await stream.get_final_response()).output_parsed == answer.output_parsed
        flat = openai.pydantic_function_tool(Trip, name="travel")["function"]
        answer = await client.responses.parse(
            **told, tools=[{"type": "function", **flat}], tool_choice={"type": "function", "name": "travel"}
        )
        (call,) = answer.output
        assert Trip.model_validate_json(call.arguments)
        plain = await client.chat.completions.create(**asked, response_format={"type": "json_object"})
        if plain.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(plain.choices[0].message.content), dict)
