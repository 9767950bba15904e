"""A sentence-transformers model in torch: token ids in, vectors out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hfms_cli import BadRequest, ContextLengthExceeded, LoadFailed, LoadRequest, UnsafeFormat
from hfms_engines.sentence_files import DenseFile, HeadFile, Recipe, read_file

Tensor = Any


@dataclass(slots=True)
class Input:
    """One text of a call. The first `unpooled` tokens are read by the model and left out of the pooling."""

    index: int
    ids: list[int]
    unpooled: int = 0

    def __len__(self) -> int:
        return len(self.ids)


# Poolings: states [batch, tokens, width] and which tokens to keep, [batch, tokens] -> [batch, width].


def _mean(states: Tensor, keep: Tensor, power: float = 1.0) -> Tensor:
    return (states * keep[..., None]).sum(1) / keep.sum(1, keepdim=True).clamp(min=1) ** power


def _mean_sqrt_len(states: Tensor, keep: Tensor) -> Tensor:
    return _mean(states, keep, power=0.5)


def _weighted_mean(states: Tensor, keep: Tensor) -> Tensor:
    """Weights are positions from 1, counted before a prompt is left out."""
    weights = keep * states.new_ones(states.shape[1]).cumsum(0)
    return (states * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)


def _max(states: Tensor, keep: Tensor) -> Tensor:
    return states.masked_fill(~keep[..., None], float("-inf")).amax(1)


def _first(states: Tensor, keep: Tensor) -> Tensor:
    return states.take_along_dim(keep.int().argmax(1)[:, None, None], 1)[:, 0]


def _last(states: Tensor, keep: Tensor) -> Tensor:
    return _first(states.flip(1), keep.flip(1))


POOL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": _first,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt_len,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}

# Encoder-decoders of which only the encoder is wanted, and its class in transformers.
ENCODERS = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}


class Encoder:
    """The model itself: token ids in, vectors out."""

    def __init__(self, recipe: Recipe, request: LoadRequest, dtype: str) -> None:
        """Load the weights and run once. `dtype` is that of the transformer; all after it is float32."""
        self._recipe = recipe
        self._request = request
        self._device = request.device.torch_device
        self._tokenizer, self._model = self._load_transformer(dtype)
        self._head = [self._load_head(kind, path) for kind, path in recipe.head]
        self._modes = recipe.pooling or (("lasttoken",) if _is_causal(self._model.config) else ("mean",))
        self._vocabulary = self._model.get_input_embeddings().weight.shape[0]
        pad = self._tokenizer.pad_token_id
        self._pad = pad if pad is not None and pad < self._vocabulary else 0
        self._prompt_tokens = 0 if recipe.pool_prompt else self._length_of_prompt()
        self.max_length = self._longest()
        # The first pass shows now, and not to the first caller, whether the files fit each other.
        self.dimensions = self.encode([Input(0, [0])]).shape[1]
        modules = [self._model, *(step for step in self._head if hasattr(step, "parameters"))]
        tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        self.memory_bytes = sum(t.numel() * t.element_size() for t in tensors)

    def read(self, inputs: Sequence[object]) -> list[Input]:
        """Tokenise, and refuse what is empty, too long or not a token. Raises BadRequest, ContextLengthExceeded."""
        texts = [self._recipe.prompt + text for text in inputs if isinstance(text, str)]
        ids_of = iter(self._tokenise(texts))
        found = []
        for index, given in enumerate(inputs):
            if isinstance(given, str):
                item = Input(index, next(ids_of), self._prompt_tokens)
            elif isinstance(given, list):
                item = Input(index, given)
            else:
                raise BadRequest(f"Input {index} is a conversation; embed a text or token ids.", param="input")
            if len(item) <= item.unpooled:
                raise BadRequest(f"Input {index} has no tokens.", param="input")
            if len(item) > self.max_length:
                raise ContextLengthExceeded(
                    f"Input {index} has {len(item)} tokens, and this model takes at most {self.max_length}. "
                    "Shorten or split it; nothing is cut here.",
                    param="input",
                )
            if item.ids is given and not 0 <= min(given) <= max(given) < self._vocabulary:
                raise BadRequest(f"Input {index} has a token id outside of 0 to {self._vocabulary - 1}.", param="input")
            found.append(item)
        return found

    def encode(self, batch: Sequence[Input]) -> Tensor:
        """Vectors of a batch, [len(batch), dimensions], float32, on the CPU.

        Padding is on the right whatever the tokenizer prefers, so that positions are those of the input alone.
        """
        import torch

        with torch.inference_mode():
            rows = [torch.tensor(item.ids) for item in batch]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self._pad).to(self._device)
            at = torch.arange(ids.shape[1], device=self._device)
            mask = at < torch.tensor([[len(item)] for item in batch], device=self._device)
            states = self._model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
            keep = mask & (at >= torch.tensor([[item.unpooled] for item in batch], device=self._device))
            vectors = torch.cat([POOL[mode](states, keep) for mode in self._modes], dim=-1)
            for step in self._head:
                vectors = step(vectors)
            return vectors[:, : self._recipe.dimensions].cpu()

    def _tokenise(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # Not cut, whatever the tokenizer's file says; not verbose, as it would warn of what is refused anyway.
        options = {"truncation": False, "padding": False, "return_attention_mask": False, "verbose": False}
        ids: list[list[int]] = self._tokenizer(texts, **options)["input_ids"]
        return ids

    def _length_of_prompt(self) -> int:
        """Tokens of the prompt, without the special one that ends a text."""
        ids = self._tokenise([self._recipe.prompt])[0] if self._recipe.prompt else []
        return len(ids) - (bool(ids) and ids[-1] in self._tokenizer.all_special_ids)

    def _longest(self) -> int:
        """The model's own limit, and never more than the positions that it learned."""
        positions = getattr(self._model.config, "max_position_embeddings", None) or 0
        limits = [self._recipe.max_length or self._tokenizer.model_max_length]
        if positions > 0 and not self._recipe.max_length:
            limits.append(positions)
        for module in self._model.modules():
            table: Any = getattr(module, "position_embeddings", None)
            if hasattr(table, "num_embeddings"):
                # RoBERTa and its kin count positions from behind the padding's.
                padding = getattr(module, "padding_idx", None)
                limits.append(table.num_embeddings - (0 if padding is None else padding + 1))
        # A tokenizer without a limit says 1e30.
        return int(min(*limits, 2**31 - 1))

    def _load_transformer(self, dtype: str) -> tuple[Any, Any]:
        import torch
        import transformers

        transformers.logging.disable_progress_bar()
        folder = self._request.folder / self._recipe.transformer
        local = {"local_files_only": True, "trust_remote_code": self._request.trust_remote_code}
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
        if self._recipe.lower_case:
            _lower_case(tokenizer)
        config = transformers.AutoConfig.from_pretrained(folder, **local)
        config.use_cache = False
        if getattr(config, "is_encoder_decoder", False) and config.model_type not in ENCODERS:
            raise LoadFailed(f"Of encoder-decoders this engine runs {', '.join(ENCODERS)}, not {config.model_type}.")
        cls = getattr(transformers, ENCODERS.get(config.model_type, "AutoModel"))
        model, report = cls.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            use_safetensors=self._request.card.format != "pickle",
            weights_only=True,
            output_loading_info=True,
            **local,
        )
        # transformers fills in what is missing at random. BERT's pooler is not used by any pooling here.
        missing = sorted(k for k in report["missing_keys"] if not k.startswith("pooler."))
        if missing:
            raise LoadFailed(f"The model's weights lack {len(missing)} tensors, the first of them {missing[0]}.")
        return tokenizer, model.eval().to(self._device)

    def _load_head(self, kind: str, path: str) -> Any:
        """A step after the pooling, a function of [batch, width]; in float32."""
        import torch

        config = f"{path}/config.json"
        if kind == "Normalize":
            if path and (self._request.folder / config).exists():
                read_file(self._request.folder, config, HeadFile)
            return lambda vectors: torch.nn.functional.normalize(vectors, dim=-1)
        dense = read_file(self._request.folder, config, DenseFile)
        activations = {
            "torch.nn.modules.activation.GELU": torch.nn.GELU,
            "torch.nn.modules.activation.ReLU": torch.nn.ReLU,
            "torch.nn.modules.activation.SiLU": torch.nn.SiLU,
            "torch.nn.modules.activation.Sigmoid": torch.nn.Sigmoid,
            "torch.nn.modules.activation.Tanh": torch.nn.Tanh,
            "torch.nn.modules.linear.Identity": torch.nn.Identity,
        }
        if dense.activation_function not in activations:
            raise LoadFailed(
                f"The model's {config} names the activation `{dense.activation_function}`, not known here."
            )
        linear = torch.nn.Linear(dense.in_features, dense.out_features, bias=dense.bias)
        weights = self._load_tensors(path)
        linear.load_state_dict({k.removeprefix("linear."): v for k, v in weights.items()})
        return torch.nn.Sequential(linear, activations[dense.activation_function]()).to(self._device)

    def _load_tensors(self, path: str) -> dict[str, Tensor]:
        folder = self._request.folder / path
        if (folder / "model.safetensors").exists():
            from safetensors.torch import load_file

            return dict(load_file(folder / "model.safetensors"))
        if self._request.card.format != "pickle":
            raise UnsafeFormat(f"The model's {path} has no model.safetensors, and pickles are not read.")
        import torch

        tensors = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
        return dict(tensors)


def _is_causal(config: Any) -> bool:
    """What sentence-transformers asks of a model without files of its own: its last token has seen all others."""
    names = config.architectures or [""]
    return names[0].endswith("ForCausalLM") and getattr(config, "is_causal", True)


def _lower_case(tokenizer: Any) -> None:
    """Lower-case before all else that the tokenizer does to a text."""
    from tokenizers.normalizers import Lowercase
    from tokenizers.normalizers import Sequence as Steps

    backend = tokenizer.backend_tokenizer
    own = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = Steps([Lowercase(), *own])
