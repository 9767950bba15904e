"""Logits as numpy's arrays or torch's tensors.

Those in the machine's memory are numpy's: an engine that has them there needs no torch, which takes longer to import
than a small model to compile. On a GPU they stay where they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import torch

    Array: TypeAlias = np.ndarray[Any, Any] | torch.Tensor


def namespace(array: Array) -> Any:
    """numpy or torch, for what both have by the same name."""
    if isinstance(array, np.ndarray):
        return np
    import torch

    return torch


def like(array: Array, values: Any, dtype: Any = None) -> Any:
    """A list, or one of numpy's arrays, as an array of the same kind and in the same place as another.

    dtype: of the namespace; that of the other, if it is not given.
    """
    return namespace(array).asarray(values, dtype=dtype or array.dtype, device=array.device)
