"""Metrics of several processes as one text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from hfms_cli.telemetry.metrics import Metrics, summed

# What one process counted: requests by status, and seconds that they took.
process = st.lists(st.tuples(st.sampled_from(["200", '4"0\\0', "500"]), st.floats(0, 100)), max_size=8)


def values(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(text.decode())
        for s in family.samples
        if not s.name.endswith("_created")
    }


@given(st.lists(process, min_size=1, max_size=4))
def test_counters_and_histograms_are_as_if_one_process_had_counted_all(processes):
    def counted(*requests) -> bytes:
        metrics = Metrics()
        for status, seconds in requests:
            metrics.requests.labels("/x", "m", status).inc()
            metrics.duration.labels("/x").observe(seconds)
        return metrics.render()

    together = values(summed([counted(*requests) for requests in processes]))
    alone = values(counted(*(r for requests in processes for r in requests)))
    assert together.keys() == alone.keys()
    assert all(abs(together[k] - alone[k]) < 1e-6 for k in alone)


def test_gauges_are_those_of_the_first():
    first, second = Metrics(), Metrics()
    first.models_loaded.set(2)
    second.models_loaded.set(5)
    assert values(summed([first.render(), second.render()]))["hfms_models_loaded", ()] == 2


def test_a_process_that_has_not_told_yet_adds_nothing():
    metrics = Metrics()
    metrics.requests.labels("/x", "m", "200").inc(3)
    assert values(summed([metrics.render(), b"", b""])) == values(metrics.render())
