"""Which of a model's files an engine needs: one set of weights, and the small files that go with it.

A repository often holds the same weights five times over. Safetensors are taken where there are any, then one GGUF
model, then what OpenVINO reads (a model of its own, or ONNX), and pickles only where there is nothing else. Where there
is no model, a LoRA adapter is taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = [
    "ADAPTER",
    "PICKLES",
    "SeveralModels",
    "choose",
    "gguf_models",
    "gguf_stem",
    "gguf_tag",
    "graph_files",
    "no_model",
]

PICKLES = (".bin", ".pt", ".pth")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
"""A LoRA adapter in PEFT's format: all that is taken of it."""

# Configurations, tokenizers and chat templates. Nothing of this is ever run.
_SIDE = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm")
_NO_SIDE = re.compile(r"(.*\.index|trainer_state|all_results|train_results|eval_results)\.json|requirements.*\.txt")
# The folders of sentence-transformers' modules (1_Pooling), and of chat templates.
_FOLDERS = re.compile(r"(?:(?:\d+_\w+|additional_chat_templates)/)?[^/]+")

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})")
_QUANT = re.compile(r"(?:^|[-_./])((?:UD-)?(?:IQ|TQ|Q)\d\w*|BF16|F16|F32|MXFP4\w*)$", re.IGNORECASE)
_NO_GGUF = re.compile(r"(.*/)?(mmproj|imatrix)[^/]*|.*imatrix\.gguf", re.IGNORECASE)
_NO_PICKLE = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|openvino_)[^/]*")
# Formats that no engine takes, and names that none looks for.
_FOREIGN = {
    re.compile(r"(.*/)?openvino_[^/]*\.xml"): "OpenVINO's under a name that is not read (openvino_model.xml is)",
    re.compile(r".*\.onnx"): "ONNX under a name that is not read (model.onnx is)",
    re.compile(r".*\.(h5|tflite)|(.*/)?saved_model\.pb"): "TensorFlow's",
    re.compile(r".*\.msgpack"): "Flax's",
    re.compile(r".*\.(mlmodel|mlpackage/.*)"): "Core ML's",
    re.compile(r".*\.(engine|plan)"): "TensorRT's",
    re.compile(r".*\.(ckpt|pkl|pickle|joblib|npz)"): "of pickles that no engine reads",
}


class SeveralModels(Exception):
    """There is more than one GGUF model; `models` are their names without `.gguf`."""

    def __init__(self, models: Iterable[str]) -> None:
        super().__init__()
        self.models = tuple(models)


def choose(paths: Iterable[str], quant: str = "") -> tuple[str, ...]:
    """The files to take, sorted; none where there is no model.

    paths: relative and POSIX. quant: the quantisation or the name of the one GGUF model to take, and nothing else.
    Raises SeveralModels where `quant` is needed.
    """
    known = sorted(paths)
    near = [p for p in known if _FOLDERS.fullmatch(p)]
    old = [p.removesuffix("config.json") for p in near if re.fullmatch(r"0_\w+/config\.json", p)]
    base = old[0] if old and "config.json" not in near else ""
    side = [p for p in near if p.endswith(_SIDE) and not _NO_SIDE.fullmatch(p.rpartition("/")[2])]
    if not quant and f"{base}config.json" in near and (weights := _safetensors(near, base)):
        return tuple(sorted({*side, *weights}))
    if not quant and set(ADAPTER) <= {*near}:
        return ADAPTER
    if models := gguf_models(known):
        return _gguf(models, quant)
    if quant:
        return ()
    modules = [p for p in near if p.endswith("/model.safetensors")]
    graphs = {kind: [*files, *modules] for kind, files in graph_files(known).items() if "config.json" in near}
    openvino, onnx = graphs.get("openvino", []), graphs.get("onnx", [])
    # ONNX is run for vectors alone: of what may be anything else, pickles are the better find.
    for found in (openvino, onnx if "modules.json" in near else [], _pickles(near, base), onnx):
        if found:
            return tuple(sorted({*side, *found}))
    return ()


def no_model(paths: Iterable[str]) -> str:
    """Why `choose` found nothing, to go on after a name: `holds no model ...`."""
    found = list(paths)
    foreign = [format for pattern, format in _FOREIGN.items() if any(map(pattern.fullmatch, found))]
    here = f"; its weights are {' and '.join(foreign)}. Name the repository that they were made from" if foreign else ""
    if torn := [(model, missing) for model, (_, missing) in _ggufs(found).items() if missing > 0]:
        return f"holds some parts of the GGUF model `{torn[0][0]}` and not all: {torn[0][1]} missing."
    return (
        "holds no model in a format that hfms reads: safetensors, OpenVINO's or ONNX beside a `config.json`, or GGUF"
        f"{here}."
    )


def graph_files(paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The files of a model that is there as a graph, by its format ("openvino", "onnx"), the graph itself first.

    They are where optimum or sentence-transformers put them: beside the `config.json`, or in a folder of their own.
    """
    known = {*paths}
    found: dict[str, tuple[str, ...]] = {}
    for folder in ("openvino/", ""):
        files = (f"{folder}openvino_model.xml", f"{folder}openvino_model.bin")
        if known.issuperset(files):
            found["openvino"] = files
    for graph in ("onnx/model.onnx", "model.onnx"):
        if graph in known:
            weights = re.compile(re.escape(graph) + r"[._]data(_\d+)?")
            found["onnx"] = (graph, *sorted(filter(weights.fullmatch, known)))
    return found


def gguf_models(paths: Iterable[str]) -> dict[str, list[str]]:
    """GGUF models by name without `.gguf`; the parts of one model are one, and none where some are missing."""
    return {model: parts for model, (parts, missing) in sorted(_ggufs(paths).items()) if not missing}


def gguf_stem(file: str) -> str:
    """The name of the model that a GGUF file is, or is a part of."""
    stem = file.removesuffix(".gguf")
    part = _PART.fullmatch(stem)
    return part[1] if part else stem


def _ggufs(paths: Iterable[str]) -> dict[str, tuple[list[str], int]]:
    """GGUF models by name: the files that are there of each, and how many parts are not."""
    models: dict[tuple[str, int], list[str]] = {}
    for path in sorted(paths):
        if path.endswith(".gguf") and path.count("/") <= 1 and not _NO_GGUF.fullmatch(path):
            part = _PART.fullmatch(path.removesuffix(".gguf"))
            models.setdefault((gguf_stem(path), int(part[3]) if part else 1), []).append(path)
    # Where a model is there in more ways than one, the one in fewest parts counts.
    return {stem: (files, count - len(files)) for (stem, count), files in sorted(models.items(), reverse=True)}


def gguf_tag(model: str) -> str:
    """What tells a GGUF model from its siblings: its quantisation, as `Q4_K_M`, or its whole name."""
    found = _QUANT.search(model)
    return found[1] if found else model.rpartition("/")[2]


def _gguf(models: dict[str, list[str]], quant: str) -> tuple[str, ...]:
    if not quant:
        if len(models) > 1:
            raise SeveralModels(models)
        return tuple(next(iter(models.values())))
    asked = quant.lower()
    fitting = [m for m in models if asked in (gguf_tag(m).lower(), m.rpartition("/")[2].lower())]
    fitting.sort(key=lambda m: (len(m), m))
    return tuple(models[fitting[0]]) if fitting else ()


def _safetensors(near: list[str], base: str) -> list[str]:
    """In transformers' order: one file, the parts that an index joins, or what else there is."""
    own = [p for p in near if p.startswith(base) and "/" not in p[len(base) :]]
    modules = [p for p in near if p.endswith("/model.safetensors") and not (base and p.startswith(base))]
    if f"{base}model.safetensors" in own:
        return [f"{base}model.safetensors", *modules]
    index = f"{base}model.safetensors.index.json"
    if index in own:
        return [index, *(p for p in own if re.fullmatch(r"model-.*\.safetensors", p[len(base) :])), *modules]
    strange = re.compile(r"(consolidated|adapter).*")
    other = [p for p in own if p.endswith(".safetensors") and not strange.fullmatch(p[len(base) :])]
    return [*other, *modules] if other else []


def _pickles(near: list[str], base: str) -> list[str]:
    found = [p for p in near if p.endswith(PICKLES) and not _NO_PICKLE.fullmatch(p.rpartition("/")[2])]
    usual = [p for p in found if re.fullmatch(r"pytorch_model.*\.bin", p.rpartition("/")[2])]
    return [*(usual or found), *(p for p in near if p == f"{base}pytorch_model.bin.index.json")]
