"""What the server itself costs: an echo engine's tokens straight from its process, and the same through HTTP.

    python -m tests.benchmarks.frontend --concurrency 1,4,16,32 --step-ms 0,10 --rounds 3 --out DIR

Each round asks both in turn under each load, with the same prompts. `engine` is a worker process asked over its own
socket, by the code that the server asks it with, and no server; `http` is `hfms serve echo:a`, asked by the code of
`hfms bench`. With a step of 0 ms it is seen how many tokens the server can stream; with that of a real engine, how
many of the engine's get lost. DIR/frontend.json has the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import uvloop

from hfms_cli.bench.dataset import Prompt
from hfms_cli.bench.load import Endpoint, Load, Sender, apply
from hfms_cli.bench.measure import Outcome, Run, summarise
from hfms_cli.engines.host import EngineHost, HostOptions
from hfms_cli.hookspecs import LoadRequest
from hfms_cli.types import Call, Device, ModelCard, Sampling
from tests.benchmarks.install import say
from tests.benchmarks.peers import OUR_ENV, Start
from tests.benchmarks.process import Process
from tests.benchmarks.serving import WANTED, free_port, machine, prompts_of

Send = Callable[[Prompt], Any]


@asynccontextmanager
async def engine(step_ms: float) -> AsyncIterator[tuple[Send, Callable[[], dict[str, float]]]]:
    """The engine's process alone: what asks it, and the CPU seconds that its processes had."""
    card = ModelCard(format="none", model_type="echo", architecture="EchoModel", tasks=("generate",), weights_bytes=0)
    cpu = Device(id="cpu", kind="cpu", name="cpu", total_bytes=1, free_bytes=1, torch_device="cpu")
    options = HostOptions("echo", {"step_ms": step_ms}, "hfms.toml", "hfms_engines")
    host = await EngineHost.start("a", LoadRequest(folder=Path("/nowhere"), card=card, device=cpu), options)
    numbers = iter(range(10**9))

    async def send(prompt: Prompt) -> Outcome:
        sampling = Sampling(max_tokens=prompt.output_len, temperature=0.0, ignore_eos=True)
        outcome = Outcome(sent=time.perf_counter(), output_tokens=0, prompt_tokens=0)
        call = Call(id=f"c{next(numbers)}", model="a", task="generate", inputs=[prompt.text], sampling=sampling)
        async for chunk in host.submit(call):
            outcome.ended = time.perf_counter()
            outcome.times.append(outcome.ended)
            outcome.output_tokens = (outcome.output_tokens or 0) + chunk.tokens
            outcome.prompt_tokens = (outcome.prompt_tokens or 0) + chunk.prompt_tokens
        return outcome

    try:
        yield send, lambda: {"worker": cpu_of(psutil.Process(host.pid))}
    finally:
        await host.close()


@asynccontextmanager
async def echo_server(step_ms: float, log: Path) -> AsyncIterator[tuple[Process, str, Sender]]:
    """`hfms serve echo:a`: its process, its URL, and what asks it."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    config = log.with_suffix(".toml")
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(f'[log]\nlevel = "warning"\n[engine.echo]\nstep_ms = {step_ms}\n')
    command = [sys.executable, "-m", "hfms_cli", "serve", "echo:a", "--port", str(port), "--config", str(config)]
    process = Process(Start(command, OUR_ENV | {"HFMS_STATE_DIR": str(log.parent / "state")}), log)
    try:
        sampling = {"temperature": 0, "ignore_eos": True}
        async with Sender(url, Endpoint.COMPLETIONS, "echo:a", sampling=sampling) as sender:

            async def answers() -> bool:
                return (await sender.send(Prompt("One", 1))).error is None

            await process.ready(answers)
            yield process, url, sender
    finally:
        process.stop()


@asynccontextmanager
async def http(step_ms: float, log: Path) -> AsyncIterator[tuple[Send, Callable[[], dict[str, float]]]]:
    """The whole server: what asks it, and the CPU seconds that its processes had."""
    async with echo_server(step_ms, log) as (process, _, sender):

        def cpu() -> dict[str, float]:
            front, *workers = process.tree()
            return {"front": cpu_of(front), "worker": sum(map(cpu_of, workers))}

        yield sender.send, cpu


def cpu_of(process: psutil.Process) -> float:
    """Seconds."""
    times = process.cpu_times()
    return float(times.user + times.system)


async def measure(
    send: Send, cpu: Callable[[], dict[str, float]], prompts: Sequence[Prompt], width: int
) -> dict[str, Any]:
    """Ask all prompts: the figures of `hfms bench`, and microseconds of CPU a token and a request."""
    run, before = Run(), cpu()
    await apply(Load(width), prompts, send, run, lambda _: None)
    used = {name: seconds - before[name] for name, seconds in cpu().items()}
    figures = summarise(run, WANTED)
    for name, seconds in used.items():
        figures[f"{name}_us_per_token"] = 1e6 * seconds / max(1, figures["total_output_tokens"] or 0)
        figures[f"{name}_us_per_request"] = 1e6 * seconds / max(1, figures["completed"])
    return figures


async def measure_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every step time, every round, every load: the engine and the server in turns."""
    runs: list[dict[str, Any]] = []
    long, short = prompts_of(1, args.output_len, shared=False), prompts_of(2, 1, shared=False)
    for step_ms in args.step_ms:
        log = args.out / "logs" / f"frontend-{step_ms:g}ms.log"
        async with engine(step_ms) as alone, http(step_ms, log) as served:
            for send, cpu in (alone, served):
                await measure(send, cpu, long.take(max(args.concurrency)), max(args.concurrency))
            for number in range(args.rounds):
                for width in args.concurrency:
                    # One token an answer: what a request costs beside its tokens.
                    for kind, prompts in (("stream", long), ("request", short)):
                        batch = prompts.take(max(args.least, args.per_stream * width))
                        for way, (send, cpu) in (("engine", alone), ("http", served)):
                            figures = await measure(send, cpu, batch, width)
                            about = {"step_ms": step_ms, "round": number + 1, "concurrency": width, "kind": kind}
                            runs.append(about | {"way": way, "load_average": os.getloadavg()[0], **figures})
            for width in args.concurrency:
                show(runs, step_ms, width)
    return runs


def show(runs: list[dict[str, Any]], step_ms: float, width: int) -> None:
    """A line of medians of a load."""

    def of(kind: str, way: str, figure: str) -> float:
        wanted = {"step_ms": step_ms, "concurrency": width, "kind": kind, "way": way}
        return float(median(r[figure] for r in runs if wanted.items() <= r.items()))

    alone, served = (of("stream", way, "output_throughput") for way in ("engine", "http"))
    say(
        f"step {step_ms:g} ms, c={width}: engine {alone:,.0f} tok/s, http {served:,.0f} ({served / alone:.3f}); front "
        f"{of('stream', 'http', 'front_us_per_token'):.1f} us a token, worker "
        f"{of('stream', 'http', 'worker_us_per_token'):.1f}; front {of('request', 'http', 'front_us_per_request'):,.0f}"
        f" us a request of one token, {of('request', 'http', 'request_throughput'):,.0f} requests/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", default="1,4,16,32", help="requests in flight")
    parser.add_argument("--step-ms", default="0,10", help="of the engine's steps")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--per-stream", type=int, default=8, help="requests of a run for each that is in flight ...")
    # The system counts CPU time in steps of 10 ms.
    parser.add_argument("--least", type=int, default=32, help="... and at least")
    parser.add_argument("--output-len", type=int, default=96, help="tokens of each answer")
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    args = parser.parse_args()
    args.concurrency = [int(c) for c in args.concurrency.split(",")]
    args.step_ms = [float(s) for s in args.step_ms.split(",")]
    args.out.mkdir(parents=True, exist_ok=True)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runs = runner.run(measure_all(args))
    results = {"machine": machine(), "runs": runs}
    (args.out / "frontend.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
