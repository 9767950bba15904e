"""A model that `openvino_export` made, on its device: compiling, the paged cache, one forward pass.

Imports openvino: for worker processes only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from hfms_cli import DoesNotFit, LoadFailed
from hfms_engines import openvino_ir, tokenizer_files
from hfms_engines.blocks import Blocks
from hfms_engines.lean_openvino import ov
from hfms_engines.lora_openvino import Changes, add_inputs, is_input
from hfms_engines.machine import physical_cores
from hfms_engines.openvino_export import INPUTS, MODEL, About, read
from hfms_engines.text import decoder_of

if TYPE_CHECKING:
    from hfms_engines.lora import Shape

__all__ = ["SHORT", "Runner", "load", "precision_of"]


SHORT = {"bfloat16": "bf16", "float32": "f32"}
"""What OpenVINO calls them."""

# In bfloat16 OpenVINO 2026.4 divides by zero where it has one thread.
_LEAST_THREADS = {"float32": 1, "bfloat16": 2}

# For each new number of tokens in a pass OpenVINO makes code, which in float32 takes as long as reading 10 to 40 of
# them, and keeps only some of it. So a pass of more than `_EXACT` tokens is filled up to a multiple of `_STEP`.
_EXACT, _STEP = 32, 8

# Blocks of a cache that is only tried out.
_FEW = 16


class Runner:
    """A compiled model and its tokenizer, ready to run."""

    def __init__(
        self,
        compiled: Any,
        tokenizer: Any,
        about: About,
        *,
        precision: str,
        cache_bytes: int | None,
        share: bool,
        layers: Mapping[str, Shape] = {},
        max_loras: int = 0,
        max_lora_rank: int = 0,
    ) -> None:
        """layers: that adapters may change."""
        self.tokenizer = tokenizer
        self.decode = decoder_of(tokenizer)
        """Text of tokens, special ones left out."""
        self.precision = precision
        self.vocabulary = about.vocabulary
        self.stop_ids = frozenset(about.stop_ids)
        self.silent_ids = set(about.silent_ids)
        self._request = compiled.create_infer_request()
        self.changes = Changes(self._request, layers, most=max_loras, most_rank=max_lora_rank)
        """LoRA adapters."""
        named = [(port, port.get_any_name()) for port in compiled.inputs]
        # Ours have each token in a row of its own; what came as OpenVINO's, all in one.
        self._tokens = [-1, 1] if len(compiled.input("input_ids").get_partial_shape()) == 2 else [-1]
        caches = [port for port, name in named if name not in INPUTS and not is_input(name)]
        shapes = [[d.get_length() for d in list(port.get_partial_shape())[1:]] for port in caches]
        block_bytes = sum(
            int(np.prod(shape)) * port.get_element_type().size for port, shape in zip(caches, shapes, strict=True)
        )
        # Values lie as the tokens do in every precision; keys may have rows beside them.
        size = shapes[1][1]
        count = _FEW if cache_bytes is None else cache_bytes // block_bytes
        self.blocks = Blocks(count, size, share=share)
        # One sequence alone must always fit.
        self.context_length = min(about.context_length, self.blocks.count * size)
        if self.blocks.count < 2:
            raise DoesNotFit(
                f"A cache of {cache_bytes} bytes holds {self.context_length} tokens of this model;"
                " set [engine.openvino] kv_cache_bytes, or free memory."
            )
        self._caches = []
        for port, shape in zip(caches, shapes, strict=True):
            # Pages that nobody has written to take no memory yet.
            tensor = ov.Tensor(port.get_element_type(), ov.Shape([self.blocks.count + 1, *shape]))
            self._request.set_tensor(port, tensor)
            self._caches.append(tensor)

    def forward(
        self,
        pieces: Sequence[Sequence[int]],
        *,
        starts: Sequence[int],
        tables: Sequence[Sequence[int]],
        tails: Sequence[int],
        adapters: Sequence[str] = (),
    ) -> np.ndarray[Any, Any]:
        """Run pieces of sequences, and return the logits of as many of each one's last tokens as `tails` says.

        starts: how many tokens of each sequence are in its blocks. tables: its blocks, enough for the piece too.
        adapters: the id of each one's, empty for the model as it is; without any, all are.
        Returns [sum of tails, vocabulary] float32, which is the caller's until the next pass.
        """
        tokens = sum(map(len, pieces))
        if tokens > _EXACT and (filling := -tokens % _STEP):
            # One sequence more, of which nobody wants anything, in the block that no other has.
            pieces, starts, tails = [*pieces, [0] * filling], [*starts, 0], [*tails, 0]
            tables = [*tables, [self.blocks.count]]
            adapters = [*adapters, ""] if adapters else ()
        lengths = [len(piece) for piece in pieces]
        begins = [0, *accumulate(lengths)]
        held = [start + n for start, n in zip(starts, lengths, strict=True)]
        blocks = [table[: self.blocks.needed(n)] for table, n in zip(tables, held, strict=True)]
        positions = chain.from_iterable(map(range, starts, held))
        wanted = [at for end, tail in zip(begins[1:], tails, strict=True) for at in range(end - tail, end)]
        for name, values in (
            ("input_ids", np.array(list(chain.from_iterable(pieces))).reshape(self._tokens)),
            ("position_ids", np.array(list(positions)).reshape(self._tokens)),
            ("past_lens", np.array(starts, np.int32)),
            ("subsequence_begins", np.array(begins, np.int32)),
            ("block_indices", np.array(list(chain.from_iterable(blocks)), np.int32)),
            ("block_indices_begins", np.array([0, *accumulate(map(len, blocks))], np.int32)),
            ("max_context_len", np.array(max(held), np.int32)),
            # There is no pass without logits.
            ("wanted", np.array(wanted or [0])),
        ):
            self._request.set_tensor(name, ov.Tensor(values))
        self.changes.choose(adapters, lengths)
        self._request.infer()
        logits: np.ndarray[Any, Any] = self._request.get_output_tensor(0).data
        return logits[: len(wanted)]

    def wipe(self, blocks: Sequence[int]) -> None:
        """Remove what blocks hold, such as values that are not finite, which would spoil the next sequence in them."""
        for tensor in self._caches:
            tensor.data[list(blocks)] = 0

    def release(self) -> None:
        """Nothing: what blocks hold is for the next call that begins alike."""

    def trim(self) -> None:
        """Nothing: openvino keeps no memory for later."""

    @staticmethod
    def is_out_of_memory(exc: BaseException) -> bool:
        return isinstance(exc, MemoryError) or (isinstance(exc, RuntimeError) and "alloc" in str(exc))

    @staticmethod
    def is_lost(exc: BaseException) -> bool:
        return False


def precision_of(core: Any, dtype: str) -> str:
    """What this machine's CPU runs in where `dtype` is asked for: "float32" or "bfloat16". Raises LoadFailed."""
    fast = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if dtype == "bfloat16" and not fast:
        raise LoadFailed("This CPU has no bfloat16; set [models] dtype to float32.")
    if dtype not in ("auto", "float32", "bfloat16"):
        raise LoadFailed(f"openvino does not run in {dtype} on CPUs; set [models] dtype to float32 or bfloat16.")
    return "bfloat16" if fast and dtype != "float32" else "float32"


def load(
    folder: Path,
    *,
    dtype: str,
    cache_bytes: int | None,
    share: bool,
    cache_dtype: str = "auto",
    threads: int = 0,
    max_loras: int = 0,
    max_lora_rank: int = 0,
    graph: Path | None = None,
) -> Runner:
    """Compile the model in an export's folder for this machine's CPU.

    graph: of a model that came as OpenVINO's; then the folder holds the notes on it alone.
    dtype: "auto", "float32" or "bfloat16". cache_bytes: for keys and values; None: a few blocks.
    cache_dtype: what these are kept in, "auto" (as `dtype`) or "int8".
    threads: 0: one for each physical core. max_loras, max_lora_rank: how many adapters it may have at once, and of what
    rank; with 0 it has no inputs for any.
    Raises LoadFailed and DoesNotFit.
    """
    core = ov.Core()
    precision = precision_of(core, dtype)
    about = msgspec.json.decode((folder / MODEL).with_suffix(".json").read_bytes(), type=About)
    short = SHORT[precision]
    with ThreadPoolExecutor(1) as beside:
        try:
            model = openvino_ir.read(core, graph) if graph else read(core, folder)
            layers = add_inputs(model, "wanted") if max_loras else {}
            # Importing transformers takes about as long as compiling, which does not hold Python up.
            tokenizer = beside.submit(tokenizer_files.read, folder, about.tokenizer)
            compiled = core.compile_model(
                model,
                "CPU",
                {
                    "INFERENCE_PRECISION_HINT": short,
                    "KV_CACHE_PRECISION": "u8" if cache_dtype == "int8" else short,
                    "PERFORMANCE_HINT": "LATENCY",
                    "INFERENCE_NUM_THREADS": max(threads or physical_cores(), _LEAST_THREADS[precision]),
                },
            )
        except RuntimeError as exc:
            raise LoadFailed("openvino cannot compile this model.") from exc
    return Runner(
        compiled,
        tokenizer.result(),
        about,
        precision=precision,
        cache_bytes=cache_bytes,
        share=share,
        layers=layers,
        max_loras=max_loras,
        max_lora_rank=max_lora_rank,
    )
