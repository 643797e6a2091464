"""How large the weights of a local model are, from the headers of its safetensors files, and what checkpoints need."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

from dpo.ds_json import read_ds_json
from dpo.nvme import largest_share, with_buffers
from dpo.refusals import ConfigError
from dpo.sections import Config

Shapes = dict[str, tuple[int, ...]]
_HEADER_LIMIT = 100_000_000
_HEAD_PARTS = ("embed", "wte", "wpe", "lm_head", "norm")


def weight_shapes(folder: Path) -> Shapes | None:
    """Name -> shape of every weight of a model folder; None where it holds no readable safetensors."""
    shapes: Shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(min(length, _HEADER_LIMIT)))
            shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
        except (OSError, ValueError, KeyError, TypeError, struct.error):
            return None
    return shapes or None


def num_trained(shapes: Shapes, config: Config) -> int:
    """Trained weights: all of them, or those of the adapter (r rows and r columns beside each linear layer)."""
    if config.lora.r == 0:
        return sum(math.prod(shape) for shape in shapes.values())
    wanted = config.lora.target_modules
    linear = [
        shape
        for name, shape in shapes.items()
        if len(shape) == 2
        and not any(part in name for part in _HEAD_PARTS)
        and ("all-linear" in wanted or any(f".{target}." in f".{name}" for target in wanted))
    ]
    return sum(config.lora.r * sum(shape) for shape in linear)


def checkpoint_bytes(shapes: Shapes, config: Config) -> int:
    """Bytes that a run holds on disk at most: fp32 weights and two moments in each of `checkpoint.keep` checkpoints and
    the one that is being written, and the final model or adapter."""
    trained = num_trained(shapes, config)
    exports_all = config.lora.r == 0 or config.export.merge_lora
    exported = sum(math.prod(shape) for shape in shapes.values()) if exports_all else trained
    return 12 * trained * (config.checkpoint.keep + 1) + 4 * exported


def buffer_problem(config: Config, *, dtype_bytes: int, world_size: int, ranks_here: int) -> str:
    """Why the page-locked buffers of weights on a disk do not fit model or machine (`dpo.nvme`); empty where they do,
    or where the weights are not known here."""
    shapes = weight_shapes(Path(config.model.path))
    if config.parallel.ds_config is None or config.model.quantization != "none" or shapes is None:
        return ""
    share = largest_share(max(math.prod(shape) for shape in shapes.values()), world_size)
    try:
        zero = read_ds_json(config.parallel.ds_config)["zero_optimization"]
        with_buffers(zero, share, dtype_bytes=dtype_bytes, ranks_here=ranks_here)
    except ConfigError as error:
        return str(error)
    return ""
