"""The generation engine against transformers' own `generate`: tiny models of real architectures, and SmolLM2."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hfms_cli import (
    BadRequest,
    Call,
    Chunk,
    ContextLengthExceeded,
    Conversation,
    Device,
    DoesNotFit,
    EngineFault,
    LoadFailed,
    LoadRequest,
    ModelCard,
    NoChatTemplate,
    Pair,
    UnsafeFormat,
)
from hfms_engines import memory
from hfms_engines.generation import GGUF_ARCHITECTURES, GenerationEngine, GenerationOptions
from hfms_engines.scheduler import Scheduler
from hfms_engines.slots import SlotScheduler

# Before torch, whose environment it sets.
pytest.importorskip("hfms_engines.torch_runner", exc_type=ImportError)

import torch
import transformers

from tests.engines import tiny
from tests.engines.driving import CPU, Answers, ask, call, drain, gguf_card, prompts

# --- helpers: a real engine, driven as a worker process drives it ---


def card(folder: Path, **more) -> ModelCard:
    config = json.loads((folder / "config.json").read_text())
    values = {
        "format": "safetensors",
        "model_type": config["model_type"],
        "architecture": config["architectures"][0],
        "tasks": ("generate",),
        "weights_bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
        "dtype": "float32",
    }
    return ModelCard(**values | more)


def load(folder: Path, *, device: Device = CPU, dtype: str = "auto", about: ModelCard | None = None, **options):
    request = LoadRequest(folder=folder, card=about or card(folder), device=device, dtype=dtype)
    return GenerationEngine(GenerationOptions(**options)).load(request)


def expected(model: Scheduler, prompt: list[int], new: int) -> list[int]:
    """What transformers' own `generate` makes of a prompt."""
    ids = torch.tensor([prompt], device=model._runner.device)
    out = model._runner.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, use_cache=True
    )
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="module", params=["slots", "paged"])
def model(request, llama) -> Scheduler:
    """With either kind of cache. Shared, so tests leave it idle."""
    return load(llama, max_batch=4, prefill_tokens=7, cache=request.param, kv_cache_bytes=2**22)


@pytest.fixture(scope="module")
def slots(llama) -> SlotScheduler:
    """Shared, so tests leave it idle."""
    return load(llama, max_batch=4, prefill_tokens=7)


@pytest.fixture(scope="module")
def smol(smollm2) -> SlotScheduler:
    return load(smollm2, about=gguf_card(smollm2), max_batch=4, prefill_tokens=32)


# --- the same tokens as transformers ---


def check_equality(model: Scheduler, made, *, lengths=(3, 11, 25, 9, 40), new=20) -> None:
    """Alone, then with others that join while it runs and leave while others run, then with all that come at once."""
    some = prompts(*lengths)
    wanted = [expected(model, p, new + i) for i, p in enumerate(some)]
    for i, prompt in enumerate(some):
        model.submit(call(f"alone {i}", prompt, max_tokens=new + i))
        drain(model)
        assert made[f"alone {i}", 0] == wanted[i]
    for i, prompt in enumerate(some):
        model.submit(call(f"mixed {i}", prompt, max_tokens=new + i))
        model.step()
        model.step()
    drain(model)
    for i, prompt in enumerate(some):
        model.submit(call(f"at once {i}", prompt, max_tokens=new + i))
    drain(model)
    for i in range(len(some)):
        assert made[f"mixed {i}", 0] == wanted[i]
        assert made[f"at once {i}", 0] == wanted[i]


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_tokens_equal_those_of_generate_alone_and_in_a_changing_batch(name, tmp_path, made):
    folder = tiny.save(tmp_path, tiny.ARCHITECTURES[name]())
    check_equality(load(folder, max_batch=4, prefill_tokens=24), made)


@pytest.mark.real_model
def test_smollm2_says_what_generate_says_alone_and_in_a_changing_batch(smol, made):
    check_equality(smol, made, lengths=(5, 70, 33), new=16)


@pytest.mark.real_model
def test_smollm2_answers_a_chat(smol):
    chat = Conversation(messages=[{"role": "user", "content": "Say hello."}])
    answers = ask(smol, chat, max_tokens=30)
    assert "hello" in answers.text("a").lower()
    assert answers.finish("a") == "stop"
    assert answers.prompt_tokens("a") == [33]
    assert smol.info.chat
    assert smol.info.context_length == 8192
    assert smol.info.dtype == "float32"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_a_gpu_makes_the_tokens_that_generate_makes_on_it(name, tmp_path, made):
    gpu = Device(id="cuda:0", kind="cuda", name="gpu", total_bytes=2**33, free_bytes=2**32, torch_device="cuda:0")
    folder = tiny.save(tmp_path, tiny.ARCHITECTURES[name]())
    check_equality(load(folder, device=gpu, dtype="float32", cache="slots", max_batch=4, prefill_tokens=24), made)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs(llama, dtype):
    model = load(llama, dtype=dtype)
    assert model.info.dtype == dtype
    assert ask(model, [5, 6, 7], ignore_eos=True).tokens("a") == 8


# --- the batch ---


@st.composite
def happenings(draw):
    """Calls that come and are cancelled between steps."""
    steps = draw(
        st.lists(st.one_of(st.just("step"), st.sampled_from(["once", "twice"]), st.integers(0, 5)), max_size=25)
    )
    return steps, draw(st.integers(0, 3))


@pytest.fixture(scope="module")
def narrow(llama) -> SlotScheduler:
    """Room for 1024 tokens: fewer than four sequences of 256, and a sequence that grows drives others out."""
    model = load(llama, max_batch=4, prefill_tokens=50)
    model._cache.budget = 1024
    return model


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(happenings())
def test_each_call_is_answered_as_if_it_were_alone_whatever_else_comes_and_goes(narrow, made, wanted, plan):
    steps, seed = plan
    made.clear()
    answers, sent, cancelled = Answers(), {}, set()
    choices = {"once": 1, "twice": 2}
    for step in steps:
        if step == "step":
            answers.take(narrow.step() if narrow.busy() else [])
        elif step in choices:
            name, n = f"{len(sent)}", choices[step]
            prompt, tokens = wanted[(len(sent) + seed) % len(wanted)]
            sent[name] = prompt, tokens, n
            narrow.submit(call(name, prompt, n=n, max_tokens=len(tokens), ignore_eos=True))
        elif str(step) in sent:
            narrow.cancel(str(step))
            cancelled.add(str(step))
    drain(narrow, answers)
    for name, (prompt, tokens, n) in sent.items():
        if name in answers.ended:
            assert answers.ended[name] is None
            assert [made[name, k] for k in range(n)] == [tokens] * n
            assert [answers.tokens(name, k) for k in range(n)] == [len(tokens)] * n
            assert answers.prompt_tokens(name) == [len(prompt)]
        else:
            assert name in cancelled
            assert all(made[name, k] == tokens[: len(made[name, k])] for k in range(n))
    assert narrow._calls == {}


@pytest.fixture(scope="module")
def wanted(narrow):
    """Prompts around the cache's blocks of 256 tokens, and what must be made of them."""
    ends = narrow._runner.model.generation_config.eos_token_id
    narrow._runner.model.generation_config.eos_token_id = None
    some = prompts(3, 250, 60, 254, 10, 7, 20, seed=1)
    made = [(p, expected(narrow, p, n)) for p, n in zip(some, (30, 20, 5, 9, 1, 8, 40), strict=True)]
    narrow._runner.model.generation_config.eos_token_id = ends
    return made


def test_the_newest_wait_again_in_order_when_sequences_outgrow_the_cache_and_lose_nothing(narrow, wanted, made):
    narrow._cache.budget = 3 * 256
    for i in (1, 0, 2, 6):
        narrow.submit(call(str(i), wanted[i][0], max_tokens=len(wanted[i][1]), ignore_eos=True))
    answers, lines = Answers(), []
    while narrow.busy():
        answers.take(narrow.step())
        line = [s.call.id for s in narrow._line]
        if line not in lines[-1:]:
            lines.append(line)
    narrow._cache.budget = 1024
    # "6" has no room at first; then "1" takes two blocks, and three sequences are two too many.
    assert lines == [["0", "2", "6"], ["2", "6"], ["6"], ["0", "2", "6"], ["2", "6"], ["6"], []]
    for i in (1, 0, 2, 6):
        assert made[str(i), 0] == wanted[i][1]
        assert answers.tokens(str(i)) == len(wanted[i][1])


def test_choices_that_wait_again_beside_choices_that_never_began_all_say_the_same(narrow, wanted, made):
    prompt, tokens = wanted[0]
    narrow._cache.budget = 3 * 256
    narrow.submit(call("long", wanted[1][0], max_tokens=20, ignore_eos=True))
    narrow.submit(call("many", prompt, n=4, max_tokens=len(tokens), ignore_eos=True))
    answers = Answers()
    while len(narrow._rows) != 1 or not made["many", 0]:
        answers.take(narrow.step())
    # Two choices have begun and wait again, two have not begun; there is room for all of them at once.
    assert [len(made["many", k]) > 0 for k in range(4)] == [True, True, False, False]
    narrow.cancel("long")
    narrow._cache.budget = 1024
    drain(narrow, answers)
    assert [made["many", k] for k in range(4)] == [tokens] * 4
    assert answers.prompt_tokens("many") == [len(prompt)]


def test_the_cache_never_holds_more_than_its_budget(narrow, wanted, monkeypatch):
    seen = []
    reserve = type(narrow._cache).reserve

    def watched(self, slots, length):
        reserve(self, slots, length)
        seen.append(self.room[0] * self.room[1])

    monkeypatch.setattr(type(narrow._cache), "reserve", watched)
    narrow._cache.budget = 3 * 256
    for i, (prompt, tokens) in enumerate(wanted * 2):
        narrow.submit(call(str(i), prompt, max_tokens=len(tokens), ignore_eos=True))
    drain(narrow)
    narrow._cache.budget = 1024
    assert max(seen) == 3 * 256


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["read", "step", "leave", "copy"]),
            st.one_of(st.integers(0, 400), st.integers(253, 255)),  # also up to the edge of a block
        ),
        max_size=30,
    )
)
@example([("read", 255), ("step", 0)])
def test_the_cache_returns_exactly_what_each_slot_was_given(happenings):
    """Slots that fill, grow, are copied and move, against lists of what was written."""
    from hfms_engines.torch_runner import SlotCache, _Place

    cache, rows, number = SlotCache(budget=8 * 256), [], itertools.count(1)

    def write(first: int, count: int, tokens: int, starts: list[int]) -> None:
        states = torch.tensor([[[[float(next(number))] for _ in range(tokens)]] for _ in range(count)])
        cache.reserve(len(rows), max([*map(len, rows), *(n + tokens for n in starts)]))
        cache.at = _Place(first, starts, tokens, torch.device("cpu"))
        with torch.inference_mode():
            keys, values = cache.update(states, -states, 0)
        for i in range(count):
            rows[first + i] += states[i, 0, :, 0].tolist()
        for i, row in enumerate(rows[first : first + count]):
            assert keys[i, 0, : len(row), 0].tolist() == row
            assert values[i, 0, : len(row), 0].tolist() == [-x for x in row]

    for what, size in happenings:
        longest = max(map(len, rows), default=0)
        if what == "read" and cache.fits(len(rows) + 1, max(longest, size + 1)):
            rows.append([])
            write(len(rows) - 1, 1, size + 1, [0])
        elif what == "step" and rows and cache.fits(len(rows), longest + 1):
            write(0, len(rows), 1, [len(r) for r in rows])
        elif what == "leave" and rows:
            gone = size % len(rows)
            cache.copy(len(rows) - 1, gone, len(rows[-1]))
            rows[gone] = rows[-1]
            rows.pop()
        elif what == "copy" and rows and cache.fits(len(rows) + 1, longest + 1):
            rows.append(list(rows[size % len(rows)]))
            cache.reserve(len(rows), longest)
            cache.copy(size % (len(rows) - 1), len(rows) - 1, len(rows[-1]))
            write(0, len(rows), 1, [len(r) for r in rows])
        assert cache.room[0] * cache.room[1] <= cache.budget


def test_an_idle_model_holds_no_slots(slots):
    ask(slots, [5, 6, 7])
    assert not slots.busy()
    assert slots._cache.room == (0, 0)
    assert list(slots._cache.layers) == []


def test_calls_beyond_the_slots_wait_in_order(model):
    for i in range(7):
        model.submit(call(str(i), [5, 6, 7], max_tokens=10, ignore_eos=True))
    assert model.waiting() == 7
    answers = Answers()
    for _ in range(6):
        answers.take(model.step())
    assert model.waiting() == 3
    drain(model, answers)
    assert list(answers.chunks) == [str(i) for i in range(7)]
    assert model.waiting() == 0


def test_a_long_prompt_does_not_stop_those_under_way(model):
    long = prompts(100)[0]
    model.submit(call("short", [5, 6, 7], max_tokens=60, ignore_eos=True))
    model.step()
    model.submit(call("long", long, max_tokens=1))
    answers = Answers()
    for _ in range(14):  # 100 tokens, 7 a step
        before = answers.tokens("short")
        answers.take(model.step())
        assert answers.tokens("short") == before + 1
        assert not answers.tokens("long")
    answers.take(model.step())
    assert answers.finish("long") == "length"
    model.cancel("short")
    assert not model.busy()


def test_a_step_says_one_token_a_choice(model):
    model.submit(call("a", [5, 6, 7], [8, 9], n=2, temperature=1.0, seed=1, ignore_eos=True))
    while model.busy():
        said = [e[1].index for e in model.step() if isinstance(e[1], Chunk) and not e[1].begins]
        assert len(said) == len(set(said))


def test_cancelling_a_call_in_any_state_leaves_the_others_alone(model, made):
    kept = prompts(9)[0]
    wanted = expected(model, kept, 30)
    for steps in range(6):
        made.clear()
        model.submit(call("gone", prompts(20)[0], [5, 6], n=2, max_tokens=30, ignore_eos=True))
        model.submit(call("kept", kept, max_tokens=30))
        for _ in range(steps):
            model.step()
        model.cancel("gone")
        answers = drain(model)
        assert made["kept", 0] == wanted
        assert "gone" not in answers.ended
    model.cancel("never heard of")


def test_closing_a_model_gives_everything_back(llama):
    model = load(llama)
    model.submit(call("a", [5, 6, 7]))
    model.step()
    model.close()
    assert not model.busy()
    assert list(model._cache.layers) == []


# --- what an answer is ---


def test_tokens_add_up_and_the_end_token_counts(model, made):
    """As in vLLM: the token that ends an answer has no text and is one of the completion's tokens."""
    end = model._runner.tokenizer.eos_token_id
    answers = ask(model, [5, 6, 7], max_tokens=5, logit_bias={end: 100})
    assert made["a", 0] == [end]
    assert answers.tokens("a") == 1
    assert answers.text("a") == ""
    assert answers.finish("a") == "stop"
    assert answers.ended == {"a": None}


def test_ignore_eos_goes_on_to_the_length(model):
    end = model._runner.tokenizer.eos_token_id
    answers = ask(model, [5, 6, 7], max_tokens=5, logit_bias={end: 100}, ignore_eos=True)
    assert (answers.tokens("a"), answers.text("a"), answers.finish("a")) == (5, "", "length")


def test_min_tokens_come_before_any_end(model):
    end = model._runner.tokenizer.eos_token_id
    answers = ask(model, [5, 6, 7], max_tokens=9, min_tokens=4, logit_bias={end: 100})
    assert (answers.tokens("a"), answers.finish("a")) == (5, "stop")


def test_every_end_token_of_the_generation_settings_ends_an_answer(tmp_path):
    folder = tiny.save(tmp_path, tiny.ARCHITECTURES["llama"]())
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [2, 77]}))
    model = load(folder)
    assert ask(model, [5, 6, 7], logit_bias={77: 100}).finish("a") == "stop"
    assert ask(model, [5, 6, 7], logit_bias={2: 100}).finish("a") == "stop"
    assert ask(model, [5, 6, 7], logit_bias={78: 100}).finish("a") == "length"


def test_text_is_what_the_tokens_decode_to(model, made):
    for seed in range(10):
        model.submit(call("a", "The quick ", max_tokens=60, temperature=1.5, seed=seed, ignore_eos=True))
        answers = drain(model)
        assert answers.text("a") == model._runner.decode(made["a", 0])
        made.clear()


def test_a_stop_string_ends_the_answer_before_it(model):
    whole = ask(model, "The quick ", max_tokens=60, ignore_eos=True).text("a")
    stop = whole[10:13]
    answers = ask(model, "The quick ", max_tokens=60, ignore_eos=True, stop=(stop, "never"))
    assert answers.text("a") == whole[: whole.index(stop)]
    assert answers.finish("a") == "stop"
    assert answers.tokens("a") < 60


def test_stop_strings_count_only_after_min_tokens(model, made):
    ask(model, "The quick ", max_tokens=20, ignore_eos=True)
    pieces = [model._runner.decode([t]) for t in made["a", 0]]
    first = next(i for i, p in enumerate(pieces) if p.strip() and "\ufffd" not in p)
    made.clear()
    answers = ask(model, "The quick ", max_tokens=20, min_tokens=first + 1, ignore_eos=True, stop=(pieces[first],))
    assert answers.tokens("a") > first + 1
    assert pieces[first] in answers.text("a")


def test_choices_are_numbered_by_input_and_answer_and_prompts_are_counted_once(model):
    some = prompts(4, 12)
    answers = ask(model, *some, n=3, temperature=1.0, seed=7, max_tokens=6, ignore_eos=True)
    assert sorted({c.index for c in answers.chunks["a"]}) == [0, 1, 2, 3, 4, 5]
    assert answers.prompt_tokens("a") == [4, 12]
    assert all(answers.tokens("a", i) == 6 for i in range(6))
    assert len({answers.text("a", i) for i in range(3)}) == 3


@pytest.fixture
def passes(slots, monkeypatch) -> list[tuple[int, int]]:
    """Rows and tokens of each forward pass."""
    seen = []
    forward = slots._runner.forward

    def watched(tokens, starts, first=0, **rest):
        seen.append((len(tokens), len(tokens[0])))
        return forward(tokens, starts, first, **rest)

    monkeypatch.setattr(slots._runner, "forward", watched)
    return seen


def test_choices_of_one_prompt_read_it_once(slots, passes):
    answers = ask(slots, prompts(20)[0], n=4, max_tokens=3, ignore_eos=True)
    assert passes == [(1, 7), (1, 7), (1, 6), (4, 1), (4, 1)]
    assert len({answers.text("a", i) for i in range(4)}) == 1


def test_short_prompts_are_read_together_and_not_beyond_prefill_tokens(slots, passes):
    ask(slots, *prompts(2, 3, 2, 2), max_tokens=2, ignore_eos=True)
    assert passes == [(2, 3), (2, 1), (2, 2), (2, 1)]


def test_a_seed_gives_the_same_answer_alone_and_in_company(model, made):
    prompt = prompts(9)[0]
    kind = {"temperature": 0.9, "top_p": 0.9, "seed": 5, "max_tokens": 25, "ignore_eos": True}
    model.submit(call("alone", prompt, n=2, **kind))
    drain(model)
    model.submit(call("other", prompts(30)[0], temperature=1.0, max_tokens=40, ignore_eos=True))
    model.step()
    model.submit(call("company", prompt, n=2, **kind))
    drain(model)
    assert made["alone", 0] == made["company", 0] != made["alone", 1]
    assert made["alone", 1] == made["company", 1]


# --- prompts ---


def test_texts_tokens_and_conversations_are_prompts(model, made):
    ids = model._runner.tokenizer("The quick ")["input_ids"]
    chat = Conversation(messages=[{"role": "user", "content": "Hi"}], template_kwargs={"mood": "gay"})
    whole = f"{tiny.START}user\nHi{tiny.STOP}\n{tiny.START}assistant\n(gay) "
    spelled = model._runner.tokenizer(whole)["input_ids"]
    answers = ask(model, "The quick ", ids, chat, spelled)
    assert answers.text("a", 0) == answers.text("a", 1)
    assert answers.text("a", 2) == answers.text("a", 3)
    assert sorted(answers.prompt_tokens("a")) == sorted([len(ids)] * 2 + [len(spelled)] * 2)


def test_an_empty_text_begins_with_the_vocabularys_own_beginning(model):
    assert ask(model, "").prompt_tokens("a") == [1]


@pytest.mark.parametrize(
    ("entry", "sampling", "kind", "words", "param"),
    [
        ([], {}, BadRequest, "empty", "prompt"),
        (Pair("a", "b"), {}, BadRequest, "Pairs of texts", "model"),
        ([5, 99999], {}, BadRequest, "Token 99999 is not in", "prompt"),
        ([-1], {}, BadRequest, "Token -1 is not in", "prompt"),
        ([5], {"logit_bias": {99999: 1.0}}, BadRequest, "99999", "logit_bias"),
        ([5], {"max_tokens": 0}, BadRequest, "max_tokens", "max_tokens"),
        ([5] * 512, {"max_tokens": None}, ContextLengthExceeded, "512 tokens.*513 tokens .512 in the prompt", "prompt"),
        ([5] * 500, {"max_tokens": 13}, ContextLengthExceeded, "513 tokens .500 in the prompt, 13 in", "prompt"),
        (
            Conversation(messages=[{"role": "user", "content": "no " * 600}]),
            {},
            ContextLengthExceeded,
            "in the messages",
            "messages",
        ),
        (Conversation(messages=[{"role": "clown", "content": "x"}]), {}, BadRequest, "unknown role clown", "messages"),
        (Conversation(messages=[{"role": 3, "content": "x"}]), {}, BadRequest, "chat template cannot", "messages"),
        (
            Conversation(messages=[], template_kwargs={"chat_template": "{{ 1 }}"}),
            {},
            BadRequest,
            "not a variable",
            "chat_template_kwargs",
        ),
    ],
)
def test_a_call_that_can_never_be_answered_is_refused_by_name(model, entry, sampling, kind, words, param):
    with pytest.raises(kind, match=words) as caught:
        model.submit(call("a", [5, 6], entry, **sampling))
    assert type(caught.value) is kind
    assert caught.value.param == param
    assert not model.busy()
    assert model.waiting() == 0


def test_a_call_under_way_is_not_replaced_by_another_of_its_name(model):
    model.submit(call("a", [5, 6, 7]))
    with pytest.raises(BadRequest, match="under way"):
        model.submit(call("a", [8]))
    assert drain(model).prompt_tokens("a") == [3]


def test_a_model_to_generate_with_does_not_embed(model):
    with pytest.raises(BadRequest, match="cannot be used to embed"):
        model.submit(Call(id="a", model="m", task="embed", inputs=["x"]))


def test_the_context_can_be_used_to_its_last_token(model):
    answers = ask(model, prompts(500)[0], max_tokens=None, ignore_eos=True)
    assert (answers.tokens("a"), answers.finish("a")) == (12, "length")


def test_a_conversation_needs_a_chat_template(tmp_path):
    model = load(tiny.save(tmp_path, tiny.ARCHITECTURES["gpt2"](), template=False))
    assert not model.info.chat
    with pytest.raises(NoChatTemplate, match="no chat template"):
        model.submit(call("a", Conversation(messages=[{"role": "user", "content": "Hi"}])))


# --- faults ---


@pytest.mark.parametrize("cache", ["slots", "paged"])
def test_a_call_whose_numbers_break_fails_alone_and_leaves_no_trace_in_its_place(cache, tmp_path, made):
    folder = tiny.save(tmp_path, tiny.ARCHITECTURES["llama"]())
    model = load(folder, max_batch=4, prefill_tokens=7, cache=cache, kv_cache_bytes=2**22)
    kept = prompts(50)[0]  # longer than what breaks, so that what broke stays in view
    wanted = expected(model, kept, 40)
    with torch.no_grad():
        model._runner.model.get_input_embeddings().weight[310] = float("nan")
    model.submit(call("kept", kept, max_tokens=40))
    for _ in range(9):
        model.step()
    model.submit(call("broken", [310] + [5] * 30, [5, 6]))
    model.submit(call("after", [5], max_tokens=20, ignore_eos=True))
    answers = drain(model)
    assert isinstance(answers.ended["broken"], EngineFault)
    assert made["kept", 0] == wanted
    assert answers.tokens("after") == 20


def break_forward(model, monkeypatch, when, error):
    """Let the forward pass raise, as a device does, where `when(tokens)`."""
    forward = model._runner.forward

    def breaking(tokens, *args, **rest):
        if when(tokens):
            raise error
        return forward(tokens, *args, **rest)

    monkeypatch.setattr(model._runner, "forward", breaking)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_when_memory_runs_out_the_newest_fails_and_the_rest_goes_on(model, made, monkeypatch, error):
    some = prompts(5, 6, 4)
    wanted = [expected(model, p, 20) for p in some]
    break_forward(model, monkeypatch, lambda tokens: len(tokens) > 2, error)
    for i, prompt in enumerate(some):
        model.submit(call(str(i), prompt, max_tokens=20))
    answers = drain(model)
    assert isinstance(answers.ended["2"], DoesNotFit)
    assert answers.ended["0"] is answers.ended["1"] is None
    assert [made["0", 0], made["1", 0]] == wanted[:2]


def test_a_prompt_too_large_for_memory_fails_alone(model, made, monkeypatch):
    kept = prompts(5)[0]
    wanted = expected(model, kept, 20)
    break_forward(model, monkeypatch, lambda tokens: any(len(t) == 6 for t in tokens), torch.OutOfMemoryError())
    model.submit(call("kept", kept, max_tokens=20))
    model.step()
    model.submit(call("large", prompts(6)[0]))
    answers = drain(model)
    assert isinstance(answers.ended["large"], DoesNotFit)
    assert made["kept", 0] == wanted


def test_a_pass_that_fails_otherwise_fails_its_calls_and_the_model_lives(model, monkeypatch):
    with monkeypatch.context() as during:
        break_forward(model, during, lambda tokens: True, ValueError("something private"))
        answers = ask(model, [5, 6, 7])
    assert isinstance(answers.ended["a"], EngineFault)
    assert "private" not in answers.ended["a"].message
    assert ask(model, [5, 6, 7]).ended == {"a": None}


def test_a_tokenizer_that_fails_on_one_answer_fails_only_that(model, monkeypatch):
    decode = model._runner.decode

    def breaking(ids):
        if 300 in ids:
            raise ValueError("something private")
        return decode(ids)

    monkeypatch.setattr(model._runner, "decode", breaking)
    model.submit(call("kept", [5, 6], ignore_eos=True))
    model.submit(call("broken", [5, 6], logit_bias={300: 100}))
    answers = drain(model)
    assert answers.tokens("kept") == 8
    assert isinstance(answers.ended["broken"], EngineFault)
    assert "private" not in answers.ended["broken"].message


@pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="torch before 2.8 does not tell a lost device")
def test_a_lost_device_ends_the_process(model, monkeypatch):
    break_forward(model, monkeypatch, lambda tokens: True, torch.AcceleratorError("CUDA error: an illegal access"))
    model.submit(call("a", [5, 6, 7]))
    with pytest.raises(torch.AcceleratorError):
        model.step()
    model.cancel("a")


# --- loading ---


def test_what_a_model_takes_is_known_before_torch_is_imported():
    code = """
import sys
from pathlib import Path
from hfms_cli import Device, LoadRequest, ModelCard
from hfms_engines.generation import GenerationEngine
card = ModelCard(format="gguf", model_type="llama", architecture="llama", tasks=("generate",), weights_bytes=10**8,
                 parameters=134_515_008, weights=("a.gguf",))
cpu = Device(id="cpu", kind="cpu", name="", total_bytes=2**34, free_bytes=2**33, torch_device="cpu")
engine = GenerationEngine()
assert engine.supports(card, cpu) is None
print(engine.estimate(LoadRequest(folder=Path("/nowhere"), card=card, device=cpu)))
assert not {"torch", "transformers", "numpy"} & set(sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    weights, work = 134_515_008 * 4, memory.TORCH_PROCESS + memory._build_bytes()
    assert int(out) == weights + work + (2**33 - weights - work) // 4


@pytest.mark.parametrize(
    ("about", "dtype", "device", "weights"),
    [
        ({"parameters": 1000, "dtype": "bfloat16"}, "auto", "cpu", 4000),
        ({"parameters": 1000, "dtype": "bfloat16"}, "bfloat16", "cpu", 3000),
        ({"parameters": 1000, "dtype": "bfloat16"}, "auto", "cuda:0", 2000),
        ({"parameters": 1000, "dtype": "float32"}, "auto", "cuda:0", 4000),
        ({"parameters": 1000, "dtype": "float32"}, "float16", "cuda:0", 2000),
        ({"parameters": 1000, "format": "gguf", "dtype": "Q4_1"}, "auto", "cuda:0", 2000),
        ({"weights_bytes": 2000, "dtype": "bfloat16"}, "auto", "cpu", 4000),
        ({"weights_bytes": 4000, "dtype": "float32"}, "auto", "cpu", 4000),
        ({"weights_bytes": 2000, "format": "pickle"}, "auto", "cuda:0", 2000),
        ({"weights_bytes": 625, "format": "gguf"}, "auto", "cpu", 4000),
    ],
)
def test_an_estimate_counts_weights_as_they_are_loaded(about, dtype, device, weights):
    base = {
        "format": "safetensors",
        "model_type": "llama",
        "architecture": "",
        "tasks": ("generate",),
        "weights_bytes": 1,
    }
    where = Device(id=device, kind="x", name="", total_bytes=0, free_bytes=0, torch_device=device)
    engine = GenerationEngine(GenerationOptions(kv_cache_bytes=7))
    request = LoadRequest(folder=Path(), card=ModelCard(**base | about), device=where, dtype=dtype)
    rest = memory.TORCH_PROCESS + memory._build_bytes() if device == "cpu" else memory.ON_GPU
    assert engine.estimate(request) == weights + 7 + rest


@pytest.mark.parametrize(
    ("about", "torch_device", "words"),
    [
        ({"tasks": ("embed",)}, "cpu", "does not generate"),
        ({"format": "none"}, "cpu", "no weights"),
        ({}, None, "torch cannot use"),
        ({"format": "gguf", "model_type": "rwkv7"}, "cpu", "cannot read rwkv7 from GGUF"),
        ({"format": "gguf", "weights": ("a-00001-of-00002.gguf", "a-00002-of-00002.gguf")}, "cpu", "one file"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(about, torch_device, words):
    base = {
        "format": "safetensors",
        "model_type": "llama",
        "architecture": "",
        "tasks": ("generate",),
        "weights_bytes": 1,
    }
    where = Device(id="x", kind="x", name="", total_bytes=0, free_bytes=0, torch_device=torch_device)
    assert words in GenerationEngine().supports(ModelCard(**base | about), where)


def test_the_gguf_architectures_are_those_that_transformers_unpacks():
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    # The table also holds keys that are no architectures, encoder-decoders, and names of transformers' own.
    other = {"general", "tokenizer", "t5", "umt5", "mamba", "lfm2"}
    ours = {"gpt_oss": "gpt-oss", "minimax_m2": "minimax-m2", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}
    assert {ours.get(a, a) for a in set(GGUF_SUPPORTED_ARCHITECTURES) - other} == GGUF_ARCHITECTURES


@pytest.mark.parametrize(
    ("model_type", "more", "words"),
    [
        ("rwkv", {"attention_hidden_size": 32}, "cache of transformers' own|token by token"),
        ("recurrent_gemma", {"lru_width": 32, "attention_window_size": 16}, "beside other sequences"),
        ("bert", {"is_decoder": False, "attn_implementation": "eager"}, "token by token"),
    ],
)
def test_a_model_that_no_cache_carries_is_refused_and_not_answered_wrongly(tmp_path, model_type, more, words):
    folder = tiny.save(tmp_path, tiny._config(model_type, **more)())
    with pytest.raises(LoadFailed, match=words):
        load(folder)


def test_an_encoder_decoder_is_refused(tmp_path):
    config = transformers.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=320)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(LoadFailed, match="encoder-decoder"):
        load(tmp_path)


def test_a_cache_too_small_for_a_block_is_refused_and_a_small_one_shortens_the_context(llama):
    token = 3 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, bytes
    with pytest.raises(DoesNotFit, match="255 tokens"):
        load(llama, kv_cache_bytes=255 * token)
    model = load(llama, kv_cache_bytes=300 * token)
    assert model.info.context_length == 256
    with pytest.raises(ContextLengthExceeded, match="is 256 tokens"):
        model.submit(call("a", [5] * 256))
    assert ask(model, prompts(200)[0], max_tokens=None, ignore_eos=True).tokens("a") == 56


def test_pickles_are_not_read_where_safetensors_were_promised(tmp_path, llama):
    folder = copy_of(llama, tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save(transformers.AutoModelForCausalLM.from_pretrained(llama).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(LoadFailed):
        load(folder)
    assert ask(load(folder, about=card(folder, format="pickle")), [5, 6, 7]).ended == {"a": None}


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path, llama):
    folder = copy_of(llama, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Bomb(tmp_path / "boom")}, folder / "pytorch_model.bin")
    with pytest.raises(LoadFailed):
        load(folder, about=card(folder, format="pickle"))
    assert not (tmp_path / "boom").exists()


def test_a_models_own_code_runs_only_where_the_operator_trusts_it(tmp_path, llama):
    folder = copy_of(llama, tmp_path / "model")
    (folder / "modeling_own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    auto = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "own", "auto_map": auto}))
    about = card(folder, remote_code=True)
    with pytest.raises(UnsafeFormat, match="trust_remote_code"):
        load(folder, about=about)
    assert not (tmp_path / "ran").exists()
    request = LoadRequest(folder=folder, card=about, device=CPU, trust_remote_code=True)
    assert ask(GenerationEngine().load(request), [5, 6, 7]).ended == {"a": None}
    assert (tmp_path / "ran").exists()


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir(exist_ok=True)
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_a_torn_model_is_refused_without_its_path(tmp_path, llama):
    folder = copy_of(llama, tmp_path)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(LoadFailed) as caught:
        load(folder)
    assert str(tmp_path) not in caught.value.message


@pytest.mark.real_model
def test_loading_says_nothing(smollm2):
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import test_generation as t
t.load(t.Path(sys.argv[2]), about=t.gguf_card(t.Path(sys.argv[2])))
"""
    here = str(Path(__file__).parent)
    out = subprocess.run([sys.executable, "-c", code, here, str(smollm2)], check=True, capture_output=True, text=True)
    assert (out.stdout, out.stderr) == ("", "")
