"""Measure hfms and its peers on the same prompts.

    python -m tests.benchmarks.serving --peers hfms,genai,llama-server --concurrency 1,4,16,32 --rounds 3 --out DIR

Each round starts every contender in turn (A B C, A B C), alone on the machine, asks it under every load and ends it.
All are asked the same prompts in a round, and new ones in the next. DIR/serving.json has each run's figures as soon
as they are there; `report.py` makes tables of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import psutil
import uvloop

from hfms_cli.bench import dataset
from hfms_cli.bench.dataset import Dataset, Lengths, Numbers, Prompt, Scale
from hfms_cli.bench.load import Endpoint, Load, Sender, apply
from hfms_cli.bench.measure import Outcome, Run, Wanted, summarise
from tests.benchmarks.install import say
from tests.benchmarks.peers import PEERS, Peer, Start
from tests.benchmarks.process import Process

PROMPT_TOKENS = (54, 190)
NUMBER_TOKENS = 11
"""Tokens that the number in front of each prompt takes: SmolLM2 has one for each digit."""
SHARED_WORDS = 100
WARMUP_TOKENS = 8
WANTED = Wanted(("ttft", "tpot", "itl", "e2el"), (50, 99))
CPU_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")


@dataclass(frozen=True)
class Contender:
    """A peer in one precision."""

    peer: Peer
    precision: str

    @property
    def name(self) -> str:
        return f"{self.peer.name} {self.precision}"

    @property
    def group(self) -> str:
        """Those of equal precision."""
        return self.peer.precisions[self.precision]


Ask = Callable[[Sequence[Prompt], int], Any]


async def ask_alone(process: Process, prompts: Sequence[Prompt], width: int) -> Run:
    """A job for an engine without a server."""
    job = {"prompts": [p.text for p in prompts], "width": width, "limit": prompts[0].output_len}
    stdin, stdout = process.popen.stdin, process.popen.stdout
    assert stdin is not None
    assert stdout is not None
    stdin.write(msgspec.json.encode(job) + b"\n")
    stdin.flush()
    outcomes = msgspec.json.decode(await asyncio.to_thread(stdout.readline), type=list[Outcome])
    return Run(outcomes, min(o.sent for o in outcomes), max(o.ended for o in outcomes), whole=True)


async def ask_server(sender: Sender, prompts: Sequence[Prompt], width: int) -> Run:
    """The same of a server."""
    run = Run()
    await apply(Load(width), prompts, sender.send, run, lambda _: None)
    return run


def prompts_of(seed: int, output_len: int, shared: bool) -> Dataset:
    """Words at random, in lengths of PROMPT_TOKENS. No prompt begins as another does, and none comes twice.

    shared: but all begin with the same hundred words, as with one system prompt.
    """
    rng = dataset.seeded("prompts", seed)
    low, high = PROMPT_TOKENS
    mean = (low + high) / 2
    lengths = Lengths(round(mean), output_len, 0.0)
    spread = Lengths(lengths.input_len, output_len, (high - low) / (high + low))
    scale = Scale(overhead=NUMBER_TOKENS)
    head = dataset.words_at_random(SHARED_WORDS, rng) + " " if shared else ""

    def source() -> Any:
        while True:
            words = scale.words(spread.draw(spread.input_len, rng))
            yield Prompt(head + dataset.words_at_random(words, rng), output_len)

    return Dataset(source, None if shared else Numbers(seed))


def machine() -> dict[str, Any]:
    """What was measured on."""
    cpu = Path("/proc/cpuinfo").read_text()
    fields = dict(line.split(":", 1) for line in cpu.splitlines() if ":" in line)
    fields = {k.strip(): v.strip() for k, v in fields.items()}
    return {
        "cpu": fields.get("model name", platform.processor()),
        "flags": [f for f in CPU_FLAGS if f in fields.get("flags", "").split()],
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


class Busyness:
    """Who had the CPUs while something was measured, as cores: the contender, the client, others, the hypervisor."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._before = self._now()

    def _now(self) -> tuple[float, ...]:
        all_, own = psutil.cpu_times(), psutil.Process().cpu_times()
        busy = sum(all_) - all_.idle - getattr(all_, "iowait", 0.0) - getattr(all_, "steal", 0.0)
        return (
            time.perf_counter(),
            self._process.cpu_seconds(),
            own.user + own.system,
            busy,
            getattr(all_, "steal", 0.0),
        )

    def cores(self) -> dict[str, float]:
        wall, contender, client, busy, steal = (b - a for a, b in zip(self._before, self._now(), strict=True))
        others = max(0.0, busy - contender - client)
        figures = {"contender": contender, "client": client, "others": others, "steal": steal}
        return {f"{name}_cores": seconds / wall for name, seconds in figures.items()}


async def measure(
    contender: Contender, start: Start, port: int, log: Path, loads: dict[int, list[Prompt]], output_len: int
) -> list[dict[str, Any]]:
    """Start a contender, ask it under every load, end it.

    loads: for each number of requests in flight, as many prompts to warm up with, and then those to measure with.
    """
    runs = []
    async with AsyncExitStack() as stack:
        process = Process(start, log)
        stack.callback(process.stop)
        if start.alone:
            stdout = process.popen.stdout
            assert stdout is not None

            async def answers() -> bool:
                return await asyncio.to_thread(stdout.readline) == b"ready\n"

            async def ask(prompts: Sequence[Prompt], width: int) -> Run:
                return await ask_alone(process, prompts, width)

        else:
            sender = Sender(f"http://127.0.0.1:{port}", Endpoint.COMPLETIONS, start.model, sampling=start.sampling)
            await stack.enter_async_context(sender)

            async def answers() -> bool:
                return (await sender.send(Prompt("One two three", 2))).error is None

            async def ask(prompts: Sequence[Prompt], width: int) -> Run:
                return await ask_server(sender, prompts, width)

        started = await process.ready(answers)
        say(f"{contender.name} answered after {started:.1f} s")
        for width, prompts in loads.items():
            await ask([Prompt(p.text, WARMUP_TOKENS) for p in prompts[:width]], width)
            load_average, busyness = os.getloadavg()[0], Busyness(process)
            run = await ask(prompts[width:], width)
            figures = summarise(run, WANTED)
            runs.append(
                {
                    "contender": contender.name,
                    "peer": contender.peer.name,
                    "precision": contender.precision,
                    "group": contender.group,
                    "concurrency": width,
                    "start_seconds": started,
                    "load_average": load_average,
                    **busyness.cores(),
                    **process.memory(),
                    **figures,
                }
            )
            wrong = sum(o.output_tokens != output_len for o in run.completed)
            say(
                f"{contender.name} c={width}: {figures['output_throughput'] or 0:.1f} tok/s, TTFT p50 "
                f"{figures['p50_ttft_ms'] or 0:.0f} ms, {figures['failed']} failed, {wrong} of another length"
            )
    return runs


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


async def measure_all(contenders: Sequence[Contender], args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Every round, every contender; results are written after each."""
    prompts = prompts_of(args.seed, args.output_len, args.shared_prefix)
    for number in range(args.rounds):
        loads = {c: prompts.take(c + max(args.least, args.per_stream * c)) for c in args.concurrency}
        for contender in contenders:
            port = free_port()
            start = contender.peer.start(args.cache, contender.precision, port)
            log = args.out / "logs" / f"{contender.name.replace(' ', '-')}-{number + 1}.log"
            its = {c: batch for c, batch in loads.items() if c <= contender.peer.most}
            try:
                runs = await measure(contender, start, port, log, its, args.output_len)
            except RuntimeError as exc:
                say(f"{contender.name}: {exc}")
                results["failures"].append({"contender": contender.name, "round": number + 1, "reason": str(exc)})
                runs = []
            results["runs"] += [{"round": number + 1, **run} for run in runs]
            (args.out / "serving.json").write_text(json.dumps(results, indent=1) + "\n")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    names = [p.name for p in PEERS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=",".join(names), help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--precisions", help="only these, such as bf16,f32,int8,Q8_0")
    parser.add_argument("--concurrency", default="1,4,16,32", help="requests in flight")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--per-stream", type=int, default=2, help="requests of a run for each that is in flight ...")
    parser.add_argument("--least", type=int, default=8, help="... and at least")
    parser.add_argument("--output-len", type=int, default=96, help="tokens of each answer")
    parser.add_argument("--shared-prefix", action="store_true", help="let all prompts begin alike")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path("/tmp/hfms-peers"), help="where peers are installed")
    parser.add_argument("--out", type=Path, help="folder of results; without it, peers are only installed")
    args = parser.parse_args(argv)
    args.concurrency = [int(c) for c in args.concurrency.split(",")]
    args.peers = args.peers.split(",")
    args.cache = args.cache.absolute()
    if unknown := set(args.peers) - set(names):
        parser.error(f"--peers has {', '.join(unknown)}; it takes {', '.join(names)}")
    return args


def main() -> None:
    args = parse()
    peers = [next(p for p in PEERS if p.name == name) for name in args.peers]
    versions = {p.name: p.install(args.cache) for p in peers}
    say("installed", versions)
    if args.out is None:
        return
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = args.precisions.split(",") if args.precisions else None
    contenders = [Contender(p, x) for p in peers for x in p.precisions if wanted is None or x in wanted]
    contenders.sort(key=lambda c: c.group)  # those that are compared run soon after one another
    results: dict[str, Any] = {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "command": " ".join(sys.argv[1:]),
        "machine": machine(),
        "versions": versions,
        "output_len": args.output_len,
        "shared_prefix": args.shared_prefix,
        "failures": [],
        "runs": [],
    }
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends what was started, as Ctrl-C does
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell hands down ignored to what it puts behind
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(measure_all(contenders, args, results))


if __name__ == "__main__":
    main()
