"""Prompts: unique, of the length asked for, and the same for the same seed."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hfms_cli.bench.dataset import (
    IN_WORDS,
    PROBE_WORDS,
    Dataset,
    DatasetName,
    Lengths,
    Numbers,
    Prompt,
    Prompts,
    Scale,
    at_random,
    builtin,
    calibrate,
    read_talks,
    scale_of,
)
from hfms_cli.bench.measure import Outcome
from hfms_cli.errors import ConfigError

timeless = settings(deadline=None)


class Counter:
    """A server that counts `per_word` tokens a word and `overhead` for the rest; it remembers what it was asked."""

    def __init__(self, per_word: float, overhead: int, error: str | None = None) -> None:
        self.per_word, self.overhead, self.error = per_word, overhead, error
        self.asked: list[Prompt] = []

    def tokens(self, prompt: Prompt) -> int:
        return round(self.overhead + self.per_word * len(prompt.text.split()))

    async def send(self, prompt: Prompt) -> Outcome:
        self.asked.append(prompt)
        return Outcome(0.0, [], 1.0, None if self.error else self.tokens(prompt), 1, self.error)


async def no_server(prompt: Prompt) -> Outcome:
    raise AssertionError("the server was asked although nothing depends on how it counts")


@timeless
@given(st.integers(), st.lists(st.integers(0, 40), max_size=5))
def test_no_prompt_comes_twice_however_it_is_batched(seed, sizes):
    dataset = Dataset(builtin(8), Numbers(seed))
    texts = [p.text for size in sizes for p in dataset.take(size)]
    assert len(set(texts)) == sum(sizes)
    assert len({text[:10] for text in texts}) == sum(sizes), "they must differ at the start, where prefixes are cached"


@timeless
@given(st.integers(), st.integers(1, 50))
def test_same_seed_makes_the_same_prompts(seed, size):
    def made() -> list[Prompt]:
        lengths = Lengths(20, 10, 0.5)
        return Dataset(at_random(lengths, IN_WORDS, random.Random(seed)), Numbers(seed)).take(size)

    assert made() == made()


def test_without_numbers_batches_repeat_so_that_a_prefix_cache_can_be_measured():
    dataset = Dataset(builtin(8), None)
    assert dataset.take(30) == dataset.take(30)


def test_builtin_prompts_are_short_and_long():
    words = [len(p.text.split()) for p in Dataset(builtin(8), None).take(16)]
    assert min(words) < 15
    assert max(words) > 150
    assert len({p.text for p in Dataset(builtin(8), None).take(16)}) == 16


@timeless
@given(st.floats(0.3, 4), st.integers(0, 60), st.integers(100, 5000))
@example(0.3505863534417808, 0, 602)
async def test_random_prompts_have_the_tokens_asked_for_as_the_server_counts_them(per_word, overhead, length):
    server, numbers, rng = Counter(per_word, overhead), Numbers(1), random.Random(1)
    scale = await calibrate(server.send, numbers, rng)
    (prompt,) = Dataset(at_random(Lengths(length, 1), scale, rng), numbers).take(1)
    # Half a word, half a token, and the rounding of the two probes, which grows with the distance in words.
    words = len(prompt.text.split())
    assert server.tokens(prompt) == pytest.approx(length, abs=per_word + 1 + words / (PROBE_WORDS[1] - PROBE_WORDS[0]))


@timeless
@given(st.integers(1, 500), st.floats(0, 0.99), st.integers(0, 10**6))
def test_lengths_stay_within_the_range_ratio(mean, ratio, seed):
    drawn = Lengths(1, 1, ratio).draw(mean, random.Random(seed))
    assert max(1, mean * (1 - ratio) - 1) <= drawn <= mean * (1 + ratio) + 1


def test_range_ratio_of_zero_is_one_length():
    assert {Lengths(1, 1).draw(7, random.Random(i)) for i in range(20)} == {7}


async def test_probes_are_unique_too():
    server = Counter(1.0, 0)
    numbers = Numbers(3)
    await calibrate(server.send, numbers, random.Random(3))
    texts = [p.text for p in [*server.asked, *Dataset(builtin(1), numbers).take(5)]]
    assert len({t[:10] for t in texts}) == 7


@pytest.mark.parametrize("server", [Counter(1.0, 0, "HTTP 500"), Counter(0.0, 5), Counter(-0.01, 9)])
async def test_server_that_does_not_count_leaves_lengths_in_words(server):
    prompts = Prompts(DatasetName.RANDOM, None, None, Lengths(50, 4), unique=False, seed=1)
    dataset, unit = await prompts.prepare(server.send)
    assert unit == "words"
    assert [len(p.text.split()) for p in dataset.take(3)] == [50, 50, 50]


def test_scale_never_asks_for_less_than_a_word_or_a_token():
    scale = Scale(overhead=30, per_word=1.5)
    assert (scale.words(10), scale.tokens(0)) == (1, 1)
    assert scale_of((32, 288), (78, 462)) == Scale(30.0, 1.5)


# ShareGPT


def talk(*turns: str) -> dict:
    return {"conversations": [{"from": "human", "value": t} for t in turns]}


ROWS = [
    talk("What is rain?", "Water that falls."),
    talk("And snow?", "Frozen water, in flakes of many forms."),
    talk("Alone"),
]


@pytest.mark.parametrize("written", [json.dumps(ROWS, indent=1), "\n".join(map(json.dumps, ROWS)) + "\n\n"])
async def test_sharegpt_is_read_as_an_array_or_by_the_line_and_answers_are_as_long_as_they_were(tmp_path, written):
    file = tmp_path / "talks.json"
    file.write_text(written)
    server = Counter(2.0, 5)
    prompts = Prompts(DatasetName.SHAREGPT, file, None, Lengths(1, 1), unique=False, seed=1)
    dataset, unit = await prompts.prepare(server.send)
    assert unit == "tokens"
    assert set(dataset.take(2)) == {Prompt("What is rain?", 6), Prompt("And snow?", 14)}
    assert len(dataset.take(5)) == 5, "a short file goes round"


async def test_output_len_wins_and_then_the_server_is_not_asked_how_it_counts(tmp_path):
    file = tmp_path / "talks.json"
    file.write_text(json.dumps(ROWS))
    prompts = Prompts(DatasetName.SHAREGPT, file, 77, Lengths(1, 1), unique=False, seed=1)
    dataset, _ = await prompts.prepare(no_server)
    assert {p.output_len for p in dataset.take(2)} == {77}
    builtins, _ = await Prompts(DatasetName.BUILTIN, None, 5, Lengths(1, 1), unique=True, seed=1).prepare(no_server)
    assert builtins.take(1)[0].output_len == 5


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (None, "cannot be read"),
        ("{oops", "neither a JSON array nor JSON by the line"),
        ("[]", "has no talk"),
        ('[1, null, "x", {}, {"conversations": 5}, {"conversations": [{"value": 1}, {"value": 2}]}]', "has no talk"),
        (json.dumps([talk("", "answer"), talk("asked", " ")]), "has no talk"),
    ],
)
def test_file_that_is_no_dataset_is_told(tmp_path, written, said):
    file = tmp_path / "talks.json"
    if written is not None:
        file.write_text(written)
    with pytest.raises(ConfigError, match=said):
        read_talks(file)
