"""Ratios are taken within a pair, and their median after."""

from __future__ import annotations

from statistics import median

from hypothesis import given, settings
from hypothesis import strategies as st

from hfms_cli.bench.compare import medians, ratios

timeless = settings(deadline=None)

speeds = st.floats(0.1, 1e6)


@timeless
@given(
    st.lists(st.tuples(speeds, speeds), min_size=1, max_size=7), st.lists(st.floats(0.01, 100), min_size=7, max_size=7)
)
def test_machine_that_slows_both_of_a_pair_does_not_move_the_ratio(pairs, drifts):
    made = [({"x": a}, {"x": b}) for a, b in pairs]
    drifted = [({"x": a * d}, {"x": b * d}) for (a, b), d in zip(pairs, drifts, strict=False)]
    close = abs(ratios(made)["x"] - ratios(drifted)["x"])
    assert close <= 1e-9 * ratios(made)["x"]


@timeless
@given(st.lists(speeds, min_size=1, max_size=7))
def test_medians_are_of_each_figure(values):
    results = [{"x": v, "y": -v, "errors": {"HTTP 500": 1}} for v in values]
    assert medians(results) == {"x": median(values), "y": -median(values)}


def test_median_of_ratios_is_not_the_ratio_of_medians():
    pairs = [({"x": 1.0}, {"x": 2.0}), ({"x": 10.0}, {"x": 5.0}), ({"x": 3.0}, {"x": 4.0})]
    assert ratios(pairs)["x"] == 0.75


def test_figure_that_one_run_lacks_is_unknown():
    assert medians([{"x": 1.0}, {"x": None}]) == {"x": None}
    assert ratios([({"x": 1.0, "y": 1}, {"x": None, "y": 0})]) == {"x": None, "y": None}


def test_nothing_measured_compares_to_nothing():
    assert (medians([]), ratios([])) == ({}, {})
