"""The OpenAI routes: completions, chat completions, embeddings, models; and rerank and score, which OpenAI has not."""

from __future__ import annotations

import array
import base64
import sys
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from aiohttp import web

from hfms_cli.errors import ModelNotFound
from hfms_cli.model_files import ADAPTER
from hfms_cli.models import names
from hfms_cli.models.router import stands_for
from hfms_cli.types import Call, Chunk, LoadedInfo, Manifest
from hfms_cli.web import answers
from hfms_cli.web.body import parse
from hfms_cli.web.calling import CALL, answered, call_of
from hfms_cli.web.context import RUNTIME, SERVING, caller_of, log_of, respond
from hfms_cli.web.dialogue import Dialogue
from hfms_cli.web.operation import operation
from hfms_cli.web.schemas import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    RerankRequest,
    ScoreRequest,
    StreamOptions,
)
from hfms_cli.web.shapes import ChatShape, CompletionShape, Tally
from hfms_cli.web.sse import EventStream

routes = web.RouteTableDef()
calls = web.RouteTableDef()
"""Routes that take nothing but the road; every front answers them by itself."""


@calls.post("/v1/chat/completions")
@operation(
    "Inference",
    answers.ChatCompletion,
    body=ChatRequest,
    events=answers.ChatEvent,
    example={
        "model": "org/name",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 64,
        "temperature": 0,
    },
    **CALL,
)
async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Answer a chat."""
    body = parse(ChatRequest, await request.read())
    dialogue = Dialogue(request.app[SERVING].config.models, body.tool_use(), effort=body.reasoning_effort)
    call = call_of(request, body, "chatcmpl")
    return await _generate(request, body, call, ChatShape(call, dialogue))


@calls.post("/v1/completions")
@operation(
    "Inference",
    answers.Completion,
    body=CompletionRequest,
    events=answers.CompletionEvent,
    example={"model": "org/name", "prompt": "One, two, three,", "max_tokens": 16, "temperature": 0},
    **CALL,
)
async def completions(request: web.Request) -> web.StreamResponse:
    """Go on with a text."""
    body = parse(CompletionRequest, await request.read())
    call = call_of(request, body, "cmpl")
    best = (body.n or 1) if body.chooses else None
    shape = CompletionShape(call, best=best, logprobs=body.logprobs is not None)
    return await _generate(request, body, call, shape)


@calls.post("/v1/embeddings")
@operation(
    "Inference",
    answers.EmbeddingList,
    body=EmbeddingRequest,
    example={"model": "org/name", "input": ["a cat", "a kitten"], "encoding_format": "float"},
    **CALL,
)
async def embeddings(request: web.Request) -> web.StreamResponse:
    """Turn texts into vectors."""
    body = parse(EmbeddingRequest, await request.read())
    chunks, usage = await _each(request, call_of(request, body, "embd"))
    encode = _as_base64 if body.encoding_format == "base64" else _as_floats
    vectors = [encode(chunk.vector or b"") for chunk in chunks]
    return respond(
        {
            "object": "list",
            "data": [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(vectors)],
            "model": body.model,
            "usage": usage,
        }
    )


@calls.post("/v1/rerank")
@calls.post("/rerank")
@operation(
    "Inference",
    answers.Ranking,
    body=RerankRequest,
    example={"model": "org/name", "query": "pets", "documents": ["a cat", "tax law"], "top_n": 1},
    **CALL,
)
async def rerank(request: web.Request) -> web.StreamResponse:
    """Order documents by how well they answer a query, by a cross-encoder."""
    body = parse(RerankRequest, await request.read())
    call = call_of(request, body, "rerank")
    chunks, usage = await _each(request, call)
    results: list[dict[str, Any]] = [{"index": i, "relevance_score": c.score} for i, c in enumerate(chunks)]
    results.sort(key=lambda result: result["relevance_score"], reverse=True)
    if body.return_documents is not False:
        texts = body.texts()
        results = [result | {"document": {"text": texts[result["index"]]}} for result in results]
    return respond({"id": call.id, "model": body.model, "results": results[: body.top_n], "usage": usage})


@calls.post("/v1/score")
@calls.post("/score")
@operation(
    "Inference",
    answers.ScoreList,
    body=ScoreRequest,
    example={"model": "org/name", "text_1": "pets", "text_2": ["a cat", "tax law"]},
    **CALL,
)
async def score(request: web.Request) -> web.StreamResponse:
    """Tell how well texts answer others, by a cross-encoder."""
    body = parse(ScoreRequest, await request.read())
    call = call_of(request, body, "score")
    chunks, usage = await _each(request, call)
    return respond(
        {
            "id": call.id,
            "object": "list",
            "created": int(time.time()),
            "model": body.model,
            "data": [{"index": i, "object": "score", "score": c.score} for i, c in enumerate(chunks)],
            "usage": usage,
        }
    )


async def _each(request: web.Request, call: Call) -> tuple[list[Chunk], dict[str, int]]:
    """What was said of each input, in the order of the inputs, and the usage."""
    found: list[Chunk] = [Chunk()] * len(call.inputs)
    tokens = 0
    async with answered(request, call) as chunks:
        async for chunk in chunks:
            tokens += chunk.prompt_tokens
            if not chunk.begins:
                found[chunk.index] = chunk
    log_of(request)["prompt_tokens"] = tokens
    return found, {"prompt_tokens": tokens, "total_tokens": tokens}


@routes.get("/v1/models")
@operation("Models", answers.ServedModelList)
async def list_models(request: web.Request) -> web.StreamResponse:
    """The models that a call of this key may name."""
    return respond({"object": "list", "data": list((await _servable(request)).values())})


@routes.get("/v1/models/{id:.+}")
@operation("Models", answers.ServedModel, errors=(404,))
async def show_model(request: web.Request) -> web.StreamResponse:
    """One of them."""
    servable = await _servable(request)
    name = request.match_info["id"]
    if name not in servable:
        raise ModelNotFound.named(name, servable)
    return respond(servable[name])


async def _servable(request: web.Request) -> dict[str, dict[str, Any]]:
    """What a caller may name: models of the pool by id and alias, then what is on disk and loads when asked for."""
    runtime, caller = request.app[RUNTIME], caller_of(request)
    found: dict[str, dict[str, Any]] = {}

    def add(
        name: str, created: int, root: str, manifest: Manifest | None = None, info: LoadedInfo | None = None
    ) -> None:
        row = {"id": name, "object": "model", "created": created, "owned_by": "hfms", "root": root}
        known = {"revision": manifest.revision, "digest": manifest.digest} if manifest else {}
        able = {"max_model_len": info.context_length, "tasks": info.tasks} if info else {}
        found.setdefault(name, row | known | able)

    for model in runtime.pool.models():
        info = model.host.info if model.host else None
        for name in (model.id, *sorted(model.aliases)):
            add(name, model.created, model.id, model.manifest, info)
    for adapter in runtime.pool.adapters:
        info = adapter.parent.host.info if adapter.parent.host else None
        add(adapter.name, adapter.created, adapter.name, adapter.manifest, info)
        found[adapter.name]["parent"] = adapter.parent.id
    if runtime.config.models.load_on_request:
        await runtime.pool.catalogue.refresh()
        on_disk = await runtime.router.list()
        for entry in runtime.pool.catalogue.entries:
            manifest = next((m for m in on_disk if stands_for(entry.name, m)), None)
            if manifest or entry.name.scheme == "path":
                for name in (entry.id, *entry.aliases):
                    add(name, int(runtime.started), entry.id, manifest)
        for manifest in on_disk:
            if any(f.path == ADAPTER[0] for f in manifest.files):
                continue  # not a model: it is loaded beside one, under another name
            name = names.served_id(manifest.name)
            add(name, int(runtime.started), name, manifest)
    for alias, target in runtime.pool.aliases.items():
        if target in found:
            found.setdefault(alias, found[target] | {"id": alias})
    return {name: row for name, row in found.items() if caller.may_use(name, row["root"])}


# Generation, the same for both shapes.


async def _generate(
    request: web.Request, body: ChatRequest | CompletionRequest, call: Call, shape: ChatShape | CompletionShape
) -> web.StreamResponse:
    async with answered(request, call, shape.fit) as chunks:
        if body.stream:
            return await _stream(request, shape, chunks, body.stream_options or StreamOptions())
        tally = Tally()
        async for chunk in chunks:
            tally.add(chunk)
    log_of(request).update(tally.log())
    return respond(shape.whole(tally))


async def _stream(
    request: web.Request, shape: ChatShape | CompletionShape, chunks: AsyncIterator[Chunk], options: StreamOptions
) -> web.StreamResponse:
    """Each chunk as an event. An error before the first is an ordinary answer; after it, the stream's last event.

    A chat's first event has its role, and goes out when the model begins to read. Whoever waits for long hears
    comments, and then an error is an event, too.
    """
    stream = EventStream(
        request,
        partial(shape.head, shape.chunk_object),
        keep_alive_seconds=request.app[SERVING].config.server.keep_alive_seconds,
    )
    tally = Tally()
    try:
        with stream.telling_errors():
            async for chunk in chunks:
                tally.add(chunk)
                events = shape.events(chunk)
                if options.include_usage:
                    so_far = {"usage": shape.usage(tally) if options.continuous_usage_stats else None}
                    events = [event | so_far for event in events]
                await stream.send(*events, more=chunk.more)
            if options.include_usage:
                await stream.send({"choices": [], "usage": shape.usage(tally)}, more=True)
    finally:
        stream.rest()
        log_of(request).update(tally.log())
    return await stream.close()


def _as_floats(vector: bytes) -> list[float]:
    floats = array.array("f", vector)
    if sys.byteorder == "big":
        floats.byteswap()
    return floats.tolist()


def _as_base64(vector: bytes) -> str:
    return base64.b64encode(vector).decode()
