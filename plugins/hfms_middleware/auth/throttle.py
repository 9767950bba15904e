"""Wrong keys cost time, more with each one from the same address. Right keys never do, wherever they come from."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable

FREE_FAILURES = 10
"""So many wrong keys an address may send before it waits; one more comes free every PARDON_SECONDS."""
PARDON_SECONDS = 6.0
FIRST_WAIT, LONGEST_WAIT = 0.25, 8.0
REMEMBERED = 10_000


class Throttle:
    """How long an address that sent wrong keys has to wait. Remembers the last 10,000 addresses, and no more."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """Address -> failures that are not yet pardoned, and when they were counted."""

    def failed(self, address: str) -> float:
        """Count a wrong key; the seconds that its answer is to be held back: 0, then 0.25, 0.5, ... 8."""
        who, now = _network(address), self._clock()
        count, counted = self._failures.pop(who, (0.0, now))
        most = FREE_FAILURES + 6.0  # who has stopped is forgiven within two minutes
        count = min(most, max(0.0, count - (now - counted) / PARDON_SECONDS) + 1)
        self._failures[who] = (count, now)
        if len(self._failures) > REMEMBERED:
            self._failures.popitem(last=False)
        excess = round(count) - FREE_FAILURES
        return min(LONGEST_WAIT, FIRST_WAIT * 2 ** (excess - 1)) if excess > 0 else 0.0

    def __len__(self) -> int:
        return len(self._failures)


def _network(address: str) -> str:
    """An IPv6 address stands for its /64: whoever has one of them has them all."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    return str(parsed) if parsed.version == 4 else str(ipaddress.ip_network((parsed, 64), strict=False))
