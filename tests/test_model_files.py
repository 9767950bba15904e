"""Which files are taken of a repository that holds the same model many times over."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfms_cli.model_files import SeveralModels, choose, gguf_models, gguf_tag, no_model

SIDE = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]


@pytest.mark.parametrize(
    ("left", "taken"),
    [
        (["model.safetensors"], ["model.safetensors"]),
        (["model.safetensors", "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"], ["model.safetensors"]),
        (["model.safetensors", "onnx/model.onnx", "onnx/config.json", "coreml/a/b.json"], ["model.safetensors"]),
        (["model.safetensors", "model.fp16.safetensors", "consolidated.safetensors"], ["model.safetensors"]),
        (["model.safetensors", "original/params.json", "original/consolidated.00.pth"], ["model.safetensors"]),
        (["model.safetensors", *SHARDS], ["model.safetensors"]),
        (["consolidated.safetensors", *SHARDS], SHARDS),
        (["model.fp16.safetensors", "adapter_model.safetensors"], ["model.fp16.safetensors"]),
        (["model.safetensors", "modeling_x.py", "README.md", ".gitattributes", "LICENSE"], ["model.safetensors"]),
        (["model.safetensors", "trainer_state.json", "training_args.bin"], ["model.safetensors"]),
        (
            [
                "model.safetensors",
                "modules.json",
                "1_Pooling/config.json",
                "2_Dense/model.safetensors",
                "2_Dense/x.bin",
            ],
            ["model.safetensors", "modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"],
        ),
        (["model.safetensors", "x.Q4_0.gguf"], ["model.safetensors"]),
        (["pytorch_model.bin", "optimizer.pt", "rng_state.pth", "tf_model.h5"], ["pytorch_model.bin"]),
        (
            ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json", "training_args.bin"],
            ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"],
        ),
    ],
)
def test_one_set_of_weights_is_taken_with_its_side_files(left, taken):
    assert choose([*SIDE, *left]) == tuple(sorted([*SIDE, *taken]))


IR = ["openvino_model.xml", "openvino_model.bin"]
ONNX = ["onnx/model.onnx", "onnx/model.onnx_data"]
VECTORS = ["modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"]


@pytest.mark.parametrize(
    ("left", "taken"),
    [
        ([*IR, "openvino_tokenizer.xml", "openvino_tokenizer.bin", "openvino_detokenizer.xml"], IR),
        ([*IR, "openvino_config.json"], [*IR, "openvino_config.json"]),
        (
            [f"openvino/{p}" for p in (*IR, "openvino_model_qint8.xml", "openvino_model_qint8.bin")],
            [f"openvino/{p}" for p in IR],
        ),
        ([*IR, *ONNX, "pytorch_model.bin"], IR),
        ([*ONNX, "onnx/model_q4.onnx", "onnx/config.json", *VECTORS, "pytorch_model.bin"], [*ONNX, *VECTORS]),
        (["model.onnx", "model.onnx.data"], ["model.onnx", "model.onnx.data"]),
        ([*ONNX, "pytorch_model.bin"], ["pytorch_model.bin"]),
        ([*IR, *ONNX, "model.safetensors"], ["model.safetensors"]),
        (["openvino_model.xml", "pytorch_model.bin"], ["pytorch_model.bin"]),
    ],
)
def test_where_there_are_no_safetensors_a_graph_is_taken_with_its_weights_and_before_pickles_where_it_can_be_run(
    left, taken
):
    assert choose([*SIDE, *left]) == tuple(sorted([*SIDE, *taken]))


def test_a_graph_without_a_config_is_no_model_and_a_gguf_comes_before_one():
    assert choose([*IR, *ONNX]) == ()
    assert choose([*SIDE, *IR, "m-Q4_0.gguf"]) == ("m-Q4_0.gguf",)


def test_of_an_old_sentence_transformers_model_the_transformers_folder_is_taken():
    paths = ["modules.json", "0_BERT/config.json", "0_BERT/model.safetensors", "1_Pooling/config.json"]
    assert choose([*paths, "0_BERT/pytorch_model.bin"]) == tuple(sorted(paths))


@pytest.mark.parametrize("paths", [[], ["README.md"], ["config.json"], ["model.safetensors"], ["onnx/model.onnx"]])
def test_nothing_is_taken_where_there_is_no_model(paths):
    assert choose(paths) == ()


GGUFS = ["m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m-Q8_0.gguf", "m-BF16-00001-of-00002.gguf", "m-BF16-00002-of-00002.gguf"]


@pytest.mark.parametrize(
    ("quant", "taken"),
    [
        ("Q4_K_M", ["m-Q4_K_M.gguf"]),
        ("q8_0", ["m-Q8_0.gguf"]),
        ("BF16", ["m-BF16-00001-of-00002.gguf", "m-BF16-00002-of-00002.gguf"]),
        ("m-Q4_K_S", ["m-Q4_K_S.gguf"]),
        ("Q4_K", []),
        ("4_K_M", []),
        ("Q2_K", []),
        (".*", []),
    ],
)
def test_a_gguf_model_is_taken_by_its_quantisation(quant, taken):
    assert choose(["config.json", "model.safetensors", "mmproj-F16.gguf", *GGUFS], quant) == tuple(taken)


def test_one_gguf_model_needs_no_choice_and_several_do():
    assert choose(["README.md", "config.json", "m-Q8_0.gguf", "mmproj-F16.gguf"]) == ("m-Q8_0.gguf",)
    with pytest.raises(SeveralModels) as caught:
        choose(GGUFS)
    assert caught.value.models == ("m-BF16", "m-Q4_K_M", "m-Q4_K_S", "m-Q8_0")


@pytest.mark.parametrize(
    ("model", "tag"),
    [
        ("SmolLM2-135M-Instruct.Q4_1", "Q4_1"),
        ("m-IQ4_XS", "IQ4_XS"),
        ("m-UD-Q4_K_XL", "UD-Q4_K_XL"),
        ("Q4_K_M/m-Q4_K_M", "Q4_K_M"),
        ("m-f16", "f16"),
        ("folder/model", "model"),
    ],
)
def test_a_gguf_models_tag_finds_it(model, tag):
    assert gguf_tag(model) == tag
    assert choose([f"{model}.gguf", "other-Q2_K.gguf"], tag) == (f"{model}.gguf",)


NAMES = st.sampled_from(
    [
        "config.json",
        "model.safetensors",
        "pytorch_model.bin",
        "a.gguf",
        "b.gguf",
        "x.py",
        "x.pt",
        "modules.json",
        "x.so",
        "model.onnx",
        "openvino_model.xml",
        "openvino_model.bin",
    ]
)
FOLDERS = st.sampled_from(["", "0_BERT/", "1_Pooling/", "onnx/", "a/b/"])


@given(st.lists(st.builds(str.__add__, FOLDERS, NAMES), unique=True))
def test_only_what_there_is_can_be_chosen_and_never_code_or_a_mix_with_pickles(paths):
    try:
        chosen = choose(paths)
    except SeveralModels:
        chosen = choose(paths, "a")
    assert {*chosen} <= {*paths}
    assert not any(p.endswith((".py", ".so")) for p in chosen)
    weights = [p for p in chosen if not p.endswith(("openvino_model.bin", "json"))]
    kinds = {p.rpartition(".")[2].replace("bin", "pt") for p in weights}
    # What stands behind the pooling of a graph has its weights beside it.
    assert len(kinds) == bool(chosen) or (kinds & {"xml", "onnx"} and len(kinds - {"safetensors"}) == 1)


def test_parts_of_a_gguf_model_are_one_model():
    assert gguf_models(GGUFS)["m-BF16"] == ["m-BF16-00001-of-00002.gguf", "m-BF16-00002-of-00002.gguf"]
    assert gguf_models([*GGUFS, "m-BF16.gguf"])["m-BF16"] == ["m-BF16.gguf"]


def test_a_gguf_model_that_lacks_a_part_is_none_and_the_reason_counts_what_is_missing():
    parts = [p.replace("00002.", "00003.") for p in GGUFS if "BF16" in p]
    assert [*gguf_models([*parts, "m-Q8_0.gguf"])] == ["m-Q8_0"]
    assert choose(parts) == choose([*parts, "m-Q8_0.gguf"], "BF16") == ()
    assert no_model(parts) == "holds some parts of the GGUF model `m-BF16` and not all: 1 missing."


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        (["openvino_other.xml", "openvino_other.bin"], "OpenVINO's under a name that is not read"),
        (["onnx/model_q4.onnx"], "ONNX under a name that is not read"),
        (["tf_model.h5"], "TensorFlow's"),
        (["flax_model.msgpack"], "Flax's"),
        (["model.ckpt"], "of pickles that no engine reads"),
        (["tf_model.h5", "flax_model.msgpack"], "TensorFlow's and Flax's"),
    ],
)
def test_weights_of_another_format_are_never_taken_and_the_reason_names_it(weights, told):
    assert choose([*SIDE, *weights]) == ()
    assert f"its weights are {told}" in no_model([*SIDE, *weights])


def test_a_repository_without_weights_blames_no_format():
    assert "weights are" not in no_model(["README.md", "config.json"])
