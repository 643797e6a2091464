"""The held-out pairs of the page: those worth a look, their numbers and their texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data_utils.shards import ShardSet
from dpo.report.series import digits, histogram
from dpo.report.texts import percentiles, read_texts, shorten

MAX_PAIRS = 2_000
Row = Mapping[str, Any]


def _margin(row: Row) -> float:
    return row["after"]["rewards/margins"]


def _change(row: Row) -> float:
    """How far training has moved the log-probs of both responses, in nats; NaN where nothing tells what they were."""
    start = row["before"] or {f"logps/{name}": row[f"reference_logps/{name}"] for name in ("chosen", "rejected")}
    if None in start.values():
        return math.nan
    moves = [row["after"][f"logps/{name}"] - start[f"logps/{name}"] for name in ("chosen", "rejected")]
    return sum(map(abs, moves))


def _surprise(row: Row) -> float:
    """Nats per token of the chosen response under the trained model."""
    return -row["after"]["logps/chosen"] / row["chosen_tokens"]


RANKS: dict[str, Callable[[Row], float]] = {
    "wrong": lambda row: -_margin(row),
    "changed": lambda row: -1.0 if math.isnan(change := _change(row)) else change,
    "surprising": _surprise,
}


def pair_table(rows: Sequence[Row], shards: ShardSet | str, max_pairs: int = MAX_PAIRS) -> dict[str, Any]:
    """Pairs and histograms of an evaluation.

    Args:
        rows: of eval_pairs.jsonl.
        shards: the held-out set that they come from, or why it cannot be read.
    """
    finite = [row for row in rows if None not in (*row["after"].values(), *(row["before"] or {}).values())]
    shown = _most_telling(finite, max_pairs)
    missing = shards if isinstance(shards, str) else ""
    texts = [None] * len(shown) if isinstance(shards, str) else read_texts(shards, [row["where"] for row in shown])
    cut, limit = shorten(texts)
    return {
        "total": len(rows),
        "not_finite": len(rows) - len(finite),
        "columns": _columns(shown),
        "texts": cut,
        "limit": limit,
        "missing": missing,
        "margins": _margins(finite),
        "tokens": {name: percentiles([row[f"{name}_tokens"] for row in rows]) for name in _PARTS},
    }


_PARTS = ("prompt", "chosen", "rejected")


def _most_telling(rows: Sequence[Row], most: int) -> list[Row]:
    """All rows, or the first quarter by each rank and some of the others; in the order of the set."""
    if len(rows) <= most:
        return list(rows)
    kept: set[int] = set()
    for rank in RANKS.values():
        kept |= set(sorted(range(len(rows)), key=lambda place: -rank(rows[place]))[: most // 4])
    others = [place for place in range(len(rows)) if place not in kept]
    room = most - len(kept)
    kept |= {others[place * len(others) // room] for place in range(room)}
    return [rows[place] for place in sorted(kept)]


def _columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """The table column by column, which is half the size."""
    after = {
        name: [digits(row["after"][key]) for row in rows]
        for name, key in (
            ("loss", "loss"),
            ("chosen", "rewards/chosen"),
            ("rejected", "rewards/rejected"),
            ("margin", "rewards/margins"),
        )
    }
    return {
        "where": [row["where"] for row in rows],
        "set": [row["set"] for row in rows],
        "source": [row["source"] for row in rows],
        **{f"{part}_tokens": [row[f"{part}_tokens"] for row in rows] for part in _PARTS},
        **after,
        "before": [None if row["before"] is None else digits(row["before"]["rewards/margins"]) for row in rows],
        "changed": [digits(_change(row)) for row in rows],
        "surprising": [digits(_surprise(row)) for row in rows],
    }


def _margins(rows: Sequence[Row]) -> dict[str, Any]:
    """Histograms of the margin now and, where it was not 0 for all, before."""
    names, columns = ["after"], [[_margin(row) for row in rows]]
    before = [row["before"]["rewards/margins"] for row in rows if row["before"]]
    if any(abs(margin) > 1e-4 for margin in before):
        names, columns = ["before", "after"], [before, *columns]
    return {"names": names, **histogram(columns)}
