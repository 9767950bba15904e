"""`/v1/rerank`, as Jina and Cohere have it."""

from __future__ import annotations

from typing import Any

from hfms_cli.conformance.server import Server
from hfms_cli.conformance.suite import Skipped, check, expect

TEXTS = ["Paris is the capital of France.", "Cats sleep most of the day.", "Taxes are due in May."]


async def rank(server: Server, **more: Any) -> list[dict[str, Any]]:
    if server.rerank_model is None:
        raise Skipped("no reranker: name one with --rerank-model")
    asked = {"model": server.rerank_model, "query": "How long do cats sleep?", "documents": TEXTS}
    results: list[dict[str, Any]] = (await server.post("/v1/rerank", **asked | more)).ok()["results"]
    return results


@check("rerank", "orders documents, the best first")
async def order(server: Server) -> None:
    results = await rank(server)
    scores = [result["relevance_score"] for result in results]
    expect(sorted(result["index"] for result in results) == [0, 1, 2], "`index` does not name each document")
    expect(scores == sorted(scores, reverse=True), "the best does not come first")
    expect(results[0]["index"] == 1, "the document that answers the query is not the best")


@check("rerank", "top_n gives so many")
async def top(server: Server) -> None:
    expect(len(await rank(server, top_n=2)) == 2, "it gave another number")
