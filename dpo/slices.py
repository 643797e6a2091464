"""Flattened tensors that many ranks write in slices and any other number of ranks reads: safetensors, no pickles.

    training-RRRRR-PPP.safetensors     rank R's part P (of about 1 GiB)
        KEY.NAME                       (n,) the elements [start, start + n) of tensor KEY of parameter NAME, flattened:
                                       weight, exp_avg, exp_avg_sq; reference, where it moves
        step                           () optimizer steps taken
        __metadata__                   {NAME: {"shape": [...], "start": ...}}, the whole parameter's shape

Nothing in the files depends on how many ranks there were, or on which sharding they followed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from dpo.durable import Sealed, write_tensors
from dpo.refusals import CheckpointError

PART_BYTES = 2**30
"""A part is copied to the host as a whole, so this (or one slice, if larger) is what a save needs there."""


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of a parameter and of what belongs to it.

    Attributes:
        shape: of the whole parameter.
        start: the first element's place in the flattened parameter.
        tensors: (n,) each, by key; views, so that reading into them loads.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    tensors: Mapping[str, Tensor]


def write_slices(
    directory: Path, rank: int, slices: Iterable[Slice], step: Tensor, part_bytes: int = PART_BYTES
) -> dict[str, Sealed]:
    """Write this rank's slices; returns the files. Over all ranks they must cover each parameter exactly once.

    Raises:
        CheckpointError: a number is not finite.
        OSError: they cannot be written.
    """
    files = {}
    for number, part in enumerate(_parts(slices, part_bytes)):
        places = {piece.name: json.dumps({"shape": piece.shape, "start": piece.start}) for piece in part}
        tensors = {f"{key}.{piece.name}": tensor.cpu() for piece in part for key, tensor in piece.tensors.items()}
        for key, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise CheckpointError(f"{key} holds numbers that are not finite: no checkpoint is written")
        name = f"training-{rank:05d}-{number:03d}.safetensors"
        files[name] = write_tensors(directory / name, {"step": step.cpu(), **tensors}, places)
    return files


def on_host(slices: Iterable[Slice]) -> list[Slice]:
    """Copies in the host's memory, which training does not change."""
    return [
        replace(piece, tensors={key: tensor.to("cpu", copy=True) for key, tensor in piece.tensors.items()})
        for piece in slices
    ]


def _parts(slices: Iterable[Slice], part_bytes: int) -> Iterator[list[Slice]]:
    part: list[Slice] = []
    num_bytes = 0
    for piece in slices:
        size = sum(tensor.nbytes for tensor in piece.tensors.values())
        if part and num_bytes + size > part_bytes:
            yield part
            part, num_bytes = [], 0
        part.append(piece)
        num_bytes += size
    if part:
        yield part


@dataclass(frozen=True, slots=True)
class _Stored:
    start: int
    num_elements: int
    file: Path


class SliceReader:
    """What all ranks wrote into a directory.

    Attributes:
        step: () optimizer steps taken.
        shapes: of all whole parameters, by name.
    """

    step: Tensor

    def __init__(self, directory: Path, names: Iterable[str]) -> None:
        """Read the headers of those of the named files that hold slices; no other file is opened.

        Raises:
            CheckpointError: there are none.
        """
        self._directory = directory
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._stored: dict[str, list[_Stored]] = {}
        for file in (directory / name for name in sorted(names) if name.startswith("training-")):
            with safe_open(file, framework="pt") as opened:
                self.step = opened.get_tensor("step")
                for name, text in opened.metadata().items():
                    place = json.loads(text)
                    (num_elements,) = opened.get_slice(f"weight.{name}").get_shape()
                    self.shapes[name] = tuple(place["shape"])
                    self._stored.setdefault(name, []).append(_Stored(place["start"], num_elements, file))
        if not self._stored:
            raise CheckpointError(f"{directory}: holds no training-*.safetensors: written by an older version")

    def require(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Refuse a checkpoint of other parameters. The answer is the same on every rank.

        Raises:
            CheckpointError: a name or a shape is not the model's.
        """
        for name in sorted(shapes.keys() | self.shapes.keys()):
            ours, theirs = shapes.get(name), self.shapes.get(name)
            if ours is None or theirs is None or tuple(ours) != theirs:
                raise CheckpointError(
                    f"{self._directory}: {name} is {_described(theirs)} there and {_described(ours)} in the model: keep"
                    " model.path and the lora keys as they were"
                )

    def read(self, piece: Slice) -> None:
        """Fill the tensors of a slice, of parameters that passed `require`."""
        (num_elements,) = {tensor.numel() for tensor in piece.tensors.values()}
        stop, num_read = piece.start + num_elements, 0
        for stored in self._stored[piece.name]:
            first, last = max(piece.start, stored.start), min(stop, stored.start + stored.num_elements)
            if first >= last:
                continue
            num_read += last - first
            with safe_open(stored.file, framework="pt") as opened:
                for key, tensor in piece.tensors.items():
                    found = opened.get_slice(f"{key}.{piece.name}")[first - stored.start : last - stored.start]
                    tensor[first - piece.start : last - piece.start].copy_(found)
        assert num_read == num_elements <= math.prod(piece.shape), piece.name


def _described(shape: Sequence[int] | None) -> str:
    return "absent" if shape is None else str(tuple(shape))
