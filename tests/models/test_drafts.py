"""A draft model beside a larger one, from the request that names it to the engine that asks it."""

from __future__ import annotations

import pytest

from tests.engines import tiny

pytest.importorskip("openvino")
pytest.importorskip("torch")

TOML = """
[models]
dtype = "float32"
folders = ["{folder}"]
[engine.openvino]
cache_dir = "{folder}/converted"
kv_cache_bytes = 4_000_000
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, one that could guess for it, and one of another vocabulary."""
    folder = tmp_path_factory.mktemp("drafts")
    tiny.save(folder / "large", tiny.ARCHITECTURES["llama"]())
    tiny.save(folder / "small", tiny.ARCHITECTURES["qwen2"]())
    stranger = tiny.save(folder / "stranger", tiny.ARCHITECTURES["llama"]())
    words = tiny.tokenizer()
    words.add_tokens(["another"])
    words.save_pretrained(stranger)
    return folder


async def answer(server, model):
    asked = {"model": model, "prompt": [5, 6, 7, 8], "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    status, body = await server.post("/v1/completions", asked)
    assert status == 200, body
    return body["choices"][0]["text"]


async def test_a_model_with_a_draft_model_answers_as_it_does_alone(serve, folder):
    async with serve(toml=TOML.format(folder=folder)) as server:
        assert (await server.post("/models/load", {"model": "large", "engine": "openvino"}))[0] == 200
        alone = await answer(server, "large")
        _, before = await server.get("/models")
        assert (await server.post("/models/unload", {"model": "large"}))[0] == 200
        asked = {"model": "large", "draft_model": str(folder / "small")}
        status, body = await server.post("/models/load", asked)
        assert status == 200, body
        assert body["engine"] == "openvino"
        [was] = [row["estimated_bytes"] for row in before["data"] if row["id"] == "large"]
        assert body["estimated_bytes"] > was
        assert await answer(server, "large") == alone


async def test_the_configuration_names_draft_models_too(serve, folder):
    toml = TOML.format(folder=folder) + f'[models.draft_models]\nlarge = "{folder / "stranger"}"\n'
    async with serve(toml=toml) as server:
        status, body = await server.post("/models/load", {"model": "large"})
        assert status == 503
        assert "another vocabulary" in body["error"]["message"]


async def test_an_engine_that_takes_no_draft_model_says_so(serve, folder):
    async with serve(toml=TOML.format(folder=folder)) as server:
        asked = {"model": "large", "engine": "transformers", "draft_model": str(folder / "small")}
        status, body = await server.post("/models/load", asked)
        assert status == 503
        assert "it takes no draft model" in body["error"]["message"]


async def test_a_draft_model_by_a_path_must_be_in_the_operators_folders(serve, folder, tmp_path):
    async with serve(toml=TOML.format(folder=folder)) as server:
        status, body = await server.post("/models/load", {"model": "large", "draft_model": str(tmp_path)})
        assert (status, body["error"]["param"]) == (403, "draft_model")
