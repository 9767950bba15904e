"""Log-probabilities of both ways to generate. Evaluation harnesses live on them."""

from __future__ import annotations

from typing import Any

from hfms_cli.conformance.server import COUNTING, HELLO, Server, choice_of, content_of, text_of
from hfms_cli.conformance.suite import Skipped, check, expect


def logprobs_of(body: dict[str, Any]) -> dict[str, Any]:
    """`logprobs` of the first choice. Raises Failed."""
    found = choice_of(body).get("logprobs")
    expect(isinstance(found, dict), f"`logprobs` is {found!r}")
    assert isinstance(found, dict)
    return found


@check("logprobs", "a completion tells each token with its logprob and offset")
async def completion(server: Server) -> None:
    body = await server.complete(logprobs=2)
    told = logprobs_of(body)
    tokens, values, offsets = told["tokens"], told["token_logprobs"], told["text_offset"]
    expect(len(tokens) == len(values) == len(offsets) > 0, "the lists differ in length")
    expect("".join(tokens) == text_of(body), "the tokens are not the text")
    expect(all(value <= 0 for value in values), "a logprob is above 0")
    starts = [offset - offsets[0] for offset in offsets]
    expect(starts == [len("".join(tokens[:i])) for i in range(len(tokens))], "`text_offset` does not fit the tokens")


@check("logprobs", "a completion tells the likeliest tokens, the greedy one among them")
async def top(server: Server) -> None:
    told = logprobs_of(await server.complete(logprobs=3))
    for token, value, likeliest in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        expect(3 <= len(likeliest) <= 4, f"{len(likeliest)} tokens were told instead of 3")
        expect(token in likeliest, "the token is not among the likeliest")
        expect(abs(max(likeliest.values()) - value) < 1e-3, "the greedy token is not the likeliest")


@check("logprobs", "a chat tells each token with its bytes and alternatives")
async def chat(server: Server) -> None:
    body = await server.chat(logprobs=True, top_logprobs=2)
    told = logprobs_of(body)["content"]
    expect(told, "`content` is empty")
    whole = b"".join(bytes(entry["bytes"] or entry["token"].encode()) for entry in told)
    expect(whole.decode(errors="replace").startswith(content_of(body)), "the tokens are not the text")
    for entry in told:
        expect(entry["logprob"] <= 0, "a logprob is above 0")
        expect(len(entry["top_logprobs"]) == 2, f"{len(entry['top_logprobs'])} alternatives were told instead of 2")


@check("logprobs", "top_logprobs 0 tells only what was chosen")
async def none_beside(server: Server) -> None:
    told = logprobs_of(await server.chat(logprobs=True))["content"]
    expect(told and not any(entry.get("top_logprobs") for entry in told), "alternatives were told")


@check("logprobs", "a streamed chat tells the same as a whole one")
async def streamed(server: Server) -> None:
    whole = logprobs_of(await server.chat(logprobs=True, top_logprobs=1))["content"]
    stream = await server.chat_stream(logprobs=True, top_logprobs=1)
    told = [entry for choice in stream.choices() for entry in (choice.get("logprobs") or {}).get("content") or ()]
    expect([e["token"] for e in told] == [e["token"] for e in whole], "the tokens differ")
    far = max(abs(a["logprob"] - b["logprob"]) for a, b in zip(told, whole, strict=True))
    expect(far < 0.05, f"a logprob differs by {far:.3f}")


@check("logprobs", "echo scores the prompt: its first token null, the others numbers")
async def echo(server: Server) -> None:
    told = logprobs_of(await server.complete(echo=True, logprobs=1, max_tokens=1))
    tokens, values = told["tokens"], told["token_logprobs"]
    expect("".join(tokens).startswith(COUNTING), "the tokens do not begin with the prompt")
    expect(values[0] is None, f"the first logprob is {values[0]!r}")
    expect(all(value <= 0 for value in values[1:]), "a logprob is above 0")


@check("logprobs", "a likelier text has the higher score")
async def likelier(server: Server) -> None:
    async def score(text: str) -> float:
        told = logprobs_of(await server.complete(text, echo=True, logprobs=1, max_tokens=1))
        return float(sum(value for value in told["token_logprobs"][1:-1]))

    expect(
        await score("The cat sat on the mat and looked at the dog.")
        > await score("The cat sat dog the at mat on looked."),
        "words in disorder have the higher score",
    )


@check("logprobs", "more alternatives than the API knows are 400")
async def bounded(server: Server) -> None:
    few, many = [
        await server.post("/v1/chat/completions", **server.chat_body(HELLO, logprobs=True, top_logprobs=number))
        for number in (1, 1000)
    ]
    if few.status != 200:
        raise Skipped("logprobs are refused whatever their number")
    many.refused(400)
