"""The official `openai` client on a real model: logprobs, echo as lm-eval asks for it, best_of, stops and seeds."""

from __future__ import annotations

import asyncio
import itertools
import random

import openai
import pytest

from tests.conftest import SMOLLM2

pytestmark = pytest.mark.real_model

POEM = [{"role": "user", "content": "Write a short poem in French and Japanese with emoji."}]


FLOAT32 = "[models]\ndtype = 'float32'\n"
# Sums of floats depend on the shape of what is added: in float32 SmolLM2's logprobs differ by up to 6e-5 between
# batches of different sizes, and of some thousand draws one falls between two such sums. Where two answers of that
# many tokens are compared, each is made in passes of the same shapes: one sequence, the same pieces of its prompt.
ONE_SHAPE = """
[models]
dtype = 'float32'
[engine]
order = ["openvino"]
[engine.openvino]
max_batch = 1
prefill_tokens = 32
prefix_cache = "off"
"""


@pytest.fixture(params=[ONE_SHAPE], ids=["one at a time"])
async def client(serve, request):
    """SmolLM2, and a client that does not retry."""
    async with (
        serve(SMOLLM2, toml=request.param) as server,
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made,
    ):
        yield made


in_batches = pytest.mark.parametrize("client", [FLOAT32], indirect=True, ids=["in batches"])


async def test_logprobs_of_chats_and_completions_whole_and_streamed(client):
    asked = {"model": SMOLLM2, "messages": POEM, "temperature": 0.9, "seed": 5, "max_tokens": 60}
    whole = await client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    told = whole.choices[0].logprobs.content
    assert len(told) == whole.usage.completion_tokens
    assert b"".join(bytes(t.bytes or ()) for t in told).decode(errors="replace") == whole.choices[0].message.content
    assert all(len(t.top_logprobs) == 3 and t.top_logprobs[0].logprob >= t.logprob for t in told)
    stream = await client.chat.completions.create(**asked, logprobs=True, top_logprobs=3, stream=True)
    pieces = [chunk.choices[0] async for chunk in stream]
    assert [t for p in pieces if p.logprobs for t in p.logprobs.content] == told
    assert pieces[0].delta.role == "assistant"

    completion = await client.completions.create(
        model=SMOLLM2, prompt="Une, deux, tro", max_tokens=12, temperature=0, logprobs=2
    )
    choice = completion.choices[0]
    starts = [*choice.logprobs.text_offset, len(choice.text)]
    assert [choice.text[a:b] for a, b in itertools.pairwise(starts)] == choice.logprobs.tokens
    for token, logprob, top in zip(*(getattr(choice.logprobs, k) for k in (
        "tokens", "token_logprobs", "top_logprobs"
    )), strict=True):  # fmt: skip
        assert top[token] == logprob == max(top.values())


@in_batches
async def test_loglikelihoods_are_asked_for_as_lm_eval_does(client):
    """Contexts and continuations as token ids, many at once, greedy, with one token that nobody wants."""
    ids = [[504, 3575, 282, 4649, 314, 7042, 30], [504, 3575, 282, 4649, 314, 8050, 30], [1, 2, 3]]
    asked = {"model": SMOLLM2, "temperature": 0, "logprobs": 1, "seed": 1234, "echo": True}
    one = await client.completions.create(**asked, prompt=ids, max_tokens=1)
    none = await client.completions.create(**asked, prompt=ids, max_tokens=0)
    alone = [(await client.completions.create(**asked, prompt=p, max_tokens=1)).choices[0] for p in ids]
    assert [c.index for c in one.choices] == [0, 1, 2]
    for made, bare, single, prompt in zip(one.choices, none.choices, alone, ids, strict=True):
        told = made.logprobs
        assert len(told.token_logprobs) == len(told.top_logprobs) == len(prompt) + 1
        assert told.token_logprobs[0] is None
        assert bare.logprobs.token_logprobs[1:] == pytest.approx(told.token_logprobs[1:-1], abs=1e-3)
        assert single.logprobs.token_logprobs[1:] == pytest.approx(told.token_logprobs[1:], abs=1e-3)
        assert made.text.startswith(bare.text)
    assert none.usage.completion_tokens == 0
    # Their likeliest next token is no guess of ours: the greedy answer is it.
    top = one.choices[0].logprobs.top_logprobs[-1]
    assert max(top, key=top.get) == one.choices[0].logprobs.tokens[-1]


async def test_the_best_of_many_are_the_likeliest_of_them(client):
    asked = {"model": SMOLLM2, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 1.2, "seed": 3}
    everyone = await client.completions.create(**asked, n=5, logprobs=0)
    best = await client.completions.create(**asked, n=2, best_of=5)
    mean = {c.text: sum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs) for c in everyone.choices}
    assert [c.text for c in best.choices] == sorted(mean, key=mean.get, reverse=True)[:2]
    assert best.usage.completion_tokens == everyone.usage.completion_tokens
    assert [c.logprobs for c in best.choices] == [None, None]


async def test_no_part_of_a_stop_string_and_no_half_character_is_ever_streamed(client):
    """Stop strings that the answer itself has, cut out of it anywhere: the stream ends right before the first."""
    chance = random.Random(0)
    asked = {"model": SMOLLM2, "messages": POEM, "temperature": 1.0, "max_tokens": 70}

    async def check(seed: int) -> None:
        text = (await client.chat.completions.create(**asked, seed=seed)).choices[0].message.content
        starts = [chance.randrange(1, max(2, len(text) - 8)) for _ in range(2)]
        stops = [text[at : at + chance.randint(1, 7)] for at in starts] + ["\U0001f600\U0001f600 never said"]
        ends = min((text.find(s) + len(s), text.find(s)) for s in stops if s in text)
        for include in (False, True):
            stream = await client.chat.completions.create(
                **asked, seed=seed, stop=stops, stream=True, logprobs=True,
                extra_body={"include_stop_str_in_output": include},
            )  # fmt: skip
            choices = [chunk.choices[0] async for chunk in stream]
            parts = [c.delta.content or "" for c in choices]
            assert "".join(parts) == text[: ends[0] if include else ends[1]]
            assert choices[-1].finish_reason == "stop"
            assert not any("\ufffd" in part for part in parts if "\ufffd" not in text)
            told = [t for c in choices if c.logprobs for t in c.logprobs.content]
            spelt = b"".join(bytes(t.bytes or ()) for t in told).decode(errors="replace")
            assert spelt.startswith("".join(parts))

    await asyncio.gather(*(check(seed) for seed in range(5)))


@in_batches
async def test_a_seed_says_the_same_alone_and_in_any_company(client):
    def ask(seed: int, text: str = "The best thing about"):
        return client.completions.create(model=SMOLLM2, prompt=text, seed=seed, temperature=1.0, max_tokens=20)

    alone = [(await ask(seed)).choices[0].text for seed in range(3)]
    company = [ask(100 + k, "word " * (k + 1)) for k in range(5)]
    together = await asyncio.gather(*(ask(seed) for seed in range(3)), *company)
    assert [c.choices[0].text for c in together[:3]] == alone
    assert len(set(alone)) == 3


async def test_an_answer_has_a_receipt_and_refusals_name_what_the_model_cannot_do(client):
    raw = await client.completions.with_raw_response.create(model=SMOLLM2, prompt="x", max_tokens=1, seed=9)
    fields = dict(field.split("=", 1) for field in raw.headers["x-hfms-receipt"].split("; "))
    assert (fields["dtype"], fields["seed"]) == ("float32", "9")
    assert len(fields["weights"]) == 16
    assert raw.parse().system_fingerprint.startswith("fp_")
    with pytest.raises(openai.BadRequestError) as refused:
        await client.completions.create(model=SMOLLM2, prompt="def f():", suffix="return 1")
    assert refused.value.param == "suffix"
    with pytest.raises(openai.BadRequestError) as long:
        await client.completions.create(model=SMOLLM2, prompt=[5] * 8193, echo=True, max_tokens=0, logprobs=1)
    assert long.value.code == "context_length_exceeded"
