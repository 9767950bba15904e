"""What this machine could do at best: memory read a second, and arithmetic of matrix products a second.

    python -m hfms_cli.tune.roofline

prints both as JSON. A process of its own, so that no library's threads stay behind in the one that measures.
"""

from __future__ import annotations

import ctypes
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from hfms_cli.tune.candidates import usable_cores

READ_BYTES = 128 * 2**20
"""For each thread; far more than caches hold."""
SIDE = 1536
"""Of square matrices."""
BEST_OF = 7
PRECISIONS = ("float32", "bfloat16")


class Roofline(msgspec.Struct, frozen=True, kw_only=True):
    """The best of a few attempts."""

    bytes_per_second: float
    """Read from memory, by all cores."""
    flops_per_second: dict[str, float] = {}
    """Of matrix products, by precision; empty where neither torch nor numpy is installed."""

    def one_stream(self, weights_bytes: int) -> float | None:
        """Tokens a second of one stream, which reads all weights for each; None where their size is unknown."""
        return self.bytes_per_second / weights_bytes if weights_bytes else None

    def batched(self, parameters: int, precision: str) -> float | None:
        """Tokens a second that can be read and written, each two operations for each parameter; None where unknown."""
        flops = self.flops_per_second.get(precision)
        return flops / (2 * parameters) if flops and parameters else None


def measure() -> Roofline:
    """Run the measurement in a process of its own; a few seconds. Raises OSError, CalledProcessError."""
    command = [sys.executable, "-P", "-m", "hfms_cli.tune.roofline"]
    said = subprocess.run(command, capture_output=True, check=True).stdout
    return msgspec.json.decode(said, type=Roofline)


def _read_rate() -> float:
    """Bytes a second. `memchr` reads as fast as the core can, and Python lets other threads run beside it."""
    memchr = ctypes.CDLL(None).memchr if sys.platform != "win32" else ctypes.cdll.msvcrt.memchr
    memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    memchr.restype = ctypes.c_void_p
    threads = usable_cores()
    # Written to, so that each page is there.
    buffers = [ctypes.create_string_buffer(b"\1" * READ_BYTES, READ_BYTES) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        seconds = _best(lambda: list(pool.map(lambda b: memchr(b, 0, READ_BYTES), buffers)))
    return threads * READ_BYTES / seconds


def _flop_rates() -> dict[str, float]:
    """Operations a second by precision."""
    operations = 2 * SIDE**3
    try:
        import torch
    except ImportError:
        return _numpy_rate(operations)
    rates = {}
    for name in PRECISIONS:
        a, b = (torch.rand(SIDE, SIDE).to(getattr(torch, name)) for _ in range(2))
        rates[name] = operations / _best(functools.partial(torch.matmul, a, b))
    return rates


def _numpy_rate(operations: int) -> dict[str, float]:
    try:
        import numpy
    except ImportError:
        return {}
    a = numpy.random.default_rng(0).random((SIDE, SIDE), numpy.float32)
    return {"float32": operations / _best(lambda: a @ a)}


def _best(work: Callable[[], Any]) -> float:
    """Seconds of the fastest of a few runs: what disturbs them only ever slows them down."""
    times = []
    for _ in range(BEST_OF):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)


if __name__ == "__main__":
    print(json.dumps({"bytes_per_second": _read_rate(), "flops_per_second": _flop_rates()}))
