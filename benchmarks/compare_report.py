"""What a comparison prints and draws: tables at 80 columns, and bars in an SVG made by hand."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from html import escape
from typing import Any

MIB = 2**20
COLORS = {"ours": "#2f6f9f", "trl-tuned": "#c9a227", "trl-default": "#b0563f"}


def summary(measured: dict[str, Any], pairs: int, layers: int) -> dict[str, Any]:
    """A side's numbers per pair and micro-step, from its counts and times (the fields of `Measured`)."""
    counted = measured["counted"]
    steps = counted["micro_steps"]
    passes = counted["layer_passes"]
    return {
        "mode": measured["mode"],
        "trainer": measured["name"],
        "flops_per_pair": counted["flops"] / pairs,
        "cpu_seconds_per_pair": _median(measured["cpu_seconds"], pairs),
        "padding_fraction": 1 - counted["tokens"] / counted["slots"],
        "slots_per_pair": counted["slots"] / pairs,
        "forwards_with_grad": passes.get("with grad", 0) / layers / steps,
        "forwards_without_grad": passes.get("without grad", 0) / layers / steps,
        "syncs_per_micro_step": sum(counted["syncs"].values()) / steps,
        "metric_collectives_per_micro_step": metric_collectives(counted["collectives"]) / steps,
        "micro_steps": steps,
        "saved_bytes": counted["saved_bytes"],
        "peak_bytes": counted["peak_bytes"],
        "tokenized_pairs_per_cpu_second": _median(measured["tokenized"]),
    }


def metric_collectives(calls: dict[str, int]) -> int:
    """Reductions of a step on the device; what ranks agree on over the CPU group is not among them."""
    return sum(count for name, count in calls.items() if name in ("Accelerator.gather", "World.sum_on_device"))


def _median(values: Sequence[float], divisor: float = 1) -> float | None:
    return statistics.median(values) / divisor if values else None


def _cell(value: float | None, width: int, digits: int, unit: float = 1) -> str:
    return f"{'-':>{width}}" if value is None else f"{value / unit:>{width}.{digits}f}"


def table(sides: Sequence[dict[str, Any]], ratios: Sequence[dict[str, Any]]) -> str:
    """Both tables, at most 80 columns wide."""
    lines = [
        "mode trainer       MFLOP  CPU-ms pad-   forwards    syncs redu-  saved    peak",
        "                   /pair   /pair ding   grad   none /micro-step   MiB     MiB",
    ]
    for side in sides:
        lines.append(
            f"{side['mode']:<4} {side['trainer']:<11} {side['flops_per_pair'] / 1e6:>8.0f}"
            f" {_cell(side['cpu_seconds_per_pair'], 7, 1, 1e-3)} {side['padding_fraction']:>4.0%}"
            f" {side['forwards_with_grad']:>6.1f} {side['forwards_without_grad']:>6.1f}"
            f" {side['syncs_per_micro_step']:>5.0f} {side['metric_collectives_per_micro_step']:>5.0f}"
            f" {side['saved_bytes'] / MIB:>6.0f} {side['peak_bytes'] / MIB:>7.0f}"
        )
    lines += ["", "times ours         FLOPs  CPU-seconds (least-most)  saved   peak  tokenizing"]
    for ratio in ratios:
        spread = ratio["cpu_seconds_ratio_spread"]
        ends = f"({spread[0]:.2f}-{spread[1]:.2f})" if spread else ""
        lines.append(
            f"{ratio['mode']:<4} {ratio['rival']:<11} {ratio['flops_ratio']:>7.2f}"
            f" {_cell(ratio['cpu_seconds_ratio'], 10, 2)} {ends:<13}"
            f" {ratio['saved_bytes_ratio']:>8.2f} {ratio['peak_bytes_ratio']:>6.2f}"
            f" {_cell(ratio['tokenize_ratio'], 9, 2)}"
        )
    return "\n".join(lines)


def plot(sides: Sequence[dict[str, Any]], title: str) -> str:
    """An SVG: FLOPs and, where they were timed, CPU-time per pair of every side in every mode, as bars."""
    panels = [("MFLOP per pair", "flops_per_pair", 1e6), ("CPU-ms per pair", "cpu_seconds_per_pair", 1e-3)]
    panels = [panel for panel in panels if sides[0][panel[1]] is not None]
    width, bar, left = 340, 18, 96
    height = 54 + len(sides) * (bar + 6)
    parts = [f'<text x="8" y="18" font-weight="bold">{escape(title)}</text>']
    for number, (label, key, unit) in enumerate(panels):
        values = [side[key] / unit for side in sides]
        x0 = number * width
        parts.append(f'<text x="{x0 + left}" y="40">{escape(label)}</text>')
        for row, (side, value) in enumerate(zip(sides, values, strict=True)):
            y = 48 + row * (bar + 6)
            length = (width - left - 60) * value / max(values)
            if number == 0:
                parts.append(f'<text x="8" y="{y + 13}">{side["mode"]} {side["trainer"]}</text>')
            parts.append(
                f'<rect x="{x0 + left + 8}" y="{y}" width="{length:.1f}" height="{bar}"'
                f' fill="{COLORS[side["trainer"]]}"/>'
                f'<text x="{x0 + left + 12 + length:.1f}" y="{y + 13}">{value:,.0f}</text>'
            )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{len(panels) * width}" height="{height}"'
        ' font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        + "".join(parts)
        + "</svg>\n"
    )
