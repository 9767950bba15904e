"""Two servers measured in turns (A B A B), so that what else the machine does meets both.

Machines drift: the ratio within a pair says more than two medians apart, so the ratios are taken first and their
median after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

Result = Mapping[str, Any]


def medians(results: Sequence[Result]) -> dict[str, float | None]:
    """The median of each figure over repeats; None where a repeat lacks it."""
    return {name: _median([r.get(name) for r in results]) for name in _figures(results)}


def ratios(pairs: Sequence[tuple[Result, Result]]) -> dict[str, float | None]:
    """The median over the pairs of each figure of A through that of B; None where one has none, or B's is 0."""
    return {
        name: _median([_ratio(a.get(name), b.get(name)) for a, b in pairs]) for name in _figures([a for a, _ in pairs])
    }


def _figures(results: Sequence[Result]) -> list[str]:
    if not results:
        return []
    return [n for n, v in results[0].items() if v is None or (isinstance(v, int | float) and not isinstance(v, bool))]


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _median(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return median(known) if len(known) == len(values) else None
