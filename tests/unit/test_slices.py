"""Slices written by some ranks and read by others, cut elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from dpo.refusals import CheckpointError
from dpo.slices import Slice, SliceReader, write_slices

SHAPES = {"embedding.weight": (7, 5), "norm.weight": (3,), "head.weight": (2, 11)}
KEYS = ("weight", "exp_avg", "exp_avg_sq")


def whole(shift: float = 0.0) -> dict[str, dict[str, Tensor]]:
    """Parameter -> key -> flattened tensor, each element with a value of its own (plus `shift`)."""
    found, first = {}, 0
    for name, shape in SHAPES.items():
        count = torch.Size(shape).numel()
        found[name] = {key: torch.arange(first, first + count).float() + 1000 * k + shift for k, key in enumerate(KEYS)}
        first += count
    return found


def cut(tensors: dict[str, dict[str, Tensor]], num_ranks: int, style: str) -> list[list[Slice]]:
    """Each rank's slices, as views: `each` splits every parameter evenly, `end_to_end` the parameters in a row."""
    ranks: list[list[Slice]] = [[] for _ in range(num_ranks)]
    total, first = sum(torch.Size(shape).numel() for shape in SHAPES.values()), 0
    for name, shape in SHAPES.items():
        count = torch.Size(shape).numel()
        for rank in range(num_ranks):
            share, offset = (-(-count // num_ranks), 0) if style == "each" else (-(-total // num_ranks), first)
            start, stop = max(rank * share - offset, 0), min((rank + 1) * share - offset, count)
            if start < stop:
                views = {key: tensor[start:stop] for key, tensor in tensors[name].items()}
                ranks[rank].append(Slice(name, shape, start, views))
        first += count
    return ranks


def write(directory: Path, num_ranks: int, style: str, part_bytes: int = 2**30) -> SliceReader:
    for rank, slices in enumerate(cut(whole(), num_ranks, style)):
        write_slices(directory, rank, slices, torch.tensor(3.0), part_bytes)
    return read(directory)


def read(directory: Path) -> SliceReader:
    return SliceReader(directory, [path.name for path in directory.iterdir()])


@pytest.mark.parametrize("part_bytes", [1, 200, 2**30])
@pytest.mark.parametrize(("writers", "style"), [(1, "each"), (2, "end_to_end"), (3, "each"), (5, "end_to_end")])
@pytest.mark.parametrize(("readers", "other"), [(1, "each"), (2, "each"), (3, "end_to_end"), (8, "each")])
def test_what_some_ranks_wrote_others_read(
    tmp_path: Path, writers: int, style: str, readers: int, other: str, part_bytes: int
) -> None:
    reader = write(tmp_path, writers, style, part_bytes)
    reader.require(SHAPES)
    assert reader.step.item() == 3
    loaded = whole(shift=0.5)
    for slices in cut(loaded, readers, other):
        for piece in slices:
            reader.read(piece)
    expected = whole()
    assert all(loaded[name][key].equal(expected[name][key]) for name in SHAPES for key in KEYS)


def test_a_part_holds_no_more_than_its_limit_or_one_slice(tmp_path: Path) -> None:
    write(tmp_path, 2, "end_to_end", part_bytes=200)
    for file in tmp_path.iterdir():
        with safe_open(file, framework="pt") as opened:
            slices = opened.metadata()
            num_bytes = sum(opened.get_tensor(key).nbytes for key in opened.keys() if key != "step")  # noqa: SIM118
        assert num_bytes <= 200 or len(slices) == 1
    assert len(list(tmp_path.iterdir())) > 2


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        (SHAPES | {"norm.weight": (4,)}, r"norm.weight is \(3,\) there and \(4,\) in the model"),
        (SHAPES | {"norm.weight": (3, 1)}, r"norm.weight is \(3,\) there and \(3, 1\) in the model"),
        (SHAPES | {"new": (1,)}, r"new is absent there and \(1,\) in the model"),
        ({"norm.weight": (3,), "head.weight": (2, 11)}, r"embedding.weight is \(7, 5\) there and absent in the model"),
    ],
)
def test_other_parameters_are_refused(tmp_path: Path, shapes: dict[str, tuple[int, ...]], expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected):
        write(tmp_path, 2, "each").require(shapes)


def test_a_checkpoint_without_slices_is_refused(tmp_path: Path) -> None:
    (tmp_path / "deepspeed").mkdir()
    with pytest.raises(CheckpointError, match="written by an older version"):
        read(tmp_path)


def test_a_missing_slice_is_never_read_as_if_it_were_there(tmp_path: Path) -> None:
    write(tmp_path, 3, "each")
    (tmp_path / "training-00001-000.safetensors").unlink()
    reader = read(tmp_path)
    with pytest.raises(AssertionError):
        reader.read(cut(whole(), 1, "each")[0][0])
