"""The transformer of a sentence-transformers model in torch: token ids in, states or logits out.

Imports torch and transformers: for worker processes only.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers

from hfms_cli import LoadFailed, LoadRequest
from hfms_engines.sentence_encoder import About
from hfms_engines.sentence_files import Recipe

# Encoder-decoders of which only the encoder is wanted, and its class in transformers.
ENCODERS = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}


class Module(torch.nn.Module):  # type: ignore[misc]
    """A model by what is wanted of it.

    ids, mask, types: [batch, tokens], int64; types are those of the tokens, where a pair is read.
    Returns the states of a model of vectors, [batch, tokens, width], or the logits of a cross-encoder, [batch, 1].
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor | None = None) -> torch.Tensor:
        more = {} if types is None else {"token_type_ids": types}
        out = self.model(input_ids=ids, attention_mask=mask, **more)
        return out.logits if "logits" in out else out.last_hidden_state


class Runner:
    """A model on its device."""

    step = 1

    def __init__(self, model: Any, recipe: Recipe, *, device: str, precision: str) -> None:
        self.module = Module(model)
        self.device = device
        self.precision = precision
        self.about = about_of(model, recipe)

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor | None) -> torch.Tensor:
        return self.module(ids, mask, types).float()


def load(recipe: Recipe, request: LoadRequest, dtype: str) -> Runner:
    """Raises LoadFailed, and what transformers raises."""
    transformers.logging.disable_progress_bar()
    folder = request.folder / recipe.transformer
    local = {"local_files_only": True, "trust_remote_code": request.trust_remote_code}
    config = transformers.AutoConfig.from_pretrained(folder, **local)
    config.use_cache = False
    if getattr(config, "is_encoder_decoder", False) and config.model_type not in ENCODERS:
        raise LoadFailed(f"Of encoder-decoders this engine runs {', '.join(ENCODERS)}, not {config.model_type}.")
    name = ENCODERS.get(config.model_type, "AutoModel")
    if recipe.task == "score":
        name = "AutoModelForSequenceClassification"
        if config.num_labels != 1:
            raise LoadFailed(f"The model gives {config.num_labels} labels and not one score.")
    model, report = getattr(transformers, name).from_pretrained(
        folder,
        config=config,
        dtype=getattr(torch, dtype),
        use_safetensors=request.card.format != "pickle",
        weights_only=True,
        output_loading_info=True,
        **local,
    )
    # transformers fills in what is missing at random. BERT's pooler is not used by any pooling here.
    missing = sorted(k for k in report["missing_keys"] if recipe.task == "score" or not k.startswith("pooler."))
    if missing:
        raise LoadFailed(f"The model's weights lack {len(missing)} tensors, the first of them {missing[0]}.")
    device = request.device.torch_device or "cpu"
    return Runner(model.eval().to(device), recipe, device=device, precision=dtype)


def about_of(model: Any, recipe: Recipe) -> About:
    """What a model of transformers tells without running; its weights are not read."""
    learned = []
    for module in model.modules():
        table: Any = getattr(module, "position_embeddings", None)
        if hasattr(table, "num_embeddings"):
            # RoBERTa and its kin count positions from behind the padding's.
            padding = getattr(module, "padding_idx", None)
            learned.append(table.num_embeddings - (0 if padding is None else padding + 1))
    names = model.config.architectures or [""]
    return About(
        vocabulary=model.get_input_embeddings().weight.shape[0],
        positions=max(0, getattr(model.config, "max_position_embeddings", None) or 0),
        learned_positions=min(learned, default=0),
        # What sentence-transformers asks of a model without files of its own: its last token has seen all others.
        causal=names[0].endswith("ForCausalLM") and getattr(model.config, "is_causal", True),
        takes_types=recipe.task == "score" and "token_type_ids" in inspect.signature(model.forward).parameters,
        memory_bytes=sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())),
    )
