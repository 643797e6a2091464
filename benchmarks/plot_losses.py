"""Draw the losses and their gradients against the reward margin.

    python -m benchmarks.plot_losses > dpo/losses.svg

Each curve is what the trainer computes at beta 1 for one pair of responses whose log-ratios are h / 2 and -h / 2.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from data_utils.batching import collate
from data_utils.schema import PairColumns, TokenizedPair
from dpo.config import LossSection
from dpo.objective import Objective

CURVES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "sigmoid, smoothing 0.1": {"label_smoothing": 0.1},
    "robust, smoothing 0.1": {"type": ("robust",), "label_smoothing": 0.1},
    "hinge": {"type": ("hinge",)},
    "ipo_sum": {"type": ("ipo_sum",)},
    "exo_pair, smoothing 0.001": {"type": ("exo_pair",), "label_smoothing": 1e-3},
    "apo_zero": {"type": ("apo_zero",)},
    "nca_pair": {"type": ("nca_pair",)},
    "discopop": {"type": ("discopop",)},
}
COLORS = ("#1b6ca8", "#6baed6", "#08306b", "#d95f02", "#7570b3", "#e7298a", "#66a61e", "#a6761d", "#666666")
LEFT, RIGHT, STEP = -6.0, 6.0, 0.05
LOWEST, HIGHEST = (-0.5, -2.5), (6.0, 1.5)
WIDTH, HEIGHT, GAP, TOP = 380, 300, 60, 30


def curve(options: dict[str, Any]) -> tuple[list[float], list[float], list[float]]:
    """Margins h, the loss at each, and its derivative in h."""
    margin_B = torch.arange(LEFT, RIGHT + STEP / 2, STEP, dtype=torch.float64).requires_grad_()
    pairs = [TokenizedPair([0], [0], [0], PairColumns(), "figure", number) for number in range(len(margin_B))]
    batch = collate(pairs, "packed", pad_token_id=0)
    batch = replace(batch, response_lengths_S=batch.response_lengths_S.double(), beta_B=torch.ones_like(margin_B))
    objective = Objective(LossSection(**options))
    logps_S = torch.cat([margin_B / 2, -margin_B / 2])
    loss_B: Tensor = objective.loss(objective.pairs(batch, logps_S, None, torch.zeros_like(logps_S)))
    (slope_B,) = torch.autograd.grad(loss_B.sum(), margin_B)
    return margin_B.tolist(), loss_B.tolist(), slope_B.tolist()


def panel(number: int, title: str, curves: Sequence[tuple[Sequence[float], Sequence[float]]]) -> list[str]:
    """One plot: axes, title and a line for each curve."""
    x0, low, high = GAP + number * (WIDTH + GAP), LOWEST[number], HIGHEST[number]

    def x(value: float) -> float:
        return x0 + (value - LEFT) / (RIGHT - LEFT) * WIDTH

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * HEIGHT

    parts = [f'<clipPath id="p{number}"><rect x="{x0}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}"/></clipPath>']
    parts += [f'<text x="{x0}" y="{TOP - 10}" font-weight="bold">{title}</text>']
    for tick in range(round(LEFT), round(RIGHT) + 1, 2):
        parts.append(f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP}" y2="{TOP + HEIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{tick}</text>')
    for tick in range(math.ceil(low), math.floor(high) + 1):
        color = "#999" if tick == 0 else "#ddd"
        parts.append(f'<line x1="{x0}" x2="{x0 + WIDTH}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="{color}"/>')
        parts.append(f'<text x="{x0 - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick}</text>')
    for color, (margins, values) in zip(COLORS, curves, strict=True):
        points = " ".join(f"{x(h):.1f},{y(min(max(v, -50), 50)):.1f}" for h, v in zip(margins, values, strict=True))
        parts.append(
            f'<polyline clip-path="url(#p{number})" points="{points}" fill="none" stroke="{color}" stroke-width="2"/>'
        )
    return parts


def draw() -> str:
    """The figure as SVG."""
    found = [curve(options) for options in CURVES.values()]
    parts = panel(0, "loss by margin h", [(margins, losses) for margins, losses, _ in found])
    parts += panel(1, "its derivative in h", [(margins, slopes) for margins, _, slopes in found])
    below = TOP + HEIGHT + 44
    for place, (name, color) in enumerate(zip(CURVES, COLORS, strict=True)):
        left, top = GAP + place % 3 * 290, below + place // 3 * 20
        parts.append(
            f'<line x1="{left}" x2="{left + 24}" y1="{top - 4}" y2="{top - 4}" stroke="{color}" stroke-width="3"/>'
        )
        parts.append(f'<text x="{left + 30}" y="{top}">{name}</text>')
    size = f'width="{2 * (WIDTH + GAP) + GAP}" height="{below + 56}"'
    style = 'font-family="sans-serif" font-size="12"'
    body = "\n".join(['<rect width="100%" height="100%" fill="white"/>', *parts])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n{body}\n</svg>\n'


if __name__ == "__main__":
    sys.stdout.write(draw())
