"""LoRA adapters of one model side by side, so that calls of each, and of none, run in one pass.

Each linear layer that an adapter changes gets two small products beside its own:

    y + select(x @ A) @ B        A: [inputs, columns]     B: [columns, outputs], with the scale in it

The columns are those of all adapters, one after the other, and `select` keeps for each row those of its own adapter and
makes nothing of the rest: whatever is in another's, it cannot reach this row. So a pass is exact for each of its rows,
and costs a row some ranks more than the model alone.

Imports torch once there is room for one: for worker processes only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

import regex

from hfms_cli import Adapter, BadRequest, Unavailable

if TYPE_CHECKING:
    import torch

    from hfms_cli import AdapterCard

__all__ = ["Adapters", "Shape"]

Shape = tuple[int, int]
"""Inputs and outputs of a linear layer."""

_PREFIX = "base_model.model."
# Patterns come from whoever made the adapter, and some take for ever.
_PATTERN_SECONDS = 1.0


@dataclass(frozen=True)
class _Weights:
    """Of one adapter, for each layer that it changes: A, [inputs, rank], and B, [rank, outputs], with the scale."""

    rank: int
    """The highest."""
    layers: dict[str, tuple[torch.Tensor, torch.Tensor]]


class Adapters:
    """Those that a model has now.

    layers: the linear layers that can be changed, by their names, with their shapes. renew: called when there is one
    more or less. most: how many adapters there may
    be at once; most_rank: of each. option: the settings that say so, for people; empty: there are none.
    """

    def __init__(
        self, layers: Mapping[str, Shape], renew: Callable[[], None], *, most: int, most_rank: int, option: str
    ) -> None:
        self.layers = layers
        self._renew = renew
        self._most = most
        self._most_rank = most_rank
        self._option = option
        self._held: dict[str, _Weights] = {}

    def __bool__(self) -> bool:
        return bool(self._held)

    def check(self, adapter_id: str) -> None:
        """Raises Unavailable where calls cannot name it: it was not brought along when this process started."""
        if adapter_id and adapter_id not in self._held:
            raise Unavailable("The adapter is not loaded in this engine.", code="adapter_unavailable")

    def add(self, adapter: Adapter) -> None:
        """Take an adapter, if it is not there already. Raises BadRequest where it does not fit; nothing has changed."""
        if adapter.id in self._held:
            return
        if not self._option:
            raise _bad("cannot be loaded: as this model is run, it takes none")
        if not self._most:
            raise _bad(f"cannot be loaded: this model was loaded without room for adapters ({self._option} max_loras)")
        if len(self._held) >= self._most:
            raise _bad(f"is one too many: {self._most} are loaded already ({self._option} max_loras)")
        self._held[adapter.id] = _read(adapter, self.layers, self._most_rank, self._option)
        self._renew()

    def remove(self, adapter_id: str) -> None:
        """Forget an adapter, if there is one."""
        if self._held.pop(adapter_id, None) is not None:
            self._renew()

    def changed(self) -> set[str]:
        """Names of layers that any of them changes."""
        return {name for weights in self._held.values() for name in weights.layers}

    @property
    def columns(self) -> int:
        """Of all of them together; where there are none, one that is nobody's."""
        return max(1, sum(weights.rank for weights in self._held.values()))

    def stacked(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of a layer, [inputs, columns] and [columns, outputs] float32; zeros where an adapter leaves it."""
        import torch

        inputs, outputs = self.layers[layer]
        a, b = torch.zeros(inputs, self.columns), torch.zeros(self.columns, outputs)
        at = 0
        for weights in self._held.values():
            if layer in weights.layers:
                own_a, own_b = weights.layers[layer]
                a[:, at : at + own_a.shape[1]] = own_a
                b[at : at + own_b.shape[0]] = own_b
            at += weights.rank
        return a, b

    def mask(self, rows: Sequence[str]) -> torch.Tensor:
        """Which columns are each row's own, [rows, columns]. rows: ids of adapters, empty for the model as it is."""
        import torch

        mask = torch.zeros(len(rows), self.columns, dtype=torch.bool)
        at = 0
        for adapter_id, weights in self._held.items():
            for row, wanted in enumerate(rows):
                if wanted == adapter_id:
                    mask[row, at : at + weights.rank] = True
            at += weights.rank
        return mask


def _read(adapter: Adapter, layers: Mapping[str, Shape], most_rank: int, option: str) -> _Weights:
    """The weights of an adapter, once all of them are known to fit the model. Raises BadRequest."""
    from safetensors import SafetensorError, safe_open

    card = adapter.card
    targets = _targets(card, layers)
    if not targets:
        raise _bad("fits no layer of this model: `target_modules` names none of its linear layers")
    try:
        with safe_open(Path(adapter.folder, "adapter_model.safetensors"), framework="pt") as file:
            told = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - it is no dict
            expected = _expected(card, targets, layers, most_rank, option)
            _compare(told, expected)
            found = {name: file.get_tensor(name).float() for name in expected}
    except (SafetensorError, OSError) as exc:
        raise _bad("has weights that cannot be read as safetensors") from exc
    products = {}
    for name in targets:
        a, b = (found[key] for key in _keys(name))
        b = b * _scale(card, name)
        if not (a.isfinite().all() and b.isfinite().all()):
            raise _bad(f"has weights that are not finite, in `{name}`")
        products[name] = a.T.contiguous(), b.T.contiguous()
    return _Weights(max(a.shape[1] for a, _ in products.values()), products)


def _targets(card: AdapterCard, layers: Mapping[str, Shape]) -> list[str]:
    """Which layers the adapter changes, by PEFT's rules."""

    def fits(names: str | frozenset[str], layer: str) -> bool:
        if isinstance(names, str):
            return _matches(names, layer)
        parts = layer.split(".")
        return any(".".join(parts[i:]) in names for i in range(len(parts)))

    targets, others = _names(card.target_modules), _names(card.exclude_modules)
    if targets == "all-linear":
        chosen = [layer for layer in layers if layer.rpartition(".")[2] not in ("lm_head", "embed_out")]
    else:
        chosen = [layer for layer in layers if fits(targets, layer)]
    return [layer for layer in chosen if not (others and fits(others, layer))]


def _names(told: str | list[str]) -> str | frozenset[str]:
    return told if isinstance(told, str) else frozenset(told)


def _matches(pattern: str, layer: str) -> bool:
    try:
        return regex.fullmatch(pattern, layer, timeout=_PATTERN_SECONDS) is not None
    except (regex.error, TimeoutError) as exc:
        raise _bad(f"has a pattern of names that cannot be used: {pattern[:80]!r}") from exc


def _patterned(pattern: Mapping[str, float], layer: str, usual: float) -> float:
    """What a pattern says of a layer: as in PEFT, the first whose expression is the end of the name."""
    return next((value for key, value in pattern.items() if _matches(rf"(.*\.)?({key})", layer)), usual)


def _rank(card: AdapterCard, layer: str) -> int:
    return int(_patterned(card.rank_pattern, layer, card.r))


def _scale(card: AdapterCard, layer: str) -> float:
    alpha, rank = _patterned(card.alpha_pattern, layer, card.lora_alpha), _rank(card, layer)
    return alpha / (sqrt(rank) if card.use_rslora else rank)


def _keys(layer: str) -> tuple[str, str]:
    return f"{_PREFIX}{layer}.lora_A.weight", f"{_PREFIX}{layer}.lora_B.weight"


def _expected(
    card: AdapterCard, targets: Sequence[str], layers: Mapping[str, Shape], most_rank: int, option: str
) -> dict[str, list[int]]:
    """The tensors that the adapter must have, with their shapes."""
    expected = {}
    for layer in targets:
        rank, (inputs, outputs) = _rank(card, layer), layers[layer]
        if rank > most_rank:
            raise _bad(f"has rank {rank}, and {most_rank} is the most here ({option} max_lora_rank)")
        a, b = _keys(layer)
        expected[a], expected[b] = [rank, inputs], [outputs, rank]
    return expected


def _compare(told: Mapping[str, list[int]], expected: Mapping[str, list[int]]) -> None:
    """Raises BadRequest where the weights are not those of this configuration and this model."""
    if whole := next((name for name in sorted(told) if not name.rpartition(".lora_")[1]), None):
        raise _bad(f"holds whole layers, too, which are not taken (PEFT's `save_embedding_layers`): `{_short(whole)}`")
    if unknown := sorted(told.keys() - expected.keys()):
        raise _bad(f"changes what this model has not, or what it does not name as its target: `{_short(unknown[0])}`")
    if missing := sorted(expected.keys() - told.keys()):
        raise _bad(f"was made for another model: this one has `{_short(missing[0])}` too, and it does not")
    for name, shape in expected.items():
        if list(told[name]) != shape:
            raise _bad(
                f"was made for another model: its `{_short(name)}` is {list(told[name])}, and this model needs {shape}"
            )


def _short(name: str) -> str:
    return name.removeprefix(_PREFIX)[:120]


def _bad(why: str) -> BadRequest:
    return BadRequest(f"This adapter {why}.", param="lora_path", code="invalid_adapter")
