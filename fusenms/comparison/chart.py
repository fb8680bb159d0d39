"""The error along the graph as an SVG image."""

from __future__ import annotations

import math
from xml.sax.saxutils import escape

from fusenms.comparison.result import Comparison, Row
from fusenms.safety.text import printable

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 960, 360, 70, 20, 40, 50
COLORS = {"equal": "#2a9d8f", "apart": "#d1495b", "unstable": "#a0a0a0"}
SMALLEST, LARGEST = 1e-8, 10.0
"""Errors outside of these are drawn at the edge."""


def svg(found: Comparison) -> str:
    """Draw the error of each pair of tensors in the order of the graph, on a logarithmic scale, and what rounding can make of it."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f"<title>{_text(found.a)} and {_text(found.b)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="22" fill="#222222">Largest difference, as a share of the largest value: '
        f"A {_text(found.a)}, B {_text(found.b)}</text>",
    ]
    for power in range(round(math.log10(SMALLEST)), round(math.log10(LARGEST)) + 1):
        y = _y(10.0**power)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#555555">1e{power}</text>')
    count = max(len(found.rows) - 1, 1)
    points = [
        (LEFT + (WIDTH - LEFT - RIGHT) * i / count, row, row.b == getattr(found.parting, "b", None))
        for i, row in enumerate(found.rows)
    ]
    if points:
        line = " ".join(f"{x:.1f},{_y(row.tolerance):.1f}" for x, row, _ in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="#888888" stroke-dasharray="4 3"/>')
    parts += [_point(x, row) for x, row, _ in points]
    for x, row, first in points:
        if first and row.state == "apart":
            anchor = "end" if x > WIDTH / 2 else "start"
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="{COLORS["apart"]}"/>'
            )
            parts.append(f'<text x="{x:.1f}" y="{TOP - 4}" text-anchor="{anchor}" fill="#222222">{_text(row.b)}</text>')
            break
    legend = " · ".join((*COLORS, "dashed: rounding"))
    parts.append(
        f'<text x="{LEFT}" y="{HEIGHT - 14}" fill="#555555">tensors in the order of the graph of B · {legend}</text>'
    )
    for i, (state, color) in enumerate(COLORS.items()):
        x = WIDTH - RIGHT - 240 + 80 * i
        parts.append(f'<circle cx="{x}" cy="{HEIGHT - 18}" r="4" fill="{color}"/>')
        parts.append(f'<text x="{x + 8}" y="{HEIGHT - 14}" fill="#555555">{state}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _point(x: float, row: Row) -> str:
    title = _text(f"{row.b} = {row.a}: {row.error:.1e}, rounding {row.tolerance:.1e}")
    return f'<circle cx="{x:.1f}" cy="{_y(row.error):.1f}" r="3" fill="{COLORS[row.state]}"><title>{title}</title></circle>'


def _y(value: float) -> float:
    low, high = math.log10(SMALLEST), math.log10(LARGEST)
    share = (math.log10(min(max(value, SMALLEST), LARGEST)) - low) / (high - low)
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _text(value: object) -> str:
    return escape(printable(str(value)))
