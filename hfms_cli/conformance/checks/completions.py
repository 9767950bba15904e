"""`/v1/completions`: going on with a text."""

from __future__ import annotations

from hfms_cli.conformance.server import COUNTING, Server, choice_of, text_of, usage_of
from hfms_cli.conformance.suite import Failed, check, expect

ENDS = ("stop", "length")


@check("completions", "answers a prompt in OpenAI's shape")
async def answers(server: Server) -> None:
    body = await server.complete()
    expect(body.get("object") == "text_completion", f"`object` is {body.get('object')!r}")
    expect(isinstance(body.get("id"), str) and isinstance(body.get("created"), int), "`id` or `created` is missing")
    text_of(body)
    expect(choice_of(body).get("finish_reason") in ENDS, f"`finish_reason` is {choice_of(body).get('finish_reason')!r}")


@check("completions", "counts tokens of prompt and answer")
async def counts(server: Server) -> None:
    usage = usage_of(await server.complete())
    expect(usage["prompt_tokens"] > 0, "`usage.prompt_tokens` is 0")


@check("completions", "stops at max_tokens and says so")
async def bounded(server: Server) -> None:
    body = await server.complete(max_tokens=3)
    made, finish = usage_of(body)["completion_tokens"], choice_of(body).get("finish_reason")
    expect(made <= 3, f"made {made} tokens of 3")
    expect(made < 3 or finish == "length", f"`finish_reason` is {finish!r} after all tokens that were allowed")


@check("completions", "answers several prompts in order")
async def several(server: Server) -> None:
    prompts = [COUNTING, "red green blue red green blue red"]
    alone = [text_of(await server.complete(prompt, max_tokens=4)) for prompt in prompts]
    together = await server.complete(prompts, max_tokens=4)
    expect(len(together["choices"]) == 2, f"gave {len(together['choices'])} choices for 2 prompts")
    expect([text_of(together, i) for i in range(2)] == alone, "the texts differ from those of each prompt alone")


@check("completions", "takes a prompt of token ids")
async def ids(server: Server) -> None:
    usage = usage_of(await server.complete([401, 402, 403, 404], max_tokens=2))
    # Some put a token of their own in front.
    expect(usage["prompt_tokens"] in (4, 5), f"counted {usage['prompt_tokens']} tokens of 4")


@check("completions", "gives n choices")
async def choices(server: Server) -> None:
    body = await server.complete(n=2, temperature=1, max_tokens=4)
    expect(sorted(c["index"] for c in body["choices"]) == [0, 1], f"gave {len(body['choices'])} choices")


@check("completions", "begins with the prompt where echo is asked for")
async def echo(server: Server) -> None:
    text = text_of(await server.complete(echo=True, max_tokens=2))
    expect(text.startswith(COUNTING), "the text does not begin with the prompt")
    expect(len(text) > len(COUNTING), "the text is the prompt alone")


@check("completions", "takes null for what may be left out")
async def nulls(server: Server) -> None:
    plain = text_of(await server.complete())
    null = dict.fromkeys(("top_p", "n", "stop", "seed", "logprobs", "presence_penalty", "logit_bias", "user", "stream"))
    expect(text_of(await server.complete(**null)) == plain, "the text differs from that without these fields")


@check("sampling", "says the same again at temperature 0")
async def greedy(server: Server) -> None:
    first, second = [text_of(await server.complete()) for _ in range(2)]
    expect(first == second, "two texts differ")


@check("sampling", "says the same again with the same seed")
async def seeded(server: Server) -> None:
    first, second = [text_of(await server.complete(temperature=1, seed=7)) for _ in range(2)]
    expect(first == second, "two texts of one seed differ")


@check("sampling", "says other things with other seeds")
async def other_seeds(server: Server) -> None:
    texts = {text_of(await server.complete(temperature=1.5, seed=seed)) for seed in range(4)}
    expect(len(texts) > 1, "four seeds gave one text at temperature 1.5")


@check("sampling", "a tiny top_p is as good as temperature 0")
async def nucleus(server: Server) -> None:
    greedy = text_of(await server.complete())
    expect(text_of(await server.complete(temperature=1, top_p=1e-6)) == greedy, "the text is not the likeliest")


@check("sampling", "ends before a stop string, which is not in the text")
async def stops(server: Server) -> None:
    prompt = "Once upon a time there was a king who lived by the sea."
    whole = text_of(await server.complete(prompt, max_tokens=24))
    stop = middle_of(whole)
    body = await server.complete(prompt, max_tokens=24, stop=[stop])
    text, finish = text_of(body), choice_of(body).get("finish_reason")
    expect(text == whole[: whole.index(stop)], "the text does not end just before the stop string")
    expect(finish == "stop", f"`finish_reason` is {finish!r}")


@check("sampling", "logit_bias of 100 makes a token certain")
async def bias(server: Server) -> None:
    plain = text_of(await server.complete(max_tokens=4))
    text = text_of(await server.complete(max_tokens=4, logit_bias={"1000": 100}))
    piece = text[: len(text) // 4]
    expect(text and text == piece * 4, "four tokens are not the same one four times")
    expect(text != plain, "the text is that without a bias")


@check("sampling", "frequency_penalty makes a repetition less likely")
async def penalty(server: Server) -> None:
    prompt = "la la la la la la la la la la la la la la la la la la la la"
    plain = text_of(await server.complete(prompt, max_tokens=32))
    penalised = text_of(await server.complete(prompt, max_tokens=32, frequency_penalty=2))
    expect(penalised != plain, "the greedy text of a repetition is the same with the highest penalty")


def middle_of(text: str) -> str:
    """A piece of a text which is not at its beginning. Raises Failed where the text is too short for one."""
    for start in range(len(text) // 3, len(text) - 2):
        piece = text[start : start + 3]
        if piece.strip() == piece and text.index(piece) == start:
            return piece
    raise Failed(f"wrote too little to stop in: {text!r}")
