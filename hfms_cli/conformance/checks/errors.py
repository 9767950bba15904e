"""What is wrong is refused with the right status, in OpenAI's envelope."""

from __future__ import annotations

from typing import Any

from hfms_cli.conformance.server import HELLO, Answer, Server
from hfms_cli.conformance.suite import Failed, Skipped, check, expect

CHAT = "/v1/chat/completions"


def error_of(answer: Answer) -> dict[str, Any]:
    """The `error` of the envelope. Raises Failed."""
    error = answer.body.get("error") if isinstance(answer.body, dict) else None
    if not isinstance(error, dict):
        raise Failed(f"{answer.status} without `error`: {answer.text[:100]}")
    return error


@check("errors", "an error has message, type, param and code")
async def envelope(server: Server) -> None:
    answer = await server.post(CHAT, **server.chat_body() | {"messages": "none"})
    expect(400 <= answer.status < 500, f"answered {answer.status}")
    error = error_of(answer)
    expect(isinstance(error.get("message"), str) and error["message"], "`message` is missing")
    expect(isinstance(error.get("type"), str), f"`type` is {error.get('type')!r}")
    expect({"param", "code"} <= error.keys(), "`param` or `code` is missing")


@check("errors", "a body that is no JSON is 400")
async def no_json(server: Server) -> None:
    error_of((await server.send("POST", CHAT, b'{"model": ')).refused(400))


@check("errors", "missing messages are 400")
async def missing(server: Server) -> None:
    error_of((await server.post(CHAT, model=server.model)).refused(400))


@check("errors", "a missing prompt is 400")
async def no_prompt(server: Server) -> None:
    error_of((await server.post("/v1/completions", model=server.model)).refused(400))


@check("errors", "an unknown role is 400")
async def role(server: Server) -> None:
    body = server.chat_body([{"role": "nobody", "content": "x"}])
    error_of((await server.post(CHAT, **body)).refused(400))


@check("errors", "a temperature beyond 2 is 400")
async def temperature(server: Server) -> None:
    error_of((await server.post(CHAT, **server.chat_body(temperature=3))).refused(400))


@check("errors", "a text for a number is 400")
async def wrong_type(server: Server) -> None:
    error_of((await server.post(CHAT, **server.chat_body(max_tokens="many"))).refused(400))


@check("errors", "the field at fault is named in `param`")
async def named(server: Server) -> None:
    error = error_of(await server.post(CHAT, **server.chat_body(temperature="hot")))
    expect(error.get("param") == "temperature", f"`param` is {error.get('param')!r}")


@check("errors", "an unknown model is 404")
async def model(server: Server) -> None:
    body = {"model": "there-is-no-such-model", "messages": HELLO, "max_tokens": 1}
    error_of((await server.post(CHAT, **body)).refused(404))


@check("errors", "an unknown route is 404 with an envelope")
async def route(server: Server) -> None:
    error_of((await server.post("/v1/there-is-no-such-route")).refused(404))


@check("errors", "a prompt that does not fit is 400 context_length_exceeded")
async def too_long(server: Server) -> None:
    length = await server.context_length()
    body = server.completion_body("word " * (length + 100), max_tokens=1)
    error = error_of((await server.post("/v1/completions", **body)).refused(400))
    expect(error.get("code") == "context_length_exceeded", f"`code` is {error.get('code')!r}")


@check("errors", "no key is 401, where the server has keys")
async def no_key(server: Server) -> None:
    if not server.key:
        raise Skipped("no key was given, so the server asks for none")
    error_of((await server.send("GET", "/v1/models", key=False)).refused(401))


@check("errors", "answers have an x-request-id")
async def request_id(server: Server) -> None:
    answer = await server.post(CHAT, **server.chat_body(max_tokens=1))
    expect(answer.headers.get("x-request-id"), "there is none")
