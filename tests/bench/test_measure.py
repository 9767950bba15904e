"""Figures are what a plain computation makes of the same timestamps."""

from __future__ import annotations

import json
import statistics

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hfms_cli.bench.measure import (
    METRICS,
    Outcome,
    Run,
    Wanted,
    is_good,
    parse_goodput,
    parse_metrics,
    parse_percentiles,
    percentile,
    spread,
    summarise,
)
from hfms_cli.errors import ConfigError

timeless = settings(deadline=None)

seconds = st.floats(0, 1000, allow_nan=False)


@st.composite
def outcomes(draw, *, usage: bool = True) -> Outcome:
    """A request that anything may have happened to."""
    times = sorted(draw(st.lists(seconds, max_size=6)))
    sent = draw(st.floats(-10, times[0] if times else 0))
    ended = draw(st.floats(times[-1] if times else 0, 2000))
    tokens = st.integers(0, 500) if usage else st.none() | st.integers(0, 500)
    error = draw(st.sampled_from([None, None, None, "HTTP 429", "connection broke"]))
    return Outcome(sent, times, ended, draw(tokens), draw(tokens), error)


def naive_percentile(values: list[float], percent: int) -> float:
    """By the standard library, which cuts at whole percents."""
    if percent in (0, 100) or len(values) == 1:
        return min(values) if percent == 0 else max(values)
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


@timeless
@given(st.lists(outcomes(), max_size=12), st.floats(0.001, 1e5))
def test_figures_are_those_of_a_plain_computation(made, duration):
    result = summarise(Run(made, 0.0, duration), Wanted(percentiles=(50, 90, 99), goodput={"ttft": 500.0, "e2el": 9e5}))
    fine = [o for o in made if o.error is None]
    inputs, outputs = sum(o.prompt_tokens for o in fine), sum(o.output_tokens for o in fine)
    assert (result["completed"], result["failed"]) == (len(fine), len(made) - len(fine))
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (inputs, outputs)
    assert result["request_throughput"] * duration == pytest.approx(len(fine))
    assert result["output_throughput"] * duration == pytest.approx(outputs)
    assert result["total_token_throughput"] * duration == pytest.approx(inputs + outputs)
    first = [(o.times[0] if o.times else o.ended) for o in fine]
    good = [
        o for o, f in zip(fine, first, strict=True) if (f - o.sent) * 1000 <= 500 and (o.ended - o.sent) * 1000 <= 9e5
    ]
    assert result["request_goodput"] * duration == pytest.approx(len(good))
    expected = {
        "ttft": [f - o.sent for o, f in zip(fine, first, strict=True)],
        "e2el": [o.ended - o.sent for o in fine],
        "itl": [o.times[i + 1] - o.times[i] for o in fine for i in range(len(o.times) - 1)],
        "tpot": [
            (o.ended - f) / (o.output_tokens - 1) for o, f in zip(fine, first, strict=True) if o.output_tokens > 1
        ],
    }
    for name, values in expected.items():
        ms = [1000 * v for v in values]
        if not ms:
            assert {result[f"{k}_{name}_ms"] for k in ("mean", "median", "std", "p50", "p90", "p99")} == {None}
            continue
        near = {"rel": 1e-6, "abs": 1e-6}
        assert result[f"mean_{name}_ms"] == pytest.approx(statistics.fmean(ms), **near)
        assert result[f"median_{name}_ms"] == pytest.approx(statistics.median(ms), **near)
        assert result[f"std_{name}_ms"] == pytest.approx(statistics.pstdev(ms), rel=1e-6, abs=1e-5)
        for percent in (50, 90, 99):
            assert result[f"p{percent}_{name}_ms"] == pytest.approx(naive_percentile(ms, percent), **near)
    assert sum(result["errors"].values()) == result["failed"]


@timeless
@given(st.lists(outcomes(usage=False), max_size=8), st.booleans())
def test_every_result_is_json(made, streamed):
    json.dumps(summarise(Run(made, 0.0, 1.0), Wanted(), streamed=streamed), allow_nan=False)


@timeless
@given(st.lists(outcomes(usage=False), min_size=1))
def test_tokens_are_unknown_where_one_answer_did_not_count_them_and_never_guessed_from_pieces(made):
    fine = [o for o in made if o.error is None]
    assume(any(o.output_tokens is None for o in fine))
    result = summarise(Run(made, 0.0, 1.0), Wanted())
    assert result["total_output_tokens"] is None
    assert result["output_throughput"] is None
    assert result["total_token_throughput"] is None
    assert result["completed"] == len(fine)


@timeless
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.integers(0, 100))
def test_percentile_is_that_of_the_standard_library(values, percent):
    assert percentile(sorted(values), percent) == pytest.approx(naive_percentile(values, percent), rel=1e-9, abs=1e-9)


def test_embeddings_have_only_an_end_to_end_latency():
    result = summarise(Run([Outcome(0.0, [], 0.25, 7)], 0.0, 1.0), Wanted(), streamed=False)
    assert result["mean_e2el_ms"] == 250
    assert (result["total_output_tokens"], result["total_token_throughput"]) == (0, 7)
    assert not [key for key in result if "ttft" in key or "itl" in key or "tpot" in key]


def test_only_the_latencies_and_percentiles_that_were_asked_for_are_in_the_result():
    result = summarise(Run([Outcome(0.0, [1.0], 1.0, 1, 1)], 0.0, 1.0), Wanted(("ttft",), (25, 99.9)))
    latencies = {key for key in result if key.endswith("_ms")}
    assert latencies == {f"{k}_ttft_ms" for k in ("mean", "median", "std", "p25", "p99.9")}


def test_run_of_no_time_has_no_rates():
    assert summarise(Run(), Wanted())["request_throughput"] is None


def test_request_without_a_second_token_keeps_to_any_limit_of_tpot():
    one_token = Outcome(0.0, [0.1], 5.0, 1, 1)
    assert is_good(one_token, {"tpot": 1.0})
    assert not is_good(one_token, {"tpot": 1.0, "e2el": 4999.0})
    assert not is_good(Outcome(0.0, [0.1], 5.0, 1, 2), {"tpot": 4899.0})


def test_first_failure_of_a_kind_tells_its_reason():
    run = Run([Outcome(0, error="HTTP 429", reason=str(i)) for i in range(3)] + [Outcome(0, error="HTTP 500")])
    assert run.failures == {"HTTP 429": "0", "HTTP 500": ""}


def test_spread_of_nothing_is_unknown_not_zero():
    assert spread("itl", [], [99]) == dict.fromkeys(["mean_itl_ms", "median_itl_ms", "std_itl_ms", "p99_itl_ms"])


def test_goodput_is_read_as_vllm_writes_it():
    assert parse_goodput("ttft:500 tpot:50.5") == {"ttft": 500.0, "tpot": 50.5}
    assert parse_goodput("") == {}


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:fast", "itl:5", "ttft:0", "ttft:-1", "ttft:nan", "ttft=5"])
def test_goodput_that_is_none_is_a_usage_error(text):
    with pytest.raises(ConfigError, match="--goodput"):
        parse_goodput(text)


def test_metrics_and_percentiles_are_read_from_lists():
    assert parse_metrics(",".join(METRICS)) == METRICS
    assert parse_percentiles("50,99.9") == (50.0, 99.9)


@pytest.mark.parametrize("text", ["", "101", "-1", "50;90", "nan", "50,"])
def test_percentiles_that_are_none_are_a_usage_error(text):
    with pytest.raises(ConfigError, match="--metric-percentiles"):
        parse_percentiles(text)


@pytest.mark.parametrize("text", ["", "ttft,speed", "TTFT"])
def test_latency_that_is_none_is_a_usage_error(text):
    with pytest.raises(ConfigError, match="--percentile-metrics"):
        parse_metrics(text)
