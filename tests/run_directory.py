"""Run directories as a trainer leaves them, made without training: as many steps and pairs as a test asks for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import yaml

from dpo.scores import PAIRS_FILE, Scores, evaluation_metrics, pair_rows

Texts = tuple[str, str, str]


def some_texts(num_pairs: int, words: int = 60) -> list[Texts]:
    """Prompts and responses of about so many words."""
    random = Random(1)
    vocabulary = "a little cat sat on the mat and was happy about it because of the sea".split()

    def text(most: int) -> str:
        return " ".join(random.choice(vocabulary) for _ in range(random.randint(3, most)))

    return [(f"{number} {text(words)}?", f"{text(words)}.", f"{text(words)}!") for number in range(num_pairs)]


def make_run(folder: Path, *, steps: int, texts: list[Texts], flags: dict[str, Any] | None = None) -> Path:
    """A finished run over `steps` steps with an evaluation of a pair for each of `texts`, which lie beside it."""
    folder.mkdir(parents=True)
    shard = folder.parent / f"{folder.name}-pairs.jsonl"
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in texts]
    shard.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config: dict[str, Any] = {
        "model": {"path": "tiny"},
        "data": {"train": [str(shard)], "eval": [str(shard)]},
        "run": {"dir": str(folder)},
    }
    for key, value in (flags or {}).items():
        section, name = key.split(".")
        config.setdefault(section, {})[name] = value
    record = {"versions": {"torch": "2.13.0"}, "git_commit": "abc", "world_size": 2, "device": "cpu"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"record": record}))
    status = {"state": "finished", "step": steps, "exit_code": 0, "reason": "", "attempt": 1}
    (folder / "status.json").write_text(json.dumps(status))
    summary = {"seconds": 3600.0, "seconds_by_phase": {"start": 12.5, "training": 3500.0, "evaluation": 100.0}}
    (folder / "summary.json").write_text(json.dumps(summary))
    _write_metrics(folder, steps, len(texts))
    return folder


def _write_metrics(folder: Path, steps: int, num_pairs: int) -> None:
    first, last = _scores(num_pairs, 0.0), _scores(num_pairs, 1.0)
    where = [f"{folder.parent / folder.name}-pairs.jsonl:{number + 1}" for number in range(num_pairs)]
    before = {row["where"]: row["before"] for row in pair_rows(first, where, 0, {})}
    pairs = pair_rows(last, where, steps, before)
    (folder / PAIRS_FILE).write_text("".join(json.dumps(row) + "\n" for row in pairs))
    with (folder / "metrics.jsonl").open("w") as file:
        for row in ({"step": 0, "epoch": 0.0, **evaluation_metrics(first)}, *map(_training_row, range(1, steps + 1))):
            file.write(json.dumps(_plain(row)) + "\n")
        file.write(json.dumps(_plain({"step": steps, "epoch": 1.0, **evaluation_metrics(last)})) + "\n")


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}


def _training_row(step: int) -> dict[str, float]:
    noise = math.sin(step * 12.9898) * 0.05
    loss = 0.69 * math.exp(-step / 4000) + noise + (2.0 if step == 1234 else 0.0)
    return {
        "step": step,
        "epoch": step / 10_000,
        "loss": loss,
        "grad_norm": abs(noise) + 0.1,
        "learning_rate": 1e-5,
        "rewards/chosen": noise,
        "rewards/rejected": -step / 4000 + noise,
        "rewards/accuracies": min(1.0, 0.5 + step / 20_000),
        "rewards/margins": step / 4000,
        "logps/chosen": -100 + noise,
        "logps/rejected": -110 - step / 400,
        "pairs_seen": 64 * step,
        "pairs_per_second": 10 + noise,
        "tokens_per_second": 5000 + 100 * noise,
        "padding_fraction": 0.0,
        "peak_memory_gib": 3.2,
        "data_wait_fraction": 0.01,
        "skipped_steps": 0,
        "skipped_rows": 0,
        "reference_forwards": 0,
    }


def _scores(num_pairs: int, moved: float) -> Scores:
    generator = np.random.default_rng(0)
    tokens = generator.integers(3, 300, (3, num_pairs))
    reference = -1.5 * tokens[1:] * generator.uniform(0.8, 1.2, (2, num_pairs))
    gaps = moved * generator.normal([[-2.0], [-12.0]], 8.0, (2, num_pairs))
    chosen_reward, rejected_reward = 0.1 * gaps
    return Scores(
        index=np.arange(num_pairs),
        set_name=np.full(num_pairs, "eval"),
        source=np.array([("chat", "code")[number % 2] for number in range(num_pairs)]),
        prompt_tokens=tokens[0],
        chosen_tokens=tokens[1],
        rejected_tokens=tokens[2],
        weight=np.ones(num_pairs),
        beta=np.full(num_pairs, 0.1),
        policy_chosen=reference[0] + gaps[0],
        policy_rejected=reference[1] + gaps[1],
        reference_chosen=reference[0],
        reference_rejected=reference[1],
        chosen_reward=chosen_reward,
        rejected_reward=rejected_reward,
        loss=np.log1p(np.exp(rejected_reward - chosen_reward)),
        chosen_kl=0.02 * moved * tokens[1],
        rejected_kl=0.03 * moved * tokens[2],
    )
