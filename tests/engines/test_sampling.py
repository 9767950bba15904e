"""Sampling against a plain reference in Python, and its independence of the other rows.

All of it as on a processor and as on a GPU, for which there are two ways.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfms_cli import Sampling

torch = pytest.importorskip("torch")
sampling = pytest.importorskip("hfms_engines.sampling")
torch_sampling = pytest.importorskip("hfms_engines.torch_sampling")
logprobs = pytest.importorskip("hfms_engines.logprobs")

timeless = settings(deadline=None)


@pytest.fixture(params=["numpy", "torch"], scope="module", autouse=True)
def kind(request) -> str:
    """What `sample` is tried with: numpy's arrays a row at a time, or torch's tensors as on a GPU."""
    Kind.now = request.param
    return Kind.now


class Kind:
    now = ""


def sample(rows, samplers):
    array = np.array(rows, np.float32)
    if Kind.now == "numpy":
        return sampling.sample(array, samplers)
    return torch_sampling.sample(torch.from_numpy(array), samplers)


WORDS = 12


class Fixed(sampling.Sampler):
    """A sampler whose random number is known."""

    def __init__(self, number: float, **settings) -> None:
        super().__init__(Sampling(**settings), prompt=[], stop_ids=[], choice=0)
        self.number = number

    def draw(self) -> float:
        return self.number


def sampler(*, prompt=(), stop_ids=(), choice=0, made=(), **settings):
    new = sampling.Sampler(Sampling(**settings), prompt=list(prompt), stop_ids=stop_ids, choice=choice)
    for token in made:
        new.took(token)
    return new


def one(row, *args, **more):
    """The next token of a single row."""
    return sample([row], [sampler(*args, **more)])[0]


def kept(row, *, temperature, top_k, top_p, min_p):
    """Token -> probability of what may be drawn: min_p, top_k, top_p, as vLLM has them, each over what is left."""
    weights = [math.exp((x - max(row)) / temperature) for x in row]
    left = {i: w for i, w in enumerate(weights) if w >= min_p * max(weights)}
    if top_k:
        least = sorted(left.values(), reverse=True)[:top_k][-1]
        left = {i: w for i, w in left.items() if w >= least}
    if top_p < 1:
        total, heap = sum(left.values()), 0.0
        for weight in sorted(left.values(), reverse=True):
            least = weight
            heap += weight
            if heap >= top_p * total:
                break
        left = {i: w for i, w in left.items() if w >= least}
    total = sum(left.values())
    return {i: w / total for i, w in left.items()}


# Logits far enough apart that no limit falls on rounding.
rows = st.permutations([x * 0.37 for x in range(WORDS)])
plain = {"temperature": 0.0}
limits = st.fixed_dictionaries(
    {
        "temperature": st.floats(0.1, 2),
        "top_k": st.integers(0, WORDS),
        "top_p": st.floats(0.05, 1),
        "min_p": st.sampled_from([0.0, 0.03, 0.3, 1.0]),
    }
)


@timeless
@given(rows, limits, st.floats(0, 1, exclude_max=True))
def test_what_is_drawn_is_what_the_reference_draws(row, limit, number):
    token = sample([row], [Fixed(number, **limit)])[0]
    probs = kept(row, **limit)
    # A hair's breadth from a limit of top_p, either side is right.
    near = {**kept(row, **limit | {"top_p": min(1, limit["top_p"] + 1e-4)}), **probs}
    assert token in near
    if near.keys() == probs.keys():
        before = sum(p for i, p in probs.items() if i < token)
        assert before - 1e-5 <= number <= before + probs[token] + 1e-5


def test_draws_are_as_frequent_as_their_probabilities():
    row = [0.0, 1.0, 2.0, -1.0, 0.5]
    one_of = sampler(temperature=0.8, seed=1)
    count = Counter(sample([row], [one_of])[0] for _ in range(5000))
    for token, prob in kept(row, temperature=0.8, top_k=0, top_p=1, min_p=0).items():
        assert count[token] / 5000 == pytest.approx(prob, abs=0.02)


def test_top_p_of_one_rules_nothing_out_not_even_by_rounding():
    row = [[20.0, 0.0, -50.0]]
    assert sample(row, [Fixed(1 - 1e-10, top_k=2, top_p=1.0)]) == [1]


def test_top_p_may_keep_thousands_of_tokens():
    flat = [0.0] * 5000
    flat[7] = 0.1
    drawn = {sample([flat], [Fixed(i / 997, top_p=0.9)])[0] for i in range(997)}
    assert len(drawn) == 997


@timeless
@given(st.data())
def test_a_row_draws_the_same_alone_and_in_any_company(data):
    number = data.draw(st.integers(1, 6))
    logits = np.random.default_rng(data.draw(st.integers(0, 999))).normal(0, 3, (number, 700))
    some = st.sampled_from
    kinds = [
        {
            "temperature": data.draw(some([0.0, 0.5, 1.0])),
            "top_k": data.draw(some([0, 1, 5, 650])),
            "top_p": data.draw(some([1.0, 0.5, 0.95])),
            "min_p": data.draw(some([0.0, 0.1])),
            "seed": data.draw(st.integers(0, 99)),
            "repetition_penalty": data.draw(some([1.0, 1.3])),
            "frequency_penalty": data.draw(some([0.0, 0.5])),
        }
        for _ in range(number)
    ]
    alone = [sample(logits[i : i + 1], [sampler(made=[1, 2, 2], **kinds[i])])[0] for i in range(number)]
    order = list(data.draw(st.permutations(range(number))))
    together = sample(logits[order], [sampler(made=[1, 2, 2], **kinds[i]) for i in order])
    assert together == [alone[i] for i in order]


def draws(**settings):
    one_of = sampler(**settings)
    return [sample([[0.0] * 50], [one_of])[0] for _ in range(20)]


def test_a_seed_draws_the_same_again_and_choices_of_one_seed_differ():
    assert draws(seed=3) == draws(seed=3)
    assert draws(seed=3) != draws(seed=4)
    assert draws(seed=3) != draws(seed=3, choice=1)
    assert draws() != draws()


def test_temperature_zero_takes_the_likeliest():
    logits = [[1.0, 3.0, 2.0], [0.0, -1.0, 5.0]]
    assert sample(logits, [sampler(**plain), sampler(temperature=1e-6)]) == [1, 2]


def test_a_row_that_is_not_a_number_is_told_and_the_others_are_drawn():
    rows = [[1.0, 3.0], [math.nan, 1.0], [1.0, math.inf], [2.0, 0.0]]
    assert sample(rows, [sampler(**plain) for _ in range(4)]) == [1, -1, -1, 0]
    tokens = sample(rows, [sampler(temperature=1, top_p=0.9, seed=1) for _ in range(4)])
    assert tokens[1:3] == [-1, -1]
    assert {tokens[0], tokens[3]} <= {0, 1}


@pytest.mark.parametrize("settings", [plain, {"temperature": 1.0}, {"temperature": 1e-4, "top_p": 0.5}])
@pytest.mark.parametrize(("penalty", "token"), [(5e-324, 1), (1e308, 3)])
def test_the_wildest_repetition_penalty_still_leaves_a_token(settings, penalty, token):
    row = [0.0, 4.0, -5.0, 30.0, -40.0]
    said = one(row, prompt=[0, 1, 2], stop_ids=[2], min_tokens=1, repetition_penalty=penalty, **settings)
    assert said == token


@pytest.mark.parametrize("settings", [plain, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}])
def test_a_row_in_which_nothing_may_come_is_told_and_the_others_are_drawn(settings):
    barred = sampler(stop_ids=[0, 1], min_tokens=1, **settings)
    assert sample([[1.0, 3.0], [9.0, 0.0]], [barred, sampler(**plain)]) == [-1, 0]


def test_logit_bias_is_added():
    assert one([1.0, 3.0, 2.0], logit_bias={0: 2.5}, **plain) == 0
    assert one([1.0, 3.0, 2.0], logit_bias={1: -100, 2: -100}, temperature=1.0) == 0


def test_stop_tokens_are_out_of_the_question_until_min_tokens():
    row = [0.0, 9.0, 1.0]
    assert one(row, stop_ids=[1], min_tokens=2, made=[0], **plain) == 2
    assert one(row, stop_ids=[1], min_tokens=2, made=[0, 0], **plain) == 1
    assert one(row, stop_ids=[1], min_tokens=2, made=[0], temperature=1.0, seed=1) != 1


def test_presence_and_frequency_penalties_count_what_was_made_and_not_the_prompt():
    row = [3.0, 2.5, 2.0]
    assert one(row, prompt=[0, 0, 0], presence_penalty=2, frequency_penalty=2, **plain) == 0
    assert one(row, made=[0], presence_penalty=0.6, **plain) == 1
    assert one(row, made=[0, 0, 1], frequency_penalty=0.4, **plain) == 0  # 2.2, 2.1, 2.0
    assert one(row, made=[0, 0, 0, 1], frequency_penalty=0.4, **plain) == 1  # 1.8, 2.1, 2.0


def test_repetition_penalty_divides_what_is_positive_and_multiplies_what_is_negative():
    assert one([3.0, 2.0, 1.0], prompt=[0], repetition_penalty=2, **plain) == 1
    assert one([3.0, 2.0, 1.0], made=[0], repetition_penalty=2, **plain) == 1
    assert one([-1.0, -1.5, -3.0], prompt=[0, 0], made=[0], repetition_penalty=1.4, **plain) == 0
    assert one([-1.0, -1.5, -3.0], prompt=[0, 0], made=[0], repetition_penalty=1.6, **plain) == 1


def test_a_draw_falls_where_its_number_does_in_a_vocabulary_of_many_blocks(kind):
    chance = np.random.default_rng(5)
    row = chance.normal(0, 2, 1000)
    heap = np.cumsum(np.exp(row)) / np.exp(row).sum()
    for number in [0.0, *chance.random(200), 1 - 2**-53]:
        (token,) = sample([row], [Fixed(number, temperature=1.0)])
        assert (heap[token - 1] if token else 0) - 1e-6 <= number <= heap[token] + 1e-6


def test_logprobs_of_both_kinds_are_the_logarithms_of_probabilities():
    logits = np.random.default_rng(6).normal(0, 3, (4, 700)).astype(np.float32)
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=-1, keepdims=True))
    tokens = [0, 699, 5, 123]
    for own, places, values in (
        logprobs.likelihoods(logits, tokens, 3),
        torch_sampling.likelihoods(torch.from_numpy(logits), tokens, 3),
    ):
        assert own == pytest.approx([exact[i, t] for i, t in enumerate(tokens)], abs=1e-5)
        assert places == np.argsort(-exact, axis=-1)[:, :3].tolist()
        assert values == [pytest.approx(exact[i, p], abs=1e-5) for i, p in enumerate(places)]
