"""Tiny models as graphs: OpenVINO's format and ONNX, with inputs and states as optimum's exporter writes them."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import openvino as ov
import torch
import transformers
from openvino import opset13 as ops
from openvino.tools.ovc import convert_model
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import repeat_kv

WEIGHTS = ("*.safetensors", "*.index.json")


def beside(source: Path, folder: Path) -> Path:
    """A folder with all of a model but its weights."""
    return Path(shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*WEIGHTS)))


# --- text generation, with a state for the keys and one for the values of each layer ---


def _attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **how: Any) -> tuple[Any, None]:
    """Each token looks back at all, or at as many as the layer's window holds."""
    key, value = (repeat_kv(states, getattr(module, "num_key_value_groups", 1)) for states in (key, value))
    there, new = key.shape[2], query.shape[2]
    at = torch.arange(there)[None]
    now = torch.arange(new)[:, None] + (there - new)
    seen = (at <= now) & mask[:, None, None].bool()
    if window := how.get("sliding_window"):
        seen = seen & (at > now - window)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=how.get("scaling"))
    return out.transpose(1, 2), None


class _Stateless(torch.nn.Module):
    """A decoder whose past goes in and comes out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, past: list[Any]) -> Any:
        cache = transformers.DynamicCache()
        for i in range(0, len(past), 2):
            layer = DynamicLayer()
            layer.keys, layer.values, layer.is_initialized = past[i], past[i + 1], True
            cache.layers.append(layer)
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        made = [states for layer in cache.layers for states in (layer.keys, layer.values)]
        return out.logits, *made


def decoder_ir(source: Path, folder: Path) -> Path:
    """A saved decoder as OpenVINO's model with states, in float32."""
    transformers.AttentionInterface.register("test_states", _attend)
    transformers.AttentionMaskInterface.register("test_states", lambda *_, attention_mask, **__: attention_mask)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    cache = model(torch.tensor([[3, 4, 5], [6, 7, 8]])).past_key_values
    model.set_attn_implementation("test_states")
    past = [states.detach() for layer in cache.layers for states in (layer.keys, layer.values)]
    _, heads, _, width = past[0].shape
    example = {
        "input_ids": torch.tensor([[3, 4], [5, 6]]),
        "attention_mask": torch.ones(2, 5, dtype=torch.int64),
        "position_ids": torch.tensor([[3, 4], [3, 4]]),
        "past": past,
    }
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = convert_model(_Stateless(model), example_input=example)
    for node in made.get_ops():  # optimum has no module around the model
        node.set_friendly_name(node.get_friendly_name().replace("__module.model.", "__module.", 1))
    first = made.inputs[:3]
    for name, port in zip(("input_ids", "attention_mask", "position_ids"), first, strict=True):
        port.get_node().set_partial_shape(ov.PartialShape([-1, -1]))
        port.set_names({name})
    names = {}
    beam = ops.parameter(ov.PartialShape([-1]), ov.Type.i32, "beam_idx")
    beam.output(0).set_names({"beam_idx"})
    beam.set_friendly_name("beam_idx")
    for i, (port, out) in enumerate(zip(made.inputs[3:], made.outputs[1:], strict=True)):
        kind = "value" if i % 2 else "key"
        port.get_node().set_partial_shape(ov.PartialShape([-1, heads, -1, width]))
        port.set_names({f"past_key_values.{i // 2}.{kind}"})
        out.set_names({f"present.{i // 2}.{kind}"})
        names[port.get_any_name()] = out.get_any_name()
        readers = port.get_target_inputs()
        chosen = ops.gather(port.get_node(), beam, ops.constant(0))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    made.outputs[0].set_names({"logits"})
    made.add_parameters([beam])
    made.validate_nodes_and_infer_types()
    from openvino._offline_transformations import apply_make_stateful_transformation

    apply_make_stateful_transformation(made, names)
    rows = ops.gather(ops.shape_of(made.input("input_ids").get_node()), ops.constant([0]), ops.constant(0))
    for node in made.get_ops():
        if node.get_type_name() == "ReadValue":
            empty = ops.concat([rows, ops.constant([heads]), ops.constant([0]), ops.constant([width])], 0)
            node.set_arguments([ops.broadcast(ops.constant(0.0, ov.Type.f32), empty)])
    made.validate_nodes_and_infer_types()
    ov.save_model(made, beside(source, folder) / "openvino_model.xml", compress_to_fp16=False)
    return folder


# --- encoders ---


class _Encoder(torch.nn.Module):
    """What the exporters of encoders make: states of tokens, or a cross-encoder's logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        return out.logits if "logits" in out else out.last_hidden_state


INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def _encoder(source: Path) -> tuple[Any, tuple[Any, ...], str]:
    """The module, an example of its inputs, and what its output is called."""
    config = transformers.AutoConfig.from_pretrained(source)
    scores = config.architectures[0].endswith("ForSequenceClassification")
    kind = transformers.AutoModelForSequenceClassification if scores else transformers.AutoModel
    model = kind.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    return _Encoder(model), (ids, mask, torch.zeros_like(ids)), "logits" if scores else "last_hidden_state"


def encoder_ir(source: Path, folder: Path, *, within: str = "") -> Path:
    """A saved encoder as OpenVINO's model, in float32. within: the folder in the model's that it is put into."""
    module, example, output = _encoder(source)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = convert_model(module, example_input=example)
    for name, port in zip(INPUTS, made.inputs, strict=True):
        port.get_node().set_partial_shape(ov.PartialShape([-1, -1]))
        port.set_names({name})
    made.outputs[0].set_names({output})
    made.validate_nodes_and_infer_types()
    ov.save_model(made, beside(source, folder) / within / "openvino_model.xml", compress_to_fp16=False)
    return folder


def encoder_onnx(source: Path, folder: Path, *, within: str = "onnx") -> Path:
    """A saved encoder as ONNX, in float32."""
    module, example, output = _encoder(source)
    (beside(source, folder) / within).mkdir(exist_ok=True)
    axes = {name: {0: "batch", 1: "tokens"} for name in (*INPUTS, "last_hidden_state")} | {"logits": {0: "batch"}}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            example,
            folder / within / "model.onnx",
            input_names=[*INPUTS],
            output_names=[output],
            dynamic_axes={name: axes[name] for name in (*INPUTS, output)},
            dynamo=False,
        )
    return folder
