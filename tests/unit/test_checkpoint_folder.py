"""Which checkpoints stay, which are set aside and which are refused, whatever lies in the folder."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dpo import checkpoint
from dpo.checkpoint import CheckpointWriter, TrainerState
from dpo.durable import write_tensors
from dpo.refusals import CheckpointError, DiskError
from dpo.shelf import Shelf
from dpo.slices import Slice, SliceReader
from dpo.world import World

WORLD = World(0, 1, 0, SimpleNamespace(type="cpu"), None)  # type: ignore[arg-type]


class Weights:
    """An engine with one weight."""

    is_writer = True
    num_updates = torch.tensor(3.0)

    def __init__(self, value: float = 1.0) -> None:
        self.held = {key: torch.full((6,), value) for key in ("weight", "exp_avg", "exp_avg_sq")}

    def slices(self) -> Iterator[Slice]:
        yield Slice("w", (2, 3), 0, self.held)

    def load(self, reader: SliceReader) -> None:
        for piece in self.slices():
            reader.read(piece)


def state(step: int) -> TrainerState:
    return TrainerState(step, 1, 0, "single", 1, "full", "float32", {}, "", "", "", {}, 0, 0, {}, 0, 0.0)


def save(root: Path, step: int, keep: int = 2) -> Path:
    writer = CheckpointWriter(Shelf(root), Weights(step), WORLD, keep)  # type: ignore[arg-type]
    writer.begin(state(step), background=False)
    return root / f"step-{step:08d}"


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def found_step(root: Path, shelf: Shelf | None = None) -> int:
    found = checkpoint.find(shelf or Shelf(root), "auto", WORLD)
    assert found is not None
    return found[1].step


@pytest.mark.parametrize("keep", [1, 2, 9])
def test_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    for step in range(1, 5):
        save(tmp_path, step, keep)
    assert names(tmp_path) == [f"step-{step:08d}" for step in range(1, 5)][-keep:]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_run_that_went_back_keeps_what_it_writes_and_sets_later_ones_aside(tmp_path: Path, keep: int) -> None:
    for step in (2, 5, 6):
        save(tmp_path, step, keep=9)
    save(tmp_path, 3, keep)
    kept = ["step-00000002", "step-00000003"][-keep:]
    assert names(tmp_path) == ["left-step-00000005", "left-step-00000006", *kept]
    assert found_step(tmp_path) == 3


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "flip": flip,
    "truncate": truncate,
    "empty": lambda file: os.truncate(file, 0),
    "missing": Path.unlink,
}
FILES = ("training-00000-000.safetensors", "rng-00000.safetensors", "trainer.json")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_found_and_set_aside_with_one_warning(tmp_path: Path, damage: str, file: str) -> None:
    save(tmp_path, 1)
    DAMAGE[damage](save(tmp_path, 2) / file)
    shelf = Shelf(tmp_path)
    assert found_step(tmp_path, shelf) == 1
    assert names(tmp_path) == ["damaged-step-00000002", "step-00000001"]
    aside = "(set aside as damaged-step-00000002); resuming from step-00000001"
    assert shelf.warnings == [f"{tmp_path}/step-00000002/{file}: missing or damaged {aside}"]


@pytest.mark.parametrize("manifest", ["[]", "{}", '{"files": {"trainer.json": {}}}', '{"files": 1}', "{", "null", None])
def test_a_manifest_that_is_none_is_a_damaged_checkpoint(tmp_path: Path, manifest: str | None) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    (path / "manifest.json").unlink() if manifest is None else (path / "manifest.json").write_text(manifest)
    assert found_step(tmp_path) == 1


def test_an_empty_directory_is_a_damaged_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-00000002").mkdir(mode=0o700)
    assert found_step(tmp_path) == 1


def test_nothing_is_left_when_all_are_damaged(tmp_path: Path) -> None:
    (save(tmp_path, 1) / "trainer.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"damaged.*no sound checkpoint is left: start again to train from step 0"
    ):
        checkpoint.find(Shelf(tmp_path), "auto", WORLD)
    assert checkpoint.find(Shelf(tmp_path), "auto", WORLD) is None


@pytest.mark.parametrize("keep", [1, 2])
def test_retention_counts_sound_ones_only(tmp_path: Path, keep: int) -> None:
    for step in range(1, 8):
        save(tmp_path, step, keep=9)
    for step in range(3, 8):
        flip(tmp_path / f"step-{step:08d}" / "trainer.json")
    save(tmp_path, 8, keep)
    torn = [f"damaged-step-{step:08d}" for step in range(3, 8)]
    assert names(tmp_path)[-keep:] == ["step-00000002", "step-00000008"][-keep:]
    assert [name for name in names(tmp_path) if name.startswith("damaged")] == (torn if keep > 1 else [])


def test_torn_saves_cost_no_checkpoint_and_are_cleared_at_the_start(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for step in range(2, 7):
        torn = tmp_path / f".step-{step:08d}.part"
        shutil.copytree(tmp_path / "step-00000001", torn)
        (torn / "manifest.json").unlink()
    assert found_step(tmp_path) == 1
    Shelf(tmp_path).clear_parts()
    assert names(tmp_path) == ["step-00000001"]


def test_foreign_files_and_links_are_not_touched(tmp_path: Path) -> None:
    save(tmp_path, 1, keep=1)
    (tmp_path / "step-00000001" / "mine.txt").write_text("notes")
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "step-00000009").symlink_to(tmp_path / "elsewhere")
    (tmp_path / ".step-00000009.part").symlink_to(tmp_path / "elsewhere")
    assert found_step(tmp_path) == 1
    Shelf(tmp_path).clear_parts()
    save(tmp_path, 2, keep=1)
    assert (tmp_path / "left-step-00000001" / "mine.txt").read_text() == "notes"
    assert {"notes.txt", "elsewhere", "step-00000009", ".step-00000009.part"} <= set(names(tmp_path))
    with pytest.raises(CheckpointError, match=r"step-00000009.part: not a checkpoint of ours"):
        save(tmp_path, 9)


def test_only_the_owner_may_read_what_is_written(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 1)
    assert [place.stat().st_mode & 0o777 for place in (path.parent, path)] == [0o700, 0o700]
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o600}


@pytest.mark.parametrize("name", ["trainer.json", "."])
def test_what_others_may_write_to_is_refused_unless_trusted(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    (path / name).chmod(0o777)
    with pytest.raises(CheckpointError, match="others may write to it: chmod"):
        checkpoint.find(Shelf(tmp_path), "auto", WORLD)
    assert found_step(tmp_path, Shelf(tmp_path, trust=True)) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_belongs_to_others_is_refused_unless_trusted(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    os.chown(path / "trainer.json", 12345, 12345)
    with pytest.raises(CheckpointError, match=r"belongs to user 12345, not to you: --checkpoint\.trust true"):
        checkpoint.find(Shelf(tmp_path), "auto", WORLD)
    assert found_step(tmp_path, Shelf(tmp_path, trust=True)) == 2


class Hostile:
    """Unpickling it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (str(self.mark),))


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    """Not even with a manifest that fits it: whatever is no safetensors or JSON is damage."""
    path = save(tmp_path / "checkpoints", 1)
    for name in FILES:
        (path / name).write_bytes(pickle.dumps(Hostile(tmp_path / "mark")))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = {name: vars_of(path / name) for name in FILES}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"trainer.json: of another version"):
        checkpoint.find(Shelf(path.parent), "auto", WORLD)
    with pytest.raises(Exception, match="header"):
        checkpoint.restore(path, Weights(), WORLD)  # type: ignore[arg-type]
    assert not (tmp_path / "mark").exists()


def vars_of(file: Path) -> dict[str, object]:
    from dpo.durable import seal_of

    sealed = seal_of(file)
    return {"bytes": sealed.bytes, "sha256": sealed.sha256}


def test_the_state_of_another_version_is_refused(tmp_path: Path) -> None:
    directory = save(tmp_path, 1)
    content = json.loads((directory / "trainer.json").read_text()) | {"new": 1}
    (directory / "trainer.json").write_text(json.dumps(content))
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"]["trainer.json"] = vars_of(directory / "trainer.json")
    (directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="another version"):
        checkpoint.find(Shelf(tmp_path), "auto", WORLD)


def test_the_manifest_says_who_wrote_it(tmp_path: Path) -> None:
    manifest = json.loads((save(tmp_path, 4) / "manifest.json").read_text())
    assert {"step": 4, "attempt": 1, "engine": "single", "world_size": 1, "data": ""}.items() <= manifest.items()
    assert len(manifest["config"]) == 64 and set(manifest["files"]) == set(FILES)


# ---- the disk


def test_a_disk_without_room_is_told_with_path_and_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(10))
    with pytest.raises(
        DiskError, match=rf"^{tmp_path}: a checkpoint takes 0.144 kB and 0.01 kB are free: free 0.134 kB"
    ):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert found_step(tmp_path) == 1
    save(tmp_path, 2)
    assert found_step(tmp_path) == 2


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_leaves_older_ones_as_they_were(tmp_path: Path, background: bool) -> None:
    def fill(aside: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(aside / "x"))

    save(tmp_path, 1)
    writer = CheckpointWriter(Shelf(tmp_path), Weights(), WORLD, 1, fill)  # type: ignore[arg-type]
    with pytest.raises(DiskError, match=r"part/x: No space left on device"):
        begin_and_settle(writer, background)
    assert names(tmp_path) == ["step-00000001"] and found_step(tmp_path) == 1


def begin_and_settle(writer: CheckpointWriter, background: bool) -> None:
    writer.begin(state(2), background)
    writer.settle()


def test_numbers_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    save(tmp_path, 1)
    writer = CheckpointWriter(Shelf(tmp_path), Weights(float("nan")), WORLD, 1)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"weight.w holds numbers that are not finite: no checkpoint is written"):
        writer.begin(state(2), background=False)
    assert names(tmp_path) == ["step-00000001"]


def test_what_is_written_in_the_background_is_what_was_there_when_it_began(tmp_path: Path) -> None:
    engine, release = Weights(1.0), threading.Event()
    wait = lambda aside: release.wait(10) and None  # noqa: E731
    writer = CheckpointWriter(Shelf(tmp_path), engine, WORLD, 1, wait)  # type: ignore[arg-type]
    writer.begin(state(1), background=True)
    engine.held["weight"].fill_(2.0)
    assert not writer.is_done and names(tmp_path) == [".step-00000001.part"]
    release.set()
    assert writer.settle() == tmp_path / "step-00000001"
    loaded = Weights(0.0)
    checkpoint.restore(tmp_path / "step-00000001", loaded, WORLD)  # type: ignore[arg-type]
    assert loaded.held["weight"].eq(1.0).all() and not writer.is_done


def test_a_file_that_does_not_hold_what_was_written_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def lose_a_bit(descriptor: int) -> None:
        os.pwrite(descriptor, b"x", 70)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", lose_a_bit)
    with pytest.raises(OSError, match="holds something else than was written"):
        write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(40)}, {})


TENSORS = {
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
    "bf16": torch.arange(6).bfloat16().view(2, 3),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "transposed": torch.arange(6.0).view(2, 3).T,
}


def test_tensors_are_written_as_safetensors(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = TENSORS
    sealed = write_tensors(tmp_path / "a.safetensors", tensors, {"made": "by us"})
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys() and all(loaded[name].equal(tensors[name]) for name in tensors)
    assert sealed.bytes == (tmp_path / "a.safetensors").stat().st_size
