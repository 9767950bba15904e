"""Cross-encoders against sentence-transformers, on tiny ones with random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("sentence_transformers")

import torch
import transformers

from hfms_cli import BadRequest, Call, Chunk, ContextLengthExceeded, LoadFailed, Pair
from hfms_cli.models.inspect import inspect
from hfms_engines.embeddings import EmbeddingModel, Embeddings
from tests.engines.sentences import CPU, call, drain, load, refusal, tiny_cross_encoder

CLOSE = 1e-4
PAIRS = [
    ("the cat", "The Cat sat On the mat"),
    ("", "a"),
    ("a", ""),
    ("query : what", "zebra ~ ünknown"),
    ("the " * 20, "cat " * 20),
    *[("the cat", "cat " * n) for n in range(20)],
]
ABOUT = {"tasks": ("score",), "architecture": "BertForSequenceClassification"}


def score(model: EmbeddingModel, pairs: list[tuple[str, str]]) -> np.ndarray:
    model.submit(call("only", [Pair(*pair) for pair in pairs], task="score"))
    *chunks, end = drain(model)["only"]
    assert end is None
    assert sorted(c.index for c in chunks) == list(range(len(pairs)))
    return np.array([c.score for c in sorted(chunks, key=lambda c: c.index)])


def theirs(folder: Path, pairs: list[tuple[str, str]]) -> np.ndarray:
    from sentence_transformers import CrossEncoder

    return CrossEncoder(str(folder), device="cpu", local_files_only=True).predict(pairs)


def saved(folder: Path, plain: Path, activation=None) -> Path:
    """As sentence-transformers itself saves a cross-encoder."""
    from sentence_transformers import CrossEncoder

    made = CrossEncoder(str(plain), device="cpu", local_files_only=True, activation_fn=activation)
    made.save(str(folder))
    return folder


def edit(folder: Path, name: str, **changes) -> None:
    values = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(values | changes))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return tiny_cross_encoder(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def copy(tmp_path, plain) -> Path:
    """A cross-encoder to break."""
    return saved(tmp_path / "copy", plain)


@pytest.fixture(scope="module")
def small(plain) -> EmbeddingModel:
    return load(plain, about=ABOUT)


@pytest.mark.parametrize("runner", ["torch", "openvino"])
@pytest.mark.parametrize("activation", [None, torch.nn.Identity(), torch.nn.Tanh()], ids=str)
def test_scores_equal_those_of_sentence_transformers(tmp_path, plain, activation, runner):
    if runner == "openvino":
        pytest.importorskip("openvino")
    folder = saved(tmp_path / "model", plain, activation)
    model = load(folder, about=ABOUT, dtype="float32", runner=runner, cache_dir=str(tmp_path / "cache"))
    ours = score(model, PAIRS)
    assert np.abs(ours - theirs(folder, PAIRS)).max() < CLOSE
    assert len({*ours.round(4)}) > 10  # texts do make a difference
    assert (model.info.tasks, model.info.dimensions) == (("score",), 0)


def test_a_plain_classifier_of_one_label_gives_its_sigmoid(small, plain):
    ours = score(small, PAIRS)
    assert np.abs(ours - theirs(plain, PAIRS)).max() < CLOSE
    assert ((ours > 0) & (ours < 1)).all()


@pytest.mark.parametrize(
    "said",
    [
        {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
        {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "5.0"}},
    ],
)
def test_the_activation_is_read_where_older_releases_wrote_it(tmp_path, plain, said):
    folder = tmp_path / "old"
    shutil.copytree(plain, folder)
    edit(folder, "config.json", **said)
    ours = score(load(folder, about=ABOUT), PAIRS)
    assert np.abs(ours - theirs(folder, PAIRS)).max() < CLOSE
    assert not ((ours > 0) & (ours < 1)).all()


@pytest.mark.parametrize("kind", ["distilbert", "roberta"])
def test_models_that_do_not_tell_the_texts_of_a_pair_apart(tmp_path, kind):
    folder = tiny_cross_encoder(tmp_path, kind)
    pairs = [pair for pair in PAIRS if len(" ".join(pair)) < 80]
    ours = score(load(folder, about=ABOUT), pairs)
    assert np.abs(ours - theirs(folder, pairs)).max() < CLOSE


def test_the_order_of_a_pair_matters(small):
    one, other = score(small, [("the cat", "a b c"), ("a b c", "the cat")])
    assert abs(one - other) > CLOSE


def test_tokens_of_both_texts_are_counted(small):
    small.submit(call("a", [Pair("the cat", "a")], task="score"))
    chunk, _ = drain(small)["a"]
    assert chunk.prompt_tokens == 6  # [CLS] the cat [SEP] a [SEP]


def test_a_pair_that_is_too_long_is_refused_and_named(small):
    error = refusal(small, [Pair("a", "b"), Pair("the cat", "the " * 100)], task="score")
    assert isinstance(error, ContextLengthExceeded)
    assert "Input 1 has 105 tokens" in error.message


@pytest.mark.parametrize("wrong", ["a text", [5, 6]])
def test_only_pairs_are_scored(small, wrong):
    assert "must be a pair of texts" in refusal(small, [wrong], task="score").message


def test_a_cross_encoder_makes_no_embeddings_and_has_no_dimensions(small):
    with pytest.raises(BadRequest, match="scores pairs of texts and does nothing else"):
        small.submit(call("a", ["the cat"]))
    with pytest.raises(BadRequest, match="dimensions"):
        small.submit(call("a", [Pair("a", "b")], task="score", dimensions=3))


def test_calls_share_batches_and_get_their_own_scores(small):
    alone = score(small, PAIRS)
    for n in range(len(PAIRS)):
        small.submit(Call(id=str(n), model="m", task="score", inputs=[Pair(*PAIRS[n])]))
    said = drain(small)
    together = [next(c.score for c in said[str(n)] if isinstance(c, Chunk)) for n in range(len(PAIRS))]
    assert np.abs(alone - together).max() < 1e-6


@pytest.mark.parametrize(
    ("file", "changes", "named"),
    [
        ("config_sentence_transformers.json", {"activation_fn": "os.system"}, "os.system"),
        ("config_sentence_transformers.json", {"model_type": "SentenceTransformer"}, "SentenceTransformer"),
        (
            "config_sentence_transformers.json",
            {"prompts": {"query": "find: "}, "default_prompt_name": "query"},
            "has a prompt",
        ),
        ("sentence_bert_config.json", {"transformer_task": "text-generation"}, "text-generation"),
        ("config.json", {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}, "2 labels"),
    ],
)
def test_what_would_change_a_score_and_is_not_known_stops_the_load(copy, file, changes, named):
    edit(copy, file, **changes)
    with pytest.raises(LoadFailed, match=named):
        load(copy, about=ABOUT)


def test_a_module_after_the_transformer_stops_the_load(copy):
    modules = json.loads((copy / "modules.json").read_text())
    modules.append({"idx": 1, "name": "1", "path": "1_Dense", "type": "sentence_transformers.models.Dense"})
    (copy / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(LoadFailed, match="Transformer -> Dense"):
        load(copy, about=ABOUT)


def test_a_classifier_whose_weights_are_missing_is_not_made_up(copy):
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadFailed, match=r"classifier\.weight"):
        load(copy, about=ABOUT)


def test_a_cross_encoder_is_known_by_its_files_with_and_without_those_of_sentence_transformers(plain, copy, tmp_path):
    for folder in (plain, copy):
        assert inspect(folder).tasks == ("score",)
        assert Embeddings().supports(inspect(folder), CPU) is None
    words, config = transformers.AutoTokenizer.from_pretrained(plain), transformers.AutoConfig.from_pretrained(plain)
    config.num_labels = 3
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "three")
    words.save_pretrained(tmp_path / "three")
    assert inspect(tmp_path / "three").tasks == ()
