"""Time to the first token of a small caller while another floods the server.

    python -m tests.benchmarks.fairness URL --model NAME --small-key K --flood-key L --out fairness.json

Key L keeps 64 long generations in flight; key K sends short chats one after another: first alone, then beside the
flood, and alone again. The server must know both keys; with one key for both, the same run shows what happens without
fairness between keys. A server without keys (llama-server) is asked without them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
from pathlib import Path
from typing import Any

from hfms_cli.bench import dataset
from hfms_cli.bench.dataset import Prompt
from hfms_cli.bench.load import Endpoint, Sender, closed_loop
from hfms_cli.bench.measure import percentile

FLOOD = 64
FLOOD_TOKENS = 400
SMALL_TOKENS = 16
IGNORE_EOS = {"temperature": 0, "ignore_eos": True}


def prompts(count: int, words: int, tokens: int, seed: int) -> list[Prompt]:
    """Prompts that share nothing."""
    rng = random.Random(seed)
    return [Prompt(dataset.words_at_random(words, rng), tokens) for _ in range(count)]


async def first_tokens(sender: Sender, count: int, seed: int) -> list[float]:
    """Seconds to the first token of so many short chats, one after another. Raises RuntimeError for a failed one."""
    seconds = []
    for prompt in prompts(count, 30, SMALL_TOKENS, seed):
        outcome = await sender.send(prompt)
        if outcome.error:
            raise RuntimeError(f"a short chat failed: {outcome.error} {outcome.reason}")
        seconds.append(outcome.ttft)
    return seconds


async def run(args: argparse.Namespace) -> dict[str, Any]:
    small_extra = IGNORE_EOS | ({"priority": args.priority} if args.priority else {})
    flood_extra = IGNORE_EOS | ({"priority": args.flood_priority} if args.flood_priority else {})
    small = Sender(args.url, Endpoint.CHAT, args.model, key=args.small_key, sampling=small_extra)
    flood = Sender(args.url, Endpoint.CHAT, args.model, key=args.flood_key, sampling=flood_extra)
    async with small, flood:
        await first_tokens(small, 3, 99)
        alone = await first_tokens(small, args.count, 1)
        done = 0

        async def send(prompt: Prompt) -> None:
            nonlocal done
            outcome = await flood.send(prompt)
            done += not outcome.error

        endless = prompts(2000, 60, FLOOD_TOKENS, 2)
        flooding = asyncio.create_task(closed_loop(endless, send, args.flood))
        await asyncio.sleep(args.settle)
        beside = await first_tokens(small, args.count, 3)
        flooding.cancel()
        await asyncio.gather(flooding, return_exceptions=True)
        await asyncio.sleep(1)
        alone += await first_tokens(small, args.count, 4)
    said: dict[str, Any] = {"load": os.getloadavg()[0], "flood_done": done}
    for name, seconds in (("alone", alone), ("beside", beside)):
        ordered = sorted(seconds)
        said[name] = {f"p{p}_ms": round(percentile(ordered, p) * 1e3, 1) for p in (50, 99)}
    said["ratio_p50"] = round(said["beside"]["p50_ms"] / said["alone"]["p50_ms"], 2)
    said["ratio_p99"] = round(said["beside"]["p99_ms"] / said["alone"]["p99_ms"], 2)
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--model", required=True)
    parser.add_argument("--small-key")
    parser.add_argument("--flood-key")
    parser.add_argument("--priority", help="of the short chats")
    parser.add_argument("--flood-priority", help="of the flood")
    parser.add_argument("--count", type=int, default=40, help="short chats in each part")
    parser.add_argument("--flood", type=int, default=FLOOD)
    parser.add_argument("--settle", type=float, default=5.0, help="seconds that the flood has before it is measured")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    said = asyncio.run(run(args))
    print(json.dumps(said, indent=2))
    if args.out:
        args.out.write_text(json.dumps(said))


if __name__ == "__main__":
    main()
