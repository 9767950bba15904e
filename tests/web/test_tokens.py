"""`/tokenize`, `/detokenize` and `/tokenizer_info`: what they take, and beside calls that keep an engine busy."""

from __future__ import annotations

import asyncio

import pytest

from tests.web.test_surface import CHAT


async def test_a_question_about_tokens_waits_for_no_call_in_line(serve):
    async with serve("echo:a", toml="[engine.echo]\nstep_ms = 5\nmax_batch = 1") as server:
        host = server.runtime.pool.find("echo:a").host
        busy = CHAT | {"ignore_eos": True, "max_tokens": 30_000}
        calls = [asyncio.create_task(server.post("/v1/chat/completions", busy)) for _ in range(3)]
        async with asyncio.timeout(10):
            while host.running < 3:
                await asyncio.sleep(0.01)
            status, body = await server.post("/tokenize", {"prompt": "one two", "return_token_strs": True})
        assert not any(call.done() for call in calls)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
    assert status == 200
    assert body["count"] == len(body["tokens"]) == 2
    assert body["token_strs"] == ["one", " two"]
    assert body["max_model_len"] == 32_768


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": CHAT["messages"]}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"messages": CHAT["messages"], "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0].content"),
        ("/tokenize", {"prompt": "a", "tools": []}, "tools"),
        ("/tokenize", {"prompt": "a", "frobnicate": 1}, "frobnicate"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [1, -1]}, "tokens[1]"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
    ],
)
async def test_a_bad_question_is_400_and_names_the_field(serve, path, body, param):
    async with serve("echo:a") as server:
        status, answer = await server.post(path, body)
    assert (status, answer["error"]["param"]) == (400, param)


async def test_the_model_may_be_left_out_where_it_is_the_only_one(serve):
    async with serve("echo:a", "echo:b") as server:
        status, answer = await server.post("/tokenize", {"prompt": "a"})
        assert (status, answer["error"]["param"]) == (400, "model")
        assert (await server.post("/tokenize", {"prompt": "a", "model": "echo:b"}))[0] == 200
        assert (await server.get("/tokenizer_info?model=echo:a"))[0] == 200
        assert (await server.post("/detokenize", {"tokens": [1], "model": "echo:c"}))[0] == 404
