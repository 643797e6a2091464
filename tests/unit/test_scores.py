"""Evaluation metrics against a recomputation by hand: plain Python floats, pair by pair, over the whole set."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from dpo.files import read_rows
from dpo.scores import (
    Scores,
    drift_warning,
    evaluation_metrics,
    length_controlled_accuracy,
    pair_rows,
    set_names,
)


def random_scores(num_pairs: int, seed: int = 0, names: tuple[str, ...] = ("a", "b c")) -> Scores:
    random = Random(seed)

    def floats(low: float, high: float) -> np.ndarray:
        return np.array([random.uniform(low, high) for _ in range(num_pairs)])

    def tokens(most: int) -> np.ndarray:
        return np.array([random.randint(1, most) for _ in range(num_pairs)])

    return Scores(
        index=np.arange(num_pairs),
        set_name=np.array([random.choice(["one", "two"]) for _ in range(num_pairs)]),
        source=np.array([random.choice(names) for _ in range(num_pairs)]),
        prompt_tokens=tokens(50),
        chosen_tokens=tokens(200),
        rejected_tokens=tokens(200),
        weight=floats(0.2, 2),
        beta=floats(0.05, 0.3),
        policy_chosen=floats(-200, -10),
        policy_rejected=floats(-200, -10),
        reference_chosen=floats(-200, -10),
        reference_rejected=floats(-200, -10),
        chosen_reward=floats(-2, 2),
        rejected_reward=floats(-2, 2),
        loss=floats(0.1, 2),
        chosen_kl=floats(0, 9),
        rejected_kl=floats(0, 9),
    )


def by_hand(scores: Scores) -> dict[str, float]:
    """The same from rows, in plain Python."""
    rows = [{name: getattr(scores, name)[b].item() for name in Scores.__slots__} for b in range(len(scores))]

    def mean(values: list[float]) -> float:
        return math.fsum(values) / len(values)

    chosen = [row["policy_chosen"] - row["reference_chosen"] for row in rows]
    rejected = [row["policy_rejected"] - row["reference_rejected"] for row in rows]
    rewards = [(row["chosen_reward"], row["rejected_reward"]) for row in rows]
    right = [float(c > r) for c, r in rewards]
    longer = [row["chosen_tokens"] - row["rejected_tokens"] for row in rows]
    share = [1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in longer]
    when_longer = math.fsum(s * hit for s, hit in zip(share, right, strict=True)) / math.fsum(share)
    when_shorter = math.fsum((1 - s) * hit for s, hit in zip(share, right, strict=True)) / (
        len(rows) - math.fsum(share)
    )
    return {
        "loss": mean([row["weight"] * row["loss"] for row in rows]),
        "rewards/chosen": mean([c for c, _ in rewards]),
        "rewards/rejected": mean([r for _, r in rewards]),
        "rewards/accuracies": mean(right),
        "rewards/margins": mean([c - r for c, r in rewards]),
        "logps/chosen": mean([row["policy_chosen"] for row in rows]),
        "logps/rejected": mean([row["policy_rejected"] for row in rows]),
        "rewards/accuracies_length_controlled": (when_longer + when_shorter) / 2,
        "drift/chosen": mean([c / row["chosen_tokens"] for c, row in zip(chosen, rows, strict=True)]),
        "drift/rejected": mean([r / row["rejected_tokens"] for r, row in zip(rejected, rows, strict=True)]),
        "drift/chosen_fell": mean([float(c < 0) for c in chosen]),
        "kl_per_token/chosen": mean([row["chosen_kl"] / row["chosen_tokens"] for row in rows]),
        "kl_per_token/rejected": mean([row["rejected_kl"] / row["rejected_tokens"] for row in rows]),
    }


def test_every_metric_equals_its_recomputation_of_the_whole_set_of_each_set_source_and_length() -> None:
    scores = random_scores(401)
    row = evaluation_metrics(scores)
    expected = {f"eval_{key}": value for key, value in by_hand(scores).items()}
    longest = np.maximum(scores.chosen_tokens, scores.rejected_tokens)
    for name in ("one", "two"):
        expected |= {f"eval_{name}_{k}": v for k, v in by_hand(scores.of(scores.set_name == name)).items()}
    groups = {"source/a": scores.source == "a", "source/b_c": scores.source == "b c"}
    for low, high in ((1, 32), (33, 64), (65, 128), (129, 256)):
        groups[f"length/{low}-{high}"] = (longest >= low) & (longest <= high)
    for name, mask in groups.items():
        part = by_hand(scores.of(mask))
        keys = ("loss", "rewards/accuracies", "rewards/margins", "drift/chosen")
        expected |= {f"eval_by_{name}/{key}": part[key] for key in keys}
    found = {key: value for key, value in row.items() if not key.endswith("pairs")}
    assert found.keys() == expected.keys()
    assert found == {key: pytest.approx(value, abs=1e-9) for key, value in expected.items()}
    assert row["eval_pairs"] == 401 == row["eval_one_pairs"] + row["eval_two_pairs"]
    by_length = [value for key, value in row.items() if key.startswith("eval_by_length") and key.endswith("/pairs")]
    assert sum(by_length) == 401


def test_a_divergence_that_was_not_measured_has_no_metric() -> None:
    row = evaluation_metrics(replace(random_scores(9), chosen_kl=None, rejected_kl=None))
    assert not [key for key in row if "kl" in key] and len(row) > 11


def test_a_rule_of_length_alone_gets_one_half_when_length_is_controlled() -> None:
    chosen, rejected = np.array([9, 9, 9, 9, 3, 5]), np.array([4, 4, 4, 4, 8, 5])
    longer = np.where(chosen == rejected, 0.5, chosen > rejected)
    assert longer.mean() == 0.75
    assert length_controlled_accuracy(longer, chosen, rejected) == pytest.approx(0.5, abs=0.06)
    assert length_controlled_accuracy(longer[:5], chosen[:5], rejected[:5]) == 0.5
    assert length_controlled_accuracy(np.ones(6), chosen, rejected) == 1
    assert math.isnan(length_controlled_accuracy(longer[:4], chosen[:4], rejected[:4]))


def test_many_sources_are_taken_together() -> None:
    row = evaluation_metrics(random_scores(500, names=tuple(f"s{n}" for n in range(40))))
    sizes = {
        key.split("/")[1]: value for key, value in row.items() if key.startswith("eval_by_source") and "pairs" in key
    }
    assert len(sizes) == 20 and sum(sizes.values()) == 500 and sizes["other"] > 100


def test_sets_are_named_by_themselves_or_by_what_tells_their_paths_apart() -> None:
    paths = ["data/hh/test.jsonl", "data/uf/test.jsonl.gz", "hf://owner/name", "x/eval.parquet"]
    assert set_names(paths, ["", "", "", "mine/1"]) == ["hh-test", "uf-test", "name", "mine_1"]
    assert set_names(["test.jsonl"], [""]) == ["test"]


def test_falling_chosen_likelihood_is_told() -> None:
    assert drift_warning({"eval_drift/chosen": -0.09, "eval_drift/chosen_fell": 0.9}) is None
    warning = drift_warning({"eval_drift/chosen": -0.134, "eval_drift/chosen_fell": 0.715})
    assert warning is not None and "-0.13 nats per token, in 72% of the held-out pairs" in warning


def test_rows_keep_what_was_before_and_null_what_is_no_number(tmp_path: Path) -> None:
    scores = random_scores(3)
    where = ["a:1", "a:2", "a:3"]
    first = list(pair_rows(scores, where, 0, {}))
    assert all(row["before"] == row["after"] for row in first)
    later = scores.of(np.arange(3))
    later.policy_chosen[1] = np.nan
    rows = list(pair_rows(later, where, 7, {row["where"]: row["before"] for row in first[:2]}))
    assert [row["before"] for row in rows] == [first[0]["after"], first[1]["after"], None]
    assert rows[1]["after"]["logps/chosen"] is None and rows[0]["after"]["step"] == 7
    path = tmp_path / "eval_pairs.jsonl"
    assert read_rows(path) == []
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"where": "torn')
    read: list[dict[str, Any]] = read_rows(path)
    assert read == rows
    assert read[0]["after"]["rewards/chosen"] == pytest.approx(scores.chosen_reward[0], rel=1e-8)
    assert read[0]["reference_logps/chosen"] == pytest.approx(scores.reference_chosen[0], rel=1e-8)
