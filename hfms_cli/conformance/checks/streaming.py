"""Server-sent events of both ways to generate."""

from __future__ import annotations

from typing import Any

from hfms_cli.conformance.checks.chat import STORY
from hfms_cli.conformance.checks.completions import middle_of
from hfms_cli.conformance.server import Server, choice_of, content_of, text_of, usage_of
from hfms_cli.conformance.suite import check, expect


@check("streaming", "a chat streams events, then [DONE], then nothing")
async def chat(server: Server) -> None:
    stream = await server.chat_stream(STORY)
    expect(stream.content_type == "text/event-stream", f"the content type is {stream.content_type}")
    expect(stream.done, "`[DONE]` did not come")
    kinds = {event.get("object") for event in stream.events}
    expect(kinds == {"chat.completion.chunk"}, f"`object` is {kinds}")
    expect(len({event.get("id") for event in stream.events}) == 1, "events have several ids")


@check("streaming", "a completion streams events, then [DONE], then nothing")
async def completion(server: Server) -> None:
    stream = await server.completion_stream()
    expect(stream.done, "`[DONE]` did not come")
    expect(stream.events and stream.text(), "no text came")


@check("streaming", "the first event of a chat has the role")
async def role(server: Server) -> None:
    first = (await server.chat_stream()).choices()[0]["delta"]
    expect(first.get("role") == "assistant", f"the first delta is {first}")


@check("streaming", "the last event of a choice has the finish_reason, and no other has")
async def finish(server: Server) -> None:
    reasons = [choice.get("finish_reason") for choice in (await server.chat_stream(STORY)).choices()]
    expect(reasons[-1] in ("stop", "length"), f"the last `finish_reason` is {reasons[-1]!r}")
    expect(not any(reasons[:-1]), "an earlier event has one")


@check("streaming", "text comes in several pieces")
async def pieces(server: Server) -> None:
    stream = await server.chat_stream(STORY, max_tokens=32)
    told = [c for c in stream.choices() if (c.get("delta") or {}).get("content")]
    expect(len(told) > 1, "all text came in one event")


@check("streaming", "a chat's pieces are the text of the answer without streaming")
async def same_chat(server: Server) -> None:
    whole = content_of(await server.chat(STORY, max_tokens=32))
    expect((await server.chat_stream(STORY, max_tokens=32)).text() == whole, "the texts differ")


@check("streaming", "a completion's pieces are the text of the answer without streaming")
async def same_completion(server: Server) -> None:
    whole = text_of(await server.complete(max_tokens=32))
    expect((await server.completion_stream(max_tokens=32)).text() == whole, "the texts differ")


@check("streaming", "characters of several bytes arrive whole")
async def characters(server: Server) -> None:
    talk = [{"role": "user", "content": "Translate into Chinese and add an emoji: good morning, my friend"}]
    text = (await server.chat_stream(talk, max_tokens=48)).text()
    expect(text, "no text came")
    # The end may be cut within a character.
    expect("\ufffd" not in text.rstrip("\ufffd"), "a character was cut in two")


@check("streaming", "a stop string does not leak, nor a part of it")
async def stops(server: Server) -> None:
    whole = content_of(await server.chat(STORY, max_tokens=32))
    stop = middle_of(whole)
    stream = await server.chat_stream(STORY, max_tokens=32, stop=[stop])
    expect(stream.text() == whole[: whole.index(stop)], "the text does not end just before the stop string")
    expect(stream.finish() == "stop", f"`finish_reason` is {stream.finish()!r}")


@check("streaming", "tells usage in a last event without choices, where asked")
async def usage(server: Server) -> None:
    stream = await server.chat_stream(STORY, stream_options={"include_usage": True})
    last = stream.events[-1]
    expect(last.get("choices") == [], f"`choices` of the last event is {last.get('choices')!r}")
    told, whole = usage_of(last), usage_of(await server.chat(STORY))
    for count in ("prompt_tokens", "completion_tokens"):
        expect(told[count] == whole[count], f"`{count}` is {told[count]}, without streaming {whole[count]}")
    expect(not any(event.get("usage") for event in stream.events[:-1]), "an earlier event tells usage too")


@check("streaming", "every event has a choice, where no usage was asked for")
async def no_empty(server: Server) -> None:
    events = (await server.chat_stream()).events
    expect(events and all(event.get("choices") for event in events), "an event has no choices")


@check("streaming", "gives n choices")
async def choices(server: Server) -> None:
    stream = await server.chat_stream(n=2, temperature=1)
    for index in range(2):
        expect(stream.finish(index), f"choice {index} does not finish")


@check("streaming", "a wrong request has its status before any event")
async def early(server: Server) -> None:
    body: dict[str, Any] = server.chat_body() | {"messages": "none", "stream": True}
    (await server.post("/v1/chat/completions", **body)).refused(400)


@check("streaming", "a client that leaves in the middle does no harm")
async def leaving(server: Server) -> None:
    left = await server.stream("/v1/chat/completions", most=2, **server.chat_body(STORY, max_tokens=200))
    expect(len(left.events) == 2, "the stream was over before")
    expect(choice_of(await server.chat()), "the next request is not answered")
