"""`hfms serve` with models as OpenVINO and as ONNX, from folders, through real worker processes."""

from __future__ import annotations

import aiohttp
import pytest

pytest.importorskip("openvino")


async def test_models_that_came_as_graphs_answer_over_http(hfms_serve, tmp_path):
    from tests.engines import tiny
    from tests.engines.graphs import decoder_ir, encoder_onnx
    from tests.engines.sentences import tiny_bert

    text = decoder_ir(tiny.save(tmp_path / "llama", tiny.ARCHITECTURES["llama"]()), tmp_path / "text")
    vectors = encoder_onnx(tiny_bert(tmp_path / "bert"), tmp_path / "vectors")
    served = await hfms_serve(str(text), str(vectors), env={"HFMS_CACHE_DIR": str(tmp_path / "cache")})
    await served.until("ready  vectors", 120)
    await served.until("ready  text", 120)
    async with aiohttp.ClientSession(served.url) as session:
        asked = {"model": "text", "prompt": "The quick", "max_tokens": 5, "ignore_eos": True}
        async with session.post("/v1/completions", json=asked) as response:
            assert response.status == 200, await response.text()
            assert (await response.json())["usage"]["completion_tokens"] == 5
        async with session.post("/v1/embeddings", json={"model": "vectors", "input": "the cat"}) as response:
            assert response.status == 200, await response.text()
            assert len((await response.json())["data"][0]["embedding"]) == 32
        async with session.get("/models") as response:
            formats = {m["id"]: m.get("format") for m in (await response.json())["data"]}
    assert formats == {"text": "openvino", "vectors": "onnx"}
