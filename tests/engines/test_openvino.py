"""The openvino engine against transformers: tiny models of real architectures, and SmolLM2 by its real process."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from hfms_cli import (
    BadRequest,
    Caller,
    Conversation,
    Device,
    HfmsError,
    LoadedInfo,
    LoadFailed,
    LoadRequest,
    ModelCard,
)
from hfms_engines.conversion import quality_of
from hfms_engines.openvino import FAMILIES, OpenVinoEngine, OpenVinoOptions

# Before torch and openvino, whose environment they set.
pytest.importorskip("hfms_engines.torch_runner", exc_type=ImportError)
pytest.importorskip("hfms_engines.openvino_export", exc_type=ImportError)

import numpy as np
import openvino
import torch

from hfms_engines import conversion, model_digest, openvino_export, openvino_runner, torch_runner
from hfms_engines.paged import PagedScheduler
from tests.engines import tiny
from tests.engines.driving import CPU, call, drain, gguf_card, prompts

TESTED = [name for name, config in tiny.ARCHITECTURES.items() if config().model_type in FAMILIES]


def card(folder: Path) -> ModelCard:
    config = json.loads((folder / "config.json").read_text())
    return ModelCard(
        format="safetensors",
        model_type=config["model_type"],
        architecture=config["architectures"][0],
        tasks=("generate",),
        weights_bytes=sum(f.stat().st_size for f in folder.glob("*.safetensors")),
        dtype="float32",
    )


def request(folder: Path, dtype: str = "float32") -> LoadRequest:
    return LoadRequest(folder=folder, card=card(folder), device=CPU, dtype=dtype)


def converted(folder: Path, out: Path, quantize: openvino_export.Made = "none") -> Path:
    """What the process makes, made in this one."""
    out.mkdir()
    openvino_export.make(openvino_export.Job(str(folder), card(folder), CPU, quantize), out)
    return out


def scheduler(
    folder: Path,
    *,
    blocks: int = 64,
    max_batch: int = 4,
    prefill_tokens: int = 24,
    share: bool = True,
    guess: int = 0,
    draft=None,
    graph: Path | None = None,
):
    """A model of an export, with a cache of so many blocks of 32 tokens."""
    one = openvino_runner.load(folder, dtype="float32", cache_bytes=None, share=False, graph=graph)
    block_bytes = sum(cache.byte_size for cache in one._caches) // one.blocks.count
    runner = openvino_runner.load(folder, dtype="float32", cache_bytes=blocks * block_bytes, share=share, graph=graph)
    info = LoadedInfo(
        engine="openvino",
        device="cpu",
        dtype="float32",
        tasks=("generate",),
        context_length=runner.context_length,
        max_batch=max_batch,
        memory_bytes=1,
    )
    return PagedScheduler(
        runner, info, prefill_tokens=prefill_tokens, stall_seconds=60, guess_tokens=guess, draft=draft
    )


def submit(model: PagedScheduler, id: str, prompt, *, n: int = 1, priority: int = 1, key="", **sampling) -> None:
    asked = call(id, prompt, n=n, **{"ignore_eos": True} | sampling)
    model.submit(msgspec.structs.replace(asked, priority=priority, caller=Caller(key_id=key or None)))


def reading(model: PagedScheduler, monkeypatch) -> list[int]:
    """Tokens that each of the following passes reads."""
    seen: list[int] = []
    forward = model._runner.forward

    def watched(pieces, **rest):
        seen.append(sum(map(len, pieces)))
        return forward(pieces, **rest)

    monkeypatch.setattr(model._runner, "forward", watched)
    return seen


def expected(model, prompt: list[int], new: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=-1)
    return out[0, len(prompt) :].tolist()


# --- the same tokens as transformers ---


def test_every_family_that_the_engine_takes_is_tested_here():
    assert {tiny.ARCHITECTURES[name]().model_type for name in TESTED} == FAMILIES


def test_serving_does_without_openvinos_converter_and_makers_have_it():
    code = "import sys, hfms_engines.openvino_runner; print('openvino.tools.ovc' in sys.modules, end=' ')"
    more = "from openvino.tools.ovc import convert_model; print(callable(convert_model))"
    said = subprocess.run([sys.executable, "-c", f"{code}; {more}"], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["False", "True"]


def test_a_conversion_tells_nobody():
    code = "import openvino.tools.ovc.telemetry_utils as t; print(t.tm.__name__)"
    run = [sys.executable, "-c", f"import hfms_engines.openvino_export; {code}"]
    said = subprocess.run(run, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "openvino.tools.ovc.telemetry_stub"


@pytest.mark.parametrize("name", TESTED)
def test_tokens_equal_those_of_generate_alone_and_in_a_changing_batch(name, tmp_path, made):
    folder = tiny.save(tmp_path / "model", tiny.ARCHITECTURES[name]())
    reference = torch_runner.load(LoadRequest(folder=folder, card=card(folder), device=CPU), cache_bytes=2**26).model
    some = prompts(3, 11, 45, 9, 70)
    wanted = [expected(reference, p, 20 + i) for i, p in enumerate(some)]
    model = scheduler(converted(folder, tmp_path / "export"))
    for i, prompt in enumerate(some):
        submit(model, f"alone {i}", prompt, max_tokens=20 + i)
        drain(model)
    for i, prompt in enumerate(some):
        submit(model, f"mixed {i}", prompt, max_tokens=20 + i)
        model.step()
        model.step()
    drain(model)
    for i, prompt in enumerate(some):
        submit(model, f"at once {i}", prompt, max_tokens=20 + i)
    drain(model)
    for i in range(len(some)):
        assert made[f"alone {i}", 0] == wanted[i]
        assert made[f"mixed {i}", 0] == wanted[i]
        assert made[f"at once {i}", 0] == wanted[i]


def test_weights_that_came_in_two_bytes_are_kept_in_two_and_lose_nothing(tmp_path, made):
    folder = tiny.save(tmp_path / "model", tiny.ARCHITECTURES["llama"](), dtype="bfloat16")
    reference = torch_runner.load(request(folder), cache_bytes=2**26).model
    [prompt] = prompts(40)
    out = converted(folder, tmp_path / "export")
    assert 'element_type="bf16"' in (out / openvino_export.MODEL).read_text()
    model = scheduler(out)
    submit(model, "a", prompt, max_tokens=20)
    drain(model)
    assert made["a", 0] == expected(reference, prompt, 20)


def test_eight_bit_weights_take_less_room_and_say_much_the_same(llama, export, tmp_path, capfd):
    small = converted(llama, tmp_path / "small", "int8")
    size = {f: (f / openvino_export.MODEL).with_suffix(".bin").stat().st_size for f in (small, export)}
    assert size[small] < 0.6 * size[export]
    assert "would choose the same token" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # whose products have their weights the other way round
def test_four_bit_weights_take_the_least_room_and_lose_no_more_than_rounding_does(name, tmp_path):
    folder = tiny.save(tmp_path / "model", tiny.ARCHITECTURES[name]())
    half, quarter = (converted(folder, tmp_path / bits, bits) for bits in ("int8", "int4"))
    size = {f: (f / openvino_export.MODEL).with_suffix(".bin").stat().st_size for f in (half, quarter)}
    assert size[quarter] < size[half]
    weights = np.random.default_rng(0).normal(size=(96, 64)).astype(np.float32)
    model = openvino.Model([openvino_export._four_bits(weights, 32)], [])
    rounded = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([])[0]
    step = (weights.max() - weights.min()) / 15
    assert np.abs(rounded - weights).max() < 0.6 * step


def test_what_quantisation_costs_is_measured_and_kept_beside_the_model(llama, export, tmp_path):
    assert quality_of(export) is None
    quality = quality_of(converted(llama, tmp_path / "small", "int8"))
    assert quality.tokens == 2048
    assert quality.agreement > 0.8
    assert quality.perplexity == pytest.approx(quality.perplexity_before, rel=0.1)


def test_a_load_may_ask_for_other_weights_than_the_options_say(llama, tmp_path):
    engine = OpenVinoEngine(OpenVinoOptions(cache_dir=str(tmp_path), kv_cache_bytes=2**24, quantize="int8"))
    phases = []
    wish = dataclasses.replace(request(llama), quantize="none", report=lambda phase, done=None: phases.append(phase))
    info = engine.load(wish).info
    assert (info.quantize, info.quality) == ("none", None)
    assert phases == ["read", "convert", "write", "compare", "compile"]
    info = engine.load(request(llama)).info
    assert info.quantize == "int8"
    assert engine.quality(llama) == {"int8": info.quality}


def test_what_other_versions_have_made_of_a_model_goes_when_there_is_a_new_one(llama, tmp_path):
    root = tmp_path / "openvino"
    model = model_digest.of_model(llama, root)
    made = [f"{model}-none-old", f"{model}-int8-old", "other-none-old"]
    for name in made:
        (root / name).mkdir(parents=True)
    OpenVinoEngine(OpenVinoOptions(cache_dir=str(tmp_path), kv_cache_bytes=2**24)).load(request(llama))
    left = {folder.name for folder in root.iterdir()}
    assert made[0] not in left
    assert {made[1], made[2]} < left


def test_keys_and_values_of_eight_bits_take_less_and_say_nearly_the_same(llama, export, tmp_path):
    said, blocks = {}, {}
    text = torch.randint(0, 500, (90,), generator=torch.Generator().manual_seed(0)).tolist()
    for kept in ("auto", "int8"):
        options = OpenVinoOptions(cache_dir=str(tmp_path), kv_cache_bytes=2**24, kv_cache_dtype=kept)
        model = OpenVinoEngine(options).load(request(llama))
        blocks[kept] = model._runner.blocks.count
        for start, piece in ((0, text[:50]), (50, text[50:])):  # the second looks at what the cache has of the first
            logits = model._runner.forward([piece], starts=[start], tables=[[0, 1, 2]], tails=[len(piece)]).copy()
        said[kept] = logits
    assert blocks["int8"] > 2 * blocks["auto"]
    exact, rounded = said.values()
    assert not np.array_equal(exact, rounded)
    assert np.linalg.norm(exact - rounded) < 0.02 * np.linalg.norm(exact)


def test_threads_are_the_operators(export):
    runner = openvino_runner.load(export, dtype="float32", cache_bytes=None, share=False, threads=1)
    assert runner._request.get_compiled_model().get_property("INFERENCE_NUM_THREADS") == 1


def test_positions_that_depend_on_the_length_are_refused(tmp_path):
    config = tiny.ARCHITECTURES["llama"]()
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    folder = tiny.save(tmp_path / "model", config)
    with pytest.raises(LoadFailed, match="dynamic"):
        converted(folder, tmp_path / "export")


# --- the scheduler ---


def test_prompts_and_answers_go_through_one_pass(export, monkeypatch):
    model = scheduler(export, prefill_tokens=16)
    first, second = prompts(10, 40)
    submit(model, "a", first, max_tokens=10)
    model.step()
    read = reading(model, monkeypatch)
    submit(model, "b", second, max_tokens=2)
    drain(model)
    assert read[:4] == [17, 17, 9, 2]


def test_what_was_read_before_is_not_read_again_and_the_tokens_are_the_same(export, monkeypatch, made):
    model = scheduler(export, prefill_tokens=256)
    [prompt] = prompts(100)
    read = reading(model, monkeypatch)
    for id in "ab":
        submit(model, id, prompt, max_tokens=5)
        drain(model)
    assert (read[0], read[5]) == (100, 100 - 96)
    assert made["a", 0] == made["b", 0]


def test_the_choices_of_a_call_read_their_prompt_once(export, monkeypatch, made):
    model = scheduler(export, prefill_tokens=256)
    [prompt] = prompts(97)
    read = reading(model, monkeypatch)
    submit(model, "a", prompt, n=3, max_tokens=5)
    drain(model)
    assert read[:2] == [97, 1 + 2]
    assert made["a", 0] == made["a", 1] == made["a", 2]


@pytest.mark.parametrize("all_keys", [False, True])
def test_what_one_key_has_asked_saves_another_no_time_unless_all_keys_share(export, monkeypatch, all_keys):
    model = scheduler(export, prefill_tokens=256)
    monkeypatch.setattr(model, "_share", all_keys)
    read = reading(model, monkeypatch)
    [prompt] = prompts(100)
    for id, key in (("a", "one"), ("b", "other"), ("c", "one")):
        submit(model, id, prompt, max_tokens=1, key=key)
        drain(model)
    assert read == ([100, 4, 4] if all_keys else [100, 100, 4])


def test_keys_of_one_group_save_each_other_time(export, monkeypatch):
    model = scheduler(export, prefill_tokens=256)
    read = reading(model, monkeypatch)
    [prompt] = prompts(100)
    for id, key, group in (("a", "one", "team"), ("b", "other", "team"), ("c", "team", "")):
        asked = call(id, prompt, max_tokens=1, ignore_eos=True)
        model.submit(msgspec.structs.replace(asked, caller=Caller(key_id=key, cache_group=group)))
        drain(model)
    assert read == [100, 4, 100]


def test_without_prefix_cache_all_is_read_again(export, monkeypatch):
    model = scheduler(export, prefill_tokens=256, share=False)
    [prompt] = prompts(100)
    read = reading(model, monkeypatch)
    for id in "ab":
        submit(model, id, prompt, max_tokens=1)
        drain(model)
    assert read == [100, 100]


def test_sequences_that_outgrow_the_cache_wait_and_lose_nothing(export, theirs, made, monkeypatch):
    model = scheduler(export, blocks=6, prefill_tokens=256)
    some = prompts(30, 30, 60, 20)
    wanted = [expected(theirs, p, 60) for p in some]
    began = []
    for i, prompt in enumerate(some):
        submit(model, str(i), prompt, max_tokens=60)
    let_in = model._let_in
    monkeypatch.setattr(model, "_let_in", lambda seq, events: began.append(1) or let_in(seq, events))
    drain(model)
    for i in range(4):
        assert made[str(i), 0] == wanted[i]
    assert len(began) > 4  # one at least had to wait again
    assert model._blocks.free == 6


def test_a_cancelled_call_leaves_the_others_as_they_are_and_its_blocks_are_free(export, theirs, made):
    model = scheduler(export)
    some = prompts(20, 50, 33)
    for i, prompt in enumerate(some):
        submit(model, str(i), prompt, max_tokens=30)
    for _ in range(6):
        model.step()
    model.cancel("1")
    assert "1" not in drain(model).chunks
    for i in (0, 2):
        assert made[str(i), 0] == expected(theirs, some[i], 30)
    assert model._blocks.free == model._blocks.count
    model.cancel("1")  # unknown by now


def test_a_call_that_is_cancelled_while_its_prompt_is_read_is_gone(export):
    model = scheduler(export, prefill_tokens=8)
    submit(model, "a", prompts(100)[0])
    model.step()
    model.cancel("a")
    assert not model.busy()
    assert model._blocks.free == model._blocks.count


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_one_product_makes_query_key_and_value(name, tmp_path):
    """qwen2 adds a bias to each, llama none; that the tokens stay the same is the families' test."""
    folder = tiny.save(tmp_path / "model", tiny.ARCHITECTURES[name]())
    model = openvino_runner.ov.Core().read_model(converted(folder, tmp_path / "export") / openvino_export.MODEL)
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    kinds = [node.get_type_name() for node in model.get_ordered_ops()]
    assert kinds.count("VariadicSplit") == layers
    assert kinds.count("MatMul") == layers * 5 + 1  # this one, its output, three of the gated layer; and the head


class Oracle:
    """Guesses the next tokens of the answer `tokens`, every n-th of them wrong."""

    def __init__(self, tokens: list[int], wrong: int) -> None:
        self.tokens, self.wrong, self.at = tokens, wrong, 0

    def __call__(self, *_) -> Oracle:
        return self

    def add(self, token: int) -> None:
        self.at += 1

    def guess(self, most: int) -> list[int]:
        ahead = range(self.at, min(self.at + most, len(self.tokens)))
        return [self.tokens[i] + (i % self.wrong == self.wrong - 1) for i in ahead]

    def learn(self, guessed: int, right: int) -> None:
        assert right <= guessed


@pytest.mark.parametrize("wrong", [1, 2, 5, 1000])
def test_guesses_change_no_token_and_save_a_pass_for_each_that_is_right(export, theirs, made, monkeypatch, wrong):
    [prompt] = prompts(40)
    tokens = expected(theirs, prompt, 50)
    monkeypatch.setattr("hfms_engines.paged.Guesser", Oracle(tokens[1:], wrong))
    model = scheduler(export, guess=8, prefill_tokens=64)
    read = reading(model, monkeypatch)
    submit(model, "a", prompt, max_tokens=50)
    said = drain(model)
    assert made["a", 0] == tokens
    assert said.tokens("a") == 50
    assert model._blocks.free == model._blocks.count
    assert len(read) == {1: 50, 2: 26, 5: 11, 1000: 8}[wrong]


def test_a_guess_is_made_only_where_the_likeliest_token_is_taken(export, monkeypatch):
    monkeypatch.setattr("hfms_engines.paged.Guesser", Oracle([7] * 100, 1000))
    model = scheduler(export, guess=8, prefill_tokens=64)
    [prompt] = prompts(48)
    read = reading(model, monkeypatch)
    for way in ({"temperature": 1.0, "seed": 1}, {"frequency_penalty": 0.5}):
        submit(model, "a", prompt, max_tokens=20, **way)
        drain(model)
    assert read[1:20] == [1] * 19
    assert read[21:] == [1] * 19
    submit(model, "a", prompt, max_tokens=20)
    drain(model)
    assert max(read[41:]) > 1


def test_an_answer_ends_within_a_guess_where_it_would_without(export, theirs, made):
    prompt = prompts(12)[0] * 4
    for most in (1, 2, 3, 7):
        model = scheduler(export, guess=8)
        submit(model, "a", prompt, max_tokens=most)
        said = drain(model)
        assert made["a", 0] == expected(theirs, prompt, most)
        assert said.finish("a") == "length"
        made.clear()


class Silent(Oracle):
    """Finds nothing in what was there before."""

    def __init__(self, *_) -> None:
        super().__init__([], 1)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory) -> Path:
    """A model of the same vocabulary that says other things."""
    folder = tmp_path_factory.mktemp("stranger")
    return converted(tiny.save(folder / "model", tiny.ARCHITECTURES["qwen2"]()), folder / "export")


def draft_of(folder: Path, blocks: int = 64):
    one = openvino_runner.load(folder, dtype="float32", cache_bytes=None, share=False)
    size = sum(cache.byte_size for cache in one._caches) // one.blocks.count
    return openvino_runner.load(folder, dtype="float32", cache_bytes=blocks * size, share=False)


def check_answers(model, some, theirs, made) -> None:
    """All together, each answered as transformers does."""
    for number, prompt in enumerate(some):
        submit(model, str(number), prompt, max_tokens=60)
    drain(model)
    for number, prompt in enumerate(some):
        assert made[str(number), 0] == expected(theirs, prompt, 60)


def test_a_draft_model_that_says_the_same_saves_passes_and_changes_no_token(export, theirs, made, monkeypatch):
    monkeypatch.setattr("hfms_engines.paged.Guesser", Silent)
    model = scheduler(export, guess=8, prefill_tokens=16, draft=draft_of(export))
    model._drafter._clock = lambda: 0.0  # as if it took no time: it is as large as the model itself
    read = reading(model, monkeypatch)
    some = prompts(40, 7)
    check_answers(model, some, theirs, made)
    assert len(read) < 30  # of more than 60
    drafter = model._drafter
    assert drafter._runner.blocks.free == drafter._runner.blocks.count
    assert model._blocks.free == model._blocks.count


def test_a_draft_model_that_says_other_things_changes_no_token(export, theirs, made, stranger):
    model = scheduler(export, guess=8, prefill_tokens=16, draft=draft_of(stranger))
    some = prompts(40, 7, 25)
    check_answers(model, some, theirs, made)


def test_a_draft_model_without_room_guesses_for_whom_it_can(export, theirs, made, monkeypatch):
    monkeypatch.setattr("hfms_engines.paged.Guesser", Silent)
    model = scheduler(export, guess=4, draft=draft_of(export, blocks=2))
    some = prompts(40, 7)
    check_answers(model, some, theirs, made)


def test_a_draft_model_rests_when_it_costs_more_than_it_saves(export, stranger, monkeypatch):
    monkeypatch.setattr("hfms_engines.paged.Guesser", Silent)
    model = scheduler(export, guess=8, draft=draft_of(stranger))
    now = itertools.count()
    model._clock = model._drafter._clock = lambda: next(now)  # a draft takes as long as a pass
    drafts = []
    forward = model._drafter._runner.forward
    monkeypatch.setattr(model._drafter._runner, "forward", lambda *a, **k: drafts.append(1) or forward(*a, **k))
    submit(model, "a", prompts(12)[0], max_tokens=200)
    drain(model)
    assert 0 < len(drafts) < 100


def test_a_draft_model_that_fails_is_left_out(export, theirs, made, monkeypatch):
    monkeypatch.setattr("hfms_engines.paged.Guesser", Silent)
    model = scheduler(export, guess=8, draft=draft_of(export))

    def broken(*_, **__):
        raise RuntimeError("no")

    monkeypatch.setattr(model._drafter._runner, "forward", broken)
    [prompt] = prompts(30)
    submit(model, "a", prompt, max_tokens=20)
    drain(model)
    assert made["a", 0] == expected(theirs, prompt, 20)
    assert model._drafter is None


# --- who goes first ---


def test_a_call_of_higher_priority_goes_on_in_the_place_of_a_lower_one_which_loses_nothing(export, theirs, made):
    model = scheduler(export, max_batch=1, prefill_tokens=64)
    low, critical = prompts(40, 30)
    submit(model, "low", low, max_tokens=30, priority=0)
    while len(made["low", 0]) < 5:
        model.step()
    submit(model, "critical", critical, max_tokens=10, priority=3)
    while model.busy():
        model.step()
        if len(made["critical", 0]) < 10:
            assert len(made["low", 0]) == 5
    assert made["critical", 0] == expected(theirs, critical, 10)
    assert made["low", 0] == expected(theirs, low, 30)


def test_a_call_of_equal_priority_and_key_waits_its_turn(export, made):
    model = scheduler(export, max_batch=1, prefill_tokens=64)
    for id, prompt in zip("ab", prompts(40, 30), strict=True):
        submit(model, id, prompt, max_tokens=10)
    while len(made["a", 0]) < 10:
        model.step()
        assert not made["b", 0]


def test_a_key_that_floods_gives_a_place_to_one_that_has_fewer_and_loses_nothing(export, theirs, made, monkeypatch):
    model = scheduler(export, max_batch=4, prefill_tokens=256)
    flood = prompts(20, 21, 22, 23, 24, 25)
    for i, prompt in enumerate(flood):
        submit(model, f"flood{i}", prompt, max_tokens=40, key="a")
    while len(made["flood3", 0]) < 5:
        model.step()
    [small] = prompts(18, seed=5)
    submit(model, "small", small, max_tokens=8, key="b")
    seen = reading(model, monkeypatch)
    model.step()
    assert seen == [18]  # at once, and alone
    drain(model)
    assert made["small", 0] == expected(theirs, small, 8)
    for i, prompt in enumerate(flood):
        assert made[f"flood{i}", 0] == expected(theirs, prompt, 40)


def test_a_flood_sits_out_the_pass_that_makes_the_first_token_of_a_small_caller(export, theirs, made, monkeypatch):
    model = scheduler(export, max_batch=8, prefill_tokens=256)
    flood = prompts(20, 21, 22, 23, 24)
    for i, prompt in enumerate(flood):
        submit(model, f"flood{i}", prompt, max_tokens=40, key="a")
    while len(made["flood4", 0]) < 5:
        model.step()
    small = prompts(18, 19, seed=5)
    submit(model, "small", small[0], max_tokens=8, key="b")
    submit(model, "after", small[1], max_tokens=8, key="b")
    seen = reading(model, monkeypatch)
    model.step()
    assert seen == [18 + 19]
    assert len(made["small", 0]) == 1
    before = len(made["flood0", 0])
    model.step()  # nor is the flood held up twice running
    assert len(made["flood0", 0]) > before
    drain(model)
    for id, prompt, most in zip(("small", "after"), small, (8, 8), strict=True):
        assert made[id, 0] == expected(theirs, prompt, most)
    for i, prompt in enumerate(flood):
        assert made[f"flood{i}", 0] == expected(theirs, prompt, 40)


def test_a_long_prompt_of_one_key_does_not_hold_up_the_short_one_of_another(export, made):
    model = scheduler(export, prefill_tokens=24)
    long, short = prompts(240, 10)
    submit(model, "long", long, max_tokens=2, key="a")
    model.step()
    submit(model, "short", short, max_tokens=2, key="b")
    while not made["short", 0]:
        model.step()
    assert not made["long", 0]


def test_who_begins_says_so_with_the_length_of_its_prompt(export):
    model = scheduler(export, max_batch=1)
    submit(model, "a", prompts(30)[0], max_tokens=3)
    submit(model, "b", prompts(20)[0], max_tokens=3)
    [(call_id, chunk), *_] = model.step()
    assert (call_id, chunk.begins, chunk.prompt_tokens) == ("a", True, 30)
    said = drain(model).chunks
    assert said["b"][0].begins
    assert [c.prompt_tokens for c in said["b"]] == [20, 0, 0, 0]


def test_sampling_is_the_same_as_with_torch(export, llama, made):
    """Seeds, penalties, bias and stop strings are the sampler's, which both engines share."""
    from hfms_engines.generation import GenerationEngine, GenerationOptions

    ways = {
        "seed": {"temperature": 1.0, "seed": 7},
        "top": {"temperature": 0.8, "seed": 1, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
        "bias": {"logit_bias": {17: 100.0}},
        "penalties": {"presence_penalty": 1.5, "frequency_penalty": 1.0, "repetition_penalty": 1.3},
    }
    [prompt] = prompts(40)
    told = []
    for model in (scheduler(export), GenerationEngine(GenerationOptions(max_batch=4)).load(request(llama))):
        made.clear()
        for id, way in ways.items():
            submit(model, id, prompt, max_tokens=12, **way)
        drain(model)
        told.append({id: made[id, 0] for id in ways})
    assert told[0] == told[1]
    assert set(told[0]["bias"]) == {17}


def test_an_output_that_is_not_a_number_fails_its_call_alone_and_spoils_no_later_one(export, theirs, made, monkeypatch):
    model = scheduler(export)
    bad, good = prompts(40, 50)
    submit(model, "bad", bad, max_tokens=9)
    submit(model, "good", good, max_tokens=9)
    model.step()
    # The cache of the first sequence holds what an overflow would leave there.
    for cache in model._runner._caches:
        cache.data[model._tables[model._rows[0]].blocks] = float("nan")
    assert isinstance(drain(model).ended["bad"], HfmsError)
    assert made["good", 0] == expected(theirs, good, 9)
    submit(model, "again", bad, max_tokens=9)
    drain(model)
    assert made["again", 0] == expected(theirs, bad, 9)


def test_a_token_beyond_the_vocabulary_is_refused(export):
    with pytest.raises(BadRequest) as refused:
        submit(scheduler(export), "a", [1, 2, 10**6])
    assert refused.value.param == "prompt"


# --- the engine ---


def test_what_it_does_not_run_is_said_before_anything_is_loaded(llama):
    engine = OpenVinoEngine()
    good = card(llama)
    assert engine.supports(good, CPU) is None
    cuda = Device(id="cuda:0", kind="cuda", name="GPU", total_bytes=1, free_bytes=1, torch_device="cuda:0")
    assert "CPUs" in engine.supports(good, cuda)
    for change, word in (
        ({"model_type": "mamba"}, "mamba"),
        ({"format": "pickle"}, "safetensors"),
        ({"tasks": ("embed",)}, "generate"),
        ({"remote_code": True}, "code of its own"),
    ):
        values = {f: getattr(good, f) for f in good.__struct_fields__}
        assert word in engine.supports(ModelCard(**values | change), CPU)


def test_float16_is_refused_with_what_to_do(export):
    with pytest.raises(LoadFailed, match="bfloat16"):
        openvino_runner.load(export, dtype="float16", cache_bytes=None, share=False)


def test_a_model_is_converted_once_and_again_when_its_files_change(llama, tmp_path, monkeypatch):
    options = OpenVinoOptions(cache_dir=str(tmp_path / "cache"), kv_cache_bytes=2**24)
    made = []
    convert = conversion._run
    monkeypatch.setattr(conversion, "_run", lambda *args: made.append(1) or convert(*args))
    folder = tmp_path / "model"
    folder.mkdir()
    for file in llama.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for _ in range(2):
        OpenVinoEngine(options).load(request(folder))
    assert len(made) == 1
    (folder / "generation_config.json").write_text('{"eos_token_id": 5}')
    model = OpenVinoEngine(options).load(request(folder))
    assert len(made) == 2
    assert 5 in model._runner.stop_ids


def test_a_conversion_that_fails_says_why_and_leaves_nothing(tmp_path):
    config = tiny.ARCHITECTURES["llama"]()
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    folder = tiny.save(tmp_path / "model", config)
    with pytest.raises(LoadFailed, match="dynamic"):
        OpenVinoEngine(OpenVinoOptions(cache_dir=str(tmp_path / "cache"))).load(request(folder))
    assert list((tmp_path / "cache" / "openvino").iterdir()) == []


def test_what_a_killed_conversion_left_is_removed_after_a_day(llama, tmp_path):
    root = tmp_path / "cache" / "openvino"
    old, new = root / ".making-old", root / ".making-new"
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "part").write_bytes(b"x")
    os.utime(old, (0, 0))
    OpenVinoEngine(OpenVinoOptions(cache_dir=str(tmp_path / "cache"), kv_cache_bytes=2**24)).load(request(llama))
    assert new.exists()
    assert not old.exists()


def test_the_process_that_converts_ends_when_nobody_waits_for_it(llama, tmp_path):
    job = openvino_export.Job(str(llama), card(llama), CPU, "none")
    child = subprocess.Popen(
        [sys.executable, "-m", "hfms_engines.openvino_export", str(tmp_path)], stdin=subprocess.PIPE
    )
    child.stdin.write(openvino_export.msgspec.json.encode(job) + b"\n")
    child.stdin.close()
    assert child.wait(timeout=60) == 1
    assert not (tmp_path / openvino_export.MODEL).exists()


# --- the real model ---


QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "Why is the sky blue?",
    "Write one sentence about the sea.",
    "Wie heißt die Hauptstadt von Österreich?",
]


@pytest.mark.real_model
def test_smollm2_from_gguf_answers_as_with_torch_alone_and_in_a_batch(smollm2, tmp_path_factory, made):
    from hfms_engines.generation import GenerationEngine, GenerationOptions

    wish = LoadRequest(folder=smollm2, card=gguf_card(smollm2), device=CPU, dtype="float32")
    options = OpenVinoOptions(cache_dir=str(tmp_path_factory.mktemp("cache")), kv_cache_bytes=2**28)
    model = OpenVinoEngine(options).load(wish)
    told = []
    for engine in (model, GenerationEngine(GenerationOptions(max_batch=5, kv_cache_bytes=2**28)).load(wish)):
        made.clear()
        for i, question in enumerate(QUESTIONS):
            submit(engine, f"batch {i}", Conversation(messages=[{"role": "user", "content": question}]), max_tokens=32)
        drain(engine)
        told.append(dict(made))
    assert told[0] == told[1]
    for i, question in enumerate(QUESTIONS):
        submit(model, f"alone {i}", Conversation(messages=[{"role": "user", "content": question}]), max_tokens=32)
        drain(model)
        assert made[f"alone {i}", 0] == told[0][f"batch {i}", 0]
