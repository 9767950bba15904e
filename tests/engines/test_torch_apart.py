"""Models that no batch takes: the tokens of `generate`, one sequence after the other in every step."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from hfms_cli import Adapter, AdapterCard, BadRequest, Device, DoesNotFit, EngineFault
from hfms_engines.slots import SlotScheduler

# Before torch, whose environment it sets.
pytest.importorskip("hfms_engines.torch_runner", exc_type=ImportError)

import torch

from tests.engines import tiny
from tests.engines.driving import ask, call, drain, prompts
from tests.engines.test_generation import break_forward, check_equality, expected, load


@pytest.fixture(scope="module", params=["mamba", "lfm2"])
def model(request, tmp_path_factory) -> SlotScheduler:
    """A state alone, and beside keys and values. Shared, so tests leave it idle."""
    return load(tiny.save(tmp_path_factory.mktemp("model"), tiny.RECURRENT[request.param]()), max_batch=4)


@pytest.mark.parametrize("name", tiny.RECURRENT)
def test_recurrent_models_say_what_generate_says_while_others_come_and_go(name, tmp_path, made, caplog):
    model = load(tiny.save(tmp_path, tiny.RECURRENT[name]()), max_batch=4)
    assert model.info.batching == "apart"
    assert "No batch takes it: its calls run one after the other" in caplog.text
    check_equality(model, made)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
@pytest.mark.parametrize("name", tiny.RECURRENT)
def test_a_gpu_makes_the_tokens_that_generate_makes_on_it(name, tmp_path, made):
    gpu = Device(id="cuda:0", kind="cuda", name="gpu", total_bytes=2**33, free_bytes=2**32, torch_device="cuda:0")
    check_equality(load(tiny.save(tmp_path, tiny.RECURRENT[name]()), device=gpu, dtype="float32", max_batch=4), made)


def test_choices_of_one_prompt_go_on_from_what_one_of_them_has_read(model, made):
    prompt = prompts(20)[0]
    kind = {"temperature": 0.9, "seed": 3, "max_tokens": 12, "ignore_eos": True}
    ask(model, prompt, n=3, **kind)
    together = [made["a", i] for i in range(3)]
    assert len({tuple(t) for t in together}) == 3
    made.clear()
    model.submit(call("b", prompt, n=3, **kind))
    model.step()
    model.submit(call("other", prompts(9)[0], max_tokens=3, ignore_eos=True))
    drain(model)
    assert [made["b", i] for i in range(3)] == together


def test_an_answer_that_was_sent_back_to_wait_loses_nothing(model, made):
    prompt = prompts(15)[0]
    wanted = expected(model, prompt, 20)
    model.submit(call("a", prompt, max_tokens=20))
    for _ in range(6):
        model.step()
    model._send_back(model._rows[0])
    drain(model)
    assert made["a", 0] == wanted


def test_a_step_that_fails_for_the_newest_is_not_read_twice_by_the_others(model, made, monkeypatch):
    """A state that has gone on cannot go back, and the step is tried again without who failed."""
    some = prompts(5, 6)
    wanted = [expected(model, p, 20) for p in some]
    inner = model._runner._forward

    def breaking(state, piece, start, tail):
        if start == 9:
            raise torch.OutOfMemoryError
        return inner(state, piece, start, tail)

    model.submit(call("0", some[0], max_tokens=20))
    model.step()
    model.step()
    model.submit(call("1", some[1], max_tokens=20))
    with monkeypatch.context() as during:
        for _ in range(4):
            model.step()
        during.setattr(model._runner, "_forward", breaking)
        answers = drain(model)
    assert isinstance(answers.ended["1"], DoesNotFit)
    assert made["0", 0] == wanted[0]


def test_a_pass_that_fails_leaves_no_trace(model, made, monkeypatch):
    prompt = prompts(8)[0]
    wanted = expected(model, prompt, 10)
    with monkeypatch.context() as during:
        break_forward(model, during, lambda tokens: len(tokens[0]) == 1, ValueError("something private"))
        assert isinstance(ask(model, prompt).ended["a"], EngineFault)
    made.clear()
    ask(model, prompt, max_tokens=10)
    assert made["a", 0] == wanted


def test_prompts_are_scored_in_pieces_as_in_one(model, monkeypatch):
    prompt = prompts(21)[0]

    def scores():
        asked = call("a", prompt, logprobs=1, max_tokens=1)
        model.submit(msgspec.structs.replace(asked, echo=True))
        return [s.logprob for c in drain(model).chunks["a"] for s in c.logprobs or ()]

    whole = scores()
    monkeypatch.setattr(model, "_score_tokens", 4)
    assert scores()[1:] == pytest.approx(whole[1:], abs=1e-4)
    assert len(whole) == 22


def test_an_idle_model_holds_no_states(model):
    ask(model, [5, 6, 7], [8, 9])
    assert model._cache._held == {}


def test_what_states_take_is_known_and_bounds_the_text_and_the_batch(model, tmp_path):
    states = model._runner.cache
    assert states.fixed_bytes > 0
    # Mamba's is as large for any text; LFM2 keeps keys and values in one layer, 2 heads of 8 numbers.
    assert states.token_bytes in (0, 2 * 2 * 8 * 4)
    folder = Path(model._runner.model.name_or_path)
    room = states.fixed_bytes + 100 * states.token_bytes
    small = load(folder, kv_cache_bytes=room)
    assert small.info.context_length == (100 if states.token_bytes else 512)
    answers = ask(small, prompts(10)[0], prompts(12)[0], max_tokens=20, ignore_eos=True)
    assert answers.ended == {"a": None}
    with pytest.raises(DoesNotFit, match="kv_cache_bytes"):
        load(folder, kv_cache_bytes=states.fixed_bytes - 1)


def test_adapters_are_refused_by_name(model):
    card = AdapterCard(r=2, lora_alpha=2, target_modules=["in_proj"])
    with pytest.raises(BadRequest, match="as this model is run, it takes none"):
        model.add_adapter(Adapter("one", "/nowhere", card))
