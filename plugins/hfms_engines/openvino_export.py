"""Makes an OpenVINO model of a transformers model, with paged attention, in a process of its own; and reads it.

    python -m hfms_engines.openvino_export OUT < job

job: the JSON of `Job`, on one line. OUT: an empty folder, which holds model and tokenizer when this succeeds. See
`conversion` for the process itself.

The model is traced once, by OpenVINO's own front end. Its attention is replaced for that by one operator,
`hfms::attend`, which becomes OpenVINO's PagedAttentionExtension; all else is the model's own code. So a pass reads
tokens of any number of sequences, one behind the other without padding, and each finds its past through its table of
blocks.

OpenVINO runs that operator and cannot write it to a file. So files have a common one in its place, with the same
inputs and the same name, and `read` puts the right one back.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from hfms_cli import Device, LoadFailed, LoadRequest, ModelCard, Quality
from hfms_engines import tokenizer_files
from hfms_engines.conversion import QUALITY, begin, main, say
from hfms_engines.lean_openvino import ops, ov
from hfms_engines.lora_openvino import layer_of, merged_name

MODEL = "openvino_model.xml"
INPUTS = (
    "input_ids",
    "position_ids",
    "past_lens",
    "subsequence_begins",
    "block_indices",
    "block_indices_begins",
    "max_context_len",
    "wanted",
)
"""All inputs but the caches, of which each layer has two."""

# Of weights in four bits, so many in a row share a scale and a zero, the first that divides a row.
_GROUPS = (64, 32)

# Smaller weights are left as they are: it would save nothing.
_SMALL = 2**10

# Tokens that a new model is compared with the old one on, and how far its logits may be from the old one's.
PROOF = 96
_MOST_ERROR = {"none": 0.01, "int8": 0.5, "int4": 0.8}

Made = Literal["none", "int8", "int4"]


class Job(msgspec.Struct):
    """What to make."""

    folder: str
    card: ModelCard
    device: Device
    quantize: Made


class Layer(msgspec.Struct, array_like=True):
    """What one layer's attention needs to know."""

    scale: float
    window: int
    """Tokens that it looks back at; 0: all."""
    key_heads: int
    key_width: int
    value_width: int


class About(msgspec.Struct):
    """What is said beside the model."""

    context_length: int
    vocabulary: int
    stop_ids: list[int]
    silent_ids: list[int]
    layers: list[Layer]
    tokenizer: str
    """As `tokenizer_files.keep` says."""


# --- what the server needs ---------------------------------------------------------------------------------------


def read(core: Any, folder: Path) -> Any:
    """The model in an export's folder, ready to be compiled."""
    about = msgspec.json.decode((folder / MODEL).with_suffix(".json").read_bytes(), type=About)
    model = core.read_model(folder / MODEL)
    inputs = {port.get_any_name(): port for port in model.inputs}
    tables = [inputs[name] for name in INPUTS[2:7]]
    found = {node.get_friendly_name(): node for node in model.get_ops()}
    # One of each for all layers: five hundred nodes less in a small model.
    constant = cache(lambda value, kind, *shape: ops.constant(np.full(shape, value), kind).output(0))
    for i, layer in enumerate(about.layers):
        stand_in = found[_name(i)]
        states = [port.get_source_output() for port in found[_name(i) + "/in"].inputs()]
        caches = [inputs[name] for name in cache_names(i)]
        stand_in.output(0).replace(
            _paged([*states, *(port.get_node().output(0) for port in [*caches, *tables])], layer, constant)
        )
    model.validate_nodes_and_infer_types()
    return model


def weights_bytes(folder: Path) -> int:
    """Bytes of an export's weights."""
    return (folder / MODEL).with_suffix(".bin").stat().st_size


def _name(layer: int) -> str:
    return f"hfms.attend.{layer}"


def cache_names(layer: int) -> tuple[str, str]:
    return f"key_cache.{layer}", f"value_cache.{layer}"


def _paged(inputs: list[Any], layer: Layer, constant: Callable[..., Any]) -> Any:
    """The output of paged attention, [tokens, heads * value_width].

    inputs: query, key and value, [tokens, heads * width]; the layer's two caches; the tables, as `INPUTS` has them.
    constant: the output of one that is so everywhere, by its value, kind and shape.
    """
    none = partial(constant, 0)
    i32, f32 = ov.Type.i32, ov.Type.f32
    *first, longest = inputs
    first += [constant(layer.scale, f32), constant(layer.window, i32), none(f32, 0), longest]
    # What we use nothing of: scores, rotation, sparse attention, sinks, eviction, types of tokens, bias.
    first += [none(i32, 0), none(i32, 0), none(i32, 0), none(f32, 0), none(f32, 0), none(i32), none(i32)]
    first += [none(f32, 0, 0, 0, 0), none(i32), none(i32, 0), none(i32, 0), none(i32, 0), none(i32, 0)]
    first += [none(ov.Type.u8, 0), none(i32, 0)]
    paged = ov.op._PagedAttentionExtension(first)
    info = paged.get_rt_info()
    info["num_k_heads"] = info["num_v_heads"] = layer.key_heads
    info["k_head_size"], info["v_head_size"] = layer.key_width, layer.value_width
    return paged.output(0)


# --- tracing -----------------------------------------------------------------------------------------------------


def convert(model: Any) -> tuple[Any, list[Layer]]:
    """The OpenVINO model of a transformers model, with stand-ins for attention, and what stands there."""
    import torch
    from openvino.frontend.pytorch import ConversionExtension
    from openvino.tools.ovc import convert_model
    from transformers import AttentionInterface

    layers: dict[int, Layer] = {}

    operator = torch.library.custom_op(
        "hfms::attend",
        lambda query, key, value, layer, width: query.new_zeros((query.shape[0], width)),
        mutates_args=(),
        schema="(Tensor query, Tensor key, Tensor value, int layer, int width) -> Tensor",
    )

    def attend(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **how: Any
    ) -> tuple[torch.Tensor, None]:
        """What the model's layers call. query, key, value: [tokens, heads, 1, width]."""
        for refused in ("softcap", "s_aux", "sinks", "position_bias"):
            if how.get(refused) is not None:
                raise NotImplementedError(f"attention with {refused}")
        scale = how.get("scaling")
        layers[module.layer_idx] = Layer(
            scale=float(query.shape[-1] ** -0.5 if scale is None else scale),
            window=int(how.get("sliding_window") or 0),
            key_heads=int(key.shape[1]),
            key_width=int(key.shape[-1]),
            value_width=int(value.shape[-1]),
        )
        flat = [states.transpose(1, 2).flatten(1) for states in (query, key, value)]
        width = value.shape[-1]
        out = operator(*flat, module.layer_idx, int(query.shape[1] * width))
        return out.view(-1, 1, query.shape[1], width), None

    def translate(node: Any) -> list[Any]:
        """A stand-in with the same inputs, and an output of the same shape."""
        layer, width = (node.get_values_from_const_input(i) for i in (3, 4))
        states = ops.concat([node.get_input(i) for i in range(3)], axis=1)
        states.set_friendly_name(_name(layer) + "/in")
        # Not at the border between two of them, where it would be optimised away.
        out = ops.slice(states, [1], [1 + width], [1], [1])
        out.set_friendly_name(_name(layer))
        return [out.output(0)]

    class Traced(torch.nn.Module):  # type: ignore[misc]
        """The model as openvino is to run it."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
            def keep(head: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
                return (args[0][wanted],)

            hook = self.model.get_output_embeddings().register_forward_pre_hook(keep)
            out = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
            hook.remove()
            # Not [:, 0], which would copy.
            return out.logits.flatten(0, 1)

    AttentionInterface.register("hfms_paged", attend)
    model.set_attn_implementation("hfms_paged")
    # A batch of one token each, so that the model's transpositions move nothing; attention alone looks beyond a token.
    tokens = torch.tensor([[3], [4], [5], [6], [7]])
    with torch.no_grad(), warnings.catch_warnings():
        # Sizes become constants of the model, as they should.
        warnings.simplefilter("ignore")
        made = convert_model(
            Traced(),
            example_input=(tokens, tokens - 3, torch.tensor([2, 4])),
            extension=ConversionExtension("hfms::attend", translate),
        )
    made.reshape({"input_ids": ov.PartialShape([-1, 1]), "position_ids": ov.PartialShape([-1, 1])})
    _add_inputs(made, len(layers))
    return made, [layers[i] for i in range(len(layers))]


def _add_inputs(model: Any, layers: int) -> None:
    """Give a traced model the inputs that only paged attention reads."""
    kinds = {name: ov.PartialShape([-1]) for name in INPUTS[2:6]} | {"max_context_len": ov.PartialShape([])}
    more = [(name, ov.Type.i32, shape) for name, shape in kinds.items()]
    # Type and size of the caches are the device's choice.
    more += [
        (name, ov.Type.dynamic, ov.PartialShape([-1] * 4)) for layer in range(layers) for name in cache_names(layer)
    ]
    added = []
    for name, kind, shape in more:
        parameter = ops.parameter(shape, kind, name)
        parameter.output(0).set_names({name})
        added.append(parameter)
    model.add_parameters(added)


# --- weights -----------------------------------------------------------------------------------------------------


def merge(model: Any) -> int:
    """Make one matrix product of the three of query, key and value; returns how often.

    They read the same, so one product does the work of three, and a token's step through a small model is a tenth
    shorter. The two of a gated layer stay as they are: the device has an operator for them.
    """
    readers: dict[Any, list[Any]] = {}
    for node, targets in _weights(model, least=1):
        product = targets[0].get_node()
        if product.get_type_name() == "MatMul" and len(targets) == 1 and _inner_axis(targets[0]) == 1:
            source = product.input_value(0)
            readers.setdefault((source.get_node().get_friendly_name(), source.get_index()), []).append((product, node))
    merged = 0
    for group in readers.values():
        if len(group) != 3:
            continue
        products = [product for product, _ in group]
        weights = [node.get_data() for _, node in group]
        biases = [bias for product in products if (bias := _bias(product))]
        ends = products
        out = ops.matmul(products[0].input_value(0), ops.constant(np.concatenate(weights)), False, True)
        if len(biases) == len(products):
            out = ops.add(out, ops.constant(np.concatenate([bias[1] for bias in biases])))
            ends = [bias[0] for bias in biases]
        parts = ops.variadic_split(out, ops.constant(-1), ops.constant([len(w) for w in weights]))
        if all(layers := [layer_of(product) for product in products]):
            parts.set_friendly_name(merged_name(layers))
        for i, end in enumerate(ends):
            end.output(0).replace(parts.output(i))
        merged += 1
    model.validate_nodes_and_infer_types()
    return merged


def _bias(product: Any) -> tuple[Any, Any] | None:
    """The addition of a vector that alone reads a product, and the vector, flat."""
    readers = list(product.output(0).get_target_inputs())
    add = readers[0].get_node()
    if len(readers) != 1 or add.get_type_name() != "Add":
        return None
    vector = add.input_value(1 - readers[0].get_index()).get_node()
    width = product.get_output_partial_shape(0)[-1]
    if vector.get_type_name() != "Constant" or width.is_dynamic or vector.get_data().size != width.get_length():
        return None
    return add, vector.get_data().reshape(-1)


def quantize(model: Any, bits: Literal["int8", "int4"], vocabulary: int) -> None:
    """Store the weights of matrix products and embeddings in few bits.

    Eight: a scale for each row of the output. Four: a scale and a zero for each group in a row; embeddings and what
    makes logits, which have a row for each word of the vocabulary, are kept in eight.
    """
    for node, targets in _weights(model):
        axes = {_inner_axis(port) for port in targets}
        axis = axes.pop()
        if axes or axis is None:
            continue
        weights = node.get_data()
        rows, width = weights.shape[1 - axis], weights.shape[axis]
        group = next((g for g in _GROUPS if width % g == 0), None)
        looked_up = any(port.get_node().get_type_name() == "Gather" for port in targets)
        if bits == "int8" or looked_up or rows == vocabulary or group is None:
            _put(_eight_bits(weights, axis), targets)
        else:
            # OpenVINO takes groups within rows only.
            _put_rows(_four_bits(weights if axis else weights.T, group), targets)


def _eight_bits(weights: Any, axis: int) -> Any:
    scale = np.abs(weights).max(axis=axis, keepdims=True) / 127
    scale[scale == 0] = 1
    small = ops.convert(ops.constant(np.rint(weights / scale).astype(np.int8)), "f32")
    return ops.multiply(small, ops.constant(scale.astype(np.float32)))


def _four_bits(weights: Any, group: int) -> Any:
    """weights: [rows, width]; width is a multiple of `group`."""
    rows, width = weights.shape
    grouped = weights.reshape(rows, width // group, group)
    # With zero in between, so that it is a whole number of steps away from both.
    low = np.minimum(grouped.min(axis=2, keepdims=True), 0)
    high = np.maximum(grouped.max(axis=2, keepdims=True), 0)
    # Rounded as it is stored, before the weights are rounded to it.
    scale = ((high - low) / 15).astype(np.float16).astype(np.float32)
    scale[scale == 0] = 1
    zero = np.clip(np.rint(-low / scale), 0, 15)
    steps = np.clip(np.rint(grouped / scale + zero), 0, 15)
    centred = ops.subtract(ops.convert(_nibbles(steps), "f32"), ops.convert(_nibbles(zero), "f32"))
    scaled = ops.multiply(centred, ops.convert(ops.constant(scale.astype(np.float16)), "f32"))
    return ops.reshape(scaled, ops.constant([rows, width], ov.Type.i32), False)


def _nibbles(values: Any) -> Any:
    """A constant of whole numbers from 0 to 15, two in a byte, the first in the lower half."""
    flat = np.append(values.astype(np.uint8), np.zeros(values.size % 2, np.uint8))
    # Made empty first: of an array it would keep no copy.
    packed = ov.Tensor(ov.Type.u4, ov.Shape(values.shape))
    packed.data[:] = flat[0::2] | flat[1::2] << 4
    return ov.op.Constant(packed)


def _put_rows(node: Any, targets: list[Any]) -> None:
    """Put weights in place that lie in rows of the output, also where a product had them the other way round."""
    for port in targets:
        product = port.get_node()
        how = product.get_attributes()
        if how["transpose_b"]:
            _put(node, [port])
        else:
            turned = ops.matmul(product.input_value(0), node, how["transpose_a"], True)
            called = product.get_friendly_name()
            product.set_friendly_name(f"{called}/turned")  # no two nodes have one name
            turned.set_friendly_name(called)
            product.output(0).replace(turned.output(0))


def shrink(model: Any) -> None:
    """Store the weights in two bytes where that loses nothing, as with those that came in two bytes."""
    for node, targets in _weights(model):
        weights = node.get_data()
        bits = weights.view(np.uint32)
        with np.errstate(over="ignore"):
            half = weights.astype(np.float16)
        if not (bits & 0xFFFF).any():
            brain = ov.Tensor(ov.Type.bf16, ov.Shape(weights.shape))
            brain.data[:] = (bits >> 16).astype(np.uint16).view(brain.data.dtype)
            stored = ov.op.Constant(brain)
        elif (half == weights).all():
            stored = ov.op.Constant(ov.Tensor(half))
        else:
            continue
        _put(ops.convert(stored, "f32"), targets)


def share(model: Any) -> None:
    """Keep small constants that are equal once: two fifths of a traced graph are these, and compiling looks at each."""
    kept: dict[tuple[str, tuple[int, ...], bytes], Any] = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Constant" and np.prod(node.get_output_shape(0)) < _SMALL:
            told = str(node.get_element_type()), tuple(node.get_output_shape(0)), node.get_data().tobytes()
            if (first := kept.setdefault(told, node)) is not node:
                node.output(0).replace(first.output(0))


def _weights(model: Any, least: int = _SMALL) -> list[tuple[Any, list[Any]]]:
    """Matrices of a model with so many elements or more, each with the ports that read it."""
    return [
        (node, list(node.output(0).get_target_inputs()))
        for node in model.get_ordered_ops()
        if node.get_type_name() == "Constant"
        and node.get_element_type() == ov.Type.f32
        and len(node.get_output_shape(0)) == 2
        and np.prod(node.get_output_shape(0)) >= least
    ]


def _inner_axis(port: Any) -> int | None:
    """The axis of a matrix that is summed over, or that is one token's vector; None where it is used otherwise."""
    node = port.get_node()
    if node.get_type_name() == "Gather" and port.get_index() == 0:
        return 1
    if node.get_type_name() == "MatMul" and port.get_index() == 1:
        return 1 if node.get_attributes()["transpose_b"] else 0
    return None


def _put(node: Any, targets: list[Any]) -> None:
    for port in targets:
        port.replace_source_output(node.output(0))


# --- the process -------------------------------------------------------------------------------------------------


def make(job: Job, out: Path) -> None:
    """Raises LoadFailed, UnsafeFormat and DoesNotFit, and whatever OpenVINO raises."""
    from hfms_engines import torch_runner

    begin("read", "reading the model with transformers")
    request = LoadRequest(folder=Path(job.folder), card=job.card, device=job.device, dtype="float32")
    theirs = torch_runner.load(request, cache_bytes=2**62)
    refuse_moving_positions(theirs.model.config)
    ids, expected = _try(theirs)
    attention = theirs.model.config._attn_implementation
    begin("convert", "converting it")
    model, layers = convert(theirs.model)
    say(f"merged the products of {merge(model)} layers")
    if job.quantize != "none":
        begin("quantize", f"quantising it to {job.quantize}")
        quantize(model, job.quantize, theirs.vocabulary)
    shrink(model)
    share(model)
    begin("write", "writing it")
    # A GGUF's few bits are far coarser than what this rounds, and half the bytes to read make a step faster.
    ov.save_model(model, out / MODEL, compress_to_fp16=job.card.format == "gguf")
    about = About(
        theirs.context_length,
        theirs.vocabulary,
        sorted(theirs.stop_ids),
        sorted(theirs.silent_ids),
        layers,
        tokenizer_files.keep(theirs.tokenizer, out),
    )
    (out / MODEL).with_suffix(".json").write_bytes(msgspec.json.encode(about))
    begin("compare", "comparing it")
    error, agree = compare(out, ids, expected)
    say(f"its logits differ by {error:.2%}; it would choose the same token in {agree:.0%} of {PROOF} places")
    if not error < _MOST_ERROR[job.quantize]:
        raise LoadFailed(f"its logits differ by {error:.0%} from those of transformers.")
    if job.quantize != "none":
        begin("judge", "measuring what quantisation has cost")
        theirs.model.set_attn_implementation(attention)  # which tracing has replaced
        quality = _judge(theirs, out)
        (out / QUALITY).write_bytes(msgspec.json.encode(quality))
        say(
            f"on a text of {quality.tokens} tokens its perplexity is {quality.perplexity:.2f}, and"
            f" {quality.perplexity_before:.2f} before; {quality.agreement:.1%} of its first choices are the same"
        )


def refuse_moving_positions(config: Any) -> None:
    rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = {str(r.get("rope_type")) for r in (rope, *rope.values()) if isinstance(r, dict)}
    if taken := sorted(kinds & {"dynamic", "longrope"}):
        raise LoadFailed(f"its positions ({taken[0]}) depend on how long a text becomes, which tracing cannot see.")


def _try(theirs: Any) -> tuple[list[int], Any]:
    """Some tokens, and the model's own logits for them, [tokens, vocabulary]."""
    import torch

    ids = [(i * 7919 + 11) % theirs.vocabulary for i in range(PROOF)]
    with torch.inference_mode():
        return ids, theirs.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def compare(out: Path, ids: list[int], expected: Any, *, graph: Path | None = None) -> tuple[float, float]:
    """How far the logits of what was written are from the model's own, and how often both have the same favourite.

    expected: [tokens, vocabulary]. graph: of a model that came as OpenVINO's, which is not written again.
    Two sequences go side by side through a cache in blocks, which the model's own pass has nothing of.
    """
    import torch

    from hfms_engines import openvino_runner

    ours = openvino_runner.load(out, dtype="float32", cache_bytes=None, share=False, graph=graph)
    got = torch.empty_like(expected)
    blocks = list(range(ours.blocks.needed(PROOF)))
    tables = [blocks, [block + len(blocks) for block in blocks]]
    half = PROOF // 2
    ours.forward([ids[:half]], starts=[0], tables=tables[1:], tails=[0])
    for i in range(half):
        pair = ours.forward([[ids[i]], [ids[half + i]]], starts=[i, half + i], tables=tables, tails=[1, 1])
        got[i], got[half + i] = torch.from_numpy(pair)
    error = float((got - expected).norm() / expected.norm())
    return error, float((got.argmax(-1) == expected.argmax(-1)).float().mean())


def _judge(theirs: Any, out: Path) -> Quality:
    """What was written against the model that it was made of."""
    import torch

    from hfms_engines import openvino_runner, quality

    ours = openvino_runner.load(out, dtype="float32", cache_bytes=None, share=False)

    def before(ids: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            return theirs.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]

    def after(ids: Sequence[int]) -> torch.Tensor:
        blocks = list(range(ours.blocks.needed(len(ids))))
        return torch.from_numpy(ours.forward([ids], starts=[0], tables=[blocks], tails=[len(ids)]))

    window = min(quality.WINDOW, ours.context_length)
    return quality.measure(theirs.tokenizer, before, after, window=window)


if __name__ == "__main__":
    main(Job, make)
