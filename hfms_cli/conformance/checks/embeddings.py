"""`/v1/embeddings` and rerankers."""

from __future__ import annotations

import array
import base64
import math
from typing import Any

from hfms_cli.conformance.server import Answer, Server, usage_of
from hfms_cli.conformance.suite import Skipped, check, expect


async def embed(server: Server, texts: Any, **more: Any) -> Answer:
    if server.embedding_model is None:
        raise Skipped("no embedding model: name one with --embedding-model")
    return await server.post("/v1/embeddings", model=server.embedding_model, input=texts, **more)


async def vectors(server: Server, texts: Any, **more: Any) -> list[Any]:
    """The embeddings in the order of the answer, which is that of the inputs. Raises Failed."""
    data = (await embed(server, texts, **more)).ok()["data"]
    expect([d.get("index") for d in data] == list(range(len(data))), "`index` does not count the inputs")
    return [d["embedding"] for d in data]


def near(one: list[float], other: list[float]) -> bool:
    """Whether two vectors point the same way."""
    product = sum(a * b for a, b in zip(one, other, strict=True))
    return product > 0.999 * math.hypot(*one) * math.hypot(*other)


@check("embeddings", "a text gives a vector, in OpenAI's shape")
async def one(server: Server) -> None:
    body = (await embed(server, "a cat")).ok()
    expect(body.get("object") == "list", f"`object` is {body.get('object')!r}")
    expect(body["data"][0].get("object") == "embedding", f"`object` is {body['data'][0].get('object')!r}")
    expect(all(isinstance(x, float | int) for x in body["data"][0]["embedding"]), "the vector is no list of numbers")
    usage = usage_of(body, "prompt_tokens", "total_tokens")
    expect(usage["prompt_tokens"] > 0, "no tokens were counted")


@check("embeddings", "many texts give each its own vector, in order")
async def many(server: Server) -> None:
    texts = ["a cat", "the law of taxes", "rain in autumn"]
    alone = [(await vectors(server, text))[0] for text in texts]
    together = await vectors(server, texts)
    expect(len(together) == 3, f"gave {len(together)} vectors for 3 texts")
    expect(all(map(near, alone, together)), "a vector differs from that of the text alone")


@check("embeddings", "likeness of meaning shows")
async def meaning(server: Server) -> None:
    cat, kitten, law = await vectors(server, ["a cat", "a kitten", "the law of taxes"])

    def likeness(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    expect(likeness(cat, kitten) > likeness(cat, law), "a cat is nearer to tax law than to a kitten")


@check("embeddings", "base64 holds the same numbers as float32")
async def packed(server: Server) -> None:
    (plain,) = await vectors(server, "a cat", encoding_format="float")
    (coded,) = await vectors(server, "a cat", encoding_format="base64")
    expect(isinstance(coded, str), "the vector is no text")
    numbers = array.array("f", base64.b64decode(coded)).tolist()
    expect(len(numbers) == len(plain), f"it has {len(numbers)} numbers, as floats {len(plain)}")
    expect(all(abs(a - b) < 1e-5 for a, b in zip(numbers, plain, strict=True)), "the numbers differ")


@check("embeddings", "token ids are taken in place of a text")
async def ids(server: Server) -> None:
    (plain,) = await vectors(server, "a cat")
    (of_ids,) = await vectors(server, [101, 1037, 4937, 102])
    expect(len(of_ids) == len(plain), "the vector has another length")
    two = await vectors(server, [[101, 1037, 102], [101, 4937, 102]])
    expect(len(two) == 2, f"two lists of ids gave {len(two)} vectors")


@check("embeddings", "dimensions gives a shorter vector, or is refused")
async def dimensions(server: Server) -> None:
    answer = await embed(server, "a cat", dimensions=8)
    if answer.status == 400:
        raise Skipped(f"the model gives no shorter vectors: {answer.said()}")
    vector = answer.ok()["data"][0]["embedding"]
    expect(len(vector) == 8, f"the vector has {len(vector)} numbers instead of 8")


@check("embeddings", "nothing to embed is 400")
async def nothing(server: Server) -> None:
    (await embed(server, [])).refused(400)
