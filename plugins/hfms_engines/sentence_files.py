"""What a model's own sentence-transformers files say of how its vectors or its scores are made.

`modules.json` names a Transformer, a Pooling, and then any number of Dense and Normalize, each with its own folder; a
cross-encoder's has the Transformer alone, whose only output goes through an activation. The files are data: a class is
never imported by the name in a file. What is not known here is refused by name, because a vector of a half-understood
model looks as good as a right one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import Struct

from hfms_cli import LoadFailed, ModelFile, Task

T = TypeVar("T")

POOLINGS = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
"""In the order in which old files' switches are joined."""

ACTIVATIONS = ("GELU", "Identity", "ReLU", "SiLU", "Sigmoid", "Tanh")
"""Classes of torch.nn."""


class ModuleFile(Struct):
    """An entry of `modules.json`."""

    type: str
    path: str = ""


class HarmlessArgs(Struct, frozen=True, forbid_unknown_fields=True):
    """Arguments for transformers that do not change what a vector means."""

    add_pooling_layer: Any = None
    attn_implementation: Any = None
    dtype: Any = None
    torch_dtype: Any = None
    trust_remote_code: Any = None
    """Never heeded: a model cannot allow itself to run code."""


class ModalityFile(Struct, frozen=True, forbid_unknown_fields=True):
    method: Literal["forward"] = "forward"
    method_output_name: Literal["last_hidden_state"] = "last_hidden_state"


class ModalitiesFile(Struct, frozen=True):
    text: ModalityFile = ModalityFile()
    message: None = None
    """Where there is one, sentence-transformers puts every text through a chat template, which is not done here."""


class TransformerFile(Struct, frozen=True):
    """`sentence_bert_config.json` and its older names."""

    max_seq_length: int | None = None
    do_lower_case: bool = False
    transformer_task: Literal["feature-extraction"] = "feature-extraction"
    module_output_name: Literal["token_embeddings"] = "token_embeddings"
    modality_config: ModalitiesFile = ModalitiesFile()
    model_args: HarmlessArgs = HarmlessArgs()
    model_kwargs: HarmlessArgs = HarmlessArgs()
    tokenizer_args: HarmlessArgs = HarmlessArgs()
    processor_kwargs: HarmlessArgs = HarmlessArgs()
    config_args: HarmlessArgs = HarmlessArgs()
    config_kwargs: HarmlessArgs = HarmlessArgs()
    processing_kwargs: HarmlessArgs = HarmlessArgs()


class ScoredFile(Struct, frozen=True, forbid_unknown_fields=True):
    method: Literal["forward"] = "forward"
    method_output_name: Literal["logits"] = "logits"


class ScoredModalitiesFile(Struct, frozen=True):
    text: ScoredFile = ScoredFile()
    message: None = None


class ScorerFile(TransformerFile, frozen=True):
    """`sentence_bert_config.json` of a cross-encoder."""

    transformer_task: Literal["sequence-classification"] = "sequence-classification"  # type: ignore[assignment]
    module_output_name: Literal["scores"] = "scores"  # type: ignore[assignment]
    modality_config: ScoredModalitiesFile = ScoredModalitiesFile()  # type: ignore[assignment]


class PoolingFile(Struct, frozen=True, forbid_unknown_fields=True):
    """`1_Pooling/config.json`: one switch a mode in old files, `pooling_mode` in new ones."""

    embedding_dimension: int = 0
    word_embedding_dimension: int = 0
    include_prompt: bool = True
    pooling_mode: str | list[str] | None = None
    pooling_mode_cls_token: bool = False
    pooling_mode_max_tokens: bool = False
    pooling_mode_mean_tokens: bool = False
    pooling_mode_mean_sqrt_len_tokens: bool = False
    pooling_mode_weightedmean_tokens: bool = False
    pooling_mode_lasttoken: bool = False

    def modes(self) -> tuple[str, ...]:
        """In the order in which their vectors are joined."""
        if self.pooling_mode is not None:
            return (self.pooling_mode,) if isinstance(self.pooling_mode, str) else tuple(self.pooling_mode)
        switches = (
            self.pooling_mode_cls_token,
            self.pooling_mode_max_tokens,
            self.pooling_mode_mean_tokens,
            self.pooling_mode_mean_sqrt_len_tokens,
            self.pooling_mode_weightedmean_tokens,
            self.pooling_mode_lasttoken,
        )
        return tuple(mode for mode, on in zip(POOLINGS, switches, strict=True) if on) or ("mean",)


class HeadFile(Struct, frozen=True, forbid_unknown_fields=True):
    """`3_Normalize/config.json`, and what is in every module's file after the pooling."""

    module_input_name: Literal["sentence_embedding"] = "sentence_embedding"
    module_output_name: Literal["sentence_embedding"] | None = None


class DenseFile(HeadFile, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`2_Dense/config.json`."""

    in_features: int
    out_features: int
    bias: bool = True
    activation_function: str = "torch.nn.modules.activation.Tanh"


class PromptsFile(Struct, frozen=True):
    """`config_sentence_transformers.json`."""

    model_type: Literal["SentenceTransformer", "CrossEncoder"] = "SentenceTransformer"
    activation_fn: str | None = None
    """Of a cross-encoder."""
    prompts: dict[str, str | None] = {}
    default_prompt_name: str | None = None
    truncate_dim: int | None = None

    def default_prompt(self) -> str:
        name = self.default_prompt_name
        if name is not None and name not in {"query", "document", *self.prompts}:
            raise LoadFailed(f"The model's default prompt `{name}` is not among its prompts.")
        return (name is not None and self.prompts.get(name)) or ""


class ActivationFile(Struct, frozen=True):
    """What `config.json` holds of an activation: in `sentence_transformers`, or under its name of old."""

    sentence_transformers: dict[str, Any] = {}
    sbert_ce_default_activation_function: str | None = None

    def name(self) -> str | None:
        named = self.sentence_transformers.get("activation_fn", self.sbert_ce_default_activation_function)
        return None if named is None else str(named)


def read_file(folder: Path, name: str, kind: type[T]) -> T:
    """A JSON file of the model, checked against `kind`."""
    try:
        return msgspec.json.decode((folder / name).read_bytes(), type=kind)
    except OSError as exc:
        raise LoadFailed(f"The model's {name} cannot be read: {exc.strerror}.") from exc
    except ValueError as exc:  # msgspec's errors are such, and so is what is not UTF-8
        raise LoadFailed(f"The model's {name} says what this engine does not know: {exc}") from exc


def activation(name: str) -> str:
    """The class of `ACTIVATIONS` that a file means by `torch.nn.modules.activation.Tanh` and its like."""
    package, _, kind = name.rpartition(".")
    if package.split(".")[:2] != ["torch", "nn"] or kind not in ACTIVATIONS:
        raise LoadFailed(f"The model names the activation `{name}`, not known here.")
    return kind


@dataclass(frozen=True)
class Recipe:
    """What the model's files say, checked, before anything heavy is loaded."""

    task: Task = "embed"
    transformer: str = ""
    """Folder of the transformer, relative to the model's, as are those in `head`."""
    max_length: int | None = None
    lower_case: bool = False
    pooling: tuple[str, ...] | None = None
    """None: not said, so that the architecture decides."""
    pool_prompt: bool = True
    head: tuple[tuple[str, str], ...] = ()
    """(Dense or Normalize, folder), in order."""
    prompt: str = ""
    dimensions: int | None = None
    """Vectors are cut to so many, where the model says so itself."""
    activation: str = "Identity"
    """What a score goes through."""

    @classmethod
    def read(cls, folder: Path, task: Task) -> Recipe:
        """Raises LoadFailed where the files ask for something else than `task`, or for what is not known here."""
        return cls._of_scores(folder) if task == "score" else cls._of_vectors(folder)

    @classmethod
    def _of_vectors(cls, folder: Path) -> Recipe:
        if not (folder / "modules.json").exists():
            return cls()
        modules = [_module(entry) for entry in read_file(folder, "modules.json", list[ModuleFile])]
        kinds = [kind for kind, _ in modules]
        if kinds[:2] != ["Transformer", "Pooling"] or not {*kinds[2:]} <= {"Dense", "Normalize"}:
            raise LoadFailed(
                f"The model's modules are {' -> '.join(kinds) or 'none'}; this engine runs Transformer -> Pooling, "
                "then Dense and Normalize in any order."
            )
        (_, transformer), (_, pooling), *head = modules
        reading = _reading(folder / transformer, TransformerFile)
        pooled = read_file(folder, f"{pooling}/config.json", PoolingFile)
        unknown = {*pooled.modes()} - {*POOLINGS}
        if unknown:
            raise LoadFailed(f"The model's pooling {sorted(unknown)} is not known; known: {', '.join(POOLINGS)}.")
        settings = _settings(folder, "SentenceTransformer")
        return cls(
            transformer=transformer,
            max_length=reading.max_seq_length,
            lower_case=reading.do_lower_case,
            pooling=pooled.modes(),
            pool_prompt=pooled.include_prompt,
            head=tuple(head),
            prompt=settings.default_prompt(),
            dimensions=settings.truncate_dim,
        )

    @classmethod
    def _of_scores(cls, folder: Path) -> Recipe:
        modules = [("Transformer", "")]
        if (folder / "modules.json").exists():
            modules = [_module(entry) for entry in read_file(folder, "modules.json", list[ModuleFile])]
        if [kind for kind, _ in modules] != ["Transformer"]:
            kinds = " -> ".join(kind for kind, _ in modules)
            raise LoadFailed(
                f"The cross-encoder's modules are {kinds or 'none'}; this engine runs a Transformer alone."
            )
        transformer = modules[0][1]
        reading = _reading(folder / transformer, ScorerFile)
        settings = _settings(folder, "CrossEncoder")
        if settings.default_prompt():
            raise LoadFailed("The cross-encoder has a prompt, which this engine does not put before pairs.")
        named = settings.activation_fn or read_file(folder / transformer, "config.json", ActivationFile).name()
        return cls(
            task="score",
            transformer=transformer,
            max_length=reading.max_seq_length,
            lower_case=reading.do_lower_case,
            activation=activation(named) if named else "Sigmoid",
        )


def _reading(folder: Path, kind: type[T]) -> T:
    """How the transformer reads. The file's name was once that of the architecture: sentence_roberta_config.json."""
    named = sorted(folder.glob("sentence_*_config.json"))
    return read_file(folder, named[0].name, kind) if named else kind()


def _settings(folder: Path, kind: str) -> PromptsFile:
    """What `config_sentence_transformers.json` says, where there is one."""
    name = "config_sentence_transformers.json"
    if not (folder / name).exists():
        return PromptsFile()
    settings = read_file(folder, name, PromptsFile)
    if settings.model_type != kind:
        raise LoadFailed(f"The model's {name} says that it is a {settings.model_type}, and its config.json does not.")
    return settings


def _module(entry: ModuleFile) -> tuple[str, str]:
    """Kind and folder of a module. Its class has moved within sentence-transformers, and kept its name."""
    package, _, kind = entry.type.rpartition(".")
    if package.split(".")[0] != "sentence_transformers" or kind not in ("Transformer", "Pooling", "Dense", "Normalize"):
        raise LoadFailed(f"The model needs the module `{entry.type}`, which this engine does not have.")
    if entry.path:
        try:
            ModelFile(entry.path, 0).safe_path()
        except ValueError as exc:
            raise LoadFailed(f"The model's modules.json has an {exc}.") from exc
    return kind, entry.path
