"""Logprobs against transformers' own forward: of what is made, of prompts, and whose text a chunk shows."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hfms_cli import BadRequest, LoadRequest
from hfms_engines.generation import GenerationEngine, GenerationOptions

# Before torch and openvino, whose environment they set.
pytest.importorskip("hfms_engines.torch_runner", exc_type=ImportError)
pytest.importorskip("hfms_engines.openvino_export", exc_type=ImportError)

import torch

from hfms_engines import middle, torch_runner
from hfms_engines.vocabulary import Vocabulary
from tests.benchmarks import dequantise
from tests.engines import tiny
from tests.engines.driving import CPU, Answers, call, drain, prompts
from tests.engines.test_openvino import card, converted, scheduler

ENGINES = ["slots", "paged", "openvino"]


@pytest.fixture(params=ENGINES)
def model(request, llama, export):
    """Pieces of a prompt are small, so that one is read in several passes."""
    if request.param == "openvino":
        return scheduler(export, prefill_tokens=24)
    asked = LoadRequest(folder=llama, card=card(llama), device=CPU)
    return GenerationEngine(
        GenerationOptions(max_batch=4, prefill_tokens=7, cache=request.param, kv_cache_bytes=2**24)
    ).load(asked)


def asked(id: str, prompt, *, n: int = 1, echo: bool = False, **sampling):
    return msgspec.structs.replace(call(id, prompt, n=n, **{"logprobs": 3} | sampling), echo=echo)


def ask(model, prompt, **how) -> Answers:
    model.submit(asked("a", prompt, **how))
    return drain(model)


def told(answers: Answers, id: str = "a", index: int = 0):
    return [score for c in answers.chunks[id] if c.index == index for score in c.logprobs or ()]


def rows(theirs, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of what follows each of these tokens, by one plain pass."""
    with torch.inference_mode():
        return theirs(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)


def check(scores, table: torch.Tensor, top: int, within: float = 1e-3) -> None:
    """Each score is what its row of `table` says of its token and of the likeliest."""
    assert len(scores) == len(table)
    for score, row in zip(scores, table, strict=True):
        assert score.logprob == pytest.approx(float(row[score.id]), abs=within)
        best = row.topk(top).values.tolist() if top else []
        assert [likely[3] for likely in score.top] == pytest.approx(best, abs=within)


# --- the numbers ---


def test_logprobs_of_an_answer_are_those_of_one_plain_pass(model, theirs, made):
    [prompt] = prompts(30)
    answers = ask(model, prompt, max_tokens=20, ignore_eos=True)
    scores, answer = told(answers), made["a", 0]
    assert [s.id for s in scores] == answer
    check(scores, rows(theirs, prompt + answer)[len(prompt) - 1 : -1], 3)


def test_logprobs_are_the_models_own_before_temperature_penalties_and_bias(model, theirs, made):
    [prompt] = prompts(12)
    how = {"temperature": 1.7, "seed": 3, "top_k": 5, "frequency_penalty": 1.5, "logit_bias": {7: 8.0}}
    scores = told(ask(model, prompt, max_tokens=12, ignore_eos=True, **how))
    check(scores, rows(theirs, prompt + made["a", 0])[len(prompt) - 1 : -1], 3)


def test_with_no_rivals_asked_for_only_the_token_itself_is_told(model):
    [prompt] = prompts(5)
    assert all(s.top == [] for s in told(ask(model, prompt, logprobs=0, max_tokens=4)))
    assert all(c.logprobs is None for c in ask(model, prompt, logprobs=None).chunks["a"])


@pytest.mark.parametrize("max_tokens", [0, 1, 6])
def test_echo_tells_the_prompts_logprobs_though_it_is_read_in_pieces(model, theirs, made, max_tokens):
    [prompt] = prompts(61)
    answers = ask(model, prompt, echo=True, max_tokens=max_tokens, ignore_eos=True)
    first, *others = told(answers)
    assert (first.id, first.logprob, first.top) == (prompt[0], None, [])
    answer = made["a", 0][:max_tokens]
    assert [s.id for s in others] == prompt[1:] + answer
    check(others, rows(theirs, prompt + answer)[:-1], 3)
    assert answers.finish("a") == "length"
    assert answers.tokens("a") == max_tokens
    assert answers.text("a").startswith(model._runner.decode(prompt))


def test_a_prompt_that_the_cache_holds_already_is_read_again_to_be_scored(model, theirs):
    [prompt] = prompts(70)
    ask(model, prompt, logprobs=None)
    for _ in range(2):
        check(told(ask(model, prompt, echo=True, max_tokens=0))[1:], rows(theirs, prompt)[:-1], 3)


def test_choices_share_the_scores_of_their_prompt_and_prompts_do_not(model, theirs):
    some = prompts(40, 9, 1, 33)
    how = {"n": 2, "max_tokens": 3, "temperature": 1.0, "seed": 1, "ignore_eos": True}
    model.submit(msgspec.structs.replace(asked("a", some[0], echo=True, **how), inputs=some))
    answers = drain(model)
    for i, prompt in enumerate(some):
        for choice in (2 * i, 2 * i + 1):
            scores = told(answers, index=choice)
            ids = [s.id for s in scores]
            assert ids[: len(prompt)] == prompt
            check(scores[1:], rows(theirs, ids)[:-1], 3)


def test_others_that_answer_meanwhile_change_nothing(model, theirs, made):
    some, answers = prompts(50, 44, 8, 21), Answers()
    for i, prompt in enumerate(some):
        model.submit(asked(f"{i}", prompt, echo=i != 1, max_tokens=5 + i, ignore_eos=True))
        answers.take(model.step())
    drain(model, answers)
    for i, prompt in enumerate(some):
        table = rows(theirs, prompt + made[f"{i}", 0])[:-1]
        scores = told(answers, f"{i}")
        check(scores[1:] if i != 1 else scores, table if i != 1 else table[len(prompt) - 1 :], 3)


def test_a_text_is_echoed_as_it_was_sent_and_a_context_full_of_prompt_can_be_scored(model):
    text = "The quick brown fox"
    assert ask(model, text, echo=True, max_tokens=0, logprobs=None).text("a") == text
    [prompt] = prompts(model.info.context_length)
    assert len(told(ask(model, prompt, echo=True, max_tokens=0))) == len(prompt)
    with pytest.raises(BadRequest) as refused:
        model.submit(asked("a", text, max_tokens=0))
    assert refused.value.param == "max_tokens"


def test_guesses_change_no_logprob(export, theirs, made):
    [part] = prompts(12)
    prompt = part * 5
    for guess in (0, 8):
        model = scheduler(export, guess=guess)
        model.submit(asked(f"{guess}", prompt, max_tokens=60, ignore_eos=True))
        answers = drain(model)
        scores = told(answers, f"{guess}")
        assert [s.id for s in scores] == made[f"{guess}", 0]
        check(scores, rows(theirs, prompt + made[f"{guess}", 0])[len(prompt) - 1 : -1], 3)
    assert made["0", 0] == made["8", 0]


# --- text and bytes ---


def test_the_bytes_of_tokens_are_the_text():
    words = tiny.tokenizer()
    vocabulary = Vocabulary(words, set(words.all_special_ids))
    for text in [*tiny.CORPUS, "\ufffd \x00 👍🏽 ﷽", " leading"]:
        ids = words(text)["input_ids"]
        assert b"".join(vocabulary[i][1] for i in ids).decode() == text
    assert vocabulary[words.eos_token_id] == (tiny.STOP, b"")
    assert vocabulary[100_000] == ("", b"")


def test_a_sentencepiece_vocabulary_gives_bytes_too():
    import tokenizers
    from tokenizers import decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "▁", "▁the", "a", "n", *(f"<0x{b:02X}>" for b in range(256))]
    made = tokenizers.Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    words = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>")
    vocabulary = Vocabulary(words, {0, 1})
    assert vocabulary[3] == (" the", b" the")
    assert vocabulary.first(3) == ("the", b"the")
    assert vocabulary[6 + 0xC3] == ("\ufffd", b"\xc3")
    assert vocabulary[1] == ("<s>", b"")


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_token_is_told_once_with_the_chunk_that_ends_its_text(data, model):
    """Whatever is held back: halves of characters, and beginnings of stop strings, of which no part is ever shown."""
    words = model._runner.tokenizer
    text = data.draw(st.text(alphabet="ab日👍é. ", min_size=1, max_size=12))
    stops = data.draw(st.lists(st.text(alphabet="ab日👍é. ", min_size=1, max_size=3), max_size=3))
    include = data.draw(st.booleans())
    ids = words(text)["input_ids"]
    [seq] = sequences(model, asked("a", [5], stop=tuple(stops), include_stop=include, max_tokens=len(ids)))
    vocabulary = Vocabulary(words, model._runner.silent_ids)
    chunks, fed = [], 0
    for token in ids:
        seq.scores.append(torch_free_score(token, vocabulary))
        chunks.append(seq.take(token))
        fed += 1
        if chunks[-1].finish_reason:
            break
    shown = ""
    told = []
    for chunk in chunks:
        shown += chunk.text
        told += chunk.logprobs
        if chunk is not chunks[-1]:
            # A token may end one character and begin the next.
            spelt = b"".join(s.bytes for s in told)
            assert shown.startswith(spelt.decode(errors="ignore"))
            # No token is kept back whose text is out.
            assert not shown.encode().startswith(spelt + vocabulary[ids[len(told)]][1])
    assert [s.id for s in told] == ids[:fed]
    assert "\ufffd" not in shown
    whole = words.decode(ids[:fed])
    if chunks[-1].finish_reason == "stop":
        assert whole.startswith(shown)
        assert include == any(shown.endswith(stop) for stop in stops)
        assert include or not any(stop in shown for stop in stops)
    else:
        assert shown == whole
        assert not any(stop in shown for stop in stops)


def sequences(model, one):
    """The sequences of a call, never run."""
    model.submit(one)
    found = list(model._line)
    model.cancel(one.id)
    return found


def torch_free_score(token: int, vocabulary: Vocabulary):
    from hfms_cli import TokenLogprob

    return TokenLogprob(token, *vocabulary[token], -1.0)


# --- what ends an answer, and what is shown of it ---


def test_stop_token_ids_end_an_answer_also_with_ignore_eos(model, made):
    [prompt] = prompts(10)
    free = ask(model, prompt, ignore_eos=True, max_tokens=12)
    answer = made.pop(("a", 0))
    assert free.finish("a") == "length"
    at = next(i for i, token in enumerate(answer) if token not in answer[:i] and i > 2)
    stopped = ask(model, prompt, ignore_eos=True, max_tokens=12, stop_token_ids=(answer[at],))
    assert (stopped.finish("a"), stopped.tokens("a")) == ("stop", at + 1)
    assert stopped.text("a") == model._runner.decode(answer[:at])
    made.clear()
    later = ask(model, prompt, ignore_eos=True, max_tokens=12, stop_token_ids=(answer[at],), min_tokens=at + 3)
    assert answer[at] not in made["a", 0][: at + 3]
    assert later.tokens("a") >= at + 3


def test_special_tokens_have_text_where_that_is_wanted(model, made):
    start = model._runner.tokenizer.convert_tokens_to_ids(tiny.START)
    how = {"logit_bias": {start: 100.0}, "max_tokens": 3}
    assert ask(model, [5, 6], **how).text("a") == ""
    assert ask(model, [5, 6], skip_special_tokens=False, **how).text("a") == 3 * tiny.START


def test_a_suffix_stands_between_the_marks_of_the_models_family():
    words = tiny.tokenizer()
    with pytest.raises(BadRequest) as refused:
        middle.around(words, "def add(a, b):", "    return c")
    assert (refused.value.param, refused.value.code) == ("suffix", "unsupported_parameter")
    marks = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]
    words.add_special_tokens({"additional_special_tokens": marks})
    before, between, behind = words.convert_tokens_to_ids(marks)
    ids = middle.around(words, "a = 1\n", "c = 3")
    assert ids == [before, *words.encode("a = 1\n"), between, *words.encode("c = 3"), behind]
    assert middle.around(words, [7, 8], "c")[:3] == [before, 7, 8]


# --- the real model ---


@pytest.mark.real_model
def test_smollm2s_prompt_logprobs_by_openvino_are_those_of_transformers(smollm2, tmp_path):
    # As safetensors: what is unpacked from a GGUF is rounded to 16 bits on its way to OpenVINO.
    folder = tmp_path / "model"
    dequantise.main(next(smollm2.glob("*.gguf")), folder)
    theirs = torch_runner.load(LoadRequest(folder=folder, card=card(folder), device=CPU), cache_bytes=2**28)
    model = scheduler(converted(folder, tmp_path / "export"), prefill_tokens=48)
    text = "The capital of France is Paris, and that of Japan is 東京. " * 4
    scores = told(ask(model, text, echo=True, max_tokens=1))
    ids = [s.id for s in scores]
    assert ids[:-1] == theirs.tokenizer(text)["input_ids"]
    check(scores[1:], rows(theirs.model, ids)[:-1], 3)
    assert b"".join(s.bytes for s in scores[:-1]).decode() == text
