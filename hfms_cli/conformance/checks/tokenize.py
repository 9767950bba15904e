"""`/tokenize` and `/detokenize`: not OpenAI's, but vLLM's and llama.cpp's, and evaluation harnesses ask them."""

from __future__ import annotations

from typing import Any

from hfms_cli.conformance.server import COUNTING, Server, text_of, usage_of
from hfms_cli.conformance.suite import Skipped, check, expect


async def tokens_of(server: Server, text: str) -> list[int]:
    """Token ids; the field of the text is `prompt` for vLLM, `content` for llama.cpp. Raises Skipped."""
    found: list[int] | None = None
    for name in ("prompt", "content"):
        body: dict[str, Any] = {"model": server.model, name: text}
        answer = await server.post("/tokenize", **body)
        if answer.absent:
            raise Skipped("there is no /tokenize, which OpenAI's API has not")
        found = answer.body.get("tokens") if answer.status == 200 and isinstance(answer.body, dict) else None
        if found:
            break
    expect(found and all(isinstance(token, int) for token in found), f"`tokens` is {found!r}")
    assert found is not None
    return found


@check("tokenize", "a text becomes token ids")
async def tokenize(server: Server) -> None:
    expect(len(await tokens_of(server, COUNTING)) > 3, "there are hardly any tokens")


@check("tokenize", "the ids become the text again")
async def back(server: Server) -> None:
    tokens = await tokens_of(server, COUNTING)
    answer = await server.post("/detokenize", model=server.model, tokens=tokens)
    if answer.absent:
        raise Skipped("there is no /detokenize, which OpenAI's API has not")
    body = answer.ok()
    text = str(body.get("prompt", body.get("content")))
    # A token that opens every text may be shown.
    expect(text.strip().endswith(COUNTING), f"the text is {text!r}")


@check("tokenize", "the ids are as many as a completion counts")
async def count(server: Server) -> None:
    tokens = await tokens_of(server, COUNTING)
    counted = usage_of(await server.complete(max_tokens=1))["prompt_tokens"]
    expect(0 <= counted - len(tokens) <= 1, f"there are {len(tokens)} ids, and a completion counts {counted} tokens")


@check("tokenize", "the ids as a prompt are answered as the text is")
async def prompt(server: Server) -> None:
    tokens = await tokens_of(server, COUNTING)
    counted = usage_of(await server.complete(max_tokens=1))["prompt_tokens"]
    if counted != len(tokens):
        raise Skipped("the server puts a token of its own in front of a text")
    same = text_of(await server.complete(tokens)) == text_of(await server.complete())
    expect(same, "the answers differ")
