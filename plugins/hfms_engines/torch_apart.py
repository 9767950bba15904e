"""Models that no batch takes, on torch: each sequence has a cache of transformers' own, and a pass runs one by one.

That is what `generate` does, a token at a time, so whatever it has a cache for runs: recurrent states (Mamba, LFM2,
Qwen3-Next) as well as keys and values. Calls still join, leave and are cancelled between any two steps; what is missing
is the speed of a batch.

A recurrent state cannot be wound back, and some models forget it when they go on by more than a token. So a state is
gone on from only where it stands at the place that is asked for, and by a token; else all is read from the beginning.

Imports torch and transformers: for worker processes only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from hfms_cli import DoesNotFit, LoadFailed
from hfms_engines.lora_torch import Changes
from hfms_engines.torch_runner import Model, inference, short_of_memory

__all__ = ["ApartRunner"]


@dataclass
class _State:
    """What a sequence has read, and what the model keeps of it; None where that is spoilt."""

    ids: list[int] = field(default_factory=list)
    cache: Cache | None = None


class States:
    """The states of all running sequences, by slot, for `SlotScheduler`.

    budget: bytes that they may take.
    """

    def __init__(self) -> None:
        self.budget = 2**62
        self.fixed_bytes = 0
        """Of a state, however long its text is."""
        self.token_bytes = 0
        self._held: dict[int, _State] = {}

    def __getitem__(self, slot: int) -> _State:
        return self._held.setdefault(slot, _State())

    def fits(self, slots: int, length: int) -> bool:
        """Whether so many sequences can each have this length."""
        return slots * (self.fixed_bytes + self.token_bytes * length) <= self.budget

    def reserve(self, slots: int, length: int) -> None:
        """Forget what is behind these slots: states grow by themselves."""
        for slot in [s for s in self._held if s >= slots]:
            del self._held[slot]

    def copy(self, source: int, target: int, length: int) -> None:
        """Make slot `target` hold what slot `source` holds."""
        if source != target:
            self._held[target] = deepcopy(self[source])

    def wipe(self, slot: int) -> None:
        self._held.pop(slot, None)

    def release(self) -> None:
        self._held.clear()


class ApartRunner(Model):
    """A model that `torch_runner` has read, one sequence after the other.

    Raises LoadFailed where the model answers otherwise token by token, and DoesNotFit.
    """

    def __init__(self, model: Model, *, cache_bytes: int) -> None:
        self.take(model)
        # Some of these models read the weights of their layers past the layers, and would leave adapters out.
        self.changes = Changes(model.model, most=0, most_rank=0, option="")
        self.cache = States()
        with short_of_memory(str(self.device)):
            self._prove()
        self.cache.budget = cache_bytes
        room = cache_bytes - self.cache.fixed_bytes
        if room < 0:
            raise DoesNotFit(
                f"A state of this model takes {self.cache.fixed_bytes} bytes, and its cache has {cache_bytes};"
                " set [engine.transformers] kv_cache_bytes, or free memory."
            )
        if self.cache.token_bytes:
            self.limit_context(room, self.cache.token_bytes, least=1)

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
        """As that of `torch_runner.Runner`; there are no adapters, and nothing is beside tokens."""
        said = [
            self._forward(self.cache[slot], list(piece[max(0, -start) :]), max(0, start), tail)
            for slot, (piece, start) in enumerate(zip(tokens, starts, strict=True), first)
        ]
        return torch.cat(said).float()

    def _forward(self, state: _State, piece: list[int], start: int, tail: int) -> torch.Tensor:
        """Let a sequence read, and return the logits of its last tokens, [tail, vocabulary]."""
        ids = state.ids[:start] + piece
        cache, new = state.cache, piece
        if cache is None or len(state.ids) != start or len(piece) > 1:
            cache, new, start = DynamicCache(config=self.model.config), ids, 0
        state.cache = None  # what a pass that fails leaves behind is of no use
        positions = torch.arange(start, len(ids), device=self.device)
        logits = self.run(torch.tensor([new], device=self.device), positions[None], cache, tail)[0]
        state.ids, state.cache = ids, cache
        return logits

    def release(self) -> None:
        """Give the memory of all states back to the device."""
        self.cache.release()
        self.trim()

    @inference
    def _prove(self) -> None:
        """Refuse a model that says otherwise token by token than in one pass. Also learns what its states take.

        Another sequence is read between any two tokens, which tells a model that keeps its state in itself.
        """
        ids = [i % self.vocabulary for i in (11, 7, 19, 5, 13, 3, 17)]
        name = type(self.model).__name__
        try:
            whole = self.model(input_ids=torch.tensor([ids], device=self.device), use_cache=False).logits[0].float()
            self.forward([ids[:4]], [0])
            before = _bytes(self.cache[0].cache)
            ours = torch.cat([self.forward([[token], ids[::-1]], [at, 0])[:1] for at, token in enumerate(ids[4:], 4)])
            after = _bytes(self.cache[0].cache)
        except Exception as exc:
            if self.is_out_of_memory(exc):
                raise
            raise LoadFailed(f"{name} does not run from a cache of transformers' own.") from exc
        self.release()
        if not self.is_same(ours, whole[4:]):
            raise LoadFailed(f"{name} answers otherwise token by token, beside other sequences, than in one pass.")
        self.cache.token_bytes = (after - before) // len(ids[4:])
        self.cache.fixed_bytes = after - self.cache.token_bytes * len(ids)


def _bytes(cache: Cache | None) -> int:
    """What a state takes."""
    return sum(t.nbytes for layer in getattr(cache, "layers", ()) for t in _tensors(list(vars(layer).values())))


def _tensors(held: Any) -> Iterator[torch.Tensor]:
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, dict | list | tuple):
        for one in held.values() if isinstance(held, dict) else held:
            yield from _tensors(one)
