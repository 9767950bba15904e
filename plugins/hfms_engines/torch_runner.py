"""The model on its device: loading, the key-value cache, one forward pass. Imports torch: for worker processes only.

Sequences live in slots. A slot is a row of one tensor a layer for keys and one for values, [slots, heads, length,
width]; running sequences fill slots 0 to B-1, so a forward pass over all of them reads a view and copies nothing.
Rows of one pass may stand at different positions. Transformers' models ask their cache for that position when they
make their masks; ours answers with one a row, and `_by_row` makes the mask that the model wants from it. So sliding
windows, chunks and whatever else a model does with its masks stay the model's own business.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported

import torch
import transformers
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from hfms_cli import ConfigError, DoesNotFit, LoadFailed, LoadRequest, UnsafeFormat
from hfms_engines.lora_torch import Changes
from hfms_engines.machine import physical_cores
from hfms_engines.text import decoder_of

__all__ = ["Model", "Runner", "SlotCache", "in_slots", "inference", "load", "read"]

# The cache grows by so many tokens at a time, so that it is not copied for every token.
BLOCK = 256


F = TypeVar("F", bound=Callable[..., Any])


def inference(work: F) -> F:
    """Run `work` without gradients. What is made in this mode can be changed in this mode only."""
    wrapped: F = torch.inference_mode()(work)
    return wrapped


def blocks(length: int) -> int:
    """`length` rounded up to what the cache takes for it."""
    return -(-length // BLOCK) * BLOCK


# --- the cache ---------------------------------------------------------------------------------------------------


C = TypeVar("C", bound=Cache)


class Layer(CacheLayerMixin, Generic[C]):  # type: ignore[misc]
    """Keys and values of one layer of a cache of ours, which take their room when the first come."""

    def __init__(self, cache: C) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys = self._room_like(key_states)
        self.values = self._room_like(value_states)
        self.is_initialized = True

    @abstractmethod
    def _room_like(self, states: torch.Tensor) -> torch.Tensor:
        """Room for all states that the cache is to hold of these.

        Filled with zeros and not just any memory: what a mask hides is still multiplied, and NaN times nothing is NaN.
        """

    def get_seq_length(self) -> int:
        length: int = self._cache.get_seq_length()
        return length

    def get_max_length(self) -> int:
        return -1


class _Slots(Layer["SlotCache"]):
    """A part of each slot."""

    def _room_like(self, states: torch.Tensor) -> torch.Tensor:
        slots, length = self._cache.room
        return states.new_zeros((slots, states.shape[1], length, states.shape[3]))

    def fit(self) -> None:
        """Take the size that the cache wants, keeping what there is."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            if (old.shape[0], old.shape[2]) != self._cache.room:
                new = self._room_like(old)
                slots, length = min(len(old), len(new)), min(old.shape[2], new.shape[2])
                new[:slots, :, :length] = old[:slots, :, :length]
                setattr(self, name, new)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new states, [rows, heads, tokens, width], and return all that these rows may look at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.fit()
        at = self._cache.at
        tokens = key_states.shape[2]
        rows = slice(at.first, at.first + len(at.starts))
        for stored, states in ((self.keys, key_states), (self.values, value_states)):
            if at.level:
                stored[rows, :, at.starts[0] : at.starts[0] + tokens] = states
            else:
                stored[at.rows[:, None], :, at.positions] = states.transpose(1, 2)
        longest = max(at.starts) + tokens
        return self.keys[rows, :, :longest], self.values[rows, :, :longest]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return max(self._cache.at.starts) + query_length, 0


class _Place:
    """Where the rows of one forward pass stand: slots `first` and up, each at its own start.

    A start below 0 is a row with fewer tokens than the others: until its turn it repeats its first token at position 0,
    which is the same key and value each time. So rows end together, and nothing that is not theirs is ever stored.
    """

    def __init__(self, first: int, starts: Sequence[int], tokens: int, device: torch.device) -> None:
        self.first = first
        self.starts = starts
        self.level = len(set(starts)) == 1
        self.offsets = torch.tensor(starts, device=device)
        self.rows = torch.arange(first, first + len(starts), device=device)
        self.positions = (self.offsets[:, None] + torch.arange(tokens, device=device)).clamp(min=0)
        """[rows, tokens]"""


class SlotCache(Cache):  # type: ignore[misc]
    """Keys and values of all running sequences.

    budget: tokens that all slots together may hold, padding included; the caller sees to it with `fits`.
    """

    def __init__(self, budget: int = 2**62) -> None:
        super().__init__(layers=[])
        self.budget = budget
        self.room = (0, 0)
        """Slots, and tokens of each."""
        self.at = _Place(0, [0], 0, torch.device("cpu"))

    def fits(self, slots: int, length: int) -> bool:
        """Whether so many slots can each have this length."""
        return slots * blocks(length) <= self.budget

    def reserve(self, slots: int, length: int) -> None:
        """Make room for so many slots of this length, and perhaps for some more slots."""
        if slots > self.room[0] or length > self.room[1]:
            twice = 1 << (slots - 1).bit_length()
            self.room = (twice if self.fits(twice, length) else slots, blocks(length))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        while len(self.layers) <= layer_idx:
            self.layers.append(_Slots(self))
        return self.layers[layer_idx].update(key_states, value_states)  # type: ignore[no-any-return]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return max(self.at.starts) + query_length, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(self.at.starts)

    def get_query_offset(self, layer_idx: int = 0) -> int | torch.Tensor:
        """One number where all rows stand at the same position, else [rows, 1, 1, 1], which `_by_row` knows."""
        return self.at.starts[0] if self.at.level else self.at.offsets[:, None, None, None]

    @inference
    def copy(self, source: int, target: int, length: int) -> None:
        """Make slot `target` hold what slot `source` holds; both lie in what was reserved."""
        if source == target:
            return
        for stored in self._stored():
            stored[target, :, :length] = stored[source, :, :length]

    @inference
    def wipe(self, slot: int) -> None:
        """Remove values that are not finite, which would spoil the next sequence in this slot."""
        for stored in self._stored():
            stored[slot] = 0

    def release(self) -> None:
        """Give all memory back."""
        self.room = (0, 0)
        self.layers.clear()

    def token_bytes(self) -> int:
        """Bytes that one token takes in one slot. Known after the first forward pass."""
        return sum(t[0, :, 0].numel() * t.element_size() for t in self._stored())

    def _stored(self) -> Iterator[torch.Tensor]:
        """All keys and all values, in their present size."""
        for layer in self.layers:
            if layer.is_initialized:  # one that shares another's keys and values never stores any
                layer.fit()
                yield layer.keys
                yield layer.values


def _by_row(mask: Callable[..., Any], *, additive: bool) -> Callable[..., Any]:
    """A maker of attention masks that lets each row stand at a position of its own."""

    @functools.wraps(mask)
    def made(*args: Any, **kwargs: Any) -> Any:
        offset = kwargs.get("q_offset")
        if not (isinstance(offset, torch.Tensor) and offset.ndim == 4):
            return mask(*args, **kwargs)
        rows, tokens, length = kwargs["batch_size"], kwargs["q_length"], kwargs["kv_length"]
        device = offset.device
        seen = kwargs["mask_function"](
            torch.arange(rows, device=device)[:, None, None, None],
            torch.zeros((1, 1, 1, 1), dtype=torch.long, device=device),
            (offset + torch.arange(tokens, device=device)[None, None, :, None]).clamp(min=0),
            torch.arange(length, device=device)[None, None, None, :],
        ).expand(rows, 1, tokens, length)
        if not additive:
            return seen
        dtype = kwargs.get("dtype", torch.float32)
        return torch.zeros((), device=device, dtype=dtype).where(seen, torch.finfo(dtype).min)

    made.by_row = True  # type: ignore[attr-defined]
    return made


def _teach_masks() -> None:
    """Put `_by_row` around transformers' two kinds of dense mask; all other callers get what they always got."""
    for name in ("sdpa", "eager"):
        mask = ALL_MASK_ATTENTION_FUNCTIONS[name]
        if not hasattr(mask, "by_row"):
            AttentionMaskInterface.register(name, _by_row(mask, additive=name == "eager"))


# --- the model ---------------------------------------------------------------------------------------------------


class Model:
    """A model and its tokenizer on their device. How keys and values are kept is for those derived from it to say."""

    engine = "transformers"
    adapters = "[engine.transformers]"
    """The options that say how many LoRA adapters there may be; empty: it takes none."""
    family: Any = transformers.AutoModelForCausalLM
    """Which of transformers' models it takes."""
    reader: Any = transformers.AutoTokenizer
    """What makes a model's inputs: a tokenizer, or what has one."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        device: torch.device,
        context_length: int,
        max_loras: int = 0,
        max_lora_rank: int = 0,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.decode = decoder_of(tokenizer)
        """Text of tokens, special ones left out."""
        self.device = device
        self.context_length = context_length
        self.changes = Changes(model, most=max_loras, most_rank=max_lora_rank, option=self.adapters)
        """LoRA adapters."""
        self.vocabulary: int = model.get_input_embeddings().weight.shape[0]
        self.stop_ids = stop_ids(getattr(model, "generation_config", None), tokenizer)
        self.silent_ids = silent_ids(tokenizer)
        """Tokens without text."""
        known = inspect.signature(model.forward).parameters
        # A model that brings its own code may know the cache by its name of before.
        self._cache_name = "cache" if "cache" in known or "past_key_values" not in known else "past_key_values"
        self._keeps = "logits_to_keep" in known

    def take(self, model: Model) -> None:
        """Be this model, which then is nobody else's."""
        vars(self).update(vars(model))

    def run(
        self, ids: torch.Tensor, positions: torch.Tensor, cache: Cache, tail: int, beside: Mapping[str, Any] = {}
    ) -> torch.Tensor:
        """The logits of each row's last `tail` tokens, [rows, tail, vocabulary].

        ids, positions: [rows, tokens]. beside: what else the model takes for these tokens.
        """
        more = {self._cache_name: cache} | ({"logits_to_keep": tail} if self._keeps else {})
        out = self.model(input_ids=ids, position_ids=positions, use_cache=True, **more, **beside)
        logits: torch.Tensor = out.logits[:, -tail:]
        return logits

    def limit_context(self, cache_bytes: int, token_bytes: int, *, least: int) -> None:
        """A text is no longer than what the cache holds, in steps of `least` tokens. Raises DoesNotFit below that."""
        budget = cache_bytes // token_bytes
        if budget < least:
            raise DoesNotFit(
                f"A cache of {cache_bytes} bytes holds {budget} tokens of this model, and {least} are the least;"
                f" set [engine.{self.engine}] kv_cache_bytes, or free memory."
            )
        # One sequence alone must always fit.
        self.context_length = min(self.context_length, budget // least * least)

    def weights_bytes(self) -> int:
        return weights_bytes(self.model)

    def trim(self) -> None:
        """Give memory back that torch keeps for its next allocations."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self.device.type == "mps":
            torch.mps.empty_cache()

    @staticmethod
    def is_out_of_memory(exc: BaseException) -> bool:
        """Whether a device, or the host, had no memory left."""
        if isinstance(exc, torch.OutOfMemoryError | MemoryError):
            return True
        # The CPU and MPS allocators raise a plain RuntimeError.
        return isinstance(exc, RuntimeError) and any(
            words in str(exc) for words in ("out of memory", "can't allocate memory", "not enough memory")
        )

    @staticmethod
    def is_lost(exc: BaseException) -> bool:
        """Whether the device is in a state that only a new process can leave."""
        # torch before 2.8 has no class for this.
        return isinstance(exc, getattr(torch, "AcceleratorError", ())) and not Model.is_out_of_memory(exc)

    def is_same(self, ours: torch.Tensor, theirs: torch.Tensor) -> bool:
        """Whether logits differ by no more than rounding makes them."""
        error = float((ours - theirs).norm() / theirs.norm())
        # Experts may be chosen otherwise where two are equally good, so half precision is let stray.
        return error < (0.01 if self.model.dtype == torch.float32 else 0.2)


class Runner(Model):
    """A model with a cache in slots."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.cache = SlotCache()

    @inference
    def forward(
        self,
        tokens: Sequence[Sequence[int]],
        starts: Sequence[int],
        first: int = 0,
        *,
        tail: int = 1,
        adapters: Sequence[str] = (),
        beside: Mapping[str, Any] = {},
    ) -> torch.Tensor:
        """Run the rows in slots `first` and up, and return the logits of each row's last `tail` tokens.

        tokens: [rows, tokens], as many for each row; starts: each row's position in its slot, below 0 as `_Place` says.
        adapters: the id of each row's, empty for the model as it is; without any, all are.
        beside: what else the model takes for these tokens.
        Returns [rows * tail, vocabulary] float32.
        """
        self.changes.choose(adapters)
        self.cache.at = _Place(first, starts, len(tokens[0]), self.device)
        ids = torch.tensor(tokens, device=self.device)
        return self.run(ids, self.cache.at.positions, self.cache, tail, beside).flatten(0, 1).float()

    def release(self) -> None:
        """Give the cache's memory back to the device."""
        self.cache.release()
        self.trim()

    @inference
    def prove(self) -> None:
        """Refuse a model that answers otherwise from our cache than without one. Also warms it up.

        Two rows are filled to different lengths, go on side by side, and must say what the whole prompt says in one
        pass. This is what tells a model that keeps more state than keys and values, or that
        derives positions from its cache's length.
        """
        ids = [i % self.vocabulary for i in (11, 7, 19, 5, 13)]
        try:
            whole = self.model(input_ids=torch.tensor([ids], device=self.device), use_cache=False).logits[0].float()
            self.cache.reserve(2, len(ids))
            self.forward([ids[:4], [ids[0], ids[0], *ids[:2]]], [0, -2])
            ours = self.forward([[ids[4]], [ids[2]]], [4, 2])
        except Exception as exc:
            if self.is_out_of_memory(exc):
                raise
            raise LoadFailed(f"This model cannot run in a batch: {_kind(self.model)} does not take our cache.") from exc
        if not self.is_same(ours, whole[[4, 2]]):
            raise LoadFailed(
                f"This model cannot run in a batch: {_kind(self.model)} answers otherwise when sequences of different"
                " lengths run together."
            )


def _kind(model: Any) -> str:
    return type(model).__name__


def weights_bytes(model: Any) -> int:
    """Bytes of parameters and buffers."""
    held = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(held.values())


def stop_ids(generation: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's, and all that the model's generation settings name."""
    named = getattr(generation, "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
    return frozenset(int(i) for i in ids if i is not None)


def silent_ids(tokenizer: Any) -> set[int]:
    """Tokens without text."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)


# --- loading -----------------------------------------------------------------------------------------------------


def load(
    request: LoadRequest,
    *,
    cache_bytes: int,
    threads: int = 0,
    max_loras: int = 0,
    max_lora_rank: int = 0,
    kind: type[Runner] = Runner,
) -> Runner:
    """A model that keeps its state in keys and values only, in slots. See `read` and `in_slots`."""
    runner = read(request, threads=threads, max_loras=max_loras, max_lora_rank=max_lora_rank, kind=kind)
    in_slots(runner, cache_bytes)
    return runner


def read(
    request: LoadRequest,
    *,
    threads: int = 0,
    max_loras: int = 0,
    max_lora_rank: int = 0,
    kind: type[Runner] = Runner,
) -> Runner:
    """Read a model onto its device.

    threads: on the CPU; 0: one for each physical core. max_loras, max_lora_rank: how many adapters it may have at once,
    and of what rank. kind: of runner.
    Raises LoadFailed, UnsafeFormat and DoesNotFit.
    """
    prepare(threads)
    _teach_masks()
    with (
        short_of_memory(request.device.name),
        _gguf_read_once() if request.card.format == "gguf" else contextlib.nullcontext(),
    ):
        return _read(request, kind, max_loras, max_lora_rank)


def prepare(threads: int) -> None:
    """Let torch have so many threads on the CPU, 0: one for each physical core, and transformers say only errors."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(threads or physical_cores())


def in_slots(runner: Runner, cache_bytes: int) -> None:
    """Give a model's slots so many bytes. Raises LoadFailed where it cannot run from them, and DoesNotFit."""
    if reason := _keeps_more(runner.model.config, runner.family):
        raise LoadFailed(reason)
    with short_of_memory(str(runner.device)):
        runner.prove()
    token_bytes = runner.cache.token_bytes()
    runner.release()
    runner.cache.budget = cache_bytes // token_bytes
    runner.limit_context(cache_bytes, token_bytes, least=BLOCK)


@contextlib.contextmanager
def short_of_memory(device: str) -> Iterator[None]:
    """Say that the model does not fit, where memory runs out."""
    try:
        yield
    except Exception as exc:
        if Model.is_out_of_memory(exc):
            raise DoesNotFit(f"The model needs more memory than {device} has free.") from exc
        raise


def _read(request: LoadRequest, kind: type[Runner], max_loras: int, max_lora_rank: int) -> Runner:
    card, folder = request.card, str(Path(request.folder))
    device = torch.device(request.device.torch_device or "cpu")
    common: dict[str, Any] = {"local_files_only": True, "trust_remote_code": request.trust_remote_code}
    if card.format == "gguf":
        common["gguf_file"] = card.weights[0]
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **common)
        if reason := _why_not(config, kind.family):
            raise LoadFailed(reason)
        reader = kind.reader.from_pretrained(folder, **common)
        how: dict[str, Any] = dict(common)
        if card.format != "gguf":
            how |= {"use_safetensors": card.format == "safetensors", "weights_only": True}
        if device.type != "cpu":
            how["device_map"] = {"": device}  # straight to the device, without a copy of all weights here
        model = kind.family.from_pretrained(folder, config=config, dtype=dtype_of(request, device), **how)
    except (LoadFailed, ConfigError):
        raise
    except Exception as exc:
        if Model.is_out_of_memory(exc):
            raise
        if card.remote_code and not request.trust_remote_code:
            raise UnsafeFormat(
                "This model needs Python code of its own; set [models] trust_remote_code to let it run."
            ) from exc
        raise LoadFailed(f"transformers cannot load this model: {type(exc).__name__}.") from exc
    model.eval()
    return kind(
        model,
        reader,
        device=device,
        context_length=context_length(config, getattr(reader, "tokenizer", reader), card.context_length),
        max_loras=max_loras,
        max_lora_rank=max_lora_rank,
    )


def dtype_of(request: LoadRequest, device: torch.device) -> Any:
    """float32 on CPU, the model's own elsewhere; what is unpacked from a GGUF has none of its own."""
    if request.dtype != "auto":
        return getattr(torch, request.dtype)
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if request.card.format == "gguf" else "auto"


def context_length(config: Any, tokenizer: Any, told: int) -> int:
    """Tokens of a text. told: what the model's card says; 0: nothing."""
    named = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    limit = named or told or tokenizer.model_max_length
    # Tokenizers say 10**30 where they do not know.
    return int(limit) if limit < 2**31 else 2048


def _why_not(config: Any, family: Any) -> str | None:
    """Why a model with this configuration cannot run, or None."""
    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        return f"{name} is an encoder-decoder; this engine runs decoders."
    known = family._model_mapping
    if type(config) not in known and family.__name__ not in (getattr(config, "auto_map", None) or {}):
        return f"transformers has no {family.__name__.removeprefix('Auto')} of type {name}."
    return None


def _keeps_more(config: Any, family: Any) -> str | None:
    """Why a model with this configuration cannot run from keys and values alone, or None."""
    name = config.model_type
    known = family._model_mapping
    if type(config) in known and getattr(known[type(config)], "_is_stateful", False):
        return f"{name} keeps a recurrent state."
    plain = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
    for layer in DynamicCache(config=config).layers:
        if type(layer) not in plain:
            return f"{name} keeps more than keys and values ({type(layer).__name__})."
    return None


@contextlib.contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Read a GGUF once and faster, while this lasts.

    transformers parses it for the config, for the tokenizer and for the weights, and each time makes one memmap object
    for each of a hundred thousand texts and numbers: seconds, in which a model that crashed is not back.
    """
    import gguf
    import numpy

    mapped = numpy.memmap
    better: list[tuple[Any, str, Any]] = [
        (gguf, "GGUFReader", functools.cache(gguf.GGUFReader)),
        (gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
        (numpy, "memmap", lambda *args, **kwargs: mapped(*args, **kwargs).view(numpy.ndarray)),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in better]
    try:
        for module, name, made in better:
            setattr(module, name, made)
        yield
    finally:
        for module, name, made in before:
            setattr(module, name, made)
