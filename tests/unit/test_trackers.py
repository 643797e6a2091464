"""TensorBoard and W&B show what metrics.jsonl holds, under its names; a resumed run goes on with its curves."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import train_dpo
from dpo.files import read_rows
from tests.tiny import tiny_model, tiny_pairs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps that went on from step 2 twice: the second process was killed after step 3, unsaved."""
    folder = tmp_path_factory.mktemp("trackers")
    tiny_model(folder / "model")
    tiny_pairs(folder / "train.jsonl", 16)
    tiny_pairs(folder / "eval.jsonl", 4, seed=1)
    common = {
        "--model.path": f"{folder}/model",
        "--data.train": f"{folder}/train.jsonl",
        "--data.eval": f"{folder}/eval.jsonl",
        "--run.dir": f"{folder}/run",
        "--batch.pairs_per_step": "4",
        "--log.every_steps": "1",
        "--log.wandb": "true",
        "--checkpoint.every_steps": "2",
    }
    words = [word for item in common.items() for word in item]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        assert train_dpo.main([*words, "--train.stop_after_steps", "2"]) == 75
        with patch.context() as dying:
            from dpo.run import Run

            def die(run: Run, step: Any, result: Any) -> None:
                after(run, step, result)
                raise RuntimeError("killed")

            after = Run.after
            dying.setattr(Run, "after", die)
            assert train_dpo.main(words) == 1
        assert train_dpo.main(words) == 0
    return folder / "run"


def expected(run: Path) -> dict[str, dict[int, float]]:
    """Name -> step -> value of metrics.jsonl."""
    curves: dict[str, dict[int, float]] = {}
    for row in read_rows(run / "metrics.jsonl"):
        for key, value in row.items():
            if key != "step" and value is not None:
                curves.setdefault(key, {})[row["step"]] = value
    assert [*curves["loss"]] == [1, 2, 3, 4] and [*curves["eval_loss"]] == [0, 4]
    return curves


def test_tensorboard_has_every_number_once_under_its_name(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    curves = expected(run)
    assert set(events.Tags()["scalars"]) == set(curves)
    for name, values in curves.items():
        found = [(event.step, event.value) for event in events.Scalars(name)]
        if name == "epoch":  # rows of training and of evaluation have it
            found = sorted(set(found))
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in values.items()]


def log_records(data: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log behind W&B's header of 7 bytes: blocks of 32 KiB, of parts with checksum, size and
    kind (1: whole, 2, 3, 4: first, middle and last part)."""
    place, record = 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            yield record
            record = b""


def test_wandb_goes_on_under_one_id_with_the_same_names(run: Path) -> None:
    records: Any = import_module("wandb.proto.wandb_internal_pb2")
    found: dict[str, dict[int, float]] = {}
    files = sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    assert len({path.name for path in files}) == 1 and len(files) == 3
    for file in files:
        for data in log_records(file.read_bytes()):
            record = records.Record()
            record.ParseFromString(data)
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                found.setdefault(name, {})[record.history.step.num] = json.loads(item.value_json)
    for name, values in expected(run).items():
        assert found[name] == {step: pytest.approx(value, rel=1e-9) for step, value in values.items()}
