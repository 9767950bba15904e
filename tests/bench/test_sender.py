"""One request, against servers on loopback that do right and wrong."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Callable

import pytest
from aiohttp import web

from hfms_cli.bench.dataset import Prompt
from hfms_cli.bench.load import Endpoint, Sender
from hfms_cli.bench.measure import Outcome

DONE = b"data: [DONE]\n\n"
PROMPT = Prompt("Say hello", 7)


def sse(**event: object) -> bytes:
    return b"data: " + json.dumps(event).encode() + b"\n\n"


def delta(finish: str | None = None, **added: object) -> bytes:
    return sse(choices=[{"index": 0, "delta": added, "finish_reason": finish}], usage=None)


def usage(prompt: int, completion: int) -> bytes:
    return sse(choices=[], usage={"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": 0})


@contextlib.asynccontextmanager
async def serving(handler: Callable) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


def streaming(*pieces: bytes, cut: bool = False) -> Callable:
    """Answers with these pieces; `cut`: and then the connection is gone."""

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
        if cut:
            request.transport.abort()
        return response

    return handler


async def ask(handler: Callable, endpoint: Endpoint = Endpoint.CHAT, **more: object) -> Outcome:
    async with serving(handler) as url, Sender(url, endpoint, "model", **more) as sender:
        return await sender.send(PROMPT)


async def test_tokens_are_those_of_usage_and_not_pieces():
    outcome = await ask(streaming(delta(content="one two three"), delta("stop"), usage(11, 3), DONE))
    assert (outcome.error, outcome.prompt_tokens, outcome.output_tokens, len(outcome.times)) == (None, 11, 3, 1)


async def test_usage_in_every_event_counts_once():
    pieces = [
        sse(choices=[{"delta": {"content": "x"}}], usage={"prompt_tokens": 4, "completion_tokens": n}) for n in (1, 2)
    ]
    outcome = await ask(streaming(*pieces, delta("stop"), usage(4, 3), DONE))
    assert (outcome.prompt_tokens, outcome.output_tokens) == (4, 3)


async def test_time_to_first_token_is_that_of_the_first_text_and_not_of_the_role():
    clock = itertools.count()  # a reading at the start, then one for each read of the socket
    came = [asyncio.Event() for _ in range(3)]

    def now() -> float:
        reading = next(clock)
        if 0 < reading <= len(came):
            came[reading - 1].set()
        return float(reading)

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        pieces = [delta(role="assistant", content=""), delta(content="Hel"), delta(content="lo")]
        for piece, read in zip(pieces, came, strict=True):
            await response.write(piece)
            await read.wait()  # so that each piece is a read of its own
        await response.write(delta("stop") + usage(1, 2) + DONE)
        return response

    outcome = await ask(handler, now=now)
    assert (outcome.sent, outcome.times, outcome.ended) == (0.0, [2.0, 3.0], 4.0)
    assert (outcome.ttft, outcome.itl, outcome.tpot, outcome.e2el) == (2.0, [1.0], 2.0, 4.0)


@pytest.mark.parametrize("added", [{"reasoning_content": "Hm"}, {"reasoning": "Hm"}, {"tool_calls": [{"index": 0}]}])
async def test_thoughts_and_calls_of_tools_are_part_of_the_answer(added):
    assert len((await ask(streaming(delta(**added), delta("stop"), DONE))).times) == 1


async def test_answer_without_usage_is_complete_and_its_tokens_unknown():
    outcome = await ask(streaming(delta(content="Hi"), delta("stop"), DONE))
    assert (outcome.error, outcome.prompt_tokens, outcome.output_tokens, outcome.tpot) == (None, None, None, None)


async def test_answer_without_text_is_complete_and_takes_until_its_end():
    outcome = await ask(streaming(delta(role="assistant"), delta("stop"), usage(3, 0), DONE))
    assert (outcome.error, outcome.times) == (None, [])
    assert outcome.ttft == outcome.e2el > 0


async def test_completions_are_read_too():
    pieces = [sse(choices=[{"index": 0, "text": t, "finish_reason": f}]) for t, f in (("a", None), ("b", "length"))]
    outcome = await ask(streaming(*pieces, usage(2, 2), DONE), Endpoint.COMPLETIONS)
    assert (outcome.error, len(outcome.times), outcome.output_tokens) == (None, 2, 2)


async def test_embeddings_are_one_answer():
    async def handler(request: web.Request) -> web.Response:
        assert await request.json() == {"model": "model", "input": "Say hello"}
        return web.json_response({"data": [{"embedding": [0.5]}], "usage": {"prompt_tokens": 2, "total_tokens": 2}})

    outcome = await ask(handler, Endpoint.EMBEDDINGS, sampling={})
    assert (outcome.error, outcome.prompt_tokens, outcome.times) == (None, 2, [])


@pytest.mark.parametrize(
    ("endpoint", "path", "asked"),
    [
        (Endpoint.CHAT, "/v1/chat/completions", {"messages": [{"role": "user", "content": "Say hello"}]}),
        (Endpoint.COMPLETIONS, "/v1/completions", {"prompt": "Say hello"}),
    ],
)
async def test_request_is_as_openai_has_it_with_the_key_as_a_bearer_token(endpoint, path, asked):
    seen = []

    async def handler(request: web.Request) -> web.StreamResponse:
        seen.append((request.path, request.headers["Authorization"], await request.json()))
        return await streaming(DONE)(request)

    await ask(handler, endpoint, key="sk-1", sampling={"temperature": 0.0, "ignore_eos": True})
    fixed = {"model": "model", "max_tokens": 7, "stream": True, "stream_options": {"include_usage": True}}
    assert seen == [(path, "Bearer sk-1", {**fixed, **asked, "temperature": 0.0, "ignore_eos": True})]


# Faults


@pytest.mark.parametrize("status", [429, 500, 503, 401])
async def test_error_of_http_is_its_status_with_the_servers_reason(status):
    async def handler(request: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "Too busy."}}, status=status)

    outcome = await ask(handler)
    assert (outcome.error, outcome.reason) == (f"HTTP {status}", "Too busy.")
    assert outcome.ended > outcome.sent


@pytest.mark.parametrize(
    ("body", "reason"),
    [("<html>", ""), ('{"error": "plain"}', "plain"), ("[]", ""), ('{"error": {}}', ""), ('{"error": 5}', "")],
)
async def test_reason_is_what_the_body_has_of_one(body, reason):
    async def handler(request: web.Request) -> web.Response:
        return web.Response(text=body, status=500)

    assert (await ask(handler)).reason == reason


async def test_long_reason_is_cut():
    async def handler(request: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "x" * 10_000}}, status=500)

    assert len((await ask(handler)).reason) == 200


async def test_redirect_is_not_followed_because_it_would_carry_the_key_along():
    async def handler(request: web.Request) -> web.Response:
        raise web.HTTPTemporaryRedirect("/elsewhere")

    assert (await ask(handler, key="sk-1")).error == "HTTP 307"


@pytest.mark.parametrize(
    ("handler", "error"),
    [
        (streaming(delta(content="So far"), cut=True), "connection broke"),
        (streaming(delta(content="So far")), "broke off before its end"),
        (streaming(), "broke off before its end"),
        (streaming(delta(content="So far"), sse(error={"message": "The engine died."})), "error in the stream"),
        (streaming(b"data: {oops\n\n"), "not what OpenAI's API answers"),
        (streaming(sse(choices=5)), "not what OpenAI's API answers"),
        (streaming(b'data: "\xff"\n\n'), "not what OpenAI's API answers"),
    ],
)
async def test_stream_that_goes_wrong_is_a_failure(handler, error):
    assert (await ask(handler)).error == error


async def test_error_in_the_stream_tells_its_reason():
    outcome = await ask(streaming(sse(error={"message": "The engine died."})))
    assert outcome.reason == "The engine died."


async def test_answer_in_one_piece_is_a_failure_because_nothing_can_be_timed():
    async def handler(request: web.Request) -> web.Response:
        return web.json_response({"choices": []})

    assert (await ask(handler)).error == "not a stream"


async def test_nobody_there_is_a_failure_and_not_an_exception(unused_tcp_port):
    async with Sender(f"http://127.0.0.1:{unused_tcp_port}", Endpoint.CHAT, "model") as sender:
        assert (await sender.send(PROMPT)).error == "no connection"


ANSWER = delta(content="Hi") + delta("stop") + usage(2, 1) + DONE
HEAD = f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: {len(ANSWER)}\r\n\r\n".encode()


@contextlib.asynccontextmanager
async def dropping(answers: int) -> AsyncIterator[tuple[str, list[int]]]:
    """A server that answers so many requests of each connection and closes it on the next. Also: requests it saw."""
    seen: list[int] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError):
            for i in range(answers + 1):
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                seen.append(i)
                if i < answers:
                    writer.write(HEAD + ANSWER)

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", seen


async def test_kept_connection_that_the_server_closes_is_replaced_once():
    async with dropping(answers=1) as (url, seen), Sender(url, Endpoint.CHAT, "model") as sender:
        outcomes = [await sender.send(PROMPT) for _ in range(3)]
    assert [o.error for o in outcomes] == [None, None, None]
    assert seen == [0, 1, 0, 1, 0]


async def test_server_that_drops_every_connection_fails_after_the_second():
    async with dropping(answers=0) as (url, seen), Sender(url, Endpoint.CHAT, "model") as sender:
        assert (await sender.send(PROMPT)).error == "connection broke"
    assert seen == [0, 0]
