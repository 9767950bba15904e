"""The transformer of a sentence-transformers model that comes as a graph: OpenVINO's own format, or ONNX.

It is run as it is, by OpenVINO: nothing is converted, and no weights are left to compare it with. What there is to know
of it beside the graph, transformers says of the model's configuration, without weights.

Imports openvino and torch: for worker processes only.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

from hfms_cli import LoadFailed, LoadRequest
from hfms_engines import sentence_torch
from hfms_engines.lean_openvino import ov
from hfms_engines.openvino_runner import precision_of
from hfms_engines.sentence_encoder import About
from hfms_engines.sentence_files import Recipe
from hfms_engines.sentence_openvino import STEP, compiled

_TAKES = ("input_ids", "attention_mask", "token_type_ids")
# What exporters call the states of tokens; a cross-encoder's graph has logits.
_STATES = ("last_hidden_state", "token_embeddings")


class Runner:
    """A compiled graph."""

    device = "cpu"
    step = STEP

    def __init__(self, graph: Any, output: str, about: About, precision: str) -> None:
        self.about = about
        self.precision = precision
        self._names = {port.get_any_name() for port in graph.inputs}
        self._output = graph.output(output)
        self._request = graph.create_infer_request()

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor | None) -> torch.Tensor:
        """What is returned is the caller's until the next pass."""
        given = zip(_TAKES, (ids, mask, torch.zeros_like(ids) if types is None else types), strict=True)
        for name, tensor in given:
            if name in self._names:
                self._request.set_tensor(name, ov.Tensor(tensor.numpy()))
        self._request.infer()
        return torch.from_numpy(self._request.get_tensor(self._output).data)


def load(recipe: Recipe, request: LoadRequest) -> Runner:
    """Compile the graph for this machine's CPU: in float32, unless bfloat16 was asked for. Raises LoadFailed."""
    core = ov.Core()
    precision = precision_of(core, "float32" if request.dtype == "auto" else request.dtype)
    try:
        graph = core.read_model(request.folder / request.card.weights[0])
    except RuntimeError as exc:
        raise LoadFailed(f"openvino cannot read this {request.card.format} model.") from exc
    strange = sorted({port.get_any_name() for port in graph.inputs} - {*_TAKES})
    if strange:
        raise LoadFailed(f"The graph asks for {', '.join(strange)}, and this engine gives {', '.join(_TAKES)}.")
    names = {name for port in graph.outputs for name in port.get_names()}
    wanted = ("logits",) if recipe.task == "score" else _STATES
    output = next((name for name in wanted if name in names), None)
    if output is None:
        raise LoadFailed(f"The graph gives {', '.join(sorted(names))}, and this engine needs {' or '.join(wanted)}.")
    about = _about(recipe, request)
    return Runner(compiled(core, graph, precision), output, about, precision)


def _about(recipe: Recipe, request: LoadRequest) -> About:
    local = {"local_files_only": True, "trust_remote_code": request.trust_remote_code}
    config = transformers.AutoConfig.from_pretrained(request.folder / recipe.transformer, **local)
    if getattr(config, "is_encoder_decoder", False):
        raise LoadFailed(f"Of graphs this engine runs encoders, and {config.model_type} is an encoder-decoder.")
    if recipe.task == "score" and config.num_labels != 1:
        raise LoadFailed(f"The model gives {config.num_labels} labels and not one score.")
    kind = transformers.AutoModelForSequenceClassification if recipe.task == "score" else transformers.AutoModel
    with torch.device("meta"):
        model = kind.from_config(config, trust_remote_code=request.trust_remote_code)
    return sentence_torch.about_of(model, recipe)
