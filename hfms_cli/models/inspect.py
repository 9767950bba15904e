"""What a model's own files say of it, read without torch and before anything is loaded.

Only headers are read, never weights. A file that is torn, or that lies about its lengths, is found here, where it costs
nothing, and not in a worker process.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from hfms_cli.errors import LoadFailed
from hfms_cli.model_files import graph_files
from hfms_cli.models.gguf import GgufHeader, read_gguf
from hfms_cli.types import ModelCard, Task

__all__ = ["inspect"]

T = TypeVar("T")

LONGEST_CONFIG = 10 * 2**20
LONGEST_INDEX = 100 * 2**20
LONGEST_HEADER = 100_000_000  # of a safetensors file; its own library's limit
LONGEST_GRAPH = 100 * 2**20

PICKLES = (".bin", ".pt", ".pth")
# What a training run leaves beside a model.
_LEFTOVERS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|openvino_)[^/]*")

GENERATES = ("ForCausalLM", "LMHeadModel")
TRANSCRIBES = ("WhisperForConditionalGeneration",)
READS_WITH = "ForConditionalGeneration"
"""How architectures end that write about something else than texts."""
# fmt: off
# Encoders whose bare model (`BertModel`: no head) makes vectors that can be pooled.
ENCODERS = {
    "albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "eurobert", "gte",
    "jina_bert", "modernbert", "mpnet", "neobert", "new", "nomic_bert", "roberta", "roformer", "xlm-roberta",
    "xlm-roberta-xl", "xmod",
}
GGUF_ENCODERS = {
    "bert", "eurobert", "gemma-embedding", "jina-bert-v2", "jina-bert-v3", "llama-embed", "modern-bert", "neo-bert",
    "nomic-bert", "nomic-bert-moe", "t5encoder",
}
# fmt: on
# GGUF architectures that cannot go on writing a text by themselves.
GGUF_OTHERS = {"clip", "mmproj", "t5", "wavtokenizer-dec", "whisper"}
GGUF_RANKS = 4  # of `pooling_type`: scores, not vectors

# Where a constant of an OpenVINO model lies in the file of its weights.
_CONSTANT = re.compile(rb'<data element_type="(\w+)" shape="([\d, ]*)" offset="(\d+)" size="(\d+)"')
# fmt: off
_GRAPH_DTYPES = {
    "f32": "float32", "f16": "float16", "bf16": "bfloat16", "i8": "int8", "u8": "int8", "i4": "int4", "u4": "int4",
}
# fmt: on

_SHARD = re.compile(r"(.*-)\d{5}-of-(\d{5})(\.\w+)")
# name -> (torch's name, bits of one)
# fmt: off
_DTYPES = {
    "F64": ("float64", 64), "F32": ("float32", 32), "F16": ("float16", 16), "BF16": ("bfloat16", 16),
    "I64": ("int64", 64), "I32": ("int32", 32), "I16": ("int16", 16), "I8": ("int8", 8),
    "U64": ("uint64", 64), "U32": ("uint32", 32), "U16": ("uint16", 16), "U8": ("uint8", 8), "BOOL": ("bool", 8),
    "F8_E4M3": ("float8_e4m3fn", 8), "F8_E5M2": ("float8_e5m2", 8),
}
# fmt: on


class _Text(msgspec.Struct):
    """Where a config says how long a text may be: each family has its own word for it."""

    max_position_embeddings: int | None = None
    n_positions: int | None = None
    n_ctx: int | None = None
    max_seq_len: int | None = None
    seq_length: int | None = None

    def context_length(self) -> int:
        lengths = (self.max_position_embeddings, self.n_positions, self.n_ctx, self.max_seq_len, self.seq_length)
        return next((n for n in lengths if n and n > 0), 0)


class _Config(_Text):
    """What is read of `config.json`."""

    model_type: str = ""
    architectures: list[str] | None = None
    auto_map: dict[str, Any] | None = None
    num_labels: int | None = None
    id2label: dict[str, Any] | None = None
    text_config: _Text | None = None
    """Models of several modalities keep the words here."""
    vision_config: dict[str, Any] | None = None
    """And what looks at images here."""

    @property
    def architecture(self) -> str:
        return self.architectures[0] if self.architectures else ""

    @property
    def scores(self) -> bool:
        """A cross-encoder with a single score. transformers writes the labels and not their number."""
        labels = len(self.id2label) if self.id2label is not None else self.num_labels
        return self.architecture.endswith("ForSequenceClassification") and labels == 1


class _Index(msgspec.Struct):
    """`model.safetensors.index.json`: which tensor lies in which shard."""

    weight_map: dict[str, str]


class _Tensor(msgspec.Struct):
    """A tensor in the header of a safetensors file."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def inspect(folder: Path, files: Collection[str] = ()) -> ModelCard:
    """Read a model's card.

    folder: the model's folder, or a GGUF file.
    files: where given, nothing else in the folder is looked at: a cache can hold more of a model than was asked for.
    Raises LoadFailed where there is no model, or where a file is torn.
    """
    if folder.is_file():
        folder, files = folder.parent, (folder.name,)
    names = set(files) or _names(folder)
    base = _transformer(folder, names)
    config = _config(folder, f"{base}config.json") if f"{base}config.json" in names else None
    if config and config.model_type == "echo":
        return ModelCard(
            format="none",
            model_type="echo",
            architecture=config.architecture,
            tasks=("generate", "embed", "score", "transcribe", "image-text-to-text"),
            weights_bytes=0,
        )
    if config is None and "adapter_config.json" in names:
        raise LoadFailed(
            "This is an adapter: load its base model, and it beside that (`hfms models load-lora NAME ADAPTER`)."
        )
    beside = sorted(n for n in names if n.startswith(base) and "/" not in n[len(base) :])
    safetensors = [n for n in beside if n.endswith(".safetensors")]
    if safetensors and config:
        return _safetensors(folder, names, base, config, safetensors)
    if ggufs := sorted(n for n in names if n.endswith(".gguf")):
        return _gguf(folder, ggufs)
    graphs = graph_files(names) if config else {}
    if config and "openvino" in graphs:
        return _openvino(folder, names, config, graphs["openvino"])
    if config and "onnx" in graphs:
        return _onnx(folder, names, config, graphs["onnx"])
    if pickles := [n for n in beside if n.endswith(PICKLES) and not _LEFTOVERS.fullmatch(n[len(base) :])]:
        return _pickle(folder, names, config or _Config(), pickles)
    if safetensors:
        raise LoadFailed("There are weights without a `config.json`, so nothing says what they are.")
    raise LoadFailed(
        "There is no model: neither a `config.json` with `*.safetensors`, `openvino_model.xml` or `model.onnx`, nor a "
        "`*.gguf` file."
    )


def _names(folder: Path) -> set[str]:
    """Files in the folder and one level below it, where sentence-transformers keeps its modules and other formats."""
    try:
        found = [*folder.iterdir(), *(p for sub in ("[0-9]*_*", "openvino", "onnx") for p in folder.glob(f"{sub}/*"))]
    except OSError as exc:
        raise LoadFailed(f"The model's folder cannot be read: {exc.strerror}.") from exc
    return {p.relative_to(folder).as_posix() for p in found if p.is_file()}


def _transformer(folder: Path, names: set[str]) -> str:
    """Where the weights are: '' or, in old sentence-transformers models, `0_Transformer/`."""
    if "config.json" in names or "modules.json" not in names:
        return ""
    modules = _json(folder, "modules.json", list[dict[str, Any]], LONGEST_CONFIG)
    path = modules[0].get("path") if modules else ""
    return f"{path}/" if path and f"{path}/config.json" in names else ""


def _config(folder: Path, name: str) -> _Config:
    return _json(folder, name, _Config, LONGEST_CONFIG)


def _json(folder: Path, name: str, kind: type[T], longest: int) -> T:
    """A JSON file. `kind` is what is needed of it; the rest is ignored."""
    try:
        # Configs hold NaN and Infinity, which msgspec's own reader refuses.
        return msgspec.convert(json.loads(_read(folder, name, longest)), kind)
    except msgspec.ValidationError as exc:
        raise LoadFailed(f"`{name}` is not what it should be: {exc}.") from exc
    except (ValueError, RecursionError) as exc:
        raise LoadFailed(f"`{name}` is not valid JSON. Fetch it again.") from exc


def _read(folder: Path, name: str, longest: int) -> bytes:
    try:
        with (folder / name).open("rb") as file:
            raw = file.read(longest + 1)
    except OSError as exc:
        raise LoadFailed(f"`{name}` cannot be read: {exc.strerror}.") from exc
    if len(raw) > longest:
        raise LoadFailed(f"`{name}` is longer than {longest // 2**20} MB.")
    return raw


def _safetensors(folder: Path, names: set[str], base: str, config: _Config, found: list[str]) -> ModelCard:
    weights = _shards(folder, names, base, found)
    count: Counter[str] = Counter()
    size = 0
    for name in weights:
        size += _read_safetensors(folder / name, count)
    dtype = count.most_common(1)[0][0] if count else ""
    return _card(
        "safetensors",
        names,
        config,
        weights,
        weights_bytes=size,
        parameters=count.total(),
        dtype=_DTYPES.get(dtype, (dtype.lower(), 0))[0],
        context_length=_context_length(folder, names, base, config),
    )


def _card(
    format: Literal["safetensors", "openvino", "onnx", "pickle"],
    names: set[str],
    config: _Config,
    weights: Sequence[str],
    *,
    weights_bytes: int,
    context_length: int,
    parameters: int = 0,
    dtype: str = "",
) -> ModelCard:
    """Of a model with a configuration."""
    return ModelCard(
        format=format,
        model_type=config.model_type,
        architecture=config.architecture,
        tasks=_tasks(names, config),
        weights_bytes=weights_bytes,
        parameters=parameters,
        dtype=dtype,
        context_length=context_length,
        weights=tuple(weights),
        remote_code=config.auto_map is not None,
    )


def _context_length(folder: Path, names: set[str], base: str, config: _Config) -> int:
    if f"{base}sentence_bert_config.json" in names:
        said = _json(folder, f"{base}sentence_bert_config.json", dict[str, Any], LONGEST_CONFIG).get("max_seq_length")
        if isinstance(said, int) and said > 0:
            return said
    return (config.text_config or config).context_length() or config.context_length()


def _tasks(names: set[str], config: _Config) -> tuple[Task, ...]:
    if config.scores and "1_Pooling/config.json" not in names:
        return ("score",)
    if "modules.json" in names:
        return ("embed",)
    if config.architecture.endswith(GENERATES):
        return ("generate",)
    if config.architecture in TRANSCRIBES:
        return ("transcribe",)
    if config.architecture.endswith(READS_WITH) and config.vision_config is not None:
        return ("image-text-to-text",)
    if config.model_type in ENCODERS and config.architecture.endswith("Model"):
        return ("embed",)
    return ()


def _shards(folder: Path, names: set[str], base: str, found: list[str]) -> list[str]:
    """The weight files that transformers would take, in its order of preference."""
    single, index = f"{base}model.safetensors", f"{base}model.safetensors.index.json"
    if single in names:
        return [single]
    if index in names:
        shards = {base + shard for shard in _json(folder, index, _Index, LONGEST_INDEX).weight_map.values()}
        for shard in sorted(shards):
            if shard not in names:
                raise LoadFailed(f"`{index}` names `{shard}`, which is not there. Fetch the model again.")
        return sorted(shards)
    if any(_SHARD.fullmatch(n) for n in found):
        raise LoadFailed(f"The weights are in parts, and `{index}`, which joins them, is not there.")
    return found


def _read_safetensors(path: Path, count: Counter[str]) -> int:
    """Add the parameters by type to `count`, and answer the bytes of the tensors."""

    def torn(why: str) -> LoadFailed:
        return LoadFailed(f"`{path.name}` is no whole safetensors file: {why}. Fetch it again.")

    size = _size(path.parent, path.name)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, LONGEST_HEADER):
                raise torn("it ends within its header")
            raw = file.read(length)
    except OSError as exc:
        raise LoadFailed(f"`{path.name}` cannot be read: {exc.strerror}.") from exc
    try:
        header = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        header.pop("__metadata__", None)
        tensors = [msgspec.json.decode(raw, type=_Tensor) for raw in header.values()]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise torn("its header is not JSON of that form") from None
    data = 0
    for tensor in tensors:
        begin, end = tensor.data_offsets
        elements = math.prod(tensor.shape)
        bits = _DTYPES.get(tensor.dtype, ("", 0))[1]
        room = 8 * (end - begin)
        fits = elements * bits == room if bits else elements <= room
        if not 0 <= begin <= end or any(n < 0 for n in tensor.shape) or not fits:
            raise torn("a tensor is not as long as its shape")
        count[tensor.dtype] += elements
        data = max(data, end)
    if 8 + length + data != size:
        raise torn(f"it has {size:,} bytes and not {8 + length + data:,}")
    return data


def _gguf(folder: Path, found: list[str]) -> ModelCard:
    first = _SHARD.fullmatch(found[0])
    if first:
        parts = [f"{first[1]}{i:05}-of-{first[2]}{first[3]}" for i in range(1, min(int(first[2]), 1000) + 1)]
        for part in parts:
            if part not in found:
                raise LoadFailed(f"`{part}` is not there. Fetch the model again.")
    if found != (parts if first else found[:1]):
        raise LoadFailed(f"There are several models: {', '.join(found)}. Name one of the files.")
    headers = [read_gguf(folder / name) for name in found]
    head = headers[0]
    for i, (name, header) in enumerate(zip(found, headers, strict=True)):
        told = header.number("split.no"), max(header.number("split.count"), 1)
        if told != (i, len(found)) and (first or told[1] > 1):
            raise LoadFailed(
                f"`{name}` says that it is part {told[0] + 1} of {told[1]}. Give the parts their own names."
            )
    if first and (tensors := head.number("split.tensors.count")) != sum(h.tensors for h in headers):
        raise LoadFailed(f"`{found[0]}` tells of {tensors} tensors, and the parts hold others. Fetch the model again.")
    architecture = head.architecture
    pooling = head.number(f"{architecture}.pooling_type")
    tasks: tuple[Task, ...] = ("generate",)
    if architecture in GGUF_OTHERS or head.text("general.type") not in ("", "model") or pooling == GGUF_RANKS:
        tasks = ()
    elif architecture in GGUF_ENCODERS or pooling:
        tasks = ("embed",)
    if not architecture:
        raise LoadFailed(f"`{found[0]}` does not say of which architecture it is.")
    return ModelCard(
        format="gguf",
        model_type=architecture,
        architecture=architecture,
        tasks=tasks,
        weights_bytes=sum(h.data_bytes for h in headers),
        parameters=sum(h.parameters for h in headers),
        dtype=max(headers, key=lambda h: h.parameters).dtype,
        context_length=head.number(f"{architecture}.context_length"),
        weights=tuple(found),
        token_cache_bytes=_token_cache_bytes(head),
        chat_template=bool(head.text("tokenizer.chat_template")),
    )


def _token_cache_bytes(head: GgufHeader) -> int:
    """Keys and values of one token in all layers, two bytes a number, as if every layer looked at the whole text."""

    def number(key: str) -> int:
        return head.number(f"{head.architecture}.{key}")

    heads = number("attention.head_count")
    usual = number("embedding_length") // heads if heads else 0
    width = (number("attention.key_length") or usual) + (number("attention.value_length") or usual)
    return 2 * number("block_count") * (number("attention.head_count_kv") or heads) * width


def _openvino(folder: Path, names: set[str], config: _Config, files: Sequence[str]) -> ModelCard:
    """The graph says where each constant lies in the file of weights."""
    graph, weights = files
    count: Counter[str] = Counter()
    end = 0
    for kind, shape, offset, size in _CONSTANT.findall(_read(folder, graph, LONGEST_GRAPH)):
        count[kind.decode()] += math.prod(map(int, filter(None, shape.replace(b" ", b"").split(b","))))
        end = max(end, int(offset) + int(size))
    there = _size(folder, weights)
    if not count or end > there:
        raise LoadFailed(f"`{weights}` has {there:,} bytes of {end:,} that `{graph}` names. Fetch the model again.")
    dtype = count.most_common(1)[0][0]
    return _card(
        "openvino",
        names,
        config,
        files,
        weights_bytes=there,
        parameters=count.total(),
        dtype=_GRAPH_DTYPES.get(dtype, dtype),
        context_length=_context_length(folder, names, "", config),
    )


def _onnx(folder: Path, names: set[str], config: _Config, files: Sequence[str]) -> ModelCard:
    """Graph and weights are one file, or the weights lie beside it; what is in them only an engine reads."""
    return _card(
        "onnx",
        names,
        config,
        files,
        weights_bytes=sum(_size(folder, name) for name in files),
        context_length=_context_length(folder, names, "", config),
    )


def _pickle(folder: Path, names: set[str], config: _Config, found: list[str]) -> ModelCard:
    """Nothing in a pickle is read: its length is all that can be known without running it."""
    return _card(
        "pickle",
        names,
        config,
        found,
        weights_bytes=sum(_size(folder, name) for name in found),
        context_length=config.context_length(),
    )


def _size(folder: Path, name: str) -> int:
    try:
        return (folder / name).stat().st_size
    except OSError as exc:
        raise LoadFailed(f"`{name}` cannot be read: {exc.strerror}.") from exc
