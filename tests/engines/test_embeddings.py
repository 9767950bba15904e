"""The embeddings engine against sentence-transformers, on MiniLM and on tiny models with random weights."""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hfms_cli import (
    BadRequest,
    Chunk,
    ContextLengthExceeded,
    Conversation,
    Device,
    EngineFault,
    LoadFailed,
    LoadRequest,
    Pair,
    UnsafeFormat,
)
from hfms_engines.embeddings import EmbeddingModel, Embeddings, EmbeddingsOptions

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("sentence_transformers")

import torch
import transformers

from tests.engines.sentences import (
    CORPUS,
    CPU,
    SIZES,
    TEXTS,
    call,
    card,
    dense,
    drain,
    embed,
    load,
    normalize,
    pooling,
    refusal,
    save,
    sentence_model,
    theirs,
    tiny_bert,
    tokenizer,
    vector,
)

CLOSE = 1e-5

# --- models ---


@pytest.fixture(scope="module")
def mini(minilm) -> EmbeddingModel:
    return load(minilm)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, plain) -> Path:
    return sentence_model(tmp_path_factory.mktemp("tiny"), plain, pooling("mean"), normalize())


@pytest.fixture(scope="module")
def small(tiny) -> EmbeddingModel:
    return load(tiny)


def edit(folder: Path, name: str, **changes) -> None:
    path = folder / name
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | changes))


# --- vectors ---


@pytest.mark.real_model
def test_minilm_vectors_equal_those_of_sentence_transformers(mini, minilm):
    assert np.abs(embed(mini, CORPUS) - theirs(minilm, CORPUS)).max() < CLOSE


@pytest.mark.real_model
def test_minilm_is_not_cut_where_its_tokenizer_file_says_128(mini):
    text = "word " * 200
    mini.submit(call("a", [text]))
    chunk, _ = drain(mini)["a"]
    assert chunk.prompt_tokens == 202


@pytest.mark.real_model
def test_minilm_says_what_it_is(mini):
    info = mini.info
    assert (info.dimensions, info.context_length, info.dtype, info.device) == (384, 256, "float32", "cpu")
    assert (info.engine, info.tasks, info.chat) == ("embeddings", ("embed",), False)
    assert info.memory_bytes == pytest.approx(90.9e6, rel=0.01)


@pytest.mark.parametrize(
    "modes",
    [
        ("cls",),
        ("max",),
        ("mean",),
        ("mean_sqrt_len_tokens",),
        ("weightedmean",),
        ("lasttoken",),
        ("lasttoken", "cls"),
        ("max", "mean", "weightedmean"),
    ],
    ids="+".join,
)
def test_every_pooling_equals_that_of_sentence_transformers(tmp_path, plain, modes):
    folder = sentence_model(tmp_path, plain, pooling(*modes))
    ours = embed(load(folder), TEXTS)
    assert ours.shape == (len(TEXTS), 32 * len(modes))
    assert np.abs(ours - theirs(folder, TEXTS)).max() < CLOSE


@pytest.mark.parametrize(
    "activation", [None, torch.nn.Tanh(), torch.nn.ReLU(), torch.nn.GELU(), torch.nn.SiLU(), torch.nn.Sigmoid()]
)
def test_projection_and_normalisation_equal_those_of_sentence_transformers(tmp_path, plain, activation):
    folder = sentence_model(
        tmp_path, plain, pooling("cls", "mean"), dense(24, activation, width=64), dense(8, width=24, bias=False)
    )
    model = load(folder)
    assert np.abs(embed(model, TEXTS) - theirs(folder, TEXTS)).max() < CLOSE
    assert model.info.dimensions == 8
    other = sentence_model(tmp_path / "n", plain, pooling("max"), dense(12, activation), normalize())
    ours = embed(load(other), TEXTS)
    assert np.abs(ours - theirs(other, TEXTS)).max() < CLOSE
    assert np.allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)


def test_files_in_the_old_spelling_mean_the_same(tmp_path, plain):
    """As sentence-transformers 2 wrote them: switches, short class names, another file's name, a subfolder."""
    root = tmp_path / "old"
    tiny_bert(root / "0_Transformer")
    (root / "0_Transformer" / "sentence_roberta_config.json").write_text('{"max_seq_length": 40}')
    (root / "1_Pooling").mkdir()
    switches = {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": False, "pooling_mode_mean_tokens": True}
    edit(root / "1_Pooling", "config.json", word_embedding_dimension=32, **switches)
    kinds = [("Transformer", "0_Transformer"), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    modules = [{"idx": 0, "name": "0", "path": p, "type": f"sentence_transformers.models.{k}"} for k, p in kinds]
    (root / "modules.json").write_text(json.dumps([m | {"name": str(i)} for i, m in enumerate(modules)]))
    model = load(root)
    assert model.info.context_length == 40
    texts = [t for t in TEXTS if len(t) < 100]
    assert np.abs(embed(model, texts) - theirs(root, texts)).max() < CLOSE


def test_a_plain_transformer_is_mean_pooled_and_not_normalised(plain):
    ours = embed(load(plain), TEXTS)
    assert np.abs(ours - theirs(plain, TEXTS)).max() < CLOSE
    assert not np.allclose(np.linalg.norm(ours, axis=1), 1, atol=0.1)


def test_a_plain_causal_model_gives_its_last_token(tmp_path):
    torch.manual_seed(3)
    words = tokenizer()
    shape = SIZES | {"vocab_size": len(words), "num_key_value_heads": 1, "max_position_embeddings": 96}
    folder = save(tmp_path, transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)), words)
    assert np.abs(embed(load(folder), TEXTS) - theirs(folder, TEXTS)).max() < CLOSE


def test_positions_behind_the_padding_are_counted_as_roberta_counts_them(tmp_path):
    torch.manual_seed(4)
    words = tokenizer()
    shape = SIZES | {"vocab_size": len(words), "max_position_embeddings": 50, "pad_token_id": 0}
    folder = save(tmp_path / "plain", transformers.RobertaModel(transformers.RobertaConfig(**shape)), words)
    folder = sentence_model(tmp_path / "st", folder, pooling("mean"), max_length=50)
    model = load(folder)
    assert model.info.context_length == 49
    texts = ["the " * 47, "a", "cat cat"]
    assert np.abs(embed(model, texts) - theirs(folder, texts)).max() < CLOSE
    assert isinstance(refusal(model, ["the " * 48]), ContextLengthExceeded)


def test_of_t5_only_the_encoder_is_used(tmp_path):
    torch.manual_seed(5)
    words = tokenizer()
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": len(words)}
    config = transformers.T5Config(**shape, decoder_start_token_id=0)
    folder = save(tmp_path / "plain", transformers.T5Model(config), words)
    folder = sentence_model(tmp_path / "st", folder, pooling("mean"), dense(16, bias=False), normalize())
    assert np.abs(embed(load(folder), TEXTS) - theirs(folder, TEXTS)).max() < CLOSE


def test_other_encoder_decoders_are_refused(tmp_path):
    words = tokenizer()
    shape = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": len(words)}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    save(tmp_path, transformers.BartModel(transformers.BartConfig(**shape, **heads)), words)
    with pytest.raises(LoadFailed, match="not bart"):
        load(tmp_path)


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("mode", ["cls", "mean", "weightedmean", "lasttoken", "max"])
def test_the_default_prompt_is_put_before_each_text(tmp_path, plain, pooled, mode):
    folder = sentence_model(
        tmp_path,
        plain,
        pooling(mode, include_prompt=pooled),
        prompts={"query": "query : ", "passage": "p"},
        default_prompt_name="query",
    )
    model = load(folder)
    texts = [t for t in TEXTS if len(t) < 100]
    ours = embed(model, texts)
    assert np.abs(ours - theirs(folder, texts)).max() < CLOSE
    model.submit(call("a", ["cat", [2, 5, 3]]))
    counted = {c.index: c.prompt_tokens for c in drain(model)["a"][:-1]}
    assert counted == {0: 5, 1: 3}  # [CLS] query : cat [SEP]; ids are used as they are


def test_lower_casing_is_done_where_the_files_ask_for_it(tmp_path, plain):
    folder = sentence_model(tmp_path, plain, pooling("mean"), lower=True)
    ours = embed(load(folder), ["The CAT", "the cat"])
    assert np.abs(ours - theirs(folder, ["The CAT", "the cat"])).max() < CLOSE
    assert np.array_equal(ours[0], ours[1])


def test_a_model_that_cuts_its_own_vectors_is_followed(tmp_path, plain):
    folder = sentence_model(tmp_path, plain, pooling("mean"), truncate_dim=10)
    model = load(folder)
    assert model.info.dimensions == 10
    assert np.abs(embed(model, TEXTS) - theirs(folder, TEXTS)).max() < CLOSE


# --- one call ---


def test_dimensions_cut_and_renormalise(small):
    whole, cut = embed(small, TEXTS), embed(small, TEXTS, dimensions=5)
    expected = whole[:, :5] / np.linalg.norm(whole[:, :5], axis=1, keepdims=True)
    assert np.abs(cut - expected).max() < 1e-6


@pytest.mark.parametrize("dimensions", [0, -1, 33])
def test_dimensions_that_the_model_does_not_have_are_refused(small, dimensions):
    with pytest.raises(BadRequest, match="1 to 32") as caught:
        small.submit(call("a", ["the cat"], dimensions=dimensions))
    assert caught.value.param == "dimensions"
    assert not small.busy()


def test_a_text_that_is_too_long_is_named_with_both_lengths(small):
    fits, long = "the " * 62, "the " * 63
    assert embed(small, [fits]).shape == (1, 32)
    error = refusal(small, [fits, long])
    assert re.search(r"Input 1 has 65 tokens.*at most 64", error.message)
    assert (error.param, error.code) == ("input", "context_length_exceeded")
    assert isinstance(error, ContextLengthExceeded)
    assert "Input 0 has 65" in refusal(small, [[4] * 65]).message


def test_token_ids_are_used_as_they_are(small, plain):
    ids = tokenizer()("the cat")["input_ids"]
    assert np.array_equal(*embed(small, ["the cat", ids]))
    bare = embed(small, [ids[1:-1]])
    assert not np.allclose(bare, embed(small, ["the cat"]), atol=1e-3)


@pytest.mark.parametrize(
    ("inputs", "why"),
    [
        (["a", []], "Input 1 has no tokens"),
        ([[0, 112]], "outside of 0 to 111"),
        ([[-1]], "outside of 0 to 111"),
        ([Conversation(messages=[{"role": "user", "content": "hi"}])], "must be a text or token ids"),
        ([Pair("the", "cat")], "must be a text or token ids"),
    ],
)
def test_what_cannot_be_embedded_is_refused(small, inputs, why):
    assert small._encoder._runner.about.vocabulary == 112
    error = refusal(small, inputs)
    assert isinstance(error, BadRequest)
    assert why in error.message
    assert error.param == "input"


def test_an_empty_list_is_refused(small):
    with pytest.raises(BadRequest, match="the list is empty"):
        small.submit(call("a", []))
    assert not small.busy()


def test_an_empty_text_without_special_tokens_is_refused(tmp_path):
    torch.manual_seed(1)
    words = tokenizer(specials=False)
    config = transformers.BertConfig(vocab_size=len(words), **SIZES)
    model = load(save(tmp_path, transformers.BertModel(config), words))
    assert "Input 1 has no tokens" in refusal(model, ["the", ""]).message


def test_an_embedding_model_refuses_to_generate(small):
    with pytest.raises(BadRequest, match="makes embeddings and does nothing else"):
        small.submit(call("a", ["once upon a time"], task="generate"))


def test_tokens_are_counted_without_padding(small):
    small.submit(call("a", ["the", "the cat the", [9]]))
    assert {c.index: c.prompt_tokens for c in drain(small)["a"][:-1]} == {0: 3, 1: 5, 2: 1}


# --- many calls ---


lengths = st.lists(st.integers(1, 60), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=st.lists(lengths, min_size=1, max_size=6), size=st.integers(1, 9), tokens=st.integers(1, 300))
def test_every_input_is_answered_once_and_as_if_it_were_alone(tiny_by_options, calls, size, tokens):
    model, shapes = tiny_by_options(size, tokens)
    inputs = {
        f"c{n}": [[(n + i + k) % 100 + 4 for k in range(x)] for i, x in enumerate(c)] for n, c in enumerate(calls)
    }
    for id, given_ids in inputs.items():
        model.submit(call(id, given_ids))
    said = drain(model)
    assert said.keys() == inputs.keys()
    for rows, longest in shapes:
        assert rows <= size
        assert rows == 1 or rows * longest <= tokens
    for id, (*chunks, end) in said.items():
        assert end is None
        assert [c.prompt_tokens for c in sorted(chunks, key=lambda c: c.index)] == [len(x) for x in inputs[id]]
        shapes.clear()
        chunk = chunks[len(chunks) // 2]
        assert np.abs(vector(chunk) - embed(model, [inputs[id][chunk.index]])[0]).max() < CLOSE
    shapes.clear()


@pytest.fixture(scope="module")
def tiny_by_options(tiny):
    """A loaded model with these batch options, and the shapes [rows, tokens] of the forward passes it makes."""
    encoder = load(tiny)._encoder
    shapes: list[tuple[int, int]] = []
    encoder._runner.module.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )

    def make(size: int, tokens: int):
        return EmbeddingModel(SimpleNamespace(dimensions=32, tasks=("embed",)), encoder, size, tokens), shapes

    return make


def test_a_batch_is_never_more_padding_than_text(tiny_by_options):
    model, shapes = tiny_by_options(32, 10**6)
    for n in range(20):
        model.submit(call(f"c{n}", [[5] * (1 + 3 * n)]))
    while model.busy():
        texts = [chunk.prompt_tokens for _, chunk in model.step() if chunk is not None]
        rows, longest = shapes.pop()
        assert 2 * sum(texts) >= rows * longest


def test_a_small_call_is_not_held_up_by_a_long_list(small):
    small.submit(call("flood", ["the cat sat on the mat"] * 2000))
    small.step()
    small.submit(call("small", ["a"]))
    steps = 0
    answered = set()
    while "small" not in answered:
        answered |= {id for id, what in small.step() if what is None}
        steps += 1
    assert steps <= 2
    small.cancel("flood")


def test_texts_are_made_into_tokens_in_slices_from_all_calls(small, monkeypatch):
    slices = []
    read = small._encoder.read
    monkeypatch.setattr(small._encoder, "read", lambda given: slices.append([g for _, g in given]) or read(given))
    small.submit(call("flood", ["the cat"] * 1000))
    small.step()
    small.submit(call("small", ["a", "b"]))
    said = drain(small)
    assert [len(texts) for texts in slices] == [256, 256, 256, 234]
    assert {"a", "b"} <= {*slices[1]}  # the next slice has all of the small call
    assert len(said["small"]) == 3


def test_a_slice_ends_where_its_texts_become_long(small, monkeypatch):
    slices = []
    read = small._encoder.read
    monkeypatch.setattr(small._encoder, "read", lambda given: slices.append(len(given)) or read(given))
    refusal(small, ["the " * 2**13] * 5)
    assert slices == [2]


def test_a_bad_input_far_down_a_list_ends_the_call_and_no_other(small):
    small.submit(call("bad", ["the cat"] * 600 + ["the " * 100]))
    small.submit(call("good", ["the cat"] * 3))
    said = drain(small)
    assert isinstance(said["bad"][-1], ContextLengthExceeded)
    assert "Input 600" in said["bad"][-1].message
    assert said["good"][-1] is None


def test_a_failed_tokenizer_ends_its_calls_and_the_next_are_answered(tiny, monkeypatch, caplog):
    model = load(tiny)
    with monkeypatch.context() as broken:
        broken.setattr(model._encoder, "_backend", object())
        assert isinstance(refusal(model, ["the cat"]), EngineFault)
    assert "the cat" not in caplog.text
    assert embed(model, ["the cat"]).shape == (1, 32)


def test_ten_thousand_inputs_are_one_call(small):
    assert embed(small, [f"cat {chr(97 + i % 26)}" for i in range(10_000)]).shape == (10_000, 32)


def test_a_cancelled_call_says_nothing_more(small):
    small.submit(call("gone", ["the cat"] * 100))
    small.submit(call("stays", ["a", "a " * 30]))
    assert "gone" in {id for id, _ in small.step()}
    small.cancel("gone")
    small.cancel("never was here")
    said = drain(small)
    assert "gone" not in said
    assert said["stays"][-1] is None


def test_calls_wait_until_their_first_input_is_run(tiny):
    model = load(tiny, batch_size=1)
    assert (model.busy(), model.waiting(), model.step()) == (False, 0, [])
    for id in "abc":
        model.submit(call(id, ["the", "cat"]))
    seen = [model.waiting()]
    while model.busy():
        model.step()
        seen.append(model.waiting())
    assert seen == [3, 2, 1, 0, 0, 0, 0]


def test_a_failed_batch_ends_its_calls_and_no_others(tmp_path, caplog):
    """A model with fewer rows than its tokenizer has words fails on the words that are too many."""
    torch.manual_seed(2)
    words = tokenizer()
    config = transformers.BertConfig(vocab_size=len(words) - 4, **SIZES)  # no "the", "cat", "query" and ":"
    model = load(save(tmp_path, transformers.BertModel(config), words), batch_size=1)
    model.submit(call("bad", ["query : the cat", "a", "b"]))
    model.submit(call("good", ["xy", "z"]))
    said = drain(model)
    (fault,) = [x for x in said["bad"] if not isinstance(x, Chunk)]
    assert isinstance(fault, EngineFault)
    assert said["bad"][-1] is fault
    assert "the cat" not in fault.message + caplog.text
    assert said["good"][-1] is None
    assert embed(model, ["still here"]).shape == (1, 32)


def test_closing_lets_go_of_the_weights_and_of_the_calls(tiny):
    model = load(tiny)
    model.submit(call("a", ["the cat"]))
    weights = weakref.ref(model._encoder._runner.module.model)
    model.close()
    gc.collect()
    assert weights() is None
    assert not model.busy()


# --- loading ---


@pytest.fixture
def copy(tmp_path, plain) -> Path:
    """A model to break."""
    return sentence_model(tmp_path / "copy", plain, pooling("mean"), dense(16, torch.nn.Tanh()), normalize())


@pytest.mark.parametrize(
    "type",
    [
        "sentence_transformers.models.LSTM",
        "sentence_transformers.sparse_encoder.modules.SpladePooling",
        "modeling_mine.Pooling",
        "os.system",
    ],
)
def test_an_unknown_module_is_named(copy, type):
    modules = json.loads((copy / "modules.json").read_text())
    modules[1]["type"] = type
    (copy / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(LoadFailed, match=type):
        load(copy)


@pytest.mark.parametrize("path", ["../elsewhere", "/etc", "a/../../b", "1_Pooling\\x"])
def test_a_module_folder_outside_of_the_model_is_refused(copy, path):
    modules = json.loads((copy / "modules.json").read_text())
    modules[1]["path"] = path
    (copy / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(LoadFailed, match="unsafe"):
        load(copy)


@pytest.mark.parametrize("order", [[1, 0, 2], [0, 2, 1], [0], [0, 1, 1], []])
def test_modules_in_another_order_are_refused(copy, order):
    modules = json.loads((copy / "modules.json").read_text())
    (copy / "modules.json").write_text(json.dumps([modules[i] for i in order]))
    with pytest.raises(LoadFailed, match="Transformer -> Pooling"):
        load(copy)


@pytest.mark.parametrize(
    ("file", "changes", "named"),
    [
        ("2_Dense/config.json", {"activation_function": "os.system"}, "os.system"),
        ("2_Dense/config.json", {"use_residual": True}, "use_residual"),
        ("2_Dense/config.json", {"module_input_name": "token_embeddings"}, "token_embeddings"),
        ("3_Normalize/config.json", {"module_input_name": "token_embeddings"}, "token_embeddings"),
        ("1_Pooling/config.json", {"pooling_mode": "median"}, "median"),
        ("1_Pooling/config.json", {"pooling_mode_median": True}, "pooling_mode_median"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "fill-mask"),
        ("sentence_bert_config.json", {"tokenizer_args": {"padding_side": "left"}}, "padding_side"),
        ("sentence_bert_config.json", {"modality_config": {"message": {}}}, "message"),
        ("sentence_bert_config.json", {"max_seq_length": "long"}, "max_seq_length"),
        ("config_sentence_transformers.json", {"model_type": "CrossEncoder"}, "CrossEncoder"),
        ("config_sentence_transformers.json", {"default_prompt_name": "nowhere"}, "nowhere"),
    ],
)
def test_what_would_change_a_vector_and_is_not_known_stops_the_load(copy, file, changes, named):
    assert load(copy)
    edit(copy, file, **changes)
    with pytest.raises(LoadFailed, match=named):
        load(copy)


@pytest.mark.parametrize("file", ["modules.json", "1_Pooling/config.json", "sentence_bert_config.json"])
@pytest.mark.parametrize("text", [b"", b"{", b"[[]]", b'[{"type": "\xff"}]', b"null"])
def test_a_broken_file_is_named(copy, file, text):
    (copy / file).write_bytes(text)
    with pytest.raises(LoadFailed, match=f"{file} says"):
        load(copy)


def test_a_missing_file_is_named(copy):
    (copy / "1_Pooling" / "config.json").unlink()
    with pytest.raises(LoadFailed, match=r"1_Pooling/config\.json cannot be read"):
        load(copy)


def test_weights_that_are_missing_are_not_made_up(copy):
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    del weights["encoder.layer.1.output.dense.bias"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadFailed, match=r"encoder\.layer\.1\.output\.dense\.bias"):
        load(copy)


def test_a_projection_of_the_wrong_size_stops_the_load(copy):
    edit(copy, "2_Dense/config.json", in_features=31)
    with pytest.raises(LoadFailed):
        load(copy)


def test_pickles_are_read_only_where_the_card_says_pickle(copy):
    from safetensors.torch import load_file

    before = embed(load(copy), TEXTS)
    for folder, name in ((copy, "model"), (copy / "2_Dense", "model")):
        torch.save(load_file(folder / f"{name}.safetensors"), folder / "pytorch_model.bin")
    (copy / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(UnsafeFormat, match="2_Dense"):
        load(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(LoadFailed):
        load(copy)
    assert np.array_equal(embed(load(copy, about={"format": "pickle"}), TEXTS), before)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_that_would_run_code_does_not(copy, tmp_path):
    ran = tmp_path / "ran"
    torch.save({"linear.weight": Bomb(ran)}, copy / "2_Dense" / "pytorch_model.bin")
    (copy / "2_Dense" / "model.safetensors").unlink()
    torch.save({"embeddings.word_embeddings.weight": Bomb(ran)}, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(LoadFailed):
        load(copy, about={"format": "pickle"})
    assert not ran.exists()


def test_a_model_that_needs_its_own_code_is_refused(copy):
    (copy / "mine.py").write_text("raise SystemExit('ran')")
    edit(copy, "config.json", model_type="mine", auto_map={"AutoConfig": "mine.C", "AutoModel": "mine.M"})
    with pytest.raises(UnsafeFormat, match="own code"):
        load(copy, about={"remote_code": True})


def test_supports_says_why_not(tmp_path):
    engine = Embeddings()
    good = card(tmp_path)
    assert engine.supports(good, CPU) is None
    assert "no embeddings" in engine.supports(card(tmp_path, tasks=("generate",)), CPU)
    assert "gguf" in engine.supports(card(tmp_path, format="gguf"), CPU)
    npu = Device(id="openvino:NPU", kind="openvino", name="NPU", total_bytes=1, free_bytes=1)
    assert "openvino:NPU" in engine.supports(good, npu)
    bare = Embeddings(find=lambda name: None)
    assert "pip install 'hfms[transformers]'" in bare.supports(good, CPU)


MEASURE = """
import msgspec, re, sys
from pathlib import Path
from hfms_cli import Call, Device, LoadRequest, ModelCard
from hfms_engines.embeddings import Embeddings
card, device = (msgspec.json.decode(text, type=kind) for text, kind in zip(sys.argv[2:], (ModelCard, Device)))
request = LoadRequest(folder=Path(sys.argv[1]), card=card, device=device)
model = Embeddings().load(request)
for length, many in ((256, 64), (20, 256)):
    inputs = [[1000 + i] * length for i in range(many)]
    model.submit(Call(id=str(length), model="m", task="embed", inputs=inputs))
while model.busy():
    model.step()
# Not getrusage: its peak is inherited from the process that started this one.
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(Embeddings().estimate(request), int(peak[1]) * 1024)
"""


@pytest.mark.real_model
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_a_process_with_minilm_stays_within_the_estimate(minilm):
    about = [msgspec.json.encode(x).decode() for x in (card(minilm), CPU)]
    command = [sys.executable, "-c", MEASURE, str(minilm), *about]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    estimate, used = map(int, run.stdout.split())
    assert used <= estimate <= 2 * used


def test_the_estimate_follows_precision_and_batch(tmp_path):
    gpu = Device(id="cuda:0", kind="cuda", name="GPU", total_bytes=1, free_bytes=1, torch_device="cuda:0")
    million = card(tmp_path, parameters=10**6, dtype="bfloat16")

    def estimate(about, device, dtype="auto", **options):
        request = LoadRequest(folder=tmp_path, card=about, device=device, dtype=dtype)
        return Embeddings(EmbeddingsOptions(**options)).estimate(request)

    assert estimate(million, CPU) - estimate(million, CPU, "bfloat16") == 2 * 10**6
    assert estimate(million, gpu) == estimate(million, gpu, "float16") == estimate(million, gpu, "float32") - 2 * 10**6
    assert estimate(million, CPU, batch_tokens=4096) > estimate(million, CPU)
    by_size = card(tmp_path, weights_bytes=2 * 10**6, dtype="bfloat16")
    assert estimate(by_size, CPU) == estimate(million, CPU)


def test_naming_the_engine_imports_no_torch():
    code = "import sys, hfms_engines; print(sorted({'torch', 'transformers', 'numpy'} & {*sys.modules}))"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"
