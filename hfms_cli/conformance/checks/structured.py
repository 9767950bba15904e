"""Answers of a given form: constrained, not asked for."""

from __future__ import annotations

import json
from typing import Any

from hfms_cli.conformance.server import Server, choice_of, content_of
from hfms_cli.conformance.suite import Failed, Skipped, check, expect

GROUP = "structured output"
ASK = [{"role": "user", "content": "Describe a cat. Answer in JSON."}]
SCHEMA = {
    "type": "object",
    "properties": {
        "animal": {"type": "string", "enum": ["cat", "dog"]},
        "wild": {"type": "boolean"},
        "size": {"type": "string", "enum": ["small", "large"]},
    },
    "required": ["animal", "wild", "size"],
    "additionalProperties": False,
}


def by_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "described", "strict": True, "schema": schema}}


def fits(text: str) -> None:
    """Raise Failed unless a text is JSON that fits SCHEMA."""
    try:
        found = json.loads(text)
    except ValueError:
        raise Failed(f"the answer is no JSON: {text[:100]!r}") from None
    expect(isinstance(found, dict) and set(found) == {"animal", "wild", "size"}, f"the fields are others: {text[:100]}")
    fit = found["animal"] in ("cat", "dog") and isinstance(found["wild"], bool) and found["size"] in ("small", "large")
    expect(fit, f"a value is none that the schema has: {text[:100]}")


@check(GROUP, "json_object gives an object")
async def json_object(server: Server) -> None:
    body = await server.chat(ASK, max_tokens=300, response_format={"type": "json_object"})
    text = content_of(body)
    if choice_of(body)["finish_reason"] == "length":
        expect(text.lstrip().startswith("{"), f"the answer is no JSON: {text[:100]!r}")
        raise Skipped("the model's answer was not over after 300 tokens")
    try:
        expect(isinstance(json.loads(text), dict), f"the answer is no object: {text[:100]}")
    except ValueError:
        raise Failed(f"the answer is no JSON: {text[:100]!r}") from None


@check(GROUP, "json_schema gives what the schema says")
async def json_schema(server: Server) -> None:
    fits(content_of(await server.chat(ASK, max_tokens=100, response_format=by_schema(SCHEMA))))


@check(GROUP, "json_schema holds at temperature 2, too")
async def hot(server: Server) -> None:
    for seed in range(3):
        body = await server.chat(
            ASK, max_tokens=100, temperature=2, seed=seed, response_format=by_schema(SCHEMA)
        )  # fmt: skip
        fits(content_of(body))


@check(GROUP, "json_schema holds in a stream")
async def streamed(server: Server) -> None:
    fits((await server.chat_stream(ASK, max_tokens=100, response_format=by_schema(SCHEMA))).text())


@check(GROUP, "response_format text changes nothing")
async def text(server: Server) -> None:
    plain = content_of(await server.chat())
    expect(content_of(await server.chat(response_format={"type": "text"})) == plain, "the answer is another one")


async def _refused(server: Server, wrong: dict[str, Any]) -> None:
    """400 for this, where a good one is taken."""
    good, bad = [
        await server.post("/v1/chat/completions", **server.chat_body(ASK, max_tokens=1, response_format=form))
        for form in (by_schema(SCHEMA), wrong)
    ]
    if good.status != 200:
        raise Skipped("a good json_schema is refused, too")
    bad.refused(400)


@check(GROUP, "an unknown response_format is 400")
async def unknown(server: Server) -> None:
    await _refused(server, {"type": "poetry"})


@check(GROUP, "a schema that is none is 400")
async def no_schema(server: Server) -> None:
    await _refused(server, by_schema({"type": "no such type"}))


@check(GROUP, "one of several words, as vLLM has it")
async def choice(server: Server) -> None:
    words = ["ocelot", "axolotl"]
    for extra in ({"structured_outputs": {"choice": words}}, {"guided_choice": words}):
        answer = await server.post("/v1/chat/completions", **server.chat_body(ASK, **extra))
        if answer.status == 200 and content_of(answer.ok()) in words:
            return
    raise Skipped("neither `structured_outputs.choice` nor `guided_choice`, which are extras, is obeyed")
