"""What this machine's memory and cores allow, and so how fast the model can be at best.

    python -m tests.benchmarks.roofline --out DIR

Reading: the sum of float32 numbers, over as many bytes as the weights take in each precision (where caches are large,
they hold some of them), and over 2 GiB. Products: square matrices of 2,048, by torch. The best of several tries each:
a roof is what can be reached, not what is usual. DIR/roofline.json has the figures.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WEIGHTS = {"layers": 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536), "head": 49152 * 576}
"""Numbers of SmolLM2-135M that a token is multiplied by: of its layers, and of its head, which only tokens that are
answered need. Each is one multiplication and one addition."""
BYTES = {"f32": 4.0, "bf16": 2.0, "8 bit": 1.0, "4 bit": 0.625}
"""Of a weight in each group of precisions; Q4_1 keeps 20 bytes for 32."""
MEMORY_BYTES = 2**31
SIDE = 2048


def best(work: Callable[[], Any], seconds: float) -> float:
    """Seconds of the quickest of many tries, which go on for so long."""
    work()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def read_rate(size: float, seconds: float) -> float:
    """Bytes a second."""
    import torch

    numbers = torch.ones(int(size) // 4)
    return int(size) / best(numbers.sum, seconds)


def product_rate(dtype: str, seconds: float) -> float:
    """Multiplications and additions a second."""
    import torch

    kind = getattr(torch, dtype)
    a, b = torch.randn(SIDE, SIDE).to(kind), torch.randn(SIDE, SIDE).to(kind)
    out = torch.empty(SIDE, SIDE, dtype=kind)
    return 2.0 * SIDE**3 / best(lambda: torch.mm(a, b, out=out), seconds)


def measure(seconds: float) -> dict[str, Any]:
    """All rates. seconds: of each."""
    import torch

    weights = sum(WEIGHTS.values())
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "read_bytes_per_second": {group: read_rate(weights * size, seconds) for group, size in BYTES.items()}
        | {"memory": read_rate(MEMORY_BYTES, seconds)},
        "operations_per_second": {"f32": product_rate("float32", seconds), "bf16": product_rate("bfloat16", seconds)},
    }


def ceiling(rates: dict[str, Any], group: str, width: int, prompt_tokens: float, output_tokens: float) -> float:
    """Output tokens a second that cannot be exceeded.

    A step reads all weights once, for `width` sequences at most; each prompt must be multiplied too. The larger of the
    two times counts, as if both went on at once. Products of 8 and 4 bits are held to those of bf16: their own roof
    is higher, and most engines do not use it. Keys and values are left out.
    """
    operations: float = rates["operations_per_second"]["f32" if group == "f32" else "bf16"]
    reads: float = sum(WEIGHTS.values()) * BYTES[group] / rates["read_bytes_per_second"][group]
    needed = 2 * (WEIGHTS["layers"] * (prompt_tokens + output_tokens) + WEIGHTS["head"] * output_tokens)
    return 1 / max(reads / width, needed / operations / output_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    args = parser.parse_args()
    rates = measure(args.seconds)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "roofline.json").write_text(json.dumps(rates, indent=1) + "\n")
    for what, rate in rates["read_bytes_per_second"].items():
        print(f"read {what:>7}: {rate / 1e9:7.1f} GB/s")
    for what, rate in rates["operations_per_second"].items():
        print(f"mm   {what:>7}: {rate / 1e9:7.0f} GFLOP/s")


if __name__ == "__main__":
    main()
