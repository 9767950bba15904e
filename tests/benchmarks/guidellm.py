"""What guidellm and `hfms bench` say of the same server under the same load.

    python -m tests.benchmarks.guidellm --cache DIR --concurrency 4,16 --step-ms 10,40 --rounds 3 --out DIR

Asks `hfms serve echo:a`, whose engine takes a fixed time a step, with both in turns and with the same prompts. Of each
figure it prints the median of the rounds' ratios, hfms through guidellm. guidellm's own rates leave out the time in
which the last requests run out, so its output tokens a second are counted anew, from its requests: all tokens through
the time from the first sending to the last end. DIR/guidellm.json has both tools' figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path
from statistics import fmean, median
from typing import Any

import uvloop

from hfms_cli.bench.dataset import Prompt
from hfms_cli.bench.load import Load, Sender, apply
from hfms_cli.bench.measure import Run, summarise
from tests.benchmarks.frontend import echo_server
from tests.benchmarks.install import TORCH, call, say, venv
from tests.benchmarks.serving import WANTED, prompts_of

FIGURES = ("completed", "total_output_tokens", "output_throughput", "mean_tpot_ms", "mean_e2el_ms", "p50_ttft_ms")


async def ask_ours(sender: Sender, prompts: list[Prompt], width: int) -> dict[str, Any]:
    """The figures of `hfms bench`."""
    run = Run()
    await apply(Load(width), prompts, sender.send, run, lambda _: None)
    figures = summarise(run, WANTED)
    return {name: figures[name] for name in FIGURES}


async def ask_guidellm(
    programs: Path, url: str, prompts: list[Prompt], width: int, out: Path, *, route: str = "/v1/completions"
) -> dict[str, Any]:
    """guidellm's, under the names of ours, and how many requests had no whole answer."""
    data, result = out / "prompts.jsonl", out / "result.json"
    out.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": p.text, "output_tokens_count": p.output_len} for p in prompts]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "backend": {"kind": "openai_http", "target": url, "model": "echo:a", "request_format": route},
        "profile": {"kind": "concurrent", "streams": [width]},
        "constraint": {"kind": "max_requests", "count": len(prompts)},
        "data": {"kind": "json_file", "path": str(data)},
        "output": {"kind": "json", "path": str(result)},
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", json.dumps(value))]
    command: list[str | Path] = [programs / "guidellm", "run", *arguments, "--disable-console"]
    await asyncio.to_thread(call, *command, log=out / "guidellm.log", env={"HF_HUB_OFFLINE": "1"})
    (benchmark,) = json.loads(result.read_text())["benchmarks"]
    done = benchmark["requests"]["successful"]
    began, ended = min(r["request_start_time"] for r in done), max(r["request_end_time"] for r in done)
    tokens = sum(r["output_tokens"] for r in done)
    return {
        "completed": len(done),
        "failed": sum(len(benchmark["requests"][kind] or ()) for kind in ("errored", "incomplete")),
        "total_output_tokens": tokens,
        "output_throughput": tokens / (ended - began),
        "mean_tpot_ms": fmean(r["inter_token_latency_ms"] for r in done),
        "mean_e2el_ms": 1000 * fmean(r["request_latency"] for r in done),
        "p50_ttft_ms": median(r["time_to_first_token_ms"] for r in done),
    }


async def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every step time, every load, every round; both tools in turns."""
    programs = venv(args.cache / "guidellm" / "venv", [TORCH], ["guidellm==0.8.1"])
    prompts = prompts_of(1, args.output_len, shared=False)
    runs = []
    for step_ms in args.step_ms:
        log = args.out / "logs" / f"guidellm-{step_ms:g}ms.log"
        async with echo_server(step_ms, log) as (_, url, sender):
            for width in args.concurrency:
                pairs = []
                for number in range(args.rounds):
                    batch = prompts.take(args.per_stream * width)
                    ours = await ask_ours(sender, batch, width)
                    theirs = await ask_guidellm(programs, url, batch, width, args.out / "logs" / "guidellm")
                    pairs.append((ours, theirs))
                    about = {"step_ms": step_ms, "concurrency": width, "round": number + 1}
                    runs.append(about | {"hfms": ours, "guidellm": theirs})
                ratios = {name: median(a[name] / b[name] for a, b in pairs) for name in FIGURES}
                say(f"step {step_ms:g} ms, c={width}:", ", ".join(f"{k} {v:.3f}" for k, v in ratios.items()))
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", default="4,16", help="requests in flight")
    parser.add_argument("--step-ms", default="10,40", help="of the engine's steps")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--per-stream", type=int, default=8, help="requests of a run for each that is in flight")
    parser.add_argument("--output-len", type=int, default=96, help="tokens of each answer")
    parser.add_argument("--cache", type=Path, default=Path("/tmp/hfms-peers"), help="where guidellm is installed")
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    args = parser.parse_args()
    args.concurrency = [int(c) for c in args.concurrency.split(",")]
    args.step_ms = [float(s) for s in args.step_ms.split(",")]
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runs = runner.run(measure(args))
    (args.out / "guidellm.json").write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
