"""`hfms models pull` beside huggingface_hub's own `hf download`, from a Hub on loopback.

    python -m tests.benchmarks.pulls [--bytes 1000000000] [--rounds 5] [--out pulls.json]

Both are whole processes, one after the other in turns, each into an empty cache. `hf download` compares no hash, so a
third column adds `sha256sum` of what it brought: that is what hfms does, too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.storage.hub import Hub, Repo

REPO = "org/large"


async def serve(size: int, files: int) -> None:
    """A Hub with one model, until stdin ends. Its address is the first line."""
    parts = {f"model-{i:05}-of-{files:05}.safetensors": os.urandom(size // files) for i in range(1, files + 1)}
    async with Hub({REPO: Repo({"config.json": b"{}"} | parts)}) as hub:
        print(hub.url, flush=True)
        await asyncio.to_thread(sys.stdin.read)


def timed(command: list[str], env: dict[str, str]) -> float:
    begin = time.perf_counter()
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begin


def once(kind: str, url: str, folder: Path) -> float:
    """Seconds that it takes into an empty cache."""
    shutil.rmtree(folder, ignore_errors=True)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HFMS_"))}
    env = kept | {"HF_ENDPOINT": url, "HF_HOME": str(folder / "hf"), "HFMS_STATE_DIR": str(folder / "state")}
    env |= {"HFMS_CACHE_DIR": str(folder / "cache"), "HFMS_STORAGE_ORDER": "hf_cache"}
    if kind == "hfms":
        seconds = timed([sys.executable, "-m", "hfms_cli", "models", "pull", REPO], env)
    else:
        hf = Path(sys.executable).with_name("hf")
        seconds = timed([str(hf), "download", REPO], env)
        if kind == "hf and sha256sum":
            blobs = [str(p) for p in folder.rglob("blobs/*") if p.is_file()]
            seconds += timed(["sha256sum", *blobs], env)
    shutil.rmtree(folder, ignore_errors=True)
    return seconds


def measured(size: int, rounds: int, files: int) -> dict[str, Any]:
    kinds = ("hfms", "hf", "hf and sha256sum")
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    command = [sys.executable, "-m", "tests.benchmarks.pulls", "--serve", "--bytes", str(size), "--files", str(files)]
    with (
        tempfile.TemporaryDirectory(prefix="hfms-pulls-") as temp,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server,
    ):
        assert server.stdin is not None
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        for number in range(rounds + 1):
            for kind in kinds[number % 3 :] + kinds[: number % 3]:
                took = once(kind, url, Path(temp, "cache"))
                if number:  # the first round warms up what all share
                    seconds[kind].append(took)
        server.stdin.close()
    middle = {kind: statistics.median(took) for kind, took in seconds.items()}
    ratios = {
        kind: statistics.median(b / a for a, b in zip(seconds["hfms"], seconds[kind], strict=True)) for kind in kinds
    }
    return {"bytes": size, "files": files, "seconds": seconds, "median_seconds": middle, "hfms_is_faster_by": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=10**9)
    parser.add_argument("--files", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve(args.bytes, args.files))
        return
    result = measured(args.bytes, args.rounds, args.files)
    for kind, took in result["median_seconds"].items():
        ratio = result["hfms_is_faster_by"][kind]
        print(f"{kind:18}{took:6.2f} s  {args.bytes / took / 1e6:6.0f} MB/s  hfms is {ratio:.2f} times as fast")
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
