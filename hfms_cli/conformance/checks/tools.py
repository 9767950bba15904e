"""Calls of functions."""

from __future__ import annotations

import json
from typing import Any

from hfms_cli.conformance.server import Server, choice_of, content_of, message_of, usage_of
from hfms_cli.conformance.suite import Failed, Skipped, check, expect

CHAT = "/v1/chat/completions"
ASK = [{"role": "user", "content": "What is the weather in Paris?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "London"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
FORCED = {"type": "function", "function": {"name": "get_weather"}}


async def takes_tools(server: Server) -> None:
    """Raise Skipped where tools are refused: many models have a template that knows none."""
    answer = await server.post(CHAT, **server.chat_body(ASK, max_tokens=1, tools=[WEATHER]))
    if answer.status == 400:
        raise Skipped(f"tools are refused: {answer.said()}")


def is_call(call: dict[str, Any]) -> None:
    """Raise Failed unless this is a call of the function."""
    expect(call.get("type") == "function" and call.get("id"), f"a call lacks its `type` or `id`: {call}")
    function = call["function"]
    expect(function.get("name") == "get_weather", f"the function is {function.get('name')!r}")
    expect(isinstance(function.get("arguments"), str), "`arguments` is no text")
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        raise Failed(f"`arguments` is no JSON: {function['arguments'][:100]!r}") from None
    expect(arguments.get("city") in ("Paris", "London"), f"the arguments do not fit the schema: {arguments}")


async def _called(server: Server, tool_choice: Any) -> None:
    await takes_tools(server)
    body = await server.chat(ASK, max_tokens=100, tools=[WEATHER], tool_choice=tool_choice)
    calls = message_of(body).get("tool_calls")
    expect(calls, f"there is no call; the text is {str(message_of(body).get('content'))[:80]!r}")
    for call in calls or ():
        is_call(call)
    reason = choice_of(body).get("finish_reason")
    # OpenAI ends a forced call by `stop`, others by `tool_calls`.
    expect(reason in ("tool_calls", "stop"), f"`finish_reason` is {reason!r}")


@check("tools", "a named function is called, with arguments that fit")
async def forced(server: Server) -> None:
    await _called(server, FORCED)


@check("tools", "tool_choice required gives a call")
async def required(server: Server) -> None:
    await _called(server, "required")


@check("tools", "tool_choice none gives a text")
async def none(server: Server) -> None:
    await takes_tools(server)
    body = await server.chat(ASK, tools=[WEATHER], tool_choice="none")
    expect(not message_of(body).get("tool_calls"), "there is a call")
    content_of(body)


@check("tools", "tool_choice auto gives a text or a call")
async def auto(server: Server) -> None:
    await takes_tools(server)
    message = message_of(await server.chat(ASK, max_tokens=64, tools=[WEATHER], tool_choice="auto"))
    expect(message.get("content") or message.get("tool_calls"), "there is neither")
    for call in message.get("tool_calls") or ():
        expect(call.get("id") and call["function"].get("name"), f"a call lacks its `id` or name: {call}")


@check("tools", "a call and its result can be told back")
async def result(server: Server) -> None:
    await takes_tools(server)
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    told = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Sunny, 21 degrees."},
    ]
    with_result = usage_of(await server.chat(told, tools=[WEATHER]))["prompt_tokens"]
    without = usage_of(await server.chat(ASK, tools=[WEATHER]))["prompt_tokens"]
    expect(with_result > without, "the result is not in the prompt")


@check("tools", "a streamed call has its id and name first, and arguments that add up")
async def streamed(server: Server) -> None:
    await takes_tools(server)
    stream = await server.chat_stream(ASK, max_tokens=100, tools=[WEATHER], tool_choice=FORCED)
    deltas = [d for c in stream.choices() for d in (c.get("delta") or {}).get("tool_calls") or ()]
    expect(deltas, f"there is no call; the text is {stream.text()[:80]!r}")
    expect(deltas[0].get("id") and deltas[0]["function"].get("name"), f"the first delta is {deltas[0]}")
    arguments = "".join((d.get("function") or {}).get("arguments") or "" for d in deltas if d.get("index") == 0)
    is_call(
        {**deltas[0], "type": "function", "function": {"name": deltas[0]["function"]["name"], "arguments": arguments}}
    )


@check("tools", "a function that is not among the tools is 400")
async def unknown(server: Server) -> None:
    await takes_tools(server)
    choice = {"type": "function", "function": {"name": "no_such_function"}}
    body = server.chat_body(ASK, tools=[WEATHER], tool_choice=choice)
    (await server.post(CHAT, **body)).refused(400)
