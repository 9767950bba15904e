"""Text generation from a model that comes as OpenVINO's own, as optimum writes it: read, and tried once.

    python -m hfms_engines.openvino_ir OUT < job

job: the JSON of `Job`, on one line. OUT: an empty folder, which holds notes and tokenizer when this succeeds. See
`conversion` for the process itself.

Such a model keeps its past in states of its own, one sequence a batch row. OpenVINO's own transformation puts paged
attention in their place, as openvino-genai has it done, and then the model has the inputs that ours have. That needs no
second copy of the weights, so it is done with each load. What is kept is what the first load found out: the model says
the same with paged attention as it did without.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from hfms_cli import LoadFailed
from hfms_engines import tokenizer_files
from hfms_engines.conversion import begin, main, say
from hfms_engines.lean_openvino import ops, ov
from hfms_engines.openvino_export import (
    INPUTS,
    MODEL,
    PROOF,
    About,
    Job,
    cache_names,
    compare,
    refuse_moving_positions,
)

_STATEFUL = {"input_ids", "attention_mask", "position_ids", "beam_idx"}
"""Inputs of a model that keeps its past itself."""
# What may stand between the last matrix product and the logits: a bias, a scale, a cap.
_AFTER_HEAD = ("Add", "Multiply", "Divide", "Tanh", "Convert")
# Where the operator of paged attention has the number of tokens that it looks back at; 0: all.
_WINDOW = 10
# How far its logits may be from those without paged attention. Where weights have few bits, OpenVINO rounds what they
# are multiplied with as well, and not the same for one token as for many.
_MOST_ERROR = 0.01
_MOST_ERROR_ROUNDED = 0.1


def read(core: Any, graph: Path) -> Any:
    """The model with paged attention and the inputs `INPUTS`, ready to be compiled. Raises LoadFailed."""
    model = _read(core, graph)
    from openvino._offline_transformations import paged_attention_transformation

    try:
        paged_attention_transformation(model)
    except RuntimeError as exc:
        raise LoadFailed("openvino cannot put paged attention into this model.") from exc
    layers = sum(node.get_type_name() == "PagedAttentionExtension" for node in model.get_ops())
    known = {*INPUTS, *(name for layer in range(layers) for name in cache_names(layer))}
    strange = sorted({port.get_any_name() for port in model.inputs} - known)
    if strange or not layers or model.get_sinks():
        raise LoadFailed(f"openvino's paged attention leaves what this engine does not know: {strange or 'states'}.")
    _keep_wanted(model)
    _name_layers(model)
    model.validate_nodes_and_infer_types()
    return model


def _read(core: Any, graph: Path) -> Any:
    """The model as it comes."""
    try:
        model = core.read_model(graph)
    except RuntimeError as exc:
        raise LoadFailed("openvino cannot read this model.") from exc
    names = {port.get_any_name() for port in model.inputs}
    if not names <= _STATEFUL or not model.get_sinks():
        raise LoadFailed(
            f"the model takes {', '.join(sorted(names))} and keeps {len(model.get_sinks())} states. Export it anew by"
            " `optimum-cli export openvino --task text-generation-with-past`, or name the repository that it is of."
        )
    return model


def _keep_wanted(model: Any) -> None:
    """Add the input `wanted`: the tokens whose logits are made. The output becomes [wanted, vocabulary]."""
    wanted = ops.parameter(ov.PartialShape([-1]), ov.Type.i64, "wanted")
    wanted.output(0).set_names({"wanted"})
    (result,) = model.get_results()
    port = _head(result) or result.input(0)
    port.replace_source_output(ops.gather(port.get_source_output(), wanted, ops.constant(0)).output(0))
    model.add_parameters([wanted])
    model.validate_nodes_and_infer_types()
    logits = result.input(0)
    shape = ops.constant([-1, logits.get_partial_shape()[-1].get_length()])
    logits.replace_source_output(ops.reshape(logits.get_source_output(), shape, False).output(0))


def _head(result: Any) -> Any | None:
    """Where the last matrix product reads the tokens' states, [tokens, 1, width]; None where it cannot be told."""
    node = result.input_value(0).get_node()
    while node.get_type_name() in _AFTER_HEAD:
        node = next((n for port in node.inputs() if not _is_constant(n := port.get_source_output().get_node())), node)
    return node.input(0) if node.get_type_name() == "MatMul" else None


def _is_constant(node: Any) -> bool:
    return node.get_type_name() == "Constant" or (
        node.get_type_name() == "Convert" and _is_constant(node.input_value(0).get_node())
    )


def _name_layers(model: Any) -> None:
    """Call products as in models that are traced here, so that LoRA adapters find them."""
    for node in model.get_ops():
        name = node.get_friendly_name()
        if node.get_type_name() == "MatMul" and name.startswith("__module."):
            node.set_friendly_name(f"__module.model.{name.removeprefix('__module.')}")


# --- the process -------------------------------------------------------------------------------------------------


def make(job: Job, out: Path) -> None:
    """Raises LoadFailed, and whatever transformers and OpenVINO raise."""
    import transformers

    from hfms_engines.torch_runner import context_length, silent_ids, stop_ids

    transformers.logging.set_verbosity_error()
    folder, core = Path(job.folder), ov.Core()
    begin("read", "reading the model")
    if not (folder / "tokenizer.json").exists() and not list(folder.glob("tokenizer*.model")):
        raise LoadFailed("it has no tokenizer.json, and hfms does not read openvino_tokenizer.xml. Export it anew.")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    refuse_moving_positions(config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    graph = folder / job.card.weights[0]
    plain = _read(core, graph)
    vocabulary = plain.outputs[0].get_partial_shape()[-1].get_length()
    context = context_length(config, tokenizer, job.card.context_length)
    _refuse_lost_windows(read(core, graph), config, context)
    try:
        generation = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:
        generation = transformers.GenerationConfig.from_model_config(config)
    begin("write", "writing what it found out")
    about = About(
        context,
        vocabulary,
        sorted(stop_ids(generation, tokenizer)),
        sorted(silent_ids(tokenizer)),
        [],
        tokenizer_files.keep(tokenizer, out),
    )
    (out / MODEL).with_suffix(".json").write_bytes(msgspec.json.encode(about))
    begin("compare", "comparing it with itself, without paged attention")
    ids = [(i * 7919 + 11) % vocabulary for i in range(PROOF)]
    error, agree = compare(out, ids, _logits(core, plain, ids), graph=graph)
    say(f"its logits differ by {error:.2%}; it would choose the same token in {agree:.0%} of {PROOF} places")
    if not error < (_MOST_ERROR_ROUNDED if job.card.dtype in ("int8", "int4") else _MOST_ERROR):
        raise LoadFailed(f"with paged attention its logits differ by {error:.0%} from its own.")


def _logits(core: Any, plain: Any, ids: list[int]) -> Any:
    """What the model says as it comes, [tokens, vocabulary]."""
    import torch

    how = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    asked = core.compile_model(plain, "CPU", how).create_infer_request()
    given = {
        "input_ids": np.array([ids]),
        "attention_mask": np.ones((1, len(ids)), np.int64),
        "position_ids": np.arange(len(ids))[None],
        "beam_idx": np.zeros(1, np.int32),
    }
    asked.infer({name: given[name] for port in plain.inputs for name in port.get_names() if name in given})
    return torch.from_numpy(asked.get_output_tensor(0).data[0].copy())


def _refuse_lost_windows(paged: Any, config: Any, context: int) -> None:
    """A few tokens do not show whether the transformation has found how far each layer looks back."""
    from transformers import DynamicCache

    windows = [getattr(layer, "sliding_window", None) or 0 for layer in DynamicCache(config=config).layers] or [0]
    found = [
        _number(node.input_value(_WINDOW).get_node())
        for node in paged.get_ops()
        if node.get_type_name() == "PagedAttentionExtension"
    ]
    # One that is as long as the longest text leaves out nothing.
    if {w if w < context else 0 for w in windows} != {w if w < context else 0 for w in found}:
        raise LoadFailed("its layers look back at some tokens only, and openvino's paged attention does not keep that.")


def _number(node: Any) -> float:
    """What a constant comes to, be it converted, squeezed or multiplied; not a number where it is none."""
    inputs = [port.get_source_output().get_node() for port in node.inputs()]
    kind = node.get_type_name()
    if kind == "Constant":
        return float(node.get_data().item())
    return math.prod(map(_number, inputs)) if kind in ("Convert", "Squeeze", "Multiply") else math.nan


if __name__ == "__main__":
    main(Job, make)
