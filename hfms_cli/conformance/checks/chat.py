"""`/v1/chat/completions`, whole answers."""

from __future__ import annotations

from typing import Any

from hfms_cli.conformance.checks.completions import middle_of
from hfms_cli.conformance.server import HELLO, Server, choice_of, content_of, message_of, usage_of
from hfms_cli.conformance.suite import check, expect

STORY = [{"role": "user", "content": "Tell me about the sea."}]


@check("chat", "answers in OpenAI's shape")
async def answers(server: Server) -> None:
    body = await server.chat()
    expect(body.get("object") == "chat.completion", f"`object` is {body.get('object')!r}")
    expect(isinstance(body.get("id"), str) and isinstance(body.get("created"), int), "`id` or `created` is missing")
    expect(message_of(body).get("role") == "assistant", f"the role is {message_of(body).get('role')!r}")
    content_of(body)
    expect(choice_of(body).get("finish_reason") in ("stop", "length"), "there is no `finish_reason`")


@check("chat", "counts tokens of prompt and answer")
async def counts(server: Server) -> None:
    usage = usage_of(await server.chat())
    expect(usage["prompt_tokens"] > 0 and usage["completion_tokens"] > 0, f"a count is 0: {usage}")


@check("chat", "stops at max_tokens and says so")
async def bounded(server: Server) -> None:
    await _bounded(server, max_tokens=3)


@check("chat", "stops at max_completion_tokens and says so")
async def bounded_anew(server: Server) -> None:
    await _bounded(server, max_completion_tokens=3)


async def _bounded(server: Server, **limit: int) -> None:
    body = await server.chat(STORY, **limit)
    made, finish = usage_of(body)["completion_tokens"], choice_of(body).get("finish_reason")
    expect(made <= 3, f"made {made} tokens of 3")
    expect(made < 3 or finish == "length", f"`finish_reason` is {finish!r} after all tokens that were allowed")


@check("chat", "reads a system message")
async def system(server: Server) -> None:
    await _reads(server, "system")


@check("chat", "reads a developer message")
async def developer(server: Server) -> None:
    await _reads(server, "developer")


async def _reads(server: Server, role: str) -> None:
    short, long = [
        usage_of(await server.chat([{"role": role, "content": text}, *HELLO], max_tokens=1))["prompt_tokens"]
        for text in ("Be kind.", "Be kind. " * 10)
    ]
    expect(long > short, "ten times the instructions have as many tokens")


@check("chat", "takes a dialogue of several turns")
async def turns(server: Server) -> None:
    dialogue = [*HELLO, {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "Again."}]
    longer = usage_of(await server.chat(dialogue))["prompt_tokens"]
    expect(longer > usage_of(await server.chat())["prompt_tokens"], "earlier turns are not in the prompt")


@check("chat", "takes content as a list of text parts")
async def parts(server: Server) -> None:
    listed = [{"role": "user", "content": [{"type": "text", "text": HELLO[0]["content"]}]}]
    same = content_of(await server.chat(listed)) == content_of(await server.chat())
    expect(same, "the answer differs from that to the same text")


@check("chat", "gives n choices")
async def choices(server: Server) -> None:
    body = await server.chat(n=2, temperature=1)
    expect(sorted(c["index"] for c in body["choices"]) == [0, 1], f"gave {len(body['choices'])} choices")


@check("chat", "says the same again at temperature 0")
async def greedy(server: Server) -> None:
    first, second = [content_of(await server.chat(STORY)) for _ in range(2)]
    expect(first == second, "two answers differ")


@check("chat", "says the same again with the same seed")
async def seeded(server: Server) -> None:
    first, second = [content_of(await server.chat(STORY, temperature=1, seed=7)) for _ in range(2)]
    expect(first == second, "two answers of one seed differ")


@check("chat", "ends before a stop string, which is not in the text")
async def stops(server: Server) -> None:
    whole = content_of(await server.chat(STORY, max_tokens=24))
    stop = middle_of(whole)
    body = await server.chat(STORY, max_tokens=24, stop=stop)
    expect(content_of(body) == whole[: whole.index(stop)], "the text does not end just before the stop string")
    finish = choice_of(body).get("finish_reason")
    expect(finish == "stop", f"`finish_reason` is {finish!r}")


@check("chat", "takes null for what may be left out")
async def nulls(server: Server) -> None:
    null: dict[str, Any] = dict.fromkeys(
        ("top_p", "n", "stop", "seed", "logprobs", "top_logprobs", "presence_penalty", "logit_bias", "user", "stream",
         "tools", "response_format")
    )  # fmt: skip
    expect(content_of(await server.chat(**null)) == content_of(await server.chat()), "the answer is another one")


@check("chat", "takes what clients send about themselves")
async def about_clients(server: Server) -> None:
    content_of(await server.chat(user="somebody", store=False, service_tier="auto"))


@check("chat", "answers requests at the same time, each with its own")
async def at_once(server: Server) -> None:
    import asyncio

    talks = [[{"role": "user", "content": f"Write the number {n}."}] for n in range(4)]
    alone = [usage_of(await server.chat(talk))["prompt_tokens"] for talk in talks]
    together = await asyncio.gather(*(server.chat(talk) for talk in talks))
    expect(len({body["id"] for body in together}) == 4, "answers share an `id`")
    expect([usage_of(body)["prompt_tokens"] for body in together] == alone, "prompts are counted otherwise")
