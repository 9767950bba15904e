"""Pulls of hfms beside those of other tools, from the same source on loopback.

    python -m tests.benchmarks.pulls [--bytes 1000000000] [--files 1] [--rounds 5] [--out pulls.json]
    python -m tests.benchmarks.pulls --ipfs --cache DIR [--bytes ...]

All are whole processes, one after the other in turns, each into an empty folder.

From a Hub: `hfms models pull` beside huggingface_hub's own `hf download`. That compares no hash, so a third column adds
`sha256sum` of what it brought: that is what hfms does, too.

From an IPFS node: `hfms ipfs get`, which checks every block, and `hfms models pull`, which also hashes each file,
beside what the program `ipfs get` does: it has the node make a tar and unpacks that (here `curl | tar`, as no package
brings the program), and believes the node; a third column adds `sha256sum` again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hfms_storage.kubo import Kubo, KuboOptions
from tests.storage.hub import Hub, Repo
from tests.storage.node import installed, running

REPO = "org/large"
HFMS = [sys.executable, "-m", "hfms_cli"]

Pull = Callable[[Path], float]
"""Pulls into a folder that is made for it, and answers the seconds that it took."""


def timed(command: Sequence[str], env: Mapping[str, str]) -> float:
    begin = time.perf_counter()
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begin


def environ(folder: Path, **variables: str) -> dict[str, str]:
    """An environment in which everything is kept below a folder."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HFMS_"))}
    own = {"HF_HOME": "hf", "HFMS_STATE_DIR": "state", "HFMS_CACHE_DIR": "cache"}
    return kept | {name: str(folder / where) for name, where in own.items()} | variables


def hashed(folder: Path, files: str) -> float:
    return timed(["sha256sum", *(str(p) for p in folder.rglob(files) if p.is_file())], os.environ)


# --- from a Hub ---


async def serve(size: int, files: int) -> None:
    """A Hub with one model, until stdin ends. Its address is the first line."""
    parts = {f"model-{i:05}-of-{files:05}.safetensors": os.urandom(size // files) for i in range(1, files + 1)}
    async with Hub({REPO: Repo({"config.json": b"{}"} | parts)}) as hub:
        print(hub.url, flush=True)
        await asyncio.to_thread(sys.stdin.read)


def pulls_from_hub(url: str) -> dict[str, Pull]:
    def hfms(folder: Path) -> float:
        return timed([*HFMS, "models", "pull", REPO], environ(folder, HF_ENDPOINT=url, HFMS_STORAGE_ORDER="hf_cache"))

    def hf(folder: Path) -> float:
        program = Path(sys.executable).with_name("hf")
        return timed([str(program), "download", REPO], environ(folder, HF_ENDPOINT=url))

    return {"hfms": hfms, "hf": hf, "hf and sha256sum": lambda folder: hf(folder) + hashed(folder, "blobs/*")}


def from_hub(args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.pulls", "--serve"]
    command += ["--bytes", str(args.bytes), "--files", str(args.files)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        result = in_turns(pulls_from_hub(server.stdout.readline().strip()), args)
        server.stdin.close()
    return result


# --- from an IPFS node ---


def make_model(folder: Path, size: int, files: int) -> None:
    """A folder that is read as a model, of bytes at random."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    part = size // files
    header = json.dumps({"w": {"dtype": "U8", "shape": [part], "data_offsets": [0, part]}}).encode()
    for i in range(1, files + 1):
        with (folder / f"model-{i:05}-of-{files:05}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.write(os.urandom(part))


def pulls_from_node(api: str, cid: str) -> dict[str, Pull]:
    def get(folder: Path) -> float:
        env = environ(folder, IPFS_API=api, HFMS_STORAGE_ORDER="kubo")
        return timed([*HFMS, "ipfs", "get", cid, "-o", str(folder / "got")], env)

    def node(folder: Path) -> float:
        url = f"{api}/api/v0/get?arg={cid}"
        return timed(["sh", "-c", 'curl -sf -X POST "$0" | tar -x -C "$1"', url, str(folder)], os.environ)

    def pull(folder: Path) -> float:
        env = environ(folder, IPFS_API=api, HFMS_STORAGE_ORDER="kubo")
        return timed([*HFMS, "models", "pull", f"ipfs://{cid}"], env)

    return {
        "hfms": get,
        "the node's get": node,
        "and sha256sum": lambda folder: node(folder) + hashed(folder, "*.safetensors"),
        "hfms models pull": pull,
    }


async def added(api: str, folder: Path) -> str:
    """The CID of a folder that the node keeps from now on."""
    node = Kubo(KuboOptions(api=api, command=""))
    try:
        return await node.add_path(folder, recursive=True)
    finally:
        await node.close()


def from_node(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="hfms-node-") as temp:
        folder = Path(temp, "model")
        make_model(folder, args.bytes, args.files)
        with running(installed(args.cache), Path(temp, "repo")) as node:
            return in_turns(pulls_from_node(node.api, asyncio.run(added(node.api, folder))), args)


# --- both ---


def in_turns(pulls: Mapping[str, Pull], args: argparse.Namespace) -> dict[str, Any]:
    kinds = list(pulls)
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory(prefix="hfms-pulls-") as temp:
        for number in range(args.rounds + 1):
            for kind in kinds[number % len(kinds) :] + kinds[: number % len(kinds)]:
                folder = Path(temp, "into")
                folder.mkdir()
                took = pulls[kind](folder)
                shutil.rmtree(folder)
                if number:  # the first round warms up what all share
                    seconds[kind].append(took)
    ratios = {
        kind: statistics.median(b / a for a, b in zip(seconds["hfms"], seconds[kind], strict=True)) for kind in kinds
    }
    middle = {kind: statistics.median(took) for kind, took in seconds.items()}
    return {
        "bytes": args.bytes,
        "files": args.files,
        "seconds": seconds,
        "median_seconds": middle,
        "hfms_is_faster_by": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=10**9)
    parser.add_argument("--files", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ipfs", action="store_true", help="from an IPFS node, and not from a Hub")
    parser.add_argument("--cache", type=Path, default=Path("/tmp/hfms-peers"), help="where the node is installed")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve(args.bytes, args.files))
        return
    result = from_node(args) if args.ipfs else from_hub(args)
    for kind, took in result["median_seconds"].items():
        ratio = result["hfms_is_faster_by"][kind]
        print(f"{kind:18}{took:6.2f} s  {args.bytes / took / 1e6:6.0f} MB/s  hfms is {ratio:.2f} times as fast")
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
