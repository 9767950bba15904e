"""A sentence-transformers model: texts into token ids, token ids into vectors or scores.

What is here is the same whatever runs the transformer itself (`sentence_torch`, `sentence_openvino`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from msgspec import Struct

from hfms_cli import BadRequest, CallInput, ContextLengthExceeded, Conversation, LoadRequest, Pair, UnsafeFormat
from hfms_engines.sentence_files import ACTIVATIONS, DenseFile, HeadFile, Recipe, activation, read_file
from hfms_engines.text import passes_on

Tensor = Any


class About(Struct):
    """What there is to know of a transformer without loading it."""

    vocabulary: int
    positions: int
    """Tokens that its configuration speaks of; 0: it does not."""
    learned_positions: int
    """Tokens that it has learned a position for; 0: its positions are computed."""
    causal: bool
    takes_types: bool
    """It wants to be told which text of a pair each token is of."""
    memory_bytes: int


class Runner(Protocol):
    """Runs a transformer on a device."""

    about: About
    device: str
    """As torch calls it: where the inputs have to be."""
    precision: str
    step: int
    """It runs better where the tokens of a row are a multiple of this."""

    def __call__(self, ids: Tensor, mask: Tensor, types: Tensor | None) -> Tensor:
        """Inputs [batch, tokens], int64; states [batch, tokens, width], or a score's logits [batch, 1], float32."""
        ...


@dataclass(slots=True)
class Input:
    """One text or pair of a call. The first `unpooled` tokens are read by the model and left out of the pooling."""

    index: int
    ids: list[int]
    unpooled: int = 0
    types: Sequence[int] = ()
    """Which text of the pair each token is of."""

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


class Encoder:
    """The model itself, in two halves: `read` makes tokens of texts, `encode` makes vectors or scores of tokens."""

    def __init__(self, recipe: Recipe, request: LoadRequest, runner: Runner) -> None:
        """Load what is around the transformer, in float32, and run once."""
        self._recipe = recipe
        self._request = request
        self._runner = runner
        self._tokenizer = self._load_tokenizer()
        self._backend = _backend(self._tokenizer)
        self._told_types = "token_type_ids" in self._tokenizer.model_input_names
        self._head = [self._load_head(kind, path) for kind, path in recipe.head]
        self._activation = _activations()[recipe.activation]()
        about = runner.about
        self._modes = recipe.pooling or (("lasttoken",) if about.causal else ("mean",))
        pad = self._tokenizer.pad_token_id
        self._pad = pad if pad is not None and pad < about.vocabulary else 0
        self._prompt_tokens = 0 if recipe.pool_prompt else self._length_of_prompt()
        self.max_length = self._longest()
        # The first pass shows now, and not to the first caller, whether the files fit each other.
        first = self.encode([Input(0, [0], types=[0])])
        self.dimensions = 0 if recipe.task == "score" else first.shape[1]
        modules = [step for step in self._head if hasattr(step, "parameters")]
        self.memory_bytes = about.memory_bytes + sum(
            t.numel() * t.element_size() for m in modules for t in m.parameters()
        )

    @property
    def precision(self) -> str:
        return self._runner.precision

    def read(self, given: Sequence[tuple[int, CallInput]]) -> list[Input | BadRequest]:
        """Tokenise what may be of several calls: for each index and input what the model reads, or why it cannot."""
        texts = [self._recipe.prompt + item for _, item in given if isinstance(item, str)]
        pairs = [item for _, item in given if isinstance(item, Pair)]
        of_texts = iter(self._tokenise(texts) if texts else ())
        of_pairs = iter(self._tokenise([p.query for p in pairs], [p.document for p in pairs]) if pairs else ())
        found: list[Input | BadRequest] = []
        for index, item in given:
            if isinstance(item, Pair) != (self._recipe.task == "score") or isinstance(item, Conversation):
                what = "a pair of texts" if self._recipe.task == "score" else "a text or token ids"
                found.append(BadRequest(f"Input {index} must be {what}.", param="input"))
                continue
            if isinstance(item, list):
                made = Input(index, item)
            elif isinstance(item, Pair):
                ids, types = next(of_pairs)
                made = Input(index, ids, types=types)
            else:
                ids, _ = next(of_texts)
                made = Input(index, ids, self._prompt_tokens)
            found.append(self._fault(made, item) or made)
        return found

    def encode(self, batch: Sequence[Input]) -> Tensor:
        """Vectors [len(batch), dimensions] or scores [len(batch)], float32, on the CPU.

        Padding is on the right whatever the tokenizer prefers, so that positions are those of the input alone.
        """
        import torch

        device, step = self._runner.device, self._runner.step
        longest = max(map(len, batch))
        width = max(longest, min(-(-longest // step) * step, self.max_length))

        def padded(rows: Sequence[Sequence[int]], padding: int) -> Tensor:
            return torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows], device=device)

        with torch.inference_mode():
            ids = padded([item.ids for item in batch], self._pad)
            types = padded([item.types for item in batch], 0) if self._runner.about.takes_types else None
            at = torch.arange(width, device=device)
            mask = at < torch.tensor([[len(item)] for item in batch], device=device)
            states = self._runner(ids, mask.long(), types)
            if self._recipe.task == "score":
                return self._activation(states[:, 0]).cpu()
            keep = mask & (at >= torch.tensor([[item.unpooled] for item in batch], device=device))
            vectors = torch.cat([POOL[mode](states, keep) for mode in self._modes], dim=-1)
            for step in self._head:
                vectors = step(vectors)
            return vectors[:, : self._recipe.dimensions].cpu()

    def _fault(self, made: Input, item: CallInput) -> BadRequest | None:
        """Why an input cannot be taken: it is empty, too long, or has something that is not a token."""
        if len(made) <= made.unpooled:
            return BadRequest(f"Input {made.index} has no tokens.", param="input")
        if len(made) > self.max_length:
            return ContextLengthExceeded(
                f"Input {made.index} has {len(made)} tokens, and this model takes at most {self.max_length}. "
                "Shorten or split it; nothing is cut here.",
                param="input",
            )
        words = self._runner.about.vocabulary
        if made.ids is item and not 0 <= min(made.ids) <= max(made.ids) < words:
            return BadRequest(f"Input {made.index} has a token id outside of 0 to {words - 1}.", param="input")
        return None

    def _tokenise(self, texts: list[str], seconds: list[str] | None = None) -> list[tuple[list[int], Sequence[int]]]:
        """The ids of each text or pair, and the type of each token where the tokenizer tells it."""
        if self._backend is not None:
            found = self._backend.encode_batch_fast(
                texts if seconds is None else list(zip(texts, seconds, strict=True))
            )
            return [(e.ids, e.type_ids if self._told_types else [0] * len(e.ids)) for e in found]
        # Not cut, whatever the tokenizer's file says; not verbose, as it would warn of what is refused anyway.
        options = {"truncation": False, "padding": False, "return_attention_mask": False, "verbose": False}
        made = self._tokenizer(texts, seconds, **options)
        types = made.get("token_type_ids") or [[0] * len(ids) for ids in made["input_ids"]]
        return list(zip(made["input_ids"], types, strict=True))

    def _length_of_prompt(self) -> int:
        """Tokens of the prompt, without the special one that ends a text."""
        ids = self._tokenise([self._recipe.prompt])[0][0] if self._recipe.prompt else []
        return len(ids) - (bool(ids) and ids[-1] in self._tokenizer.all_special_ids)

    def _longest(self) -> int:
        """The model's own limit, and never more than the positions that it learned."""
        about = self._runner.about
        limits = [self._recipe.max_length or self._tokenizer.model_max_length]
        if about.positions and not self._recipe.max_length:
            limits.append(about.positions)
        if about.learned_positions:
            limits.append(about.learned_positions)
        # A tokenizer without a limit says 1e30.
        return int(min(*limits, 2**31 - 1))

    def _load_tokenizer(self) -> Any:
        import transformers

        folder = self._request.folder / self._recipe.transformer
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=self._request.trust_remote_code
        )
        if self._recipe.lower_case:
            _lower_case(tokenizer)
        return tokenizer

    def _load_head(self, kind: str, path: str) -> Any:
        """A step after the pooling, a function of [batch, width]; in float32."""
        import torch

        config = f"{path}/config.json"
        if kind == "Normalize":
            if path and (self._request.folder / config).exists():
                read_file(self._request.folder, config, HeadFile)
            return lambda vectors: torch.nn.functional.normalize(vectors, dim=-1)
        dense = read_file(self._request.folder, config, DenseFile)
        made = _activations()[activation(dense.activation_function)]()
        linear = torch.nn.Linear(dense.in_features, dense.out_features, bias=dense.bias)
        weights = self._load_tensors(path)
        linear.load_state_dict({k.removeprefix("linear."): v for k, v in weights.items()})
        return torch.nn.Sequential(linear, made).to(self._runner.device)

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


def _activations() -> dict[str, Callable[[], Any]]:
    import torch

    return {name: getattr(torch.nn, name) for name in ACTIVATIONS}


def _backend(tokenizer: Any) -> Any | None:
    """What a tokenizer passes texts on to, which takes a half of the time; None where it does more than that."""
    if not passes_on(tokenizer, "__call__", "_encode_plus"):
        return None
    backend = tokenizer.backend_tokenizer
    # Not cut, whatever the tokenizer's file says.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


def _lower_case(tokenizer: Any) -> None:
    """Lower-case before all else that the tokenizer does to a text."""
    from tokenizers.normalizers import Lowercase
    from tokenizers.normalizers import Sequence as Steps

    backend = tokenizer.backend_tokenizer
    own = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = Steps([Lowercase(), *own])
