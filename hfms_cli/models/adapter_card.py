"""What a LoRA adapter's own configuration says. Each field of PEFT's is honoured, has no say, or is refused by name.

PEFT makes its adapters in some twenty variants, and tells them apart by fields of `adapter_config.json` alone: whoever
reads the ranks and passes over the rest gives wrong answers, and nobody sees it.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from hfms_cli.errors import BadRequest
from hfms_cli.model_files import ADAPTER
from hfms_cli.types import AdapterCard

__all__ = ["read_card"]

CONFIG, WEIGHTS = ADAPTER
LARGEST = 2**20
"""Bytes of a configuration."""

MOST_PATTERNS = 2048
"""Each is tried with each layer of a model."""

Rank = Annotated[int, Meta(ge=1)]
Positive = Annotated[float, Meta(gt=0)]
Names = list[str]

# What matters to training, to other kinds of model, or to a field beside it that is refused.
_WITHOUT_A_SAY = {
    "auto_mapping", "inference_mode", "loftq_config", "lora_dropout", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config",
}  # fmt: skip
# Ways of beginning that leave the model as it is. Others change it as well, and its adapter alone is not the whole.
_BEGINNINGS = (True, False, None, "gaussian", "orthogonal", "eva")


class _Config(msgspec.Struct, kw_only=True):
    """The fields that have a say. Of those that are left out, PEFT's own values."""

    peft_type: str
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    r: Rank = 8
    lora_alpha: Positive = 8
    target_modules: str | Names | None = None
    exclude_modules: str | Names | None = None
    use_rslora: bool = False
    rank_pattern: Annotated[dict[str, Rank], Meta(max_length=MOST_PATTERNS)] | None = None
    alpha_pattern: Annotated[dict[str, Positive], Meta(max_length=MOST_PATTERNS)] | None = None
    bias: str = "none"
    fan_in_fan_out: bool = False
    """Says how the layer that is changed keeps its weights; what is added to its output is the same."""
    init_lora_weights: bool | str | None = True


def read_card(folder: Path, files: Collection[str]) -> AdapterCard:
    """Read an adapter's configuration. files: what is in the folder. Raises BadRequest (`param` is `lora_path`)."""
    if CONFIG not in files:
        raise _bad(f"is no LoRA adapter: it has no {CONFIG}")
    if WEIGHTS not in files:
        raise _bad(f"has no {WEIGHTS}; adapters are taken as safetensors only")
    try:
        with (folder / CONFIG).open("rb") as stream:
            told = stream.read(LARGEST + 1)
    except OSError as exc:
        raise _bad(f"cannot be read: {exc.strerror}") from exc
    if len(told) > LARGEST:
        raise _bad(f"has a {CONFIG} that is too long for one")
    try:
        fields = msgspec.json.decode(told, type=dict[str, Any])
        config = msgspec.convert(fields, _Config)
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise _bad(f"has a {CONFIG} that is none: {exc}") from exc
    _refuse(config, fields)
    assert config.target_modules is not None
    return AdapterCard(
        r=config.r,
        lora_alpha=config.lora_alpha,
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules or [],
        use_rslora=config.use_rslora,
        rank_pattern=config.rank_pattern or {},
        alpha_pattern=config.alpha_pattern or {},
        base_model_name_or_path=config.base_model_name_or_path or "",
    )


def _refuse(config: _Config, fields: dict[str, Any]) -> None:
    """Raises BadRequest for whatever would make another adapter of it than the one that is run here."""
    if config.peft_type != "LORA":
        raise _bad(f"is of `peft_type` {config.peft_type!r}; hfms runs LORA")
    if config.task_type not in ("CAUSAL_LM", None):
        raise _bad(f"is for the `task_type` {config.task_type!r}; hfms runs adapters of CAUSAL_LM")
    if config.bias != "none":
        raise _bad(f"changes biases (`bias` is {config.bias!r}), which hfms does not")
    if config.init_lora_weights not in _BEGINNINGS:
        raise _bad(f"has changed its base model, too (`init_lora_weights` is {config.init_lora_weights!r})")
    if not config.target_modules:
        raise _bad("names no layers (`target_modules`)")
    known = {*_Config.__struct_fields__, *_WITHOUT_A_SAY}
    if other := sorted(name for name, value in fields.items() if value and name not in known):
        raise _bad(f"asks for what hfms does not do: {', '.join(f'`{name}`' for name in other)}")


def _bad(why: str) -> BadRequest:
    return BadRequest(f"This adapter {why}.", param="lora_path", code="invalid_adapter")
