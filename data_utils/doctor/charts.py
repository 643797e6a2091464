"""Small parts of the page: escaped text, tables, bars, histograms. One hue shows size; numbers stand beside it."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

from data_utils.doctor.lengths import Histogram

_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
_WIDTH, _HEIGHT = 320, 170  # of a histogram, in its own units
_LEFT, _RIGHT, _TOP, _BOTTOM = 38, 16, 12, 34
_MAX_TICKS = 7


def text(value: str) -> str:
    """Text of the data, safe to show: escaped, with invisible characters named."""
    return html.escape(_INVISIBLE.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", value))


def number(value: float) -> str:
    """An integer with commas."""
    return f"{value:,.0f}"


def percent(value: float) -> str:
    """A fraction as a percentage."""
    return f"{value:.1%}" if value < 0.9995 or value == 1 else "99.9%"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A table; the first `words` columns are words, later ones numbers; a later one without a heading holds bars.

    Cells are HTML.
    """
    kinds = [
        "" if place < words else ' class="n"' if heading else ' class="b"' for place, heading in enumerate(headings)
    ]

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, row, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="wide"><table><thead><tr>{cells("th", headings)}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def bar(fraction: float) -> str:
    """A bar of a fraction of its cell; the number it shows stands in another cell."""
    return f'<span class="bar" aria-hidden="true"><i style="width:{100 * fraction:.1f}%"></i></span>'


def histogram(data: Histogram, title: str, unit: str) -> str:
    """An SVG of counts over bins that grow; both axes labelled, exact counts on hover."""
    most = max(data.counts)
    plot_width, plot_height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    step = plot_width / len(data.counts)
    bars = [
        f'<rect x="{_LEFT + place * step + 1:.1f}" y="{_TOP + plot_height * (1 - count / most):.1f}" '
        f'width="{max(1.0, step - 2):.1f}" height="{plot_height * count / most:.1f}" rx="2">'
        f"<title>{number(low)} to {number(high - 1)} {unit}: {number(count)} pairs</title></rect>"
        for place, (count, low, high) in enumerate(zip(data.counts, data.edges, data.edges[1:], strict=False))
        if count
    ]
    return (
        f'<figure><figcaption>{title}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{title}: pairs by length in {unit}">{_grid(most)}{"".join(bars)}{_ticks(data.edges, step)}'
        f'<text x="{_LEFT + plot_width / 2}" y="{_HEIGHT - 4}" text-anchor="middle">{unit} (log scale)</text>'
        "</svg></figure>"
    )


def _grid(most: int) -> str:
    """Lines at nothing, half and all of the highest bar."""
    lines = []
    for count in dict.fromkeys((0, most // 2, most)):
        y = _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - count / most)
        lines.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{_LEFT - 4}" y="{y + 4:.1f}" text-anchor="end">{_short(count)}</text>')
    return "".join(lines) + f'<text x="2" y="{_HEIGHT - 4}">pairs ↑</text>'


def _ticks(edges: Sequence[int], step: float) -> str:
    every = -(-len(edges) // _MAX_TICKS)
    return "".join(
        f'<text x="{_LEFT + place * step:.1f}" y="{_HEIGHT - _BOTTOM + 14}" text-anchor="middle">{_short(edge)}</text>'
        for place, edge in enumerate(edges)
        if place % every == 0
    )


def _short(value: int) -> str:
    """1,500 as 1.5k, to fit an axis."""
    for size, suffix in ((1_000_000, "M"), (1_000, "k")):
        if value >= 10 * size or (value >= size and value % size == 0):
            return f"{value / size:.3g}{suffix}"
    return f"{value:,}"
