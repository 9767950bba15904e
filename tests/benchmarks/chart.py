"""A line chart as SVG: small, and readable on a light and on a dark page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import cycle

WIDTH, HEIGHT = 720, 340
LEFT, RIGHT, TOP, BOTTOM = 56, 190, 40, 44
# Okabe and Ito's, which people of every colour vision tell apart.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")


def lines(title: str, x_title: str, xs: Sequence[int], series: Mapping[str, Sequence[float | None]]) -> str:
    """A line for each series over `xs`, evenly spaced; None leaves a point out. The first series is drawn thicker."""
    highest = max((y for ys in series.values() for y in ys if y is not None), default=1.0)
    step = _step(highest)
    top = step * (int(highest / step) + 1)
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(i: int, y: float) -> tuple[float, float]:
        return LEFT + across * i / max(1, len(xs) - 1), TOP + down * (1 - y / top)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12" role="img" aria-label="{escape(title)}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="22" font-size="15">{escape(title)}</text>',
        f'<text x="{LEFT + across / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_title)}</text>',
    ]
    for n in range(round(top / step) + 1):
        _, y = place(0, n * step)
        out.append(f'<path d="M{LEFT} {y:.1f}h{across}" stroke="#ddd"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{n * step:g}</text>')
    for i, x in enumerate(xs):
        out.append(f'<text x="{place(i, 0)[0]:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x}</text>')
    for row, ((name, ys), colour) in enumerate(zip(series.items(), cycle(COLOURS), strict=False)):
        points = [place(i, y) for i, y in enumerate(ys) if y is not None]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        thick = 3 if row == 0 else 1.6
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{thick}"/>')
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        key = TOP + 8 + 20 * row
        out.append(f'<path d="M{WIDTH - RIGHT + 16} {key}h18" stroke="{colour}" stroke-width="{thick}"/>')
        out.append(f'<text x="{WIDTH - RIGHT + 40}" y="{key + 4}">{escape(name)}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def _step(highest: float) -> float:
    """Between two lines of the grid: a round number, so that there are three to seven of them."""
    power = 10.0 ** (len(str(int(highest))) - 1)
    return next(power * part for part in (0.1, 0.2, 0.5, 1, 2) if highest / (power * part) < 7)
