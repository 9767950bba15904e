"""What `inspect` reads from a model's files, and which files it does not believe."""

import json
import struct

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from hfms_cli import LoadFailed
from hfms_cli.models.gguf import TENSOR_TYPES, read_gguf
from hfms_cli.models.inspect import inspect

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 2048}
BERT = {"model_type": "bert", "architectures": ["BertModel"], "max_position_embeddings": 512}
CLASSIFIER = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}


def write_config(folder, config=LLAMA, name="config.json"):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(config))


def write_weights(folder, name="model.safetensors", dtype=np.float32):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    save_file({"a": np.zeros((4, 8), dtype), "b": np.zeros(8, dtype)}, folder / name, {"format": "pt"})


def write_gguf(path, architecture="llama", parts=1, **values):
    """parts: 1 or 2; the names of two are of gguf's own making."""
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=parts - 1)
    writer.add_context_length(1024)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "a", "b"])
    for key, value in values.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    quantised = gguf.quants.quantize(np.ones((4, 32), np.float32), gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("blk.0.weight", quantised, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def llama(tmp_path):
    write_config(tmp_path)
    write_weights(tmp_path)
    return tmp_path


# What is read.


def test_a_safetensors_model_is_read_from_its_config_and_header(llama):
    card = inspect(llama)
    assert (card.format, card.model_type, card.architecture) == ("safetensors", "llama", "LlamaForCausalLM")
    assert (card.parameters, card.weights_bytes, card.dtype) == (40, 160, "float32")
    assert (card.tasks, card.context_length, card.weights) == (("generate",), 2048, ("model.safetensors",))
    assert not card.remote_code


def test_every_shard_of_the_index_counts_and_nothing_else(tmp_path):
    write_config(tmp_path)
    write_weights(tmp_path, "model-00001-of-00002.safetensors", np.float16)
    write_weights(tmp_path, "model-00002-of-00002.safetensors", np.float16)
    write_weights(tmp_path, "consolidated.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    write_config(tmp_path, index, "model.safetensors.index.json")
    card = inspect(tmp_path)
    assert (card.parameters, card.weights_bytes, card.dtype) == (80, 160, "float16")
    assert len(card.weights) == 2


def test_a_shard_that_is_missing_is_named(tmp_path):
    write_config(tmp_path)
    write_weights(tmp_path, "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    write_config(tmp_path, index, "model.safetensors.index.json")
    with pytest.raises(LoadFailed, match="model-00002-of-00002"):
        inspect(tmp_path)


def test_shards_without_their_index_are_no_model(tmp_path):
    write_config(tmp_path)
    write_weights(tmp_path, "model-00001-of-00002.safetensors")
    with pytest.raises(LoadFailed, match=r"index\.json"):
        inspect(tmp_path)


@pytest.mark.parametrize(
    ("config", "tasks"),
    [
        (LLAMA, ("generate",)),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_positions": 1024}, ("generate",)),
        (BERT, ("embed",)),
        ({"model_type": "xlm-roberta", "architectures": ["XLMRobertaModel"]}, ("embed",)),
        (CLASSIFIER, ()),
        (CLASSIFIER | {"id2label": {"0": "relevant"}}, ("score",)),
        (CLASSIFIER | {"num_labels": 1}, ("score",)),
        (CLASSIFIER | {"id2label": {"0": "no", "1": "yes"}}, ()),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, ()),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, ()),
        ({"model_type": "llama"}, ()),
        ({"architectures": ["XForConditionalGeneration"], "vision_config": {}}, ("image-text-to-text",)),
        ({"architectures": ["XModel"], "vision_config": {}}, ()),
    ],
)
def test_tasks_come_from_the_architecture(tmp_path, config, tasks):
    write_config(tmp_path, config)
    write_weights(tmp_path)
    assert inspect(tmp_path).tasks == tasks


def test_a_sentence_transformers_model_embeds_whatever_its_architecture(llama):
    write_config(llama, [{"type": "sentence_transformers.models.Transformer", "path": ""}], "modules.json")
    write_config(llama, {"max_seq_length": 128}, "sentence_bert_config.json")
    card = inspect(llama)
    assert (card.tasks, card.context_length) == (("embed",), 128)


def test_a_model_with_a_pooling_embeds_although_it_was_once_a_classifier(tmp_path):
    write_config(tmp_path, CLASSIFIER | {"num_labels": 1})
    write_weights(tmp_path)
    write_config(tmp_path, [{"type": "sentence_transformers.models.Transformer", "path": ""}], "modules.json")
    assert inspect(tmp_path).tasks == ("score",)
    write_config(tmp_path, {}, "1_Pooling/config.json")
    assert inspect(tmp_path).tasks == ("embed",)


def test_weights_in_an_old_transformer_folder_are_found(tmp_path):
    write_config(tmp_path, [{"type": "sentence_transformers.models.Transformer", "path": "0_BERT"}], "modules.json")
    write_config(tmp_path, BERT, "0_BERT/config.json")
    write_weights(tmp_path, "0_BERT/model.safetensors")
    card = inspect(tmp_path)
    assert (card.tasks, card.weights, card.parameters) == (("embed",), ("0_BERT/model.safetensors",), 40)


def test_own_code_is_told(llama):
    write_config(llama, {**LLAMA, "auto_map": {"AutoModel": "modeling_x.X"}})
    assert inspect(llama).remote_code


def test_the_context_of_a_model_of_several_modalities_is_its_texts(llama):
    write_config(llama, {"model_type": "gemma3", "text_config": {"max_position_embeddings": 77}})
    assert inspect(llama).context_length == 77


def test_infinity_in_a_config_is_read_as_transformers_reads_it(llama):
    (llama / "config.json").write_text('{"model_type": "mamba2", "time_step_limit": [0.0, Infinity]}')
    assert inspect(llama).model_type == "mamba2"


def test_the_echo_model_has_no_weights(tmp_path):
    write_config(tmp_path, {"model_type": "echo", "architectures": ["EchoModel"]})
    card = inspect(tmp_path)
    assert (card.format, card.weights_bytes, card.weights) == ("none", 0, ())
    assert card.tasks == ("generate", "embed", "score", "transcribe", "image-text-to-text")


def test_a_gguf_file_is_read_through_its_folder_and_by_its_own_path(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    card = inspect(tmp_path)
    assert card == inspect(tmp_path / "tiny.gguf")
    assert (card.format, card.model_type, card.dtype, card.parameters) == ("gguf", "llama", "Q4_1", 160)
    assert (card.tasks, card.context_length, card.weights) == (("generate",), 1024, ("tiny.gguf",))
    assert card.weights_bytes >= 4 * 20 + 32 * 4


@pytest.mark.parametrize(
    ("values", "size"),
    [
        ({}, 0),
        ({"block_count": 3, "embedding_length": 32, "attention.head_count": 4}, 2 * 3 * 4 * (8 + 8)),
        (
            {"block_count": 3, "embedding_length": 32, "attention.head_count": 4, "attention.head_count_kv": 2},
            2 * 3 * 2 * (8 + 8),
        ),
        (
            {
                "block_count": 3,
                "embedding_length": 32,
                "attention.head_count": 4,
                "attention.key_length": 16,
                "attention.value_length": 4,
            },
            2 * 3 * 4 * (16 + 4),
        ),
    ],
)
def test_the_cache_of_a_token_is_counted_from_gguf(tmp_path, values, size):
    write_gguf(tmp_path / "x.gguf", **values)
    assert inspect(tmp_path).token_cache_bytes == size


@pytest.mark.parametrize(
    ("architecture", "values", "tasks"),
    [
        ("qwen3", {}, ("generate",)),
        ("qwen3", {"pooling_type": 3}, ("embed",)),
        ("qwen3", {"pooling_type": 4}, ()),
        ("bert", {"pooling_type": 1}, ("embed",)),
        ("clip", {}, ()),
    ],
)
def test_gguf_tasks_come_from_the_architecture_and_its_pooling(tmp_path, architecture, values, tasks):
    write_gguf(tmp_path / "x.gguf", architecture, **values)
    assert inspect(tmp_path).tasks == tasks


def test_of_several_gguf_files_one_must_be_named(tmp_path):
    write_gguf(tmp_path / "x.Q4_1.gguf")
    write_gguf(tmp_path / "x.Q8_0.gguf")
    with pytest.raises(LoadFailed, match=r"x\.Q4_1\.gguf, x\.Q8_0\.gguf"):
        inspect(tmp_path)
    assert inspect(tmp_path, ["x.Q8_0.gguf"]).weights == ("x.Q8_0.gguf",)


def test_the_parts_of_one_gguf_model_are_one_model(tmp_path):
    write_gguf(tmp_path / "x.gguf", parts=2)
    card = inspect(tmp_path)
    assert (card.parameters, card.context_length) == (160, 1024)
    assert card.weights == ("x-00001-of-00002.gguf", "x-00002-of-00002.gguf")
    (tmp_path / "x-00002-of-00002.gguf").unlink()
    with pytest.raises(LoadFailed, match="x-00002-of-00002"):
        inspect(tmp_path)


def test_parts_of_a_gguf_model_under_each_others_names_or_under_another_are_refused(tmp_path):
    write_gguf(tmp_path / "x.gguf", parts=2)
    one, two = (tmp_path / f"x-0000{i}-of-00002.gguf" for i in (1, 2))
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    with pytest.raises(LoadFailed, match=r"x-00001-of-00002\.gguf` says that it is part 2 of 2"):
        inspect(tmp_path)
    one.write_bytes(kept)
    one.rename(tmp_path / "alone.gguf")
    two.unlink()
    with pytest.raises(LoadFailed, match="part 1 of 2"):
        inspect(tmp_path / "alone.gguf")


def test_a_part_of_another_gguf_model_is_refused(tmp_path):
    write_gguf(tmp_path / "x.gguf", parts=2)
    short = gguf.GGUFWriter(tmp_path / "x-00002-of-00002.gguf", "llama")
    for key, value in (("split.no", 1), ("split.count", 2)):
        short.add_uint16(key, value)
    short.write_header_to_file()
    short.write_kv_data_to_file()
    short.write_tensors_to_file()
    short.close()
    with pytest.raises(LoadFailed, match="tells of 2 tensors"):
        inspect(tmp_path)


def test_only_the_files_of_the_manifest_are_looked_at(llama):
    write_gguf(llama / "x.gguf")
    assert inspect(llama, ["x.gguf"]).format == "gguf"
    assert inspect(llama, ["config.json", "model.safetensors"]).format == "safetensors"


def test_pickles_are_told_and_what_training_left_is_none(tmp_path):
    write_config(tmp_path)
    (tmp_path / "training_args.bin").write_bytes(b"x")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 100)
    card = inspect(tmp_path)
    assert (card.format, card.weights, card.weights_bytes) == ("pickle", ("pytorch_model.bin",), 100)


def test_safetensors_win_over_pickles(llama):
    (llama / "pytorch_model.bin").write_bytes(b"x")
    assert inspect(llama).format == "safetensors"


def test_our_table_of_tensor_types_is_ggmls():
    theirs = {t.value: (t.name, *gguf.GGML_QUANT_SIZES[t]) for t in gguf.GGML_QUANT_SIZES}
    assert {t: TENSOR_TYPES.get(t) for t in theirs} == theirs


# What is not believed.


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "There is no model"),
        ({"README.md": b"hello"}, "There is no model"),
        ({"config.json": b"{}"}, "There is no model"),
        ({"model.safetensors": b"x"}, "without a `config.json`"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}, "adapter"),
        ({"config.json": b"[]", "model.safetensors": b"x"}, "not what it should be"),
        ({"config.json": b"{", "model.safetensors": b"x"}, "not valid JSON"),
        ({"config.json": b"\xff", "model.safetensors": b"x"}, "not valid JSON"),
        ({"config.json": b"[" * 100_000, "model.safetensors": b"x"}, "not valid JSON"),
        ({"config.json": b'{"architectures": "x"}', "model.safetensors": b"x"}, r"\$\.architectures"),
        ({"config.json": b" " * (10 * 2**20) + b"{}", "model.safetensors": b"x"}, "longer than 10 MB"),
    ],
)
def test_what_is_no_model_is_refused_with_the_reason(tmp_path, files, said):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(LoadFailed, match=said):
        inspect(tmp_path)


def test_a_missing_folder_is_refused_with_the_reason(tmp_path):
    with pytest.raises(LoadFailed, match="No such file"):
        inspect(tmp_path / "missing")


@pytest.mark.parametrize("keep", [0, 7, 8, 20, -1])
def test_a_torn_safetensors_file_is_refused(llama, keep):
    whole = (llama / "model.safetensors").read_bytes()
    (llama / "model.safetensors").write_bytes(whole[:keep])
    with pytest.raises(LoadFailed, match="whole safetensors"):
        inspect(llama)


@pytest.mark.parametrize(
    "tensor",
    [
        {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "NEW", "shape": [2**40], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32"},
        [],
    ],
)
def test_a_safetensors_header_that_lies_is_refused(llama, tensor):
    raw = json.dumps({"x": tensor}).encode()
    (llama / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(8))
    with pytest.raises(LoadFailed, match="whole safetensors"):
        inspect(llama)


@given(st.binary(max_size=200))
def test_no_header_of_a_safetensors_file_is_worse_than_refused(tmp_path_factory, raw):
    folder = tmp_path_factory.mktemp("model")
    write_config(folder)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)
    with pytest.raises(LoadFailed):
        inspect(folder)


def test_a_gguf_file_torn_anywhere_is_refused(tmp_path):
    write_gguf(tmp_path / "x.gguf")
    whole = (tmp_path / "x.gguf").read_bytes()
    needed = max(n for n in range(len(whole)) if whole[n])  # the file may be padded at its end
    for keep in range(needed):
        (tmp_path / "x.gguf").write_bytes(whole[:keep])
        with pytest.raises(LoadFailed, match="whole GGUF"):
            read_gguf(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    "body",
    [
        b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0),  # tensors
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63),  # values
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63),  # a key's length
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 8, 2**61),  # an array of strings
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 4, 2**63),  # an array of numbers
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 9, 1),  # an array of arrays
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 99),  # a type
        b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<I", 2**32 - 1),  # dimensions
        b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<IQQIQ", 2, 2**63, 2**63, 99, 0),  # a shape
        b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<IQIQ", 1, 1, 0, 2**63),  # an offset
        b"GGUF" + struct.pack(">IQQ", 3, 0, 0),  # the other byte order
        b"GGUF" + struct.pack("<IQQ", 1, 0, 0),  # an old version
        b"PK\x03\x04",
    ],
)
def test_hostile_lengths_and_counts_in_a_gguf_file_are_refused(tmp_path, body):
    (tmp_path / "x.gguf").write_bytes(body + bytes(100))
    with pytest.raises(LoadFailed, match="whole GGUF"):
        read_gguf(tmp_path / "x.gguf")


def test_a_huge_gguf_file_without_end_to_its_header_is_given_up(tmp_path):
    with (tmp_path / "x.gguf").open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 0, 2**38))
        file.truncate(2**40)  # sparse: takes no room on the disk
    with pytest.raises(LoadFailed, match="counts more than it holds"):
        read_gguf(tmp_path / "x.gguf")


@given(st.binary(max_size=300))
def test_no_gguf_header_is_worse_than_refused(tmp_path_factory, raw):
    path = tmp_path_factory.mktemp("model") / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + raw)
    try:
        header = read_gguf(path)
    except LoadFailed:
        return
    assert header.parameters <= 8 * path.stat().st_size


def test_reading_a_gguf_header_does_not_read_the_weights(tmp_path):
    write_gguf(tmp_path / "x.gguf")
    with (tmp_path / "x.gguf").open("r+b") as file:
        file.truncate(2**40)
    assert read_gguf(tmp_path / "x.gguf").parameters == 160
