"""Answers of llama.cpp's a request a token: logprobs, echo, and what needs the tokens one by one."""

from __future__ import annotations

import codecs
from functools import cache

import msgspec
import openai
import pytest

from hfms_cli import Conversation, EngineFault
from hfms_engines.llama_cpp_steps import Reader, Step
from tests.conftest import SMOLLM2
from tests.engines.driving import Answers, call, drain

pytest.importorskip("xllamacpp")

from tests.engines.test_llama_cpp import FRANCE, TOKEN_BYTES, load

PARROTS = "🦜 " * 3 + "🦜"
EOS = 2
"""SmolLM2's `<|im_end|>`."""


@pytest.fixture(scope="module")
def model(smollm2):
    """Shared, so tests leave it idle."""
    loaded = load(smollm2, max_batch=4, prefill_tokens=16, kv_cache_bytes=2048 * TOKEN_BYTES)
    yield loaded
    loaded.close()


def asked(id: str, *inputs, echo: bool = False, marks: tuple[str, ...] = (), **how):
    return msgspec.structs.replace(call(id, *inputs, **how), echo=echo, marks=marks)


def ask(model, *inputs, **how) -> Answers:
    model.submit(asked("a", *inputs, **how))
    answers = drain(model)
    assert answers.ended == {"a": None}
    return answers


def told(answers: Answers, index: int = 0):
    return [score for c in answers.chunks["a"] if c.index == index for score in c.logprobs or ()]


@pytest.fixture(scope="module")
def every(model, reader):
    """All that llama.cpp says of what may come next."""

    @cache
    def said(*before: int) -> dict[int, float]:
        forced = {"prompt": before, "n_probs": reader.words.vocabulary, "logit_bias": [[reader.words.whole, 1000.0]]}
        return {token.id: token.logprob for token in reader.ask(forced | {"temperature": 0.0}).told.top_logprobs}

    return said


@pytest.fixture(scope="module")
def reader(model):
    """Asks the idle model about single tokens."""

    def ask(changes) -> Step:
        said: list[bytes] = []
        base = {"n_predict": 1, "stream": False, "return_tokens": True, "verbose": True, "cache_prompt": False}
        model._server.handle_completions(msgspec.json.encode(base | changes), lambda data: said.append(data) or False)
        return msgspec.json.decode(said[0], type=Step)

    return Reader(ask, model._words)


# --- logprobs ---


@pytest.mark.parametrize("prompt", [FRANCE, PARROTS])
def test_each_token_has_its_logprob_and_the_likeliest_also_within_characters(model, every, prompt):
    answers = ask(model, prompt, max_tokens=5, logprobs=3)
    ids = model._tokenize(prompt)
    scores = told(answers)
    assert len(scores) == answers.tokens("a") == 5
    for score in scores:
        said = every(*ids)
        assert score.logprob == pytest.approx(said[score.id], abs=1e-3)
        assert [t[0] for t in score.top] == sorted(said, key=said.__getitem__, reverse=True)[:3]
        assert [t[3] for t in score.top] == pytest.approx([said[t[0]] for t in score.top], abs=1e-3)
        ids.append(score.id)


def test_the_bytes_of_tokens_that_cut_characters_are_the_text(model):
    answers = ask(model, PARROTS, max_tokens=9, logprobs=0)
    scores = told(answers)
    assert b"".join(s.bytes for s in scores).decode() == answers.text("a") == " 🦜" * 3
    assert scores[0].bytes == b" \xf0\x9f"
    assert scores[0].text == " \ufffd"
    # Nobody is told half a character, and each token with the text that it ends.
    seen = codecs.getincrementaldecoder("utf-8")()
    for chunk in answers.chunks["a"]:
        assert "\ufffd" not in chunk.text
        shown = "".join(seen.decode(s.bytes) for s in chunk.logprobs or ())
        assert shown == chunk.text


def test_an_answer_is_the_same_with_and_without_logprobs(model):
    plain = ask(model, FRANCE, max_tokens=30)
    scored = ask(model, FRANCE, max_tokens=30, logprobs=2)
    assert scored.text("a") == plain.text("a")
    assert scored.tokens("a") == plain.tokens("a") == len(told(scored))
    assert all(c.logprobs is None for c in plain.chunks["a"])


def test_logprobs_are_the_models_own_before_temperature_penalties_and_bias(model, every):
    how = {"temperature": 1.5, "seed": 5, "frequency_penalty": 1.5, "logit_bias": {504: 4.0}, "top_k": 50}
    ids = model._tokenize(FRANCE)
    for score in told(ask(model, FRANCE, max_tokens=4, logprobs=1, **how)):
        assert score.logprob == pytest.approx(every(*ids)[score.id], abs=1e-3)
        ids.append(score.id)


def test_a_token_that_llama_cpp_leaves_out_is_scored_as_one_of_all(model, reader, every):
    """Half characters that are far from likely, and so are none of the rivals that are looked through."""
    ids = model._tokenize(FRANCE)
    said = every(*ids)
    ranked = sorted(said, key=said.__getitem__, reverse=True)
    halves = [model._tokenize(text)[0] for text in ("🦜", " 日", "é", "本")]
    far = [token for token in halves if token not in ranked[:64]]
    assert far
    for token in far:
        assert reader.look_up(ids, token, 0).logprob == pytest.approx(said[token], abs=1e-2)
        assert reader.score(ids, token, 0).logprob == pytest.approx(said[token], abs=1e-2)


def test_the_token_that_ends_an_answer_is_among_them_and_has_a_name_and_no_bytes(model):
    answers = ask(model, FRANCE, max_tokens=5, logprobs=1, logit_bias={EOS: 100.0})
    [score] = told(answers)
    assert (score.id, score.text, score.bytes, score.top[0][1]) == (EOS, "<|im_end|>", b"", " Paris")
    assert (answers.text("a"), answers.finish("a"), answers.tokens("a")) == ("", "stop", 1)


def test_a_stop_string_holds_back_the_logprobs_of_its_text(model):
    whole = ask(model, FRANCE, max_tokens=12).text("a")
    answers = ask(model, FRANCE, max_tokens=12, logprobs=0, stop=(whole[3:9],))
    assert answers.text("a") == whole[:3]
    assert answers.finish("a") == "stop"
    assert len(told(answers)) == answers.tokens("a")


# --- echo ---


def test_echo_tells_the_prompts_logprobs_as_those_of_an_answer(model, every):
    text = "A 🦜 日"
    ids = model._tokenize(text)
    answers = ask(model, text, echo=True, max_tokens=2, logprobs=2, n=2)
    for choice in (0, 1):
        first, *others = told(answers, choice)
        assert (first.id, first.logprob, first.top) == (ids[0], None, [])
        assert [s.id for s in others[: len(ids) - 1]] == ids[1:]
        assert answers.text("a", choice).startswith(text)
        assert b"".join(s.bytes for s in (first, *others)).decode(errors="replace") == answers.text("a", choice)
        for i, score in enumerate(others, 1):
            said = every(*[s.id for s in (first, *others)][:i])
            # The prompt is read once; answers come side by side, and two rows are multiplied otherwise than one.
            assert score.logprob == pytest.approx(said[score.id], abs=1e-2 if i < len(ids) else 0.2)
            assert len(score.top) == 2


def test_only_a_prompt_can_be_scored_or_said(model):
    scored = ask(model, FRANCE, echo=True, max_tokens=0, logprobs=1)
    assert (scored.text("a"), scored.finish("a"), scored.tokens("a")) == (FRANCE, "length", 0)
    assert len(told(scored)) == 5
    assert ask(model, FRANCE, echo=True, max_tokens=0).text("a") == FRANCE
    assert ask(model, model._tokenize(FRANCE), echo=True, max_tokens=2).text("a") == FRANCE + " Paris."


# --- what ends an answer, and what may not ---


def test_stop_token_ids_end_an_answer_and_have_no_text(model):
    [dot] = model._tokenize(".")
    for more in ({}, {"ignore_eos": True}):
        answers = ask(model, FRANCE, max_tokens=8, stop_token_ids=(dot,), **more)
        assert (answers.text("a"), answers.finish("a"), answers.tokens("a")) == (" Paris", "stop", 2)


def test_before_min_tokens_nothing_ends_an_answer(model):
    [dot] = model._tokenize(".")
    assert ask(model, FRANCE, max_tokens=8, logit_bias={EOS: 40.0}).tokens("a") == 1
    answers = ask(model, FRANCE, max_tokens=8, min_tokens=4, logit_bias={EOS: 40.0})
    assert (answers.tokens("a"), answers.finish("a")) == (5, "stop")
    assert "." not in ask(model, FRANCE, max_tokens=4, min_tokens=4, stop_token_ids=(dot,)).text("a")
    assert ask(model, FRANCE, max_tokens=8, min_tokens=4, stop=("Paris",)).text("a").startswith(" Paris")


def test_special_tokens_are_shown_where_that_is_asked_for(model):
    how = {"max_tokens": 3, "logit_bias": {1: 100.0}}
    assert ask(model, FRANCE, skip_special_tokens=False, **how).text("a") == "<|im_start|>" * 3
    assert ask(model, FRANCE, logprobs=0, **how).text("a") == ""
    assert ask(model, FRANCE, logprobs=0, marks=("<|im_start|>",), **how).text("a") == "<|im_start|>" * 3


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
def test_a_penalty_counts_the_answer_and_not_the_prompt(model, penalty):
    answers = ask(model, "red, red, red, red,", max_tokens=16, logprobs=20, **{penalty: 8.0})
    assert answers.text("a").startswith(" red")
    made: list[int] = []
    for score in told(answers):
        counts = {t[0]: made.count(t[0]) for t in score.top}
        lost = counts if penalty == "frequency_penalty" else {t: min(n, 1) for t, n in counts.items()}
        assert score.id == max(score.top, key=lambda t: t[3] - 8 * lost[t[0]])[0]
        made.append(score.id)
    assert answers.text("a") != ask(model, "red, red, red, red,", max_tokens=16).text("a")


# --- beside others ---


def test_a_seed_gives_the_same_answer_again(model):
    how = {"temperature": 1.0, "max_tokens": 8, "logprobs": 0}
    said = [ask(model, FRANCE, seed=seed, **how).text("a") for seed in (7, 7, 8)]
    assert said[0] == said[1] != said[2]
    both = ask(model, FRANCE, seed=7, n=2, **how)
    assert both.text("a", 0) != both.text("a", 1)


def test_calls_of_both_kinds_run_side_by_side(model):
    model.submit(asked("streamed", "Once upon a time", max_tokens=40, ignore_eos=True))
    model.submit(asked("a", FRANCE, max_tokens=3, logprobs=0))
    model.submit(asked("b", FRANCE, max_tokens=20, min_tokens=20))
    answers = drain(model)
    assert set(answers.ended.values()) == {None}
    assert [answers.tokens(id) for id in ("streamed", "a", "b")] == [40, 3, 20]
    assert answers.text("a").startswith(" Paris")


def test_a_long_prompt_is_read_in_the_steps_of_other_calls_and_answered_the_same(model):
    long = model._tokenize("The parrot says hello. " * 20)
    assert len(long) % 16
    plain = ask(model, long, max_tokens=8)
    assert ask(model, long, max_tokens=8, logprobs=0).text("a") == plain.text("a")


def test_a_call_is_cancelled_between_two_tokens_and_while_its_prompt_is_read(model):
    model.submit(asked("scored", [504] * 500, echo=True, logprobs=0))
    model.submit(asked("read", [504] * 1400, max_tokens=1, logprobs=0))
    while model.waiting():
        model.step()
    running = list(model._running.values())
    model.cancel("scored")
    model.cancel("read")
    for thread in running:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in running)
    assert ask(model, FRANCE, max_tokens=1, logprobs=0).text("a") == " Paris"


def test_a_failure_of_llama_cpp_fails_the_call(model, caplog):
    model.submit(asked("bad", FRANCE, logprobs=0))
    [seq] = model._line
    seq.steps.prompt.ids = [99999999]
    answers = drain(model)
    assert isinstance(answers.ended["bad"], EngineFault)
    assert "invalid tokens" in caplog.text


def test_a_chat_has_logprobs(model):
    hello = Conversation(messages=[{"role": "user", "content": "Say hello."}])
    answers = ask(model, hello, max_tokens=60, logprobs=1)
    scores = told(answers)
    assert answers.finish("a") == "stop"
    assert scores[-1].text == "<|im_end|>"
    assert b"".join(s.bytes for s in scores).decode() == answers.text("a")


# --- over HTTP ---


@pytest.mark.real_model
async def test_the_client_is_told_logprobs_whole_and_streamed(serve):
    chat = {
        "model": SMOLLM2,
        "messages": [{"role": "user", "content": "Repeat: 🦜🦜"}],
        "temperature": 0,
        "max_tokens": 12,
        "logprobs": True,
        "top_logprobs": 2,
    }
    async with (
        serve(SMOLLM2, toml='[engine]\norder = ["llama_cpp"]') as server,
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        (choice,) = (await client.chat.completions.create(**chat)).choices
        told = [(t.token, t.bytes, t.logprob, len(t.top_logprobs)) for t in choice.logprobs.content]
        assert bytes(b for _, raw, *_ in told for b in raw or ()).decode() == choice.message.content
        streamed, text = [], ""
        async for chunk in await client.chat.completions.create(**chat, stream=True):
            for said in chunk.choices:
                text += said.delta.content or ""
                if said.logprobs:
                    streamed += [(t.token, t.bytes, t.logprob, len(t.top_logprobs)) for t in said.logprobs.content]
        assert text == choice.message.content
        assert [t[:2] for t in streamed] == [t[:2] for t in told]
        assert [t[2] for t in streamed] == pytest.approx([t[2] for t in told], abs=1e-3)
        completion = {"model": SMOLLM2, "prompt": [FRANCE, "Once"], "echo": True, "logprobs": 1, "max_tokens": 1}
        answer = await client.completions.create(**completion, temperature=0)
        assert answer.choices[0].text == FRANCE + " Paris"
        assert answer.choices[0].logprobs.token_logprobs[0] is None
        assert answer.choices[0].logprobs.text_offset == [0, 3, 11, 14, 21, 24]
        best = await client.completions.create(
            model=SMOLLM2, prompt=FRANCE, max_tokens=4, seed=1, extra_body={"best_of": 3, "min_tokens": 2}
        )
        assert len(best.choices) == 1
        assert best.usage.completion_tokens >= 6
