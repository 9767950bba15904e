"""What part of the machine a server's front and its client take while a model answers.

    python -m tests.benchmarks.share URL --pid PID --concurrency 1,4,16,32

PID: of a running `hfms serve` on this machine, with one model. Throughputs with HTTP and without (`hfms-alone`) differ
by less than they vary from minute to minute. Processor time does not vary so, and on a machine that a model keeps busy
it is what the others take from it. Prints, of all cores: the front's share, the client's, and the engine's.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import time

import psutil

from hfms_cli.bench import dataset
from hfms_cli.bench.dataset import Prompt
from hfms_cli.bench.load import Endpoint, Sender, closed_loop

WORDS, TOKENS = 100, 96
SECONDS = 12.0


def seconds_of(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def measure(sender: Sender, front: psutil.Process, concurrency: int) -> dict[str, float]:
    """Shares of all cores, and output tokens a second, of `SECONDS` in the middle of a load."""
    watched = {"front": front, "client": psutil.Process(os.getpid()), "engine": front.children()[0]}
    made = 0

    async def send(prompt: Prompt) -> None:
        nonlocal made
        outcome = await sender.send(prompt)
        if outcome.error:
            raise RuntimeError(f"a call failed: {outcome.error} {outcome.reason}")
        made += outcome.output_tokens or 0

    chance = random.Random(time.time())
    prompts = [Prompt(dataset.words_at_random(WORDS, chance), TOKENS) for _ in range(100 * concurrency)]
    load = asyncio.ensure_future(closed_loop(prompts, send, concurrency))
    await asyncio.wait([load], timeout=3)
    if load.done():
        await load  # it has failed
    before, had, began = {name: seconds_of(p) for name, p in watched.items()}, made, time.perf_counter()
    await asyncio.sleep(SECONDS)
    took = time.perf_counter() - began
    shares = {name: (seconds_of(p) - before[name]) / took / (os.cpu_count() or 1) for name, p in watched.items()}
    load.cancel()
    await asyncio.wait([load])
    return {**shares, "tokens_per_second": (made - had) / took}


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--concurrency", default="1,4,16,32")
    args = parser.parse_args()
    greedy = {"temperature": 0, "ignore_eos": True}
    async with Sender(args.url, Endpoint.COMPLETIONS, args.model, sampling=greedy) as sender:
        for concurrency in map(int, args.concurrency.split(",")):
            told = await measure(sender, psutil.Process(args.pid), concurrency)
            shares = ", ".join(f"{name} {told[name]:.1%}" for name in ("front", "client", "engine"))
            print(f"c = {concurrency}: {shares}; {told['tokens_per_second']:.0f} tokens/s", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
