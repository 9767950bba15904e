"""What LoRA adapters add to a torch model, by hooks on its layers. While there are none, there are no hooks.

Imports torch and transformers: for worker processes only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from hfms_engines.lora import Adapters, Shape

__all__ = ["Changes", "linear_layers"]


def linear_layers(model: Any) -> dict[str, Shape]:
    """The layers that adapters can change. Experts are not among them: they see tokens of any rows, in any order."""
    found: dict[str, Shape] = {}
    for name, module in model.named_modules():
        if ".experts." in name:
            continue
        if isinstance(module, torch.nn.Linear):
            found[name] = module.in_features, module.out_features
        elif isinstance(module, Conv1D):
            found[name] = module.nx, module.nf
    return found


class Changes:
    """The adapters of a model, and how they get into its passes."""

    def __init__(self, model: Any, *, most: int, most_rank: int, option: str) -> None:
        self.adapters = Adapters(linear_layers(model), self._renew, most=most, most_rank=most_rank, option=option)
        self._model = model
        self._hooks: list[Any] = []
        self._hidden: torch.Tensor | None = None
        """Of this pass, [rows, columns]: which columns are not a row's own. None: no row has any."""

    def choose(self, rows: Sequence[str]) -> None:
        """By which adapter each row of the next pass is answered; empty: by none. No rows: none has one."""
        self._hidden = ~self.adapters.mask(rows).to(self._model.device) if any(rows) else None

    def _renew(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = [
            self._model.get_submodule(layer).register_forward_hook(self._hook(layer))
            for layer in sorted(self.adapters.changed())
        ]

    def _hook(self, layer: str) -> Callable[..., Any]:
        # In the precision of the pass, whatever that of the layer's own weights is.
        a, b = (t.to(self._model.device, self._model.dtype) for t in self.adapters.stacked(layer))

        def add(module: Any, inputs: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
            hidden = self._hidden
            if hidden is None:
                return out
            (x,) = inputs
            # Some models lay the tokens of all rows one behind the other.
            flat = x.ndim == 2
            hidden = hidden.repeat_interleave(x.shape[0] // len(hidden), 0) if flat else hidden[:, None]
            return out + (x @ a).masked_fill(hidden, 0) @ b

        return add
