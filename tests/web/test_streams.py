"""What a stream is beside its text: the role at once, comments while one waits, and what names the model."""

from __future__ import annotations

import asyncio
import json

import pytest

from hfms_cli.serving.receipt import fingerprint
from tests.web.test_surface import CHAT, events

SLOW = "[engine.echo]\nstep_ms = 300\nmax_batch = 1\n[server]\nkeep_alive_seconds = 0.05"


async def read_until_event(response) -> list[bytes]:
    """Lines up to the first that is data."""
    lines = []
    while not lines or not lines[-1].startswith(b"data:"):
        lines.append(await response.content.readline())
        assert lines[-1], "the stream ended"
    return lines


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
async def test_whoever_waits_hears_comments_and_then_the_answer(serve, path):
    body = {"model": "echo:a", "prompt": "one two"} if path == "completions" else CHAT
    async with (
        serve("echo:a", toml=SLOW) as server,
        server.session.post(f"{server.url}/v1/{path}", json=body | {"stream": True}) as response,
    ):
        assert response.headers["x-hfms-receipt"]  # the model was there before the patience was over
        lines = await read_until_event(response)
        assert lines[0] == b": keep-alive\n"
        rest = (lines[-1] + await response.content.read()).decode()
    data = [line.removeprefix("data: ") for line in rest.split("\n") if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    assert json.loads(data[-2])["choices"][0]["finish_reason"]


async def test_an_error_after_a_comment_is_the_last_event(serve):
    toml = SLOW + "\n[middleware]\norder = ['queue']\n[middleware.queue]\ntimeout_seconds = 0.2"
    async with serve("echo:a", toml=toml) as server:
        first = asyncio.create_task(server.post("/v1/chat/completions", CHAT | {"ignore_eos": True, "max_tokens": 99}))
        async with asyncio.timeout(10):
            while not server.runtime.pool.find("echo:a").host.running:
                await asyncio.sleep(0.01)
        async with server.session.post(server.url + "/v1/chat/completions", json=CHAT | {"stream": True}) as response:
            assert response.status == 200
            data = [line for line in (await response.text()).split("\n\n") if line]
        first.cancel()
    assert data[0] == ": keep-alive"
    assert json.loads(data[-1].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"


async def test_an_early_error_has_a_status_of_its_own_and_no_patience_means_no_comments(serve):
    toml = SLOW.replace("keep_alive_seconds = 0.05", "keep_alive_seconds = 0")
    async with serve("echo:a", toml=toml) as server:
        status, body = await server.post("/v1/chat/completions", CHAT | {"model": "echo:b", "stream": True})
        assert (status, body["error"]["code"]) == (404, "model_not_found")
        async with server.session.post(server.url + "/v1/chat/completions", json=CHAT | {"stream": True}) as response:
            assert ": keep-alive" not in await response.text()


async def test_every_answer_names_what_made_it_and_its_seed(serve):
    async with serve("echo:a", "echo:b") as server:

        async def ask(**more) -> tuple[str, set[str]]:
            async with server.session.post(server.url + "/v1/chat/completions", json=CHAT | more) as response:
                if more.get("stream"):
                    bodies = [json.loads(e) for e in (await events(response))[:-1]]
                else:
                    bodies = [await response.json()]
                return response.headers["x-hfms-receipt"], {b["system_fingerprint"] for b in bodies}

        receipt, prints = await ask()
        fields = dict(field.split("=", 1) for field in receipt.split("; "))
        assert list(fields) == ["weights", "template", "dtype", "quantize", "engine", "hfms", "seed"]
        assert (fields["engine"], fields["dtype"], fields["seed"]) == ("echo", "none", "none")
        assert prints == {fingerprint(receipt)}
        assert await ask() == (receipt, prints)
        assert await ask(stream=True, stream_options={"include_usage": True}) == (receipt, prints)
        seeded, same = await ask(seed=7)
        assert seeded == receipt.replace("seed=none", "seed=7")
        assert same == prints
        _, completion = await server.post("/v1/completions", {"model": "echo:a", "prompt": "x"})
        assert {completion["system_fingerprint"]} == prints
