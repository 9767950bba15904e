"""What two answers have to have in common to be comparable, in one line: the header `x-hfms-receipt`."""

from __future__ import annotations

import functools
import hashlib

from hfms_cli.types import Call, LoadedInfo
from hfms_cli.version import __version__

RECEIPT = "x-hfms-receipt"
_DIGITS = 16
"""Of a SHA-256, in hex: enough to tell two models apart."""


def receipt(weights: str, info: LoadedInfo, call: Call) -> str:
    """`k=v; k=v`. weights: their digest, in hex. The seed is the last, since it is the call's and not the model's."""
    said = {
        "weights": weights[:_DIGITS],
        "template": _digest(info.template) if info.template else "none",
        "dtype": info.dtype,
        "quantize": info.quantize,
        "engine": info.engine,
        "hfms": __version__,
        "seed": "none" if call.sampling.seed is None else call.sampling.seed,
    }
    return "; ".join(f"{name}={value}" for name, value in said.items())


@functools.lru_cache(maxsize=64)
def _digest(template: str) -> str:
    """The same few templates come with every call."""
    return hashlib.sha256(template.encode()).hexdigest()[:_DIGITS]


def fingerprint(receipt: str) -> str:
    """OpenAI's `system_fingerprint`: the same for answers that differ at most by their seed."""
    served, _, _ = receipt.rpartition("; seed=")
    return f"fp_{hashlib.sha256(served.encode()).hexdigest()[:10]}"
