"""Tiny sentence-transformers models, and an engine for them that is driven as a worker process drives it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers

from hfms_cli import Call, Chunk, Device, HfmsError, LoadRequest, ModelCard
from hfms_engines.embeddings import EmbeddingModel, Embeddings, EmbeddingsOptions

CPU = Device(id="cpu", kind="cpu", name="this machine", total_bytes=2**34, free_bytes=2**33, torch_device="cpu")
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

CORPUS = [
    "The cat sits on the mat.",
    "",
    " ",
    "  leading and trailing space \n",
    "naïve café, Ünïcödé, ﬁgure, ①②③",
    "日本語のテキストと한국어와中文",
    "مرحبا بالعالم",
    "👩‍👩‍👧‍👦 emoji 🤖 with joiners",
    "e\u0301 and \u00e9 are one letter",
    "a\x00b\u200bc\ufeffd",
    "[CLS] [SEP] [MASK] special tokens in the text [PAD]",
    "UPPER lower MiXeD",
    "x" * 400,
    "word " * 60,
    "def f(x):\n    return x ** 2  # code",
    "1234567890 3.14159 -1e-9",
    *[f"Sentence number {i} " + "and so on " * (i % 17) for i in range(60)],
    "the end of a long text " * 36,
]


TEXTS = ["the cat", "The Cat sat On the mat", "a", "", "the " * 40, "zebra ~ ünknown", "query : what", "Q"]


def card(folder: Path, **more) -> ModelCard:
    size = sum(f.stat().st_size for f in folder.rglob("*.safetensors"))
    values = {
        "format": "safetensors",
        "model_type": "bert",
        "architecture": "BertModel",
        "tasks": ("embed",),
        "weights_bytes": size,
        "dtype": "float32",
    }
    return ModelCard(**values | more)


def request(folder: Path, dtype: str = "auto", **about) -> LoadRequest:
    return LoadRequest(folder=folder, card=card(folder, **about), device=CPU, dtype=dtype)


def load(folder: Path, *, about: dict | None = None, dtype: str = "auto", **options) -> EmbeddingModel:
    """By torch, unless `options` say otherwise."""
    engine = Embeddings(EmbeddingsOptions(**{"runner": "torch"} | options))
    return engine.load(request(folder, dtype, **about or {}))


def call(id: str, inputs: list, **more) -> Call:
    return Call(**{"id": id, "model": "m", "task": "embed", "inputs": inputs} | more)


def drain(model: EmbeddingModel) -> dict[str, list]:
    """Step until nothing is left; all that was said, by call."""
    said: dict[str, list] = {}
    while model.busy():
        for id, what in model.step():
            said.setdefault(id, []).append(what)
    return said


def refusal(model: EmbeddingModel, inputs: list, **more) -> HfmsError:
    """What a call is answered with that cannot be taken; nothing of it stays."""
    model.submit(call("refused", inputs, **more))
    (error,) = [what for what in drain(model)["refused"] if not isinstance(what, Chunk)]
    assert isinstance(error, HfmsError)
    return error


def vector(chunk: Chunk) -> np.ndarray:
    return np.frombuffer(chunk.vector, "<f4")


def embed(model: EmbeddingModel, inputs: list, **more) -> np.ndarray:
    model.submit(call("only", inputs, **more))
    *chunks, end = drain(model)["only"]
    assert end is None
    assert sorted(c.index for c in chunks) == list(range(len(inputs)))
    return np.stack([vector(c) for c in sorted(chunks, key=lambda c: c.index)])


def theirs(folder: Path, texts: list[str]) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32})
    return model.encode(texts, convert_to_numpy=True, show_progress_bar=False)


def tokenizer(*, lower: bool = False, specials: bool = True):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LETTERS, *("##" + c for c in LETTERS), "the", "cat", "query", ":"]
    made = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if lower:
        made.normalizer = normalizers.Lowercase()
    if specials:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def save(folder: Path, model, words) -> Path:
    # Weights of a fresh model are so small that all texts look the same; spread them.
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def tiny_bert(folder: Path, **more) -> Path:
    torch.manual_seed(7)
    words = tokenizer()
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=96, **SIZES | more)
    return save(folder, transformers.BertModel(config), words)


def _tiny_config(kind: str, vocabulary: int):
    common = {"vocab_size": vocabulary, "max_position_embeddings": 96, "pad_token_id": 0, "num_labels": 1}
    shape = {
        "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48},
        "electra": SIZES | {"embedding_size": 16},
        # So that some layers see a window alone.
        "modernbert": SIZES | {"num_hidden_layers": 3, "local_attention": 8, "global_attn_every_n_layers": 2},
        "eurobert": SIZES | {"num_key_value_heads": 1},
    }.get(kind, SIZES)
    special = {"cls_token_id": 2, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3}
    return transformers.AutoConfig.for_model(kind, **common | shape | (special if kind == "modernbert" else {}))


def tiny_encoder(folder: Path, kind: str = "bert") -> Path:
    torch.manual_seed(7)
    words = tokenizer()
    return save(folder, transformers.AutoModel.from_config(_tiny_config(kind, len(words))), words)


def tiny_cross_encoder(folder: Path, kind: str = "bert") -> Path:
    """A classifier of one label, as `transformers` saves it."""
    torch.manual_seed(7)
    words = tokenizer()
    if kind != "bert":
        words.model_input_names = ["input_ids", "attention_mask"]
    model = transformers.AutoModelForSequenceClassification.from_config(_tiny_config(kind, len(words)))
    return save(folder, model, words)


def sentence_model(folder: Path, plain: Path, *after, **settings) -> Path:
    """A model saved by sentence-transformers itself."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer

    max_length = settings.pop("max_length", 64)
    lower = settings.pop("lower", False)
    first = Transformer(str(plain), max_seq_length=max_length, do_lower_case=lower)
    SentenceTransformer(modules=[first, *after], device="cpu", **settings).save(str(folder))
    return folder


def pooling(*modes: str, width: int = 32, **more):
    from sentence_transformers.sentence_transformer.modules import Pooling

    return Pooling(width, list(modes), **more)


def dense(into: int, activation=None, *, width: int = 32, bias: bool = True):
    from sentence_transformers.base.modules import Dense

    return Dense(width, into, bias=bias, activation_function=activation)


def normalize():
    from sentence_transformers.base.modules import Normalize

    return Normalize()
