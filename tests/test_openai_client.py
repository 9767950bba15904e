"""The official `openai` client against real models in real worker processes."""

from __future__ import annotations

import asyncio
import os
import signal

import numpy
import openai
import pytest

from tests.conftest import MINILM, SMOLLM2

pytestmark = pytest.mark.real_model

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
async def both(serve):
    """SmolLM2 and MiniLM behind one server, and a client for it that does not retry."""
    async with (
        serve(SMOLLM2, MINILM) as server,
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield server, client


async def test_the_client_chats_streams_completes_embeds_and_lists(both):
    _, client = both
    answer = await client.chat.completions.create(model=SMOLLM2, messages=FRANCE, temperature=0)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens

    stream = await client.chat.completions.create(
        model=SMOLLM2, messages=FRANCE, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == answer.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == answer.usage

    completion = await client.completions.create(
        model=SMOLLM2, prompt=["Paris is the capital of", "One, two, three,"], max_tokens=5, temperature=0
    )
    assert [c.index for c in completion.choices] == [0, 1]
    assert completion.choices[1].text.startswith(" four")
    assert completion.usage.completion_tokens == 10

    vectors = await client.embeddings.create(model=MINILM, input=["a cat", "a kitten", "tax law"])
    cat, kitten, law = (numpy.array(d.embedding) for d in vectors.data)
    assert len(cat) == 384
    assert cat @ kitten > 0.6 > 0.3 > cat @ law
    floats = await client.embeddings.create(model=MINILM, input="a cat", encoding_format="float")
    assert numpy.allclose(floats.data[0].embedding, cat, atol=1e-6)

    assert {m.id async for m in client.models.list()} >= {SMOLLM2, MINILM}
    assert (await client.models.retrieve(SMOLLM2)).id == SMOLLM2


async def test_the_client_gets_its_own_typed_errors(both):
    _, client = both
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="package:llm-smolm2", messages=FRANCE)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(model=SMOLLM2, messages=FRANCE, temperature=3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as wrong:
        await client.embeddings.create(model=SMOLLM2, input="text")
    assert wrong.value.param == "model"
    with pytest.raises(openai.BadRequestError) as chatting:
        await client.chat.completions.create(model=MINILM, messages=FRANCE)
    assert chatting.value.param == "model"
    with pytest.raises(openai.BadRequestError) as long:
        await client.completions.create(model=SMOLLM2, prompt="word " * 9000)
    assert long.value.code == "context_length_exceeded"


async def test_the_client_gets_authentication_errors(serve):
    async with (
        serve(env={"HFMS_API_KEY": "k-0123456789abcdefghij"}) as server,
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client,
    ):
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()


async def test_kill_9_of_the_worker_mid_stream_raises_then_503_then_answers_again(both):
    server, client = both
    model = server.runtime.pool.find(SMOLLM2)
    stream = await client.chat.completions.create(
        model=SMOLLM2, messages=FRANCE, stream=True, max_tokens=2000, extra_body={"ignore_eos": True}
    )
    await anext(stream)
    os.kill(model.host.pid, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="ended before"):
        [chunk async for chunk in stream]
    with pytest.raises(openai.InternalServerError) as away:
        await client.chat.completions.create(model=SMOLLM2, messages=FRANCE)
    assert away.value.status_code == 503
    assert int(away.value.response.headers["Retry-After"]) >= 1
    # The other model's process is another one: it answers all the while.
    assert (await client.embeddings.create(model=MINILM, input="still here")).data
    async with asyncio.timeout(60):
        while model.state != "loaded":
            await asyncio.sleep(0.1)
    again = await client.chat.completions.create(model=SMOLLM2, messages=FRANCE, temperature=0)
    assert "Paris" in again.choices[0].message.content


@pytest.mark.parametrize("engine", ["openvino", "transformers"])
async def test_thirty_two_chats_at_once_are_the_same_as_alone(serve, engine):
    # In half precision the size of a batch may tip a choice between two words that are equally good.
    toml = f'[models]\ndtype = "float32"\n[engine]\norder = ["{engine}"]'
    async with (
        serve(SMOLLM2, toml=toml) as server,
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):

        async def ask(i: int) -> str:
            answer = await client.chat.completions.create(
                model=SMOLLM2,
                messages=[{"role": "user", "content": f"Say the number {i % 4} and nothing else."}],
                temperature=0,
                max_tokens=12,
            )
            return answer.choices[0].message.content

        alone = [await ask(i) for i in range(4)]
        together = await asyncio.gather(*(ask(i) for i in range(32)))
        assert together == [alone[i % 4] for i in range(32)]
