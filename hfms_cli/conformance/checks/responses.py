"""`/v1/responses`, OpenAI's newer way to ask."""

from __future__ import annotations

from typing import Any

from hfms_cli.conformance.server import Server, Stream
from hfms_cli.conformance.suite import Failed, Skipped, check, expect

PATH = "/v1/responses"
SEA = "Tell me about the sea."


async def respond(server: Server, asked: Any = SEA, **more: Any) -> dict[str, Any]:
    body = {"model": server.model, "input": asked, "temperature": 0, "max_output_tokens": 16, "store": False}
    answer = await server.post(PATH, **body | more)
    if answer.absent:
        raise Skipped("there is no /v1/responses")
    return answer.ok()


def text_of(response: dict[str, Any]) -> str:
    """The text of a response's messages. Raises Failed."""
    messages = [item for item in response.get("output") or () if item.get("type") == "message"]
    expect(messages, "there is no message in `output`")
    return "".join(part.get("text") or "" for m in messages for part in m["content"] if part["type"] == "output_text")


@check("responses", "answers a text in OpenAI's shape")
async def answers(server: Server) -> None:
    body = await respond(server)
    expect(body.get("object") == "response", f"`object` is {body.get('object')!r}")
    expect(body.get("status") in ("completed", "incomplete"), f"`status` is {body.get('status')!r}")
    expect(text_of(body), "there is no text")


@check("responses", "counts tokens of prompt and answer")
async def counts(server: Server) -> None:
    usage = (await respond(server))["usage"]
    total = usage["input_tokens"] + usage["output_tokens"]
    expect(usage["input_tokens"] > 0 and usage["total_tokens"] == total, f"`usage` does not add up: {usage}")


@check("responses", "says that an answer was cut at max_output_tokens")
async def cut(server: Server) -> None:
    body = await respond(server, max_output_tokens=16)
    if body["usage"]["output_tokens"] < 16:
        raise Skipped("the model's answer was shorter")
    expect(body.get("status") == "incomplete", f"`status` is {body.get('status')!r}")
    reason = (body.get("incomplete_details") or {}).get("reason")
    expect(reason == "max_output_tokens", f"the reason is {reason!r}")


@check("responses", "reads instructions")
async def instructions(server: Server) -> None:
    plain, told = [(await respond(server, instructions=text))["usage"] for text in (None, "Be kind. " * 10)]
    expect(told["input_tokens"] > plain["input_tokens"], "the instructions are not in the prompt")


@check("responses", "takes a dialogue")
async def dialogue(server: Server) -> None:
    talk = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": SEA},
    ]
    longer = (await respond(server, talk))["usage"]["input_tokens"]
    expect(longer > (await respond(server))["usage"]["input_tokens"], "earlier turns are not in the prompt")


async def streamed(server: Server) -> Stream:
    await respond(server)  # whether it is there at all
    return await server.stream(
        PATH, model=server.model, input=SEA, temperature=0, max_output_tokens=16, store=False
    )  # fmt: skip


@check("responses", "streams from response.created to the end, numbered")
async def events(server: Server) -> None:
    events = (await streamed(server)).events
    expect(events[0]["type"] == "response.created", f"the first event is {events[0].get('type')!r}")
    expect(
        events[-1]["type"] in ("response.completed", "response.incomplete"), f"the last is {events[-1].get('type')!r}"
    )
    numbers = [event.get("sequence_number") for event in events]
    if None in numbers:
        raise Failed("an event has no `sequence_number`")
    expect(numbers == sorted(set(numbers)), "`sequence_number` does not count up")


@check("responses", "the pieces of a stream are the text of its end")
async def pieces(server: Server) -> None:
    events = (await streamed(server)).events
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    expect(text and text == text_of(events[-1]["response"]), "the texts differ")
