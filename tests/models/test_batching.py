"""How the calls of a model run together is told where its state is, whichever way its engine found."""

from __future__ import annotations

import asyncio

import pytest

from tests.engines import tiny

pytest.importorskip("hfms_engines.torch_runner", exc_type=ImportError)

TOML = """
[models]
folders = ["{folder}"]
[engine]
order = ["transformers"]
[engine.transformers]
kv_cache_bytes = 4_000_000
cache = "{cache}"
"""


@pytest.mark.parametrize(
    ("name", "cache", "batching"),
    [("llama", "auto", "slots"), ("llama", "paged", "paged"), ("mamba", "paged", "apart")],
)
async def test_get_models_and_status_tell_how_calls_run_together(serve, tmp_path, name, cache, batching):
    folder = tiny.save(tmp_path / name, (tiny.ARCHITECTURES | tiny.RECURRENT)[name]())
    async with serve(str(folder), toml=TOML.format(folder=tmp_path, cache=cache)) as server:
        asked = {"model": name, "prompt": [5, 6, 7, 8, 9], "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        answers = await asyncio.gather(*(server.post("/v1/completions", asked) for _ in range(3)))
        assert [(status, body["usage"]["completion_tokens"]) for status, body in answers] == [(200, 12)] * 3
        assert len({body["choices"][0]["text"] for _, body in answers}) == 1
        _, models = await server.get("/models")
        [row] = [r for r in models["data"] if r["id"] == name]
        assert row["batching"] == row["replicas"][0]["batching"] == batching
        _, status = await server.get("/status")
        assert [m["batching"] for m in status["models"] if m["id"] == name] == [batching]
