"""How much memory the text engines take, by what a model's files say of it. Imports nothing heavy.

    a process with its libraries, tokenizer and working space + weights as they are held + keys and values

What is not arithmetic here was measured on worker processes, driven until their caches were full:
`tests/engines/test_memory.py` does it again, and holds estimates to a tenth of the truth.
"""

from __future__ import annotations

import functools
import importlib.metadata
import sys
from pathlib import Path

from hfms_cli import Footprint, LoadRequest, ModelCard

MIB = 2**20
TORCH_PROCESS = 408 * MIB
OPENVINO_PROCESS = 138 * MIB
# What torch takes of a process that has openvino already.
_TORCH_BESIDE = 205 * MIB
# What a build of torch for GPUs takes more of the machine's memory, used or not.
GPU_BUILD = 256 * MIB
# Of a GPU's own memory, its context, libraries and working space.
ON_GPU = 512 * MIB
# Of the memory that is free when all else is there, so much may go to keys and values.
CACHE_SHARE = 0.25

# On CPUs, products in half precision hold part of the weights in a second layout.
_TORCH_HALF = 1.5
# OpenVINO holds some weights in two layouts, for one token and for many.
_OPENVINO_LAYOUTS = 1.2
_OPENVINO_HALF_LAYOUTS = 1.5
# Those of few bits all of them, and four bits in more room than they need. Bytes of a weight as it is mapped, with
# scales, zeros, and embeddings in eight bits, and as it is laid out.
_OPENVINO_SMALL = {"int8": (1.0, 2.0), "int4": (0.6, 1.75)}


def cache_bytes(request: LoadRequest, asked: int, held: int) -> int:
    """Bytes for keys and values: what the operator asked for, or a share of what is free beside the `held` bytes."""
    return asked or max(0, int((request.device.free_bytes - held) * CACHE_SHARE))


def footprint(weights: int, held: int, cache: int) -> Footprint:
    """held: bytes beside keys and values, the weights among them."""
    return Footprint(weights, cache, held - weights)


def torch_bytes(request: LoadRequest) -> int:
    """Bytes that the torch engine holds beside keys and values."""
    on_cpu = request.device.torch_device in (None, "cpu")
    return torch_weights(request) + (TORCH_PROCESS + _build_bytes() if on_cpu else ON_GPU)


def torch_weights(request: LoadRequest) -> int:
    """Bytes of the weights as torch holds them."""
    on_cpu = request.device.torch_device in (None, "cpu")
    unpacked = request.card.format == "gguf"
    dtype = request.dtype
    if dtype == "auto":
        dtype = "float32" if on_cpu else "bfloat16" if unpacked else request.card.dtype
    weights = parameters(request.card) * (4 if dtype == "float32" else 2)
    return int(weights * _TORCH_HALF) if on_cpu and dtype != "float32" else weights


def openvino_bytes(request: LoadRequest, quantize: str, *, torch: bool) -> int:
    """Bytes that the openvino engine holds beside keys and values. torch: whether it needs torch, too."""
    held = openvino_weights(request, quantize) + OPENVINO_PROCESS
    return held + _TORCH_BESIDE + _build_bytes() if torch else held


def openvino_weights(request: LoadRequest, quantize: str) -> int:
    """Bytes of the weights as OpenVINO holds them.

    A conversion is mapped into memory, and its weights are laid out once more as the processor wants them.
    """
    count = parameters(request.card)
    half = request.dtype == "bfloat16" or (request.dtype == "auto" and has_bfloat16())
    as_it_is = request.card.format == "openvino"
    # What was a GGUF is kept in two bytes; other weights of two bytes are mapped and spread out to four.
    plain = 2 if request.card.format == "gguf" else 4, 2 * _OPENVINO_HALF_LAYOUTS if half else 4 * _OPENVINO_LAYOUTS
    mapped, laid_out = _OPENVINO_SMALL.get(request.card.dtype if as_it_is else quantize, plain)
    if as_it_is:
        mapped = request.card.weights_bytes / count
    return int(count * (mapped + laid_out))


def parameters(card: ModelCard) -> int:
    """Weights of a model; where its files do not count them, by their bytes: two each, or five bits of a GGUF."""
    each = 5 / 8 if card.format == "gguf" else 4 if card.dtype == "float32" else 2
    return card.parameters or int(card.weights_bytes / each)


def _build_bytes() -> int:
    # PyPI's build for Linux is for CUDA; those for CPUs say so in their versions.
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return 0
    return 0 if sys.platform != "linux" or "+cpu" in version else GPU_BUILD


@functools.cache
def has_bfloat16() -> bool:
    """Whether the processor multiplies in bfloat16, and so openvino does unless it is told otherwise."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return bool({"avx512_bf16", "amx_bf16"} & set(flags))
