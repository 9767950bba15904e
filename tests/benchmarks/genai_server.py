"""openvino-genai's ContinuousBatchingPipeline, behind the thinnest server that is fair to it, or alone.

    python genai_server.py MODEL PRECISION [CACHE] --port PORT     streams /v1/completions
    python genai_server.py MODEL PRECISION [CACHE] --alone         jobs on stdin, outcomes on stdout; no HTTP, no text

PRECISION is what OpenVINO is told to compute in: f32 or bf16; CACHE what it is to keep keys and values in, without it
OpenVINO's own choice, u8. Runs in an environment with openvino-genai, tokenizers,
aiohttp, uvloop and msgspec.

`step()` holds Python's lock, so the engine has a process of its own. One message a step goes each way at most: the
front makes tokens and text, the engine sees only tokens. Nothing is checked, nothing is logged, nothing is cancelled.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import multiprocessing
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Protocol

import msgspec

CACHE_GIB = 1


class Engine:
    """The pipeline, asked by token ids."""

    def __init__(self, model: str, precisions: dict[str, str]) -> None:
        import openvino_genai as genai  # type: ignore[import-not-found]

        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GIB
        scheduler.enable_prefix_caching = True
        self._genai = genai
        self._pipeline = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", precisions)
        self._open: dict[int, Any] = {}

    def add(self, key: int, ids: list[int], limit: int) -> None:
        """Ask for `limit` tokens, greedily and past every end of the text."""
        import numpy as np
        import openvino as ov

        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = limit, True, False
        self._open[key] = self._pipeline.add_request(key, ov.Tensor(np.array([ids], dtype=np.int64)), config)

    @property
    def busy(self) -> bool:
        return bool(self._open)

    def step(self) -> list[tuple[int, list[int], bool]]:
        """Of each request that got tokens: its key, the tokens, and whether it has ended."""
        self._pipeline.step()
        said = []
        for key, handle in list(self._open.items()):
            ids = [i for output in (handle.read().values() if handle.can_read() else ()) for i in output.generated_ids]
            ended = handle.get_status() == self._genai.GenerationStatus.FINISHED and not handle.can_read()
            if ended:
                del self._open[key]
            if ids or ended:
                said.append((key, ids, ended))
        return said


def run_engine(model: str, precisions: dict[str, str], front: Connection) -> None:
    """The engine's process: takes what waits before each step, and sends what the step gave."""
    engine = Engine(model, precisions)
    front.send_bytes(b"ready")
    while True:
        while front.poll(0 if engine.busy else None):
            try:
                job = front.recv_bytes()
            except EOFError:
                return
            engine.add(*msgspec.msgpack.decode(job))
        front.send_bytes(msgspec.msgpack.encode(engine.step()))


def serve(model: str, precisions: dict[str, str], port: int) -> None:
    """Serve until SIGTERM."""
    import uvloop
    from aiohttp import web
    from tokenizers import Tokenizer
    from tokenizers.decoders import DecodeStream

    tokenizer = Tokenizer.from_file(f"{model}/tokenizer.json")
    context = multiprocessing.get_context("spawn")
    engine, theirs = context.Pipe()
    context.Process(target=run_engine, args=(model, precisions, theirs), daemon=True).start()
    theirs.close()
    assert engine.recv_bytes() == b"ready"
    answers: dict[int, asyncio.Queue[tuple[list[int], bool]]] = {}
    keys = itertools.count()

    def hear() -> None:
        for key, ids, ended in msgspec.msgpack.decode(engine.recv_bytes()):
            answers[key].put_nowait((ids, ended))

    def event(key: int, choices: list[Any], usage: Any = None) -> bytes:
        data = {"id": f"cmpl-{key}", "object": "text_completion", "created": 0, "model": "smollm2", "choices": choices}
        return b"data: " + msgspec.json.encode(data | ({"usage": usage} if usage else {})) + b"\n\n"

    async def completions(request: web.Request) -> web.StreamResponse:
        asked = msgspec.json.decode(await request.read())
        key, text = next(keys), DecodeStream(skip_special_tokens=True)
        answer = answers[key] = asyncio.Queue()
        prompt = tokenizer.encode(asked["prompt"]).ids
        engine.send_bytes(msgspec.msgpack.encode((key, prompt, asked["max_tokens"])))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        tokens, ended = 0, False
        while not ended:
            ids, ended = await answer.get()
            tokens += len(ids)
            said = "".join(text.step(tokenizer, i) or "" for i in ids)
            choice = {"index": 0, "text": said, "finish_reason": "length" if ended else None}
            await response.write(event(key, [choice]))
        del answers[key]
        usage = {"prompt_tokens": len(prompt), "completion_tokens": tokens, "total_tokens": len(prompt) + tokens}
        await response.write(event(key, [], usage) + b"data: [DONE]\n\n")
        return response

    async def listen() -> web.Application:
        asyncio.get_running_loop().add_reader(engine.fileno(), hear)
        app = web.Application()
        app.router.add_post("/v1/completions", completions)
        return app

    web.run_app(listen(), host="127.0.0.1", port=port, loop=uvloop.new_event_loop(), access_log=None, print=None)


class AnyEngine(Protocol):
    """What is asked by token ids."""

    @property
    def busy(self) -> bool: ...

    def add(self, key: int, ids: list[int], limit: int) -> None: ...

    def step(self) -> list[tuple[int, list[int], bool]]: ...


def do_jobs(engine: AnyEngine, encode: Callable[[str], list[int]]) -> None:
    """Measure an engine without a server: each line of stdin is a job, each of stdout its outcomes.

    A job is `{"prompts": [text], "width": requests in flight, "limit": tokens of each}`. Times are of the monotonic
    clock that all processes of a machine share.
    """
    print("ready", flush=True)
    for line in sys.stdin:
        job = msgspec.json.decode(line)
        prompts = [encode(text) for text in job["prompts"]]
        outcomes: list[dict[str, Any]] = [{"prompt_tokens": len(p), "output_tokens": 0, "times": []} for p in prompts]
        waiting = iter(range(len(prompts)))

        def send(
            key: int | None,
            prompts: list[list[int]] = prompts,
            outcomes: list[dict[str, Any]] = outcomes,
            job: Any = job,
        ) -> None:
            if key is not None:
                outcomes[key]["sent"] = time.perf_counter()
                engine.add(key, prompts[key], job["limit"])

        for _ in range(job["width"]):
            send(next(waiting, None))
        while engine.busy:
            said = engine.step()
            now = time.perf_counter()
            for key, ids, ended in said:
                outcomes[key]["output_tokens"] += len(ids)
                outcomes[key]["times"].append(now)
                outcomes[key]["ended"] = now
                if ended:
                    send(next(waiting, None))
        print(msgspec.json.encode(outcomes).decode(), flush=True)


def run_alone(model: str, precisions: dict[str, str]) -> None:
    """The pipeline without a server."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{model}/tokenizer.json")
    do_jobs(Engine(model, precisions), lambda text: tokenizer.encode(text).ids)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("precision")
    parser.add_argument("cache", nargs="?")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--port", type=int)
    how.add_argument("--alone", action="store_true")
    args = parser.parse_args()
    asked = {"INFERENCE_PRECISION_HINT": args.precision, "KV_CACHE_PRECISION": args.cache}
    precisions = {name: value for name, value in asked.items() if value}
    if args.alone:
        run_alone(args.model, precisions)
    else:
        serve(args.model, precisions, args.port)
