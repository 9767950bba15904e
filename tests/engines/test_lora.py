"""LoRA adapters in the engines against PEFT: the same tokens, whatever else runs in the batch."""

from __future__ import annotations

import json
import shutil

import msgspec
import pytest

from hfms_cli import BadRequest, Unavailable

# Before torch and openvino, whose environment they set.
pytest.importorskip("hfms_engines.torch_runner", exc_type=ImportError)
pytest.importorskip("hfms_engines.openvino_export", exc_type=ImportError)
pytest.importorskip("peft")

import torch
from safetensors.torch import load_file, save_file

from hfms_engines import openvino_runner
from hfms_engines.paged import PagedScheduler
from tests.engines import peft_adapters, test_generation, test_openvino, tiny
from tests.engines.driving import call, drain, prompts
from tests.engines.test_openvino import converted, expected

CONFIGS = {
    "plain": {},
    "attention": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
    "patterns": {
        "r": 3,
        "use_rslora": True,
        "target_modules": r"model\.layers\.\d\.(self_attn\.[qkvo]|mlp\.down)_proj",
        "rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\.down_proj": 1},
        "alpha_pattern": {"o_proj": 16},
    },
    "head": {"r": 8, "target_modules": ["lm_head", "up_proj"], "exclude_modules": ["layers.0.mlp.up_proj"]},
}


@pytest.fixture(scope="module")
def adapters(llama, tmp_path_factory):
    """Folders of adapters of the tiny model."""
    top = tmp_path_factory.mktemp("adapters")
    return {
        name: peft_adapters.save(top / name, llama, seed=i, **config)
        for i, (name, config) in enumerate(CONFIGS.items())
    }


def paged(folder, *, dtype: str = "float32", max_loras: int = 4) -> PagedScheduler:
    made = test_openvino.scheduler(folder)
    runner = openvino_runner.load(
        folder, dtype=dtype, cache_bytes=2**22, share=True, max_loras=max_loras, max_lora_rank=8
    )
    return PagedScheduler(runner, made.info, prefill_tokens=24, stall_seconds=60)


def on_torch(folder, cache: str):
    return test_generation.load(folder, cache=cache, kv_cache_bytes=2**22, max_loras=4, max_lora_rank=8)


@pytest.fixture(params=["slots", "paged", "openvino"])
def model(request, llama):
    """A loaded model with room for four adapters."""
    if request.param != "openvino":
        return on_torch(llama, request.param)
    return paged(request.getfixturevalue("export"))


def ask(model, id: str, prompt: list[int], adapter: str = "", **more) -> None:
    asked = call(id, prompt, **{"ignore_eos": True, "max_tokens": 12} | more)
    model.submit(msgspec.structs.replace(asked, adapter=adapter))


# --- what is answered ---


def test_tokens_are_those_of_peft_for_base_and_adapters_in_one_batch(model, llama, adapters, theirs, made):
    some = prompts(7, 30, 12, 19, 5)
    references = {"": theirs} | {name: peft_adapters.merged(llama, folder) for name, folder in adapters.items()}
    wanted = {name: expected(references[name], p, 12) for name, p in zip(references, some, strict=True)}
    assert len({tuple(expected(m, some[0], 12)) for m in references.values()}) == len(references)
    for name, folder in adapters.items():
        model.add_adapter(peft_adapters.read(folder, name))
    for name, p in zip(references, some, strict=True):  # alone
        ask(model, f"alone {name}", p, name)
        drain(model)
    for name, p in zip(references, some, strict=True):  # together
        ask(model, f"together {name}", p, name)
    drain(model)
    for name in references:
        assert made[f"alone {name}", 0] == wanted[name]
        assert made[f"together {name}", 0] == wanted[name]


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt", "qwen2"])
@pytest.mark.parametrize("engine", ["transformers", "openvino"])
def test_other_kinds_of_layer_are_changed_too(name, engine, tmp_path, made):
    folder = tiny.save(tmp_path / "model", tiny.ARCHITECTURES[name]())
    adapter = peft_adapters.save(tmp_path / "adapter", folder, fan_in_fan_out=name == "gpt2")
    model = test_generation.load(folder) if engine == "transformers" else paged(converted(folder, tmp_path / "export"))
    model.add_adapter(peft_adapters.read(adapter, "one"))
    prompt, other = prompts(9, 14)
    ask(model, "a", prompt, "one")
    ask(model, "b", other)
    drain(model)
    assert made["a", 0] == expected(peft_adapters.merged(folder, adapter), prompt, 12)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantised_weights_are_changed_too(quantize, llama, adapters, tmp_path, made):
    model = paged(converted(llama, tmp_path / "export", quantize))
    layers = model._runner.changes.adapters.layers
    assert len(layers) == 3 * 7 + 1
    model.add_adapter(peft_adapters.read(adapters["plain"], "one"))
    prompt = prompts(9)[0]
    ask(model, "with", prompt, "one")
    ask(model, "without", prompt)
    drain(model)
    assert made["with", 0] != made["without", 0]


@pytest.mark.parametrize("engine", ["transformers", "openvino"])
def test_blocks_are_never_shared_between_adapters(engine, llama, export, adapters, made):
    model = on_torch(llama, "paged") if engine == "transformers" else paged(export)
    model.add_adapter(peft_adapters.read(adapters["plain"], "one"))
    model.add_adapter(peft_adapters.read(adapters["attention"], "two"))
    prompt = prompts(100)[0]
    read: list[int] = []
    forward = model._runner.forward

    def watched(pieces, **rest):
        read.append(sum(map(len, pieces)))
        return forward(pieces, **rest)

    model._runner.forward = watched
    for adapter in ("", "one", "two"):
        read.clear()
        ask(model, f"first {adapter}", prompt, adapter, max_tokens=1)
        drain(model)
        assert sum(read) == 100
        read.clear()
        ask(model, f"again {adapter}", prompt, adapter, max_tokens=1)
        drain(model)
        assert sum(read) < 100
        assert made[f"first {adapter}", 0] == made[f"again {adapter}", 0]


def test_adapters_come_and_go_while_calls_run(model, llama, adapters, made):
    some = prompts(7, 9)
    model.add_adapter(peft_adapters.read(adapters["plain"], "one"))
    ask(model, "a", some[0], "one", max_tokens=30)
    ask(model, "b", some[1], max_tokens=30)
    for _ in range(5):
        model.step()
    model.add_adapter(peft_adapters.read(adapters["patterns"], "two"))
    for _ in range(5):
        model.step()
    model.remove_adapter("two")
    drain(model)
    assert made["a", 0] == expected(peft_adapters.merged(llama, adapters["plain"]), some[0], 30)
    model.remove_adapter("one")
    ask(model, "c", some[1], max_tokens=30)
    drain(model)
    assert made["c", 0] == made["b", 0]


def test_a_call_by_an_adapter_that_is_not_there_is_refused(model):
    with pytest.raises(Unavailable, match="not loaded in this engine"):
        ask(model, "a", [5, 6, 7], "nobody")


# --- what is refused ---


def changed(folder, out, **fields):
    """A copy of an adapter whose configuration says something else."""
    shutil.copytree(folder, out)
    file = out / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return out


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"use_dora": True}, "`use_dora`"),
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save`"),
        ({"lora_bias": True}, "`lora_bias`"),
        ({"layers_to_transform": [0]}, "`layers_to_transform`"),
        ({"something_new": {"a": 1}}, "`something_new`"),
        ({"bias": "all"}, "`bias` is 'all'"),
        ({"peft_type": "IA3"}, "`peft_type` 'IA3'"),
        ({"task_type": "SEQ_CLS"}, "`task_type` 'SEQ_CLS'"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights` is 'pissa'"),
        ({"target_modules": None}, "`target_modules`"),
        ({"r": 0}, r"\$\.r"),
    ],
)
def test_a_configuration_that_cannot_be_honoured_is_refused_by_name(fields, said, adapters, tmp_path):
    with pytest.raises(BadRequest, match=said):
        peft_adapters.read(changed(adapters["plain"], tmp_path / "a", **fields), "one")


def test_an_adapter_without_safetensors_is_refused(adapters, tmp_path):
    folder = changed(adapters["plain"], tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(BadRequest, match="safetensors only"):
        peft_adapters.read(folder, "one")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"r": 3}, "another model"),
        ({"rank_pattern": {"q_proj": 2}}, "another model"),
        ({"target_modules": ["q_proj"]}, "does not name as its target"),
        ({"target_modules": ["nothing"]}, "fits no layer"),
        ({"target_modules": "(a+)+$|("}, "pattern"),
        ({"rank_pattern": {"(.*)*x": 2}, "r": 900}, "is the most here|pattern"),
        ({"r": 16}, "is the most here"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_and_changes_nothing(fields, said, model, adapters, tmp_path, made):
    prompt = prompts(9)[0]
    ask(model, "before", prompt)
    drain(model)
    adapter = peft_adapters.read(changed(adapters["plain"], tmp_path / "a", **fields), "one")
    with pytest.raises(BadRequest, match=said):
        model.add_adapter(adapter)
    ask(model, "after", prompt)
    drain(model)
    assert made["before", 0] == made["after", 0]
    with pytest.raises(Unavailable):
        ask(model, "a", prompt, "one")


def test_an_adapter_of_a_model_with_more_or_fewer_layers_is_refused(model, tmp_path):
    for layers in (2, 4):
        config = tiny.ARCHITECTURES["llama"]()
        config.num_hidden_layers = layers
        other = tiny.save(tmp_path / f"model{layers}", config)
        adapter = peft_adapters.save(tmp_path / f"adapter{layers}", other, target_modules=["q_proj"])
        with pytest.raises(BadRequest, match=r"another model|this model has not"):
            model.add_adapter(peft_adapters.read(adapter, "one"))


def test_weights_that_are_not_finite_are_refused(model, adapters, tmp_path):
    folder = changed(adapters["plain"], tmp_path / "a")
    weights = load_file(folder / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("inf")
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(BadRequest, match="not finite"):
        model.add_adapter(peft_adapters.read(folder, "one"))


def test_more_adapters_than_there_is_room_for_are_refused(model, adapters):
    for i in range(4):
        model.add_adapter(peft_adapters.read(adapters["plain"], str(i)))
    model.add_adapter(peft_adapters.read(adapters["plain"], "3"))  # it is there
    with pytest.raises(BadRequest, match="4 are loaded already"):
        model.add_adapter(peft_adapters.read(adapters["plain"], "4"))


def test_a_model_without_room_for_adapters_has_no_inputs_for_them_and_says_so(export, adapters):
    model = test_openvino.scheduler(export)
    assert not model._runner.changes.adapters.layers
    with pytest.raises(BadRequest, match=r"\[engine.openvino\] max_loras"):
        model.add_adapter(peft_adapters.read(adapters["plain"], "one"))


def test_nothing_of_one_row_reaches_another_however_large_it_is(model, adapters, tmp_path, made):
    """Its sums are infinite, which times nothing is not a number."""
    folder = changed(adapters["plain"], tmp_path / "a")
    weights = {k: torch.full_like(v, 1e38) for k, v in load_file(folder / "adapter_model.safetensors").items()}
    save_file({k: v / 1e3 for k, v in weights.items()}, folder / "adapter_model.safetensors")
    prompt = prompts(9)[0]
    ask(model, "before", prompt)
    drain(model)
    model.add_adapter(peft_adapters.read(folder, "one"))
    ask(model, "after", prompt)
    ask(model, "spoilt", prompt, "one")
    drain(model)
    assert made["after", 0] == made["before", 0]
