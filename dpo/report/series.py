"""Curves of thousands of steps, thinned to what a screen can show without hiding a spike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

MAX_POINTS = 400


def series(rows: Sequence[Mapping[str, Any]], max_points: int = MAX_POINTS) -> dict[str, dict[str, Any]]:
    """The curve of every number in rows of metrics.jsonl, by name, over the steps.

    Of more than `max_points` rows each point stands for several consecutive ones: their mean, and the least and the
    greatest of them in `low` and `high`. Without thinning these two are left out.

    Returns:
        name -> {"x": last step of each point, "y": means, "low", "high"}; null where there was no number.
    """
    names = dict.fromkeys(key for row in rows for key in row if key != "step")
    found = {}
    for name in names:
        points = [(row["step"], row[name]) for row in rows if name in row]
        if any(isinstance(value, int | float) for _, value in points):
            found[name] = _thinned(points, max_points)
    return found


def _thinned(points: Sequence[tuple[int, float | None]], max_points: int) -> dict[str, Any]:
    if len(points) <= max_points:
        return {"x": [step for step, _ in points], "y": [digits(value) for _, value in points]}
    edges = [round(place * len(points) / max_points) for place in range(max_points + 1)]
    groups = [points[first:last] for first, last in pairwise(edges)]
    values = [[value for _, value in group if value is not None] for group in groups]
    return {
        "x": [group[-1][0] for group in groups],
        "y": [digits(math.fsum(known) / len(known)) if known else None for known in values],
        "low": [digits(min(known)) if known else None for known in values],
        "high": [digits(max(known)) if known else None for known in values],
    }


def digits(value: float | None, number: int = 5) -> float | int | None:
    """A number with so many significant digits; None for what JSON does not have."""
    if value is None or isinstance(value, int):
        return value
    return float(f"{value:.{number}g}") if math.isfinite(value) else None


def histogram(columns: Sequence[Sequence[float]], num_bins: int = 40) -> dict[str, Any]:
    """Counts of several lists of numbers over common bins of equal width; a bin begins at 0.

    Returns:
        {"edges": num_bins + 1 or fewer, "counts": [[...], ...]}
    """
    values = [value for column in columns for value in column]
    if not values:
        return {"edges": [], "counts": [[] for _ in columns]}
    width = _round_up((max(values) - min(values)) / num_bins) or 1.0
    first, last = math.floor(min(values) / width), math.floor(max(values) / width)
    counts = [[0] * (last - first + 1) for _ in columns]
    for column, count in zip(columns, counts, strict=True):
        for value in column:
            count[math.floor(value / width) - first] += 1
    return {"edges": [digits(place * width, 7) for place in range(first, last + 2)], "counts": counts}


def _round_up(width: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    if width <= 0:
        return 0.0
    power = 10.0 ** math.floor(math.log10(width))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= width)
