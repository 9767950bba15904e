"""Embeddings by OpenVINO against torch: tiny models of every family, and MiniLM in the precisions that it runs in."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from hfms_cli import BadRequest, LoadFailed
from hfms_engines.embeddings import TRACED

pytest.importorskip("torch")
pytest.importorskip("sentence_transformers")
# Before openvino, whose environment it sets.
pytest.importorskip("hfms_engines.sentence_openvino", exc_type=ImportError)

import openvino as ov
import torch
import transformers

from hfms_engines import conversion, sentence_openvino, sentence_torch
from hfms_engines.embeddings import Embeddings, EmbeddingsOptions
from hfms_engines.openvino_export import MODEL
from hfms_engines.sentence_files import Recipe
from tests.engines.sentences import (
    CORPUS,
    CPU,
    TEXTS,
    card,
    dense,
    embed,
    load,
    normalize,
    pooling,
    request,
    sentence_model,
    theirs,
    tiny_bert,
    tiny_cross_encoder,
    tiny_encoder,
)

CLOSE = 1e-4
BF16 = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def cosine_distance(one: np.ndarray, other: np.ndarray) -> float:
    """The largest between rows."""
    products = (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    return float(1 - products.min())


def made(folder: Path, out: Path, **about) -> sentence_openvino.Runner:
    """What the maker's process makes, made in this one, in float32."""
    out.mkdir()
    sentence_openvino.make(sentence_openvino.Job(str(folder), card(folder, **about), CPU, "none"), out)
    return sentence_openvino.read(ov.Core(), out, "float32")


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("plain"))


def by_openvino(folder: Path, cache: str, **more):
    return load(folder, cache_dir=cache, **{"runner": "openvino"} | more)


# --- vectors ---


@pytest.mark.real_model
def test_minilm_vectors_in_the_default_precision_are_within_a_thousandth_of_float32(minilm, cache):
    model = load(minilm, cache_dir=cache, runner="auto")
    ours = embed(model, CORPUS)
    assert cosine_distance(ours, theirs(minilm, CORPUS)) < 1e-3
    assert np.allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)
    assert model.info.dtype == ("bfloat16" if BF16 else "float32")
    assert (model.info.dimensions, model.info.context_length) == (384, 256)


@pytest.mark.real_model
def test_minilm_vectors_in_float32_equal_those_of_sentence_transformers(minilm, cache):
    model = by_openvino(minilm, cache, dtype="float32")
    assert np.abs(embed(model, CORPUS) - theirs(minilm, CORPUS)).max() < 1e-5
    assert model.info.dtype == "float32"


@pytest.mark.real_model
def test_minilm_vectors_of_eight_bits_point_the_same_way_and_its_weights_take_a_quarter(minilm, tmp_path):
    ours = embed(by_openvino(minilm, str(tmp_path), dtype="float32", quantize="int8"), CORPUS)
    assert cosine_distance(ours, theirs(minilm, CORPUS)) < 1e-2
    (weights,) = tmp_path.rglob("openvino_model.bin")
    assert weights.stat().st_size < 0.27 * (minilm / "model.safetensors").stat().st_size


@pytest.mark.parametrize("task", ["embed", "score"])
@pytest.mark.parametrize("kind", sorted(TRACED))
def test_every_family_says_what_torch_says_for_batches_of_any_size(tmp_path, kind, task):
    maker = tiny_cross_encoder if task == "score" else tiny_encoder
    folder = maker(tmp_path / "model", kind)
    about = {"model_type": kind, "tasks": (task,)}
    ours = made(folder, tmp_path / "made", **about)
    torchs = sentence_torch.load(Recipe.read(folder, task), request(folder, **about), "float32")
    generator = torch.Generator().manual_seed(0)
    for rows, length in ((1, 1), (1, 2), (2, 30), (9, 17)):
        ids = torch.randint(4, 100, (rows, length), generator=generator)
        mask = (torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=generator)).long()
        types = torch.randint(0, 2, (rows, length), generator=generator) if ours.about.takes_types else None
        with torch.inference_mode():
            mine, yours = torchs(ids, mask, types), ours(ids, mask, types)
        if task == "embed":
            mine, yours = mine[mask.bool()], yours[mask.bool()]
        assert float((mine - yours).abs().max()) < CLOSE * max(1.0, float(mine.abs().max()))


def test_pooling_projection_prompt_and_dimensions_are_as_with_torch(tmp_path, plain, cache):
    folder = sentence_model(
        tmp_path / "model",
        plain,
        pooling("mean", "cls", include_prompt=False),
        dense(24, torch.nn.Tanh(), width=64),
        normalize(),
        prompts={"query": "query : "},
        default_prompt_name="query",
        truncate_dim=10,
    )
    texts = [text for text in TEXTS if len(text) < 100]
    model = by_openvino(folder, cache, dtype="float32")
    assert np.abs(embed(model, texts) - theirs(folder, texts)).max() < 1e-5
    assert (model.info.dimensions, model.info.context_length) == (10, 64)


# --- which one runs ---


def test_a_model_that_is_not_tested_with_openvino_runs_by_torch_and_the_log_says_so(tmp_path, caplog):
    transformers.T5EncoderModel(
        transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=2, vocab_size=112)
    ).save_pretrained(tmp_path / "t5")
    tiny_bert(tmp_path / "words")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "t5" / file).write_bytes((tmp_path / "words" / file).read_bytes())
    model = load(tmp_path / "t5", about={"model_type": "t5"}, runner="auto", cache_dir=str(tmp_path / "cache"))
    assert embed(model, TEXTS[:3]).shape == (3, 32)
    assert "torch runs this model" in caplog.text
    assert "t5 is not among the models" in caplog.text
    with pytest.raises(LoadFailed, match="t5 is not among"):
        load(tmp_path / "t5", about={"model_type": "t5"}, runner="openvino", cache_dir=str(tmp_path / "cache"))


def test_a_model_whose_conversion_fails_runs_by_torch_and_the_log_says_why(plain, tmp_path, caplog, monkeypatch):
    """A maker that ends as one does that runs out of memory."""
    monkeypatch.setattr(conversion.sys, "executable", "/bin/false")
    model = load(plain, runner="auto", cache_dir=str(tmp_path))
    assert embed(model, TEXTS[:3]).shape == (3, 32)
    assert "its conversion ended with status 1" in caplog.text
    with pytest.raises(LoadFailed, match="its conversion ended with status 1"):
        load(plain, runner="openvino", cache_dir=str(tmp_path))


def test_eight_bits_are_never_left_out_in_silence(plain):
    with pytest.raises(LoadFailed, match="runner is torch"):
        load(plain, runner="torch", quantize="int8")


def test_a_load_may_ask_for_eight_bits_and_says_that_it_has_them(plain, cache):
    options = EmbeddingsOptions(runner="openvino", cache_dir=cache)
    model = Embeddings(options).load(dataclasses.replace(request(plain), quantize="int8"))
    assert model.info.quantize == "int8"
    assert Embeddings(options).load(request(plain)).info.quantize == "none"


def test_a_precision_that_openvino_does_not_have_is_torchs(plain, tmp_path):
    assert load(plain, runner="auto", dtype="float16", cache_dir=str(tmp_path)).info.dtype == "float16"
    assert not (tmp_path / "openvino").exists()


@pytest.mark.skipif(not BF16, reason="this CPU has no bfloat16")
@pytest.mark.parametrize(("allowed", "precision"), [(5e-4, "bfloat16"), (1e-9, "float32")])
def test_bfloat16_is_used_by_itself_only_where_vectors_stay(plain, tmp_path, monkeypatch, allowed, precision):
    monkeypatch.setattr(sentence_openvino, "_CLOSE", (allowed, allowed))
    out = tmp_path / "made"
    made(plain, out)
    assert sentence_openvino.read(ov.Core(), out, "auto").precision == precision
    assert sentence_openvino.read(ov.Core(), out, "bfloat16").precision == "bfloat16"


# --- conversion ---


def test_a_conversion_is_kept_and_made_again_when_the_model_changes(plain, tmp_path, monkeypatch):
    runs = []
    run = conversion._run
    monkeypatch.setattr(conversion, "_run", lambda *args: runs.append(1) or run(*args))
    folder = tmp_path / "model"
    folder.mkdir()
    for file in plain.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    first = embed(by_openvino(folder, str(tmp_path / "cache")), TEXTS)
    assert np.array_equal(first, embed(by_openvino(folder, str(tmp_path / "cache")), TEXTS))
    assert len(runs) == 1
    tiny_bert(folder, num_hidden_layers=1)
    assert not np.allclose(first, embed(by_openvino(folder, str(tmp_path / "cache")), TEXTS), atol=1e-3)
    assert len(runs) == 2


def test_a_model_that_does_not_say_the_same_is_not_kept(plain, tmp_path, monkeypatch):
    real = sentence_openvino._trace

    def wrong(theirs):
        model = real(theirs)
        layer = theirs.module.model.encoder.layer[0].output.dense
        # In its place, since both share the old one.
        layer.bias = torch.nn.Parameter(torch.randn(32))
        return model

    monkeypatch.setattr(sentence_openvino, "_trace", wrong)
    with pytest.raises(LoadFailed, match="differs"):
        made(plain, tmp_path / "made")


def test_the_maker_ends_when_nobody_waits_for_it(plain, tmp_path):
    job = sentence_openvino.Job(str(plain), card(plain), CPU, "none")
    command = [sys.executable, "-m", "hfms_engines.sentence_openvino", str(tmp_path)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE)
    child.stdin.write(msgspec.json.encode(job) + b"\n")
    child.stdin.close()
    assert child.wait(timeout=60) == 1
    assert not (tmp_path / MODEL).exists()


def test_an_engine_that_openvino_runs_still_refuses_what_is_no_text(plain, cache):
    model = by_openvino(plain, cache)
    with pytest.raises(BadRequest, match="the list is empty"):
        embed(model, [])
