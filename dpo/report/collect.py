"""A run directory as plain data for the page: what was run, how it went, what came out."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_utils.shards import ShardSet
from dpo.config import Config, build, load_record, to_yaml
from dpo.config_text import MISSING, default_of, known_keys, yaml_values
from dpo.files import read_object, read_rows
from dpo.refusals import ConfigError
from dpo.report.answers import answers
from dpo.report.pairs import pair_table
from dpo.report.series import MAX_POINTS, digits, series
from dpo.report.texts import open_shards, statistics
from dpo.scores import KL_MEANS, MEANS, PAIRS_FILE, drift_warning

Row = Mapping[str, Any]


class Shards:
    """The training and the held-out pairs of a run, opened when they are asked for."""

    def __init__(self, config: Config, train: ShardSet | None = None, held_out: ShardSet | None = None) -> None:
        self._config, self._train, self._held_out = config, train, held_out

    @property
    def train(self) -> ShardSet | str:
        """Or why they cannot be read."""
        return self._train or open_shards(self._config.data.train)

    @property
    def held_out(self) -> ShardSet | str:
        """Or why they cannot be read."""
        return self._held_out or open_shards(self._config.data.eval)


def config_of(directory: Path) -> Config:
    """The config of a run directory.

    Raises:
        ConfigError: it is none.
    """
    return build(yaml_values(_record(directory), str(directory / "config.yaml")))


def _record(directory: Path) -> dict[str, Any]:
    path = directory / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{directory}: no config.yaml there; give the run.dir of a run")
    return load_record(str(path))


def collect(
    directory: Path, shards: Shards | None = None, *, in_detail: bool = True, until: int | None = None
) -> dict[str, Any]:
    """All that the page shows of a run.

    Args:
        shards: those of the run, where they are open already.
        in_detail: with pairs, data and the config; a comparison shows none of these.
        until: leave out what was measured after this step.

    Raises:
        ConfigError: the folder is no run directory, or what it holds is not what a run writes.
    """
    config, record = config_of(directory), _record(directory).get("record") or {}
    rows = [row for row in _rows(directory / "metrics.jsonl") if until is None or row["step"] <= until]
    training = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "eval_loss" in row]
    status, summary = read_object(directory / "status.json"), read_object(directory / "summary.json")
    max_points = MAX_POINTS if in_detail else MAX_POINTS // 2
    run = {
        "name": directory.name or str(directory),
        "directory": str(directory),
        "status": status,
        "facts": _facts(config, record, training, summary),
        "warnings": _warnings(status, training, evaluations),
        "logged": len(training),
        "max_points": max_points,
        "training": series(training, max_points),
        "evaluation": series(evaluations, max_points),
        "before_after": _before_after(evaluations),
        "groups": _groups(evaluations),
        "changed": _changed_keys(config),
        "seconds": summary.get("seconds"),
        "phases": summary.get("seconds_by_phase") or {},
        "reproduce": _reproduce(directory, config, record),
    }
    return run | _detail(directory, config, shards or Shards(config), record) if in_detail else run


def _detail(directory: Path, config: Config, shards: Shards, record: Row) -> dict[str, Any]:
    pairs = _rows(directory / PAIRS_FILE)
    train = shards.train
    return {
        "pairs": pair_table(pairs, shards.held_out) if pairs else None,
        "generations": answers(directory, config.eval.temperature),
        "data": {"missing": train} if isinstance(train, str) else statistics(train),
        "config": to_yaml(config),
        "versions": record.get("versions") or {},
    }


# ---- files


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return read_rows(path)
    except ValueError as error:
        raise ConfigError(f"{path}: not what a run writes ({error}); restore the file") from None


# ---- what was run


def _facts(config: Config, record: Row, training: Sequence[Row], summary: Row) -> list[tuple[str, str]]:
    """What was run, on what: names and values for people."""
    lora = f"LoRA adapters of rank {config.lora.r}" if config.lora.r else "the whole model"
    paths = [entry if isinstance(entry, str) else entry.path for entry in config.data.train]
    held_out = [entry if isinstance(entry, str) else entry.path for entry in config.data.eval]
    last = training[-1] if training else {}
    facts = {
        "model": config.model.path,
        "trained": lora,
        "loss": f"{' + '.join(config.loss.type)}, beta {config.loss.beta:g}",
        "training pairs": ", ".join(paths),
        "held-out pairs": ", ".join(held_out),
        "steps": f"{last['step']:,} of {config.batch.pairs_per_step} pairs, {last['epoch']:.3g} epochs" if last else "",
        "optimizer": f"{config.optim.name}, learning rate {config.optim.learning_rate:g}, {config.optim.scheduler}",
        "ran on": f"{record.get('world_size', '?')} × {record.get('device', '?')}",
        "time": _duration(summary["seconds"]) if "seconds" in summary else "",
    }
    return [(name, value) for name, value in facts.items() if value]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _changed_keys(config: Config) -> dict[str, Any]:
    """Keys that differ from their defaults, as text; without those that name files."""
    values = {}
    for key in known_keys():
        section, name = key.split(".")
        value, default = getattr(getattr(config, section), name), default_of(key)
        if key != "run.dir" and (default is MISSING or value != default):
            values[key] = " ".join(map(_text, value)) if isinstance(value, tuple) else _text(value)
    return values


def _text(value: Any) -> str:
    return value.path if hasattr(value, "path") else f"{value:g}" if isinstance(value, float) else str(value)


def _reproduce(directory: Path, config: Config, record: Row) -> dict[str, Any]:
    """The command that does it again."""
    ranks, engine = int(record.get("world_size") or 1), config.parallel.engine
    again = ["--config", f"{directory}/config.yaml", "--run.dir", f"{directory}-again"]
    start = ["launch/local.sh", "-n", str(ranks)] if ranks > 1 else ["python", "train_dpo.py"]
    return {
        "command": shlex.join([*start, *again]),
        "commit": record.get("git_commit"),
        "ranks": ranks,
        "engine": engine,
        "device": record.get("device"),
        "seed": config.train.seed,
    }


# ---- how it went


def _warnings(status: Row, training: Sequence[Row], evaluations: Sequence[Row]) -> list[str]:
    found = []
    if status.get("state") == "failed":
        found.append(f"The run failed after step {status.get('step')}: {status.get('reason')}")
    if status.get("state") in ("stopped", "running"):
        found.append(f"The run is not finished: {status['state']} at step {status.get('step')}.")
    last = training[-1] if training else {}
    if last.get("skipped_steps"):
        found.append(f"{last['skipped_steps']} steps were skipped: their gradient was not finite, or their loss leapt.")
    if last.get("skipped_rows"):
        found.append(f"{last['skipped_rows']} rows could not be used and were left out.")
    latest = evaluations[-1] if evaluations else {}
    if latest.get("eval_drift/chosen") is not None and (drift := drift_warning(latest)):
        found.append(f"{drift[0].upper()}{drift[1:]}.")
    return found


ROWS = (
    ("loss", "Loss"),
    ("rewards/accuracies", "Accuracy"),
    ("rewards/accuracies_length_controlled", "Accuracy, length controlled"),
    ("rewards/margins", "Margin of rewards"),
    ("rewards/chosen", "Reward of chosen"),
    ("rewards/rejected", "Reward of rejected"),
    ("drift/chosen", "Drift of chosen, nats per token"),
    ("drift/rejected", "Drift of rejected, nats per token"),
    ("drift/chosen_fell", "Chosen that became less likely"),
    ("kl_per_token/chosen", "KL to the reference on chosen, nats per token"),
    ("kl_per_token/rejected", "KL to the reference on rejected, nats per token"),
)


def _before_after(evaluations: Sequence[Row]) -> dict[str, Any]:
    """The first evaluation, where it was before training, and the latest one; of each set."""
    if not evaluations:
        return {}
    latest = evaluations[-1]
    before = evaluations[0] if evaluations[0]["step"] == 0 else {}
    counts = [key for key in latest if key.endswith("_pairs") and key != "eval_pairs"]
    sets = [key.removeprefix("eval_").removesuffix("_pairs") for key in counts]
    prefixes = {"": "eval_"} | {name: f"eval_{name}_" for name in sets}
    tables = {
        name: {
            "pairs": latest[f"{prefix}pairs"],
            "rows": [
                (key, label, digits(before.get(prefix + key)), digits(latest[prefix + key]))
                for key, label in ROWS
                if prefix + key in latest and not (key.startswith(("drift", "kl")) and latest[prefix + key] is None)
            ],
        }
        for name, prefix in prefixes.items()
    }
    return {"step": latest["step"], "sets": tables}


def _groups(evaluations: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """The latest evaluation by source and by length."""
    latest = evaluations[-1] if evaluations else {}
    groups: dict[str, dict[str, dict[str, Any]]] = {"source": {}, "length": {}}
    for key, value in latest.items():
        if key.startswith("eval_by_"):
            kind, name, *metric = key.removeprefix("eval_by_").split("/")
            groups[kind].setdefault(name, {"name": name})["/".join(metric)] = digits(value)
    return {kind: list(found.values()) for kind, found in groups.items()}


def document(
    directories: Sequence[Path], shards: Callable[[Path], Shards | None] = lambda directory: None
) -> dict[str, Any]:
    """The data of a page: one run in detail, or several beside each other.

    Raises:
        ConfigError: one of the folders is no run directory.
    """
    in_detail = len(directories) == 1
    runs = [collect(directory, shards(directory), in_detail=in_detail) for directory in directories]
    return {"made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "runs": runs}


assert {key for key, _ in ROWS} <= {*MEANS, *KL_MEANS}
