"""`/v1/rerank` and `/v1/score`: their shapes over the echo engine, and a real cross-encoder behind them."""

from __future__ import annotations

import json

import pytest

DOCUMENTS = ["nothing here", {"text": "the big cat sat"}, "the cat"]
QUERY = "the big cat"


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank"])
async def test_rerank_answers_best_first_with_the_index_of_each_document(serve, path):
    async with serve("echo:a") as server:
        status, body = await server.post(path, {"model": "echo:a", "query": QUERY, "documents": DOCUMENTS})
    assert status == 200
    assert body["id"].startswith("rerank-")
    assert body["model"] == "echo:a"
    assert body["results"] == [
        {"index": 1, "relevance_score": 1.0, "document": {"text": "the big cat sat"}},
        {"index": 2, "relevance_score": pytest.approx(2 / 3), "document": {"text": "the cat"}},
        {"index": 0, "relevance_score": 0.0, "document": {"text": "nothing here"}},
    ]
    assert body["usage"] == {"prompt_tokens": 17, "total_tokens": 17}


async def test_rerank_answers_as_many_as_were_asked_for_and_leaves_out_documents(serve):
    async with serve("echo:a") as server:
        body = {"model": "echo:a", "query": QUERY, "documents": DOCUMENTS, "return_documents": False}
        _, two = await server.post("/v1/rerank", body | {"top_n": 2})
        _, many = await server.post("/v1/rerank", body | {"top_n": 20})
    assert [result["index"] for result in two["results"]] == [1, 2]
    assert len(many["results"]) == 3
    assert all(set(result) == {"index", "relevance_score"} for result in many["results"])


async def test_documents_of_the_same_score_keep_their_order(serve):
    async with serve("echo:a") as server:
        body = {"model": "echo:a", "query": "x", "documents": ["a", "x 1", "b", "x 2"]}
        _, answer = await server.post("/v1/rerank", body)
    assert [result["index"] for result in answer["results"]] == [1, 3, 0, 2]


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
@pytest.mark.parametrize(
    ("first", "second", "scores"),
    [
        ("a b", "b", [0.5]),
        ("a b", ["b", "a b", "c"], [0.5, 1.0, 0.0]),
        (["a b"], ["b", "a b"], [0.5, 1.0]),
        (["a", "b c"], ["a", "b"], [1.0, 0.5]),
    ],
)
async def test_score_takes_one_against_many_and_as_many_against_as_many(serve, path, first, second, scores):
    async with serve("echo:a") as server:
        status, body = await server.post(path, {"model": "echo:a", "text_1": first, "text_2": second})
    assert status == 200
    assert (body["object"], body["model"]) == ("list", "echo:a")
    assert body["data"] == [{"index": i, "object": "score", "score": s} for i, s in enumerate(scores)]
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] > 0


@pytest.fixture
def cross_encoder(tmp_path) -> str:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.engines.sentences import tiny_cross_encoder

    return str(tiny_cross_encoder(tmp_path / "cross-encoder"))


async def test_a_real_cross_encoder_scores_and_says_what_it_cannot(serve, cross_encoder):
    async with serve(cross_encoder) as server:
        _, models = await server.get("/v1/models")
        (model,) = models["data"]
        assert model["tasks"] == ["score"]
        name = model["id"]
        pairs = {"model": name, "text_1": "the cat", "text_2": ["The Cat sat", "zebra", "the cat"]}
        status, body = await server.post("/v1/score", pairs)
        assert status == 200
        scores = [row["score"] for row in body["data"]]
        assert len({*scores}) == 3
        ranked = {"model": name, "query": pairs["text_1"], "documents": pairs["text_2"]}
        _, body = await server.post("/v1/rerank", ranked)
        assert [result["relevance_score"] for result in body["results"]] == pytest.approx(
            sorted(scores, reverse=True), abs=1e-3
        )
        status, body = await server.post("/v1/score", pairs | {"text_2": "the " * 100})
        assert (status, body["error"]["code"], body["error"]["param"]) == (400, "context_length_exceeded", "input")
        status, body = await server.post("/v1/embeddings", {"model": name, "input": "the cat"})
        assert (status, body["error"]["param"]) == (400, "model")
        assert "cannot make embeddings; it can score pairs of texts" in body["error"]["message"]


async def test_a_model_that_scores_nothing_refuses_both_routes(serve, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.engines.sentences import tiny_bert

    async with serve(str(tiny_bert(tmp_path / "bert"))) as server:
        _, models = await server.get("/v1/models")
        name = models["data"][0]["id"]
        for path, more in (
            ("/v1/rerank", {"query": "a", "documents": ["b"]}),
            ("/v1/score", {"text_1": "a", "text_2": "b"}),
        ):
            status, body = await server.post(path, {"model": name} | more)
            assert (status, body["error"]["param"]) == (400, "model")
            assert "cannot score pairs of texts; it can make embeddings" in body["error"]["message"]


async def test_texts_of_a_score_are_not_in_the_log(serve, capsys):
    async with serve("echo:a") as server:
        await server.post("/v1/rerank", {"model": "echo:a", "query": "my-secret", "documents": ["my-secret too"]})
    logged = "".join(capsys.readouterr())
    (line,) = [x for x in logged.splitlines() if "/v1/rerank" in x]
    assert "prompt_tokens" in line
    assert "my-secret" not in json.dumps(logged)
