"""What LoRA adapters add to an OpenVINO model: two more products beside each linear layer, whose matrices are inputs.

Only a model that is loaded with room for adapters has them. While none is loaded, they have one column of nothing.

Imports openvino: for worker processes only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hfms_engines.lean_openvino import ops, ov
from hfms_engines.lora import Adapters, Shape

__all__ = ["Changes", "add_inputs", "is_input", "layer_of", "merged_name"]

# Which columns each token may use, [tokens, columns].
_MASK = "lora.mask"
# Layers that see only the tokens whose logits are wanted.
_HEADS = ("lm_head", "embed_out")

_LAYER = re.compile(r"__module\.model\.(.+)/aten::(?:linear|addmm)/MatMul")
_MERGED = "hfms.layers/"


def layer_of(product: Any) -> str:
    """The name of the torch layer that a matrix product was; empty: of none."""
    found = _LAYER.fullmatch(product.get_friendly_name())
    return found[1] if found else ""


def merged_name(layers: Sequence[str]) -> str:
    """What to call the node that has the outputs of several layers, one behind the other."""
    return _MERGED + "+".join(layers)


def is_input(name: str) -> bool:
    return name.startswith("lora.")


def add_inputs(model: Any, wanted: str) -> dict[str, Shape]:
    """Let a model take adapters; its linear layers by name.

    wanted: the input that says which tokens the last layer sees.
    """
    mask = _parameter(_MASK, [-1, -1], ov.Type.boolean)
    added = [mask]
    named = {port.get_any_name(): port for port in model.inputs}
    of_wanted = ops.gather(mask, named[wanted].get_node(), ops.constant(0))
    layers: dict[str, Shape] = {}
    for layer, product, output in [*_layers(model)]:
        source, weights = product.input_value(0), product.get_input_shape(1)
        inputs = int(weights[1 if product.get_attributes()["transpose_b"] else 0])
        outputs = int(output.get_partial_shape()[-1].get_length())
        a, b = (
            _parameter(f"lora.{which}.{layer}", shape, ov.Type.f32)
            for which, shape in (("a", [inputs, -1]), ("b", [-1, outputs]))
        )
        own = of_wanted if layer.rpartition(".")[2] in _HEADS else mask
        if output.get_partial_shape().rank.get_length() == 3:
            own = ops.unsqueeze(own, ops.constant(1))
        readers = output.get_target_inputs()
        columns = ops.select(own, ops.matmul(source, a, False, False), ops.constant(np.float32(0)))
        changed = ops.add(output, ops.matmul(columns, b, False, False))
        for reader in readers:
            reader.replace_source_output(changed.output(0))
        added += [a, b]
        layers[layer] = inputs, outputs
    model.add_parameters(added)
    model.validate_nodes_and_infer_types()
    return layers


def _parameter(name: str, shape: list[int], kind: Any) -> Any:
    made = ops.parameter(ov.PartialShape(shape), kind, name)
    made.output(0).set_names({name})
    return made


def _layers(model: Any) -> Iterator[tuple[str, Any, Any]]:
    """Each linear layer: its name, its product (which others may share), and what it says."""
    for node in model.get_ordered_ops():
        if layer := layer_of(node):
            yield layer, node, node.output(0)
        elif node.get_friendly_name().startswith(_MERGED):
            product = node.input_value(0).get_node()
            if product.get_type_name() == "Add":  # of a bias
                product = next(
                    n for i in (0, 1) if (n := product.input_value(i).get_node()).get_type_name() == "MatMul"
                )
            names = node.get_friendly_name().removeprefix(_MERGED).split("+")
            for i, layer in enumerate(names):
                yield layer, product, node.output(i)


class Changes:
    """The adapters of a model, and how they get into its passes."""

    def __init__(self, request: Any, layers: Mapping[str, Shape], *, most: int, most_rank: int) -> None:
        """layers: as `add_inputs` says; none, where the model takes no adapters."""
        self.adapters = Adapters(layers, self._renew, most=most, most_rank=most_rank, option="[engine.openvino]")
        self._request = request
        self._renew()

    def choose(self, rows: Sequence[str], lengths: Sequence[int]) -> None:
        """By which adapter the tokens of each piece of the next pass are read; empty, or no rows at all: by none."""
        if self.adapters.layers:
            mask = self.adapters.mask(rows or [""] * len(lengths)).numpy()
            self._request.set_tensor(_MASK, ov.Tensor(np.repeat(mask, lengths, axis=0)))

    def _renew(self) -> None:
        for layer in self.adapters.layers:
            for which, matrix in zip("ab", self.adapters.stacked(layer), strict=True):
                self._request.set_tensor(f"lora.{which}.{layer}", ov.Tensor(matrix.numpy()))
