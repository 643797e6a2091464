"""Which checkpoints stay, and which are refused, whatever lies in the folder."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from dpo import checkpoint
from dpo.checkpoint import CheckpointError, TrainerState
from dpo.world import World


class Nothing:
    """An engine without weights."""

    def save(self, directory: Path) -> None:
        (directory / "training").write_text("weights")


WORLD = World(0, 1, 0, SimpleNamespace(type="cpu"), None)  # type: ignore[arg-type]


def save(root: Path, step: int, keep: int = 2) -> Path:
    state = TrainerState(step, 0, "single", 1, "full", "float32", "", {}, 0, 0, {}, 0, 0.0)
    return checkpoint.save(root, state, Nothing(), WORLD, keep)  # type: ignore[arg-type]


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize("keep", [1, 2, 9])
def test_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    for step in range(1, 5):
        save(tmp_path, step, keep)
    assert names(tmp_path) == [f"step-{step:08d}" for step in range(1, 5)][-keep:]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_run_that_went_back_keeps_what_it_writes_and_sets_later_ones_aside(tmp_path: Path, keep: int) -> None:
    for step in (2, 5, 6):
        save(tmp_path, step, keep=9)
    (tmp_path / "step-00000006" / "training").write_text("torn")
    save(tmp_path, 3, keep)
    kept = ["step-00000002", "step-00000003"][-keep:]
    assert names(tmp_path) == ["left-step-00000005", "left-step-00000006", *kept]
    found = checkpoint.find(tmp_path, "auto", WORLD)
    assert found is not None and found[1].step == 3


@pytest.mark.parametrize("manifest", ["[]", "{}", '{"trainer.json": {}}', '{"trainer.json": 1}', "{", "null"])
def test_a_manifest_that_is_none_is_a_damaged_checkpoint(tmp_path: Path, manifest: str) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / "manifest.json").write_text(manifest)
    found = checkpoint.find(tmp_path, "auto", WORLD)
    assert found is not None and found[1].step == 1


def test_the_state_of_another_version_is_refused(tmp_path: Path) -> None:
    directory = save(tmp_path, 1)
    state = json.loads((directory / "trainer.json").read_text()) | {"new": 1}
    (directory / "trainer.json").write_text(json.dumps(state))
    checkpoint._seal(directory)
    with pytest.raises(CheckpointError, match="another version"):
        checkpoint.find(tmp_path, "auto", WORLD)
