"""What an answer must look like, over HTTP: every way to say it, what is refused, and real answers of SmolLM2."""

from __future__ import annotations

import json
import re

import openai
import pytest

from hfms_cli.errors import BadRequest
from hfms_cli.types import Caller, Structure
from hfms_cli.web.body import parse
from hfms_cli.web.schemas import ChatRequest, CompletionRequest
from tests.conftest import SMOLLM2

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TEXT = json.dumps(SCHEMA, separators=(",", ":"))
NAMED = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}


def chat(**more) -> Structure | None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]} | more
    return parse(ChatRequest, json.dumps(body).encode()).call("id", Caller()).sampling.structure


def completion(**more) -> Structure | None:
    body = {"model": "m", "prompt": "hi"} | more
    return parse(CompletionRequest, json.dumps(body).encode()).call("id", Caller()).sampling.structure


@pytest.mark.parametrize("strict", [{}, {"strict": True}, {"strict": False}, {"strict": None, "description": "d"}])
def test_response_format_is_followed_whether_strict_or_not(strict):
    asked = {"type": "json_schema", "json_schema": NAMED["json_schema"] | strict}
    assert chat(response_format=asked) == Structure(kind="json_schema", spec=TEXT)
    assert chat(response_format={"type": "json_object"}) == Structure(kind="json_object")
    assert chat(response_format={"type": "text"}) is None
    assert chat(response_format=None) is None


@pytest.mark.parametrize("read", [chat, completion])
@pytest.mark.parametrize(
    ("kind", "old", "value", "spec"),
    [
        ("json", "guided_json", SCHEMA, TEXT),
        ("json", "guided_json", TEXT, TEXT),
        ("regex", "guided_regex", "[0-9]+", "[0-9]+"),
        ("choice", "guided_choice", ["é", "b"], '["é","b"]'),
        ("grammar", "guided_grammar", 'root ::= "a"', 'root ::= "a"'),
    ],
)
def test_vllms_names_of_old_and_new_mean_the_same(read, kind, old, value, spec):
    meant = "json_schema" if kind == "json" else kind
    assert read(**{old: value}) == Structure(kind=meant, spec=spec, param=old)
    new = read(structured_outputs={kind: value})
    assert new == Structure(kind=meant, spec=spec, param="structured_outputs")


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"response_format": {"type": "json_object"}, "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
        ({"structured_outputs": {"regex": "a"}, "response_format": NAMED}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs.structural_tag"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [1]}, "guided_choice[0]"),
        ({"guided_json": 3}, "guided_json"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": []}}},
            "response_format.json_schema.schema",
        ),
    ],
)
def test_two_at_once_and_wrong_types_are_refused_by_their_field(asked, param):
    with pytest.raises(BadRequest) as refused:
        chat(**asked)
    assert refused.value.param == param


async def test_an_engine_that_cannot_constrain_says_so_by_the_field(serve):
    async with serve("echo:a") as server:
        status, body = await server.post("/v1/completions", {"model": "echo:a", "prompt": "a", "guided_regex": "a"})
    assert (status, body["error"]["param"]) == (400, "guided_regex")


@pytest.mark.real_model
async def test_smollm2_answers_as_it_must(serve):
    async with (
        serve(SMOLLM2) as server,
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        ask = [{"role": "user", "content": "Tell me of Ada Lovelace, who lived to be 36, as JSON."}]
        made = client.chat.completions.create
        answer = await made(model=SMOLLM2, messages=ask, response_format=NAMED, temperature=0)
        said = json.loads(answer.choices[0].message.content)
        assert answer.choices[0].finish_reason == "stop"
        assert "Ada" in said["name"]
        assert 0 <= said["age"] <= 120

        stream = await made(model=SMOLLM2, messages=ask, response_format=NAMED, temperature=0, stream=True)
        text = "".join([c.choices[0].delta.content or "" async for c in stream])
        assert text == answer.choices[0].message.content

        hot = await made(model=SMOLLM2, messages=ask, response_format=NAMED, temperature=2, n=4, max_tokens=200)
        for choice in hot.choices:
            assert choice.finish_reason == "stop"
            assert json.loads(choice.message.content).keys() == {"name", "age"}

        free = await made(
            model=SMOLLM2, messages=ask, response_format={"type": "json_object"}, temperature=0, max_tokens=300
        )
        assert free.choices[0].message.content.startswith("{")
        if free.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(free.choices[0].message.content), dict)

        cut = await made(model=SMOLLM2, messages=ask, response_format=NAMED, max_tokens=2)
        assert cut.choices[0].finish_reason == "length"

        france = {"model": SMOLLM2, "prompt": "The capital of France is the city of", "temperature": 0}
        for extra, pattern in (
            ({"guided_choice": [" Berlin", " Paris", " Rome"]}, " Paris"),
            ({"structured_outputs": {"regex": " P[a-z]{4}"}}, " Paris"),
            ({"structured_outputs": {"grammar": 'root ::= " Par" rest "!"\nrest ::= [a-z]{2}'}}, " Par[a-z]{2}!"),
        ):
            completion = await client.completions.create(**france, extra_body=extra)
            assert re.fullmatch(pattern, completion.choices[0].text)
            assert completion.choices[0].finish_reason == "stop"

        for extra, param, word in (
            ({"guided_json": {"type": "string", "not": {}}}, "guided_json", "`not`"),
            ({"structured_outputs": {"regex": "("}}, "structured_outputs", "unclosed group"),
        ):
            for stream in (False, True):
                with pytest.raises(openai.BadRequestError) as refused:
                    await client.completions.create(**france, stream=stream, extra_body=extra)
                assert (refused.value.code, refused.value.param) == ("invalid_schema", param)
                assert word in refused.value.message
