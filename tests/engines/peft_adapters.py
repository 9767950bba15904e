"""LoRA adapters with random weights, made by PEFT itself, and what PEFT says that a model with one answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hfms_cli import Adapter
from hfms_cli.models.adapter_card import read_card


def save(folder: Path, base: Path, *, seed: int = 1, **config: Any) -> Path:
    """An adapter of the model in `base`, whose answers are far from those of the model alone."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**settings | config))
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "lora_" in name:
                weights.copy_(torch.randn(weights.shape, generator=chance) * 0.3)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def merged(base: Path, adapter: Path) -> Any:
    """The model with the adapter's changes in its own weights."""
    import peft
    from transformers import AutoModelForCausalLM

    changed = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    return changed.eval()


def read(folder: Path, id: str) -> Adapter:
    """As the front hands it to an engine."""
    return Adapter(id, str(folder), read_card(folder, [f.name for f in folder.iterdir()]))
