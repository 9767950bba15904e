"""The llama_cpp engine on SmolLM2's GGUF: what is mapped, what is refused, and that it needs no torch."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import aiohttp
import gguf
import jinja2
import msgspec
import pytest

from hfms_cli import (
    BadRequest,
    Caller,
    ContextLengthExceeded,
    Conversation,
    Device,
    DoesNotFit,
    EngineFault,
    LoadFailed,
    LoadRequest,
    NoChatTemplate,
    Structure,
    TextOf,
    TokensOf,
    VocabularyOf,
)
from hfms_cli.models.inspect import inspect
from hfms_engines.llama_cpp import LlamaCppEngine, LlamaCppOptions
from tests.chat_templates import TEMPLATES
from tests.conftest import SMOLLM2
from tests.engines.driving import CPU, Answers, ask, call, drain

pytest.importorskip("xllamacpp")
llama_cpp_runner = pytest.importorskip("hfms_engines.llama_cpp_runner")

FRANCE = "The capital of France is"
HELLO = Conversation(messages=[{"role": "user", "content": "Say hello."}])
TOKEN_BYTES = 23_040
"""Keys and values of one token of SmolLM2: 30 layers, 3 heads of 64, keys and values, 2 bytes."""


class Settings(msgspec.Struct):
    n_ctx: int


class Props(msgspec.Struct):
    """What llama.cpp says of each of its slots."""

    default_generation_settings: Settings


def request(folder: Path, *, dtype: str = "auto", device: Device = CPU, **more) -> LoadRequest:
    return LoadRequest(folder=folder, card=msgspec.structs.replace(inspect(folder), **more), device=device, dtype=dtype)


def load(folder: Path, **options):
    return LlamaCppEngine(LlamaCppOptions(**options)).load(request(folder))


def tokens_kept(model) -> list[int]:
    """How much each slot had kept of what it has read; now it has nothing."""
    slots = range(model.info.max_batch)
    ask = model._door.ask
    return [ask("POST", f"/slots/{i}?action=erase", {}, llama_cpp_runner._Erased).n_erased for i in slots]


def rewritten(source: Path, out: Path, *, without: tuple[str, ...] = (), template: str = "", **writing) -> None:
    """A copy of a GGUF, less some of what it says of itself, and with another chat template where there is one."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, "llama", **writing)
    for name, value in reader.fields.items():
        if name in without or name.startswith(("GGUF.", "general.architecture")):
            continue
        inner = value.types[-1] if value.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, value.contents(), value.types[0], sub_type=inner)
    if template:
        writer.add_chat_template(template)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_shape=tensor.data.shape, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def model(smollm2):
    """Shared, so tests leave it idle."""
    loaded = load(smollm2, max_batch=4, prefill_tokens=64, kv_cache_bytes=2048 * TOKEN_BYTES)
    yield loaded
    loaded.close()


# --- what it answers ---


def test_text_and_token_ids_and_chats_are_answered(model):
    ids = model._tokenize(FRANCE)
    assert ask(model, FRANCE, max_tokens=2).text("a") == " Paris."
    assert ask(model, ids, max_tokens=2).text("a") == " Paris."
    answers = ask(model, HELLO, max_tokens=30)
    assert "hello" in answers.text("a").lower()
    assert answers.prompt_tokens("a") == [33]


def test_it_tells_tokens_their_text_and_its_vocabulary(model):
    told = model.ask(TokensOf("日本 is"))
    assert told.ids == model._tokenize("日本 is")
    assert len(told.names) == len(told.ids)
    assert model.ask(TextOf(told.ids)).text == "日本 is"
    assert model.ask(TokensOf(HELLO)).ids == model._tokenize(model._chat(HELLO))
    about = model.ask(VocabularyOf())
    assert (about.size, about.eos_token) == (49152, "<|im_end|>")
    assert "<|im_start|>" in about.chat_template
    with pytest.raises(BadRequest) as refused:
        model.ask(TextOf([10**6]))
    assert refused.value.param == "tokens"


def test_tokens_are_counted_as_they_are_told_and_prompts_once(model):
    answers = ask(model, FRANCE, "Once", n=2, max_tokens=5)
    assert answers.prompt_tokens("a") == [5, 1]
    assert [answers.tokens("a", i) for i in range(4)] == [5] * 4
    assert [answers.finish("a", i) for i in range(4)] == ["length"] * 4
    ended = ask(model, HELLO, max_tokens=100)
    assert ended.finish("a") == "stop"
    # The last token ends the answer and has no text.
    assert ended.tokens("a") == len(model._tokenize(ended.text("a"))) + 1


def test_greedy_answers_are_the_same_each_time(model):
    first = ask(model, FRANCE, max_tokens=40).text("a")
    ask(model, "Something else came between", max_tokens=10)
    assert ask(model, FRANCE, max_tokens=40).text("a") == first


def test_an_answer_without_a_limit_goes_on_until_the_context_is_full(smollm2):
    model = load(smollm2, kv_cache_bytes=256 * TOKEN_BYTES)
    try:
        assert model.info.context_length == 256
        answers = ask(model, FRANCE, max_tokens=None, ignore_eos=True)
        assert (answers.tokens("a"), answers.finish("a")) == (251, "length")
    finally:
        model.close()


def test_more_sequences_than_slots_and_cache_are_all_answered(smollm2):
    """Each of the long ones may come to need most of the cache."""
    model = load(smollm2, max_batch=2, kv_cache_bytes=256 * TOKEN_BYTES)
    try:
        for i in range(3):
            model.submit(call(f"long {i}", FRANCE, max_tokens=150, ignore_eos=True))
            model.submit(call(f"short {i}", FRANCE, max_tokens=2))
        assert model.waiting() == 6
        answers = drain(model)
        assert set(answers.ended.values()) == {None}
        assert [answers.tokens(f"long {i}") for i in range(3)] == [150] * 3
        assert [answers.text(f"short {i}") for i in range(3)] == [" Paris."] * 3
    finally:
        model.close()


def test_what_idle_slots_have_kept_makes_room(smollm2):
    model = load(smollm2, max_batch=4, prefix_cache=True, kv_cache_bytes=256 * TOKEN_BYTES)
    try:
        for i in range(4):
            answers = ask(model, f"{i} " * 50, max_tokens=50, ignore_eos=True)
            assert answers.prompt_tokens("a")[0] + answers.tokens("a") > 256 / 4
            assert answers.ended == {"a": None}
            assert answers.tokens("a") == 50
    finally:
        model.close()


def test_a_slot_forgets_what_it_has_read_once_its_sequence_is_over_or_cancelled(model):
    """Each step of llama.cpp's looks through all that the cache holds, whoever's it was."""
    ask(model, FRANCE, "Once", max_tokens=5)
    ask(model, FRANCE, max_tokens=5, logprobs=1)  # a request a token
    model.submit(call("long", FRANCE, max_tokens=1000, ignore_eos=True))
    answers = Answers()
    while not answers.tokens("long"):
        answers.take(model.step())
    model.cancel("long")
    while model._running:
        model.step()
    assert tokens_kept(model) == [0] * 4


def test_what_slots_have_read_stays_where_it_may_be_read_again(smollm2):
    model = load(smollm2, max_batch=2, prefix_cache=True, kv_cache_bytes=256 * TOKEN_BYTES)
    try:
        ask(model, FRANCE, max_tokens=5)
        assert sum(tokens_kept(model)) >= 5
    finally:
        model.close()


@pytest.mark.parametrize("longest", [256, 512])
def test_slots_have_a_cache_each_where_all_have_room_for_the_longest_text(smollm2, longest):
    """Here for two texts of 256 tokens; or for one of 512, so that either slot can have it."""
    room = 512 * TOKEN_BYTES
    alone = load(smollm2, max_batch=1, kv_cache_bytes=room)
    try:
        expected = ask(alone, FRANCE, max_tokens=251, ignore_eos=True).text("a")
    finally:
        alone.close()
    engine = LlamaCppEngine(LlamaCppOptions(max_batch=2, kv_cache_bytes=room))
    model = engine.load(request(smollm2, context_length=longest))
    try:
        assert model._door.ask("GET", "/props", None, Props).default_generation_settings.n_ctx == longest
        for i in range(2):
            model.submit(call(f"{i}", FRANCE, max_tokens=251, ignore_eos=True))
        answers = drain(model)
        assert [answers.text(f"{i}") for i in range(2)] == [expected] * 2
    finally:
        model.close()


def test_who_has_priority_goes_first_and_then_the_key_that_has_had_less(smollm2):
    model = load(smollm2, max_batch=1, kv_cache_bytes=256 * TOKEN_BYTES)
    try:
        for id, key, priority in (("a1", "a", 1), ("a2", "a", 1), ("b", "b", 1), ("low", "c", 0), ("high", "a", 2)):
            asked = call(id, FRANCE, max_tokens=1)
            model.submit(msgspec.structs.replace(asked, priority=priority, caller=Caller(key_id=key)))
        assert list(drain(model).ended) == ["high", "b", "a1", "a2", "low"]
    finally:
        model.close()


# --- sampling ---


def test_a_seed_gives_the_same_answer_again(model):
    said = [ask(model, FRANCE, temperature=1.0, seed=seed, max_tokens=12).text("a") for seed in (7, 7, 8)]
    assert said[0] == said[1] != said[2]


def test_choices_of_one_seed_differ(model):
    answers = ask(model, FRANCE, n=3, temperature=1.0, seed=7, max_tokens=12)
    assert len({answers.text("a", i) for i in range(3)}) == 3


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_top_k_and_top_p_and_min_p_narrow_the_choice(model, narrow):
    greedy = ask(model, FRANCE, max_tokens=8).text("a")
    assert ask(model, FRANCE, max_tokens=8, temperature=2.0, seed=1, **narrow).text("a") == greedy
    assert ask(model, FRANCE, max_tokens=8, temperature=2.0, seed=1).text("a") != greedy


def test_the_temperature_comes_before_top_p(model):
    """At a high temperature nearly every word counts, so half of their sum is reached by many."""
    said = {ask(model, FRANCE, max_tokens=1, temperature=5.0, top_p=0.5, seed=i).text("a") for i in range(8)}
    assert len(said) > 4


def test_a_bias_lifts_or_bans_a_token(model):
    [paris] = model._tokenize(" Paris")
    assert ask(model, FRANCE, max_tokens=3, logit_bias={paris: 100.0}).text("a") == " Paris" * 3
    assert "Paris" not in ask(model, FRANCE, max_tokens=3, logit_bias={paris: -100.0}).text("a")


def test_a_repetition_penalty_counts_prompt_and_answer(model):
    said = "red, red, red, red,"
    assert ask(model, said, max_tokens=4).text("a") == " red, red,"
    penalised = ask(model, said, max_tokens=4, repetition_penalty=5.0).text("a")
    assert "red" not in penalised
    assert "," not in penalised


def test_ignore_eos_goes_on_to_the_limit(model):
    assert ask(model, HELLO, max_tokens=60).finish("a") == "stop"
    answers = ask(model, HELLO, max_tokens=60, ignore_eos=True)
    assert (answers.finish("a"), answers.tokens("a")) == ("length", 60)


@pytest.mark.parametrize("stop", [("Paris",), ("ris.", "zzz"), (" Paris.\n\nThe",)])
def test_a_stop_string_ends_the_answer_and_is_never_shown(model, stop):
    whole = ask(model, FRANCE, max_tokens=12).text("a")
    answers = ask(model, FRANCE, max_tokens=12, stop=stop)
    assert answers.text("a") == whole[: whole.index(stop[0])]
    assert answers.finish("a") == "stop"
    assert answers.tokens("a") <= 12


def test_characters_come_whole_and_every_token_of_them_is_counted(model):
    answers = ask(model, "🦜 " * 4 + "🦜", max_tokens=11)
    told = [(c.text, c.tokens) for c in answers.chunks["a"] if not c.begins]
    assert told[:3] == [(" 🦜", 3)] * 3
    # The limit came in the middle of the fourth.
    assert "\ufffd" not in answers.text("a")
    assert (answers.tokens("a"), answers.finish("a")) == (11, "length")


# --- what it refuses ---


@pytest.mark.parametrize(
    ("prompt", "sampling", "param"),
    [
        (FRANCE, {"presence_penalty": 0.5, "repetition_penalty": 1.1}, "presence_penalty"),
        (FRANCE, {"frequency_penalty": -0.5, "repetition_penalty": 1.1}, "frequency_penalty"),
        (FRANCE, {"max_tokens": 0}, "max_tokens"),
        (FRANCE, {"stop_token_ids": (10**6,)}, "stop_token_ids"),
        (FRANCE, {"logit_bias": {10**6: 1.0}}, "logit_bias"),
        ([1, 10**6], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([], {}, "prompt"),
        (Conversation(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), {}, "messages"),
        (Conversation(messages=[{"role": "user"}]), {}, "messages"),
    ],
)
def test_what_cannot_be_done_as_asked_is_refused_by_its_field(model, prompt, sampling, param):
    with pytest.raises(BadRequest) as refused:
        model.submit(call("a", prompt, **sampling))
    assert refused.value.param == param
    assert not model.busy()


def test_an_empty_text_is_the_token_that_texts_begin_with(model):
    assert ask(model, "", max_tokens=2).prompt_tokens("a") == [1]


@pytest.mark.parametrize(("prompt", "where"), [(FRANCE, "prompt"), (HELLO, "messages")])
def test_what_is_longer_than_the_context_is_refused_before_anything_runs(model, prompt, where):
    with pytest.raises(ContextLengthExceeded) as refused:
        model.submit(call("a", prompt, max_tokens=2048))
    assert refused.value.param == where
    assert "maximum context length is 2048 tokens" in refused.value.message
    assert not model.busy()


def test_a_model_without_a_template_holds_no_conversation(smollm2, tmp_path):
    rewritten(next(smollm2.glob("*.gguf")), tmp_path / "plain.gguf", without=("tokenizer.chat_template",))
    model = load(tmp_path, kv_cache_bytes=256 * TOKEN_BYTES)
    try:
        assert not model.info.chat
        with pytest.raises(NoChatTemplate):
            model.submit(call("a", HELLO))
        assert ask(model, FRANCE, max_tokens=1).text("a") == " Paris"
    finally:
        model.close()


# --- tools and reasoning ---

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALLED = Conversation(
    messages=[
        {"role": "user", "content": "How is the weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": "a1b2c3d4e",
                    "type": "function",
                    "function": {"name": "weather", "arguments": {"city": "Zürich", "days": [1, {"a": None}]}},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "a1b2c3d4e", "name": "weather", "content": "It rains."},
    ],
    tools=[TOOL],
)


def rendered(template: str, chat: Conversation) -> str:
    """What jinja makes of it, set up as transformers does that."""
    made = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    made.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    words = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    return made.from_string(template).render(
        messages=chat.messages, tools=chat.tools, add_generation_prompt=True, **words, **(chat.template_kwargs or {})
    )


@pytest.mark.parametrize("name", ["qwen3", "thinks-at-once"])
def test_templates_take_tools_and_an_answer_begins_with_what_the_prompt_opened(smollm2, tmp_path, name):
    template = TEMPLATES[name].rstrip()
    rewritten(
        next(smollm2.glob("*.gguf")),
        tmp_path / "plain.gguf",
        without=("tokenizer.chat_template",),
        template=template,
    )
    model = load(tmp_path, kv_cache_bytes=1024 * TOKEN_BYTES)
    try:
        assert model.info.template == template
        thought = Conversation(messages=CALLED.messages[:1], template_kwargs={"enable_thinking": False})
        for chat in (CALLED, thought) if name == "qwen3" else (thought,):
            assert model._chat(chat) == rendered(template, chat)
        asked = call("a", thought, max_tokens=3)
        opening = "</think>\n\n" if name == "qwen3" else "<think>\n"
        model.submit(msgspec.structs.replace(asked, marks=("<think>", "</think>")))
        marked = drain(model).text("a")
        model.submit(asked)
        assert marked == opening + drain(model).text("a")
    finally:
        model.close()


def test_special_tokens_are_left_out_of_an_answer_unless_they_are_marks(model):
    start = 1  # <|im_start|>

    def say(**more):
        asked = call("a", "Once upon a time", max_tokens=6, temperature=1.0, seed=3, logit_bias={start: 25.0})
        model.submit(msgspec.structs.replace(asked, **more))
        return drain(model).text("a")

    plain, shown = say(), say(marks=("<|im_start|>",))
    assert "<|im_start|>" in shown
    assert shown.replace("<|im_start|>", "") == plain


# --- leaving early, and failing ---


def test_a_cancelled_call_says_no_more_and_its_slot_is_free_for_the_next(smollm2):
    model = load(smollm2, max_batch=1, kv_cache_bytes=4096 * TOKEN_BYTES)
    try:
        model.submit(call("long", FRANCE, max_tokens=4000, ignore_eos=True))
        model.submit(call("next", FRANCE, max_tokens=1))
        answers = Answers()
        while not answers.tokens("long"):
            answers.take(model.step())
        told = answers.tokens("long")
        model.cancel("long")
        model.cancel("unknown")
        drain(model, answers)
        assert answers.tokens("long") == told
        assert answers.ended == {"next": None}
        assert answers.text("next") == " Paris"
    finally:
        model.close()


def test_a_call_is_cancelled_while_its_prompt_is_read(smollm2):
    model = load(smollm2, max_batch=1, prefill_tokens=16, kv_cache_bytes=4096 * TOKEN_BYTES)
    try:
        model.submit(call("long", [504] * 4000, max_tokens=1))
        while model.waiting():
            model.step()
        [thread] = model._running.values()
        model.cancel("long")
        assert not model.busy()
        thread.join(timeout=60)
        assert not thread.is_alive()
        assert ask(model, FRANCE, max_tokens=1).text("a") == " Paris"
    finally:
        model.close()


def test_a_failure_of_llama_cpp_fails_the_call_and_tells_no_more_of_it(model, caplog):
    model.submit(call("bad", FRANCE))
    [seq] = model._line
    seq.request["prompt"] = [99999999]
    model.submit(call("good", FRANCE, max_tokens=1))
    answers = drain(model)
    assert isinstance(answers.ended["bad"], EngineFault)
    assert "invalid tokens" not in answers.ended["bad"].message
    assert "invalid tokens" in caplog.text
    assert answers.text("good") == " Paris"


def test_closing_ends_its_threads_and_leaves_no_file(smollm2):
    model = load(smollm2, kv_cache_bytes=2048 * TOKEN_BYTES)
    folder = model._door.folder
    assert folder.stat().st_mode & 0o777 == 0o700
    model.submit(call("a", FRANCE, max_tokens=2000, ignore_eos=True))
    model.step()
    model.close()
    assert not model.busy()
    assert not folder.exists()
    assert not [t for t in threading.enumerate() if t.name.startswith("sequence")]


def test_llama_cpp_leaves_the_signals_of_the_process_alone(model):
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert ask(model, FRANCE, max_tokens=1).text("a") == " Paris"


# --- loading ---


def test_what_it_does_not_run_is_said_before_anything_is_loaded(smollm2):
    engine, good = LlamaCppEngine(), inspect(smollm2)
    assert engine.supports(good, CPU) is None
    assert "CPUs" in engine.supports(good, msgspec.structs.replace(CPU, kind="cuda"))
    for change, word in (({"format": "safetensors"}, "no GGUF"), ({"tasks": ("embed",)}, "does not generate")):
        assert word in engine.supports(msgspec.structs.replace(good, **change), CPU)


def test_a_file_that_llama_cpp_cannot_load_says_which_and_leaves_nothing(smollm2, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "doors"))
    (tmp_path / "doors").mkdir()
    (tmp_path / "model").mkdir()
    name = next(smollm2.glob("*.gguf")).name
    (tmp_path / "model" / name).write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(LoadFailed, match="architecture `llama`"):
        LlamaCppEngine().load(replace(request(smollm2), folder=tmp_path / "model"))
    assert list((tmp_path / "doors").iterdir()) == []


def test_only_the_precision_of_the_file_is_served(smollm2):
    with pytest.raises(LoadFailed, match="dtype"):
        LlamaCppEngine().load(request(smollm2, dtype="bfloat16"))


@pytest.mark.parametrize(
    ("options", "free", "cache"),
    [
        ({}, 2**40, 4 * 8192),
        ({"max_batch": 2}, 2**40, 2 * 8192),
        ({}, 2**30, 8960),
        ({"kv_cache_bytes": 1000 * TOKEN_BYTES}, 2**30, 768),
        ({"kv_cache_bytes": 10**12, "max_batch": 3}, 2**30, 3 * 8192),
        ({}, 0, 0),
    ],
)
def test_an_estimate_counts_the_cache_that_is_made(smollm2, options, free, cache):
    wish = request(smollm2, device=msgspec.structs.replace(CPU, free_bytes=free))
    weights, work = 96_576_768, 128 * 2**20
    engine = LlamaCppEngine(LlamaCppOptions(**options))
    assert engine.estimate(wish) == weights + work + cache * TOKEN_BYTES
    if not cache:
        with pytest.raises(DoesNotFit, match="kv_cache_bytes"):
            engine.load(wish)


@pytest.mark.parametrize("small_first_shard", [False, True])  # whether the first part has weights
def test_a_model_in_parts_is_one_model(smollm2, tmp_path, small_first_shard):
    out = tmp_path / "part.gguf"
    source = next(smollm2.glob("*.gguf"))
    rewritten(source, out, split_max_tensors=100, small_first_shard=small_first_shard)
    assert len(list(tmp_path.iterdir())) == 3 + small_first_shard
    assert inspect(tmp_path).parameters == inspect(source).parameters
    model = load(tmp_path, kv_cache_bytes=256 * TOKEN_BYTES)
    try:
        assert ask(model, FRANCE, max_tokens=2).text("a") == " Paris."
    finally:
        model.close()


# --- over HTTP ---


# Read by every Python that starts with it on its path.
BLOCKED = """
from importlib.machinery import PathFinder

missing = {"accelerate", "gguf", "numpy", "openvino", "tokenizers", "torch", "transformers"}
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] in missing else find(name, *rest)
"""


@pytest.mark.real_model
async def test_a_gguf_is_served_where_torch_and_transformers_and_numpy_are_missing(environ, free_port, tmp_path):
    """The whole server, in processes that cannot import them."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKED)
    env = environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, [environ.get("PYTHONPATH")])])}
    probe = (
        "import importlib.util, sys; sys.exit(any(map(importlib.util.find_spec, ['torch', 'transformers', 'numpy'])))"
    )
    assert subprocess.run([sys.executable, "-c", probe], env=env, check=False).returncode == 0
    serve = [sys.executable, "-m", "hfms_cli", "serve", SMOLLM2, "--port", str(free_port)]
    url = f"http://127.0.0.1:{free_port}"
    with (
        open(tmp_path / "log", "w") as log,
        subprocess.Popen(serve, cwd=tmp_path, env=env, stdout=log, stderr=log) as server,
    ):
        try:
            async with aiohttp.ClientSession(url) as session, asyncio.timeout(120):
                while not await ready(session):
                    assert server.poll() is None, (tmp_path / "log").read_text()
                    await asyncio.sleep(0.1)
                body = {"model": SMOLLM2, "prompt": FRANCE, "max_tokens": 2, "temperature": 0}
                async with session.post("/v1/completions", json=body) as response:
                    answer = await response.json()
                async with session.get("/models") as response:
                    models = {about["id"]: about for about in (await response.json())["data"]}
        finally:
            server.terminate()
    assert FRANCE + answer["choices"][0]["text"] == "The capital of France is Paris."
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    assert models[SMOLLM2]["engine"] == "llama_cpp"


async def ready(session: aiohttp.ClientSession) -> bool:
    try:
        async with session.get("/ready") as response:
            return response.status == 200
    except aiohttp.ClientConnectionError:
        return False


# --- what answers must look like ---

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 3, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def structured(kind: str, spec, **sampling):
    text = spec if isinstance(spec, str) else json.dumps(spec)
    return {"structure": Structure(kind=kind, spec=text, param="guided")} | {"temperature": 2.0, "seed": 1} | sampling


def test_answers_have_the_structure_that_was_asked_for(model):
    answers = ask(model, HELLO, n=3, **structured("json_schema", PERSON, max_tokens=80))
    for i in range(3):
        assert answers.finish("a", i) == "stop"
        said = json.loads(answers.text("a", i))
        assert said.keys() == {"name", "age"}
        assert 3 <= said["age"] <= 99
    assert re.fullmatch("[0-9]{3}-[a-f]{2}", ask(model, HELLO, **structured("regex", "[0-9]{3}-[a-f]{2}")).text("a"))
    assert ask(model, HELLO, **structured("choice", ["é", "no"])).text("a") in ("é", "no")
    lark = 'start: "<call>" /[a-z]{3}/ "</call>"'
    assert re.fullmatch(
        "<call>[a-z]{3}</call>", ask(model, HELLO, **structured("grammar", lark, max_tokens=30)).text("a")
    )
    assert ask(model, HELLO, **structured("json_object", "", max_tokens=2)).finish("a") == "length"


@pytest.mark.parametrize(
    ("kind", "spec"),
    [("json_schema", {"not": {}}), ("regex", "("), ("json_schema", {"type": "integer", "multipleOf": 999_983})],
)
def test_a_structure_that_cannot_be_followed_is_refused_before_llama_cpp_sees_it(model, kind, spec):
    refused = ask(model, HELLO, **structured(kind, spec)).ended["a"]
    assert isinstance(refused, BadRequest)
    assert (refused.code, refused.param) == ("invalid_schema", "guided")


@pytest.mark.parametrize("more", [{"ignore_eos": True}, {"logprobs": 1}, {"min_tokens": 2}])
def test_what_is_done_token_by_token_is_refused_beside_a_structure(model, more):
    with pytest.raises(BadRequest) as refused:
        model.submit(call("a", FRANCE, **structured("regex", "a", **more)))
    assert [refused.value.param] == list(more)
    assert "beside `guided`" in refused.value.message
    assert not model.busy()


def test_a_grammar_that_llama_cpp_gives_up_fails_its_call(model):
    """llama.cpp itself would go on without it."""
    grammar = "start: a0\n" + "".join(f"a{i}: a{i + 1} a{i + 1}\n" for i in range(30)) + 'a30: "x"'
    answers = ask(model, HELLO, **structured("grammar", grammar, max_tokens=40))
    assert isinstance(answers.ended["a"], BadRequest)
    assert (answers.ended["a"].code, answers.ended["a"].param) == ("invalid_schema", "guided")
    assert set(answers.text("a")) <= {"x"}


def test_a_call_is_cancelled_while_its_structure_is_checked(model):
    slow = {"type": "integer", "multipleOf": 999_979}
    model.submit(call("a", HELLO, **structured("json_schema", slow)))
    model.cancel("a")
    assert not model.busy()
    assert ask(model, FRANCE, max_tokens=1).text("a") == " Paris"
