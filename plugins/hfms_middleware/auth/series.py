"""What Prometheus sees of the door."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from hfms_middleware.auth.middleware import Auth


class AuthSeries(Collector):
    """Read from the middleware's own counts whenever `/metrics` is."""

    def __init__(self, auth: Auth) -> None:
        self._auth = auth

    def collect(self) -> Iterator[Metric]:
        status = self._auth.status()
        failures = CounterMetricFamily("hfms_auth_failures", "Requests without a good key.", labels=["reason"])
        for reason, count in status["failures"].items():
            failures.add_metric([reason], count)
        yield failures
        keys = GaugeMetricFamily("hfms_auth_keys", "Keys of the store.", labels=["status"])
        for state, count in status["keys_of_store"].items():
            keys.add_metric([state], count)
        yield keys
        up = not status["store_error"]
        yield GaugeMetricFamily("hfms_auth_store_up", "1 where the key store answered when last asked.", value=up)
