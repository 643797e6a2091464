"""Whether a run will fit, at its start; and what to change when it did not (`dpo.estimate`, `dpo.propose`)."""

from __future__ import annotations

import os
from typing import Any

import torch

from dpo.config import Config, ConfigError
from dpo.ds_json import read_ds_json
from dpo.engine import compute_dtype
from dpo.estimate import Setup, memory
from dpo.nvme import host_memory_bytes
from dpo.planner import GIB, counter, remedy, start_warning
from dpo.pretrained import Pretrained
from dpo.propose import HEADROOM, proposals
from dpo.world import World

PERSISTENT = ("weights", "gradients", "optimizer", "reference")
SMALL = 16 * 16 * 2**20
"""Parameters of a model that no machine with a GPU, or gigabytes for a rank, can be short of memory for."""


class OutOfMemory(ConfigError):
    """Memory ran out; the message says which part grew and what would have fitted."""


def will_it_fit(config: Config, world: World) -> str:
    """A warning for the start of a run that will hardly fit on its devices, or nothing."""
    text = Pretrained.of(config.model).text_config
    if text.num_hidden_layers * 12 * text.hidden_size**2 + text.vocab_size * text.hidden_size < SMALL:
        return ""
    return start_warning(config, _setup(config, world), _limit(world), _host_limit(world))


def _setup(config: Config, world: World) -> Setup:
    ds_json = None if config.parallel.ds_config is None else read_ds_json(config.parallel.ds_config)
    return Setup.of(config, world.size, compute_dtype(config.model.dtype, world.device).itemsize, ds_json)


def _limit(world: World) -> float:
    """Bytes that a rank may use: of its GPU, or of this machine's memory, in equal parts."""
    if world.device.type == "cuda":
        return float(torch.cuda.get_device_properties(world.device).total_memory)
    return _host_limit(world)


def _host_limit(world: World) -> float:
    """Main memory of this machine, in equal parts for its ranks."""
    return host_memory_bytes() / int(os.environ.get("LOCAL_WORLD_SIZE", world.size))


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or the CPU (where torch raises a plain RuntimeError)."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def explain(config: Config, world: World) -> OutOfMemory:
    """What to tell about an allocation that failed: held against the plan, and the smallest change that fits."""
    setup, shapes_of = _setup(config, world), counter(compute_dtype(config.model.dtype, world.device).itemsize)
    planned, _ = memory(setup, shapes_of(config))
    # The plan was too small, if it fitted. What is less than all of it helps; `proposals` leaves room beside the limit.
    limit = min(_limit(world), 0.98 * sum(planned.values()) / (1 - HEADROOM))
    persistent = sum(planned[part] for part in PERSISTENT)
    found = proposals(setup, shapes_of, limit, wanted=1)
    used = torch.cuda.max_memory_allocated(world.device) if world.device.type == "cuda" else None
    return OutOfMemory(f"out of memory on {world.device}: {_parts(planned, persistent, used)}: {remedy(found)}")


def _parts(planned: dict[str, Any], persistent: float, used: float | None) -> str:
    """Where the memory went: what lies there for the whole run, and what comes with a micro-batch."""
    passing = {part: size for part, size in planned.items() if part not in PERSISTENT}
    largest = max(planned, key=planned.__getitem__)
    text = f"weights, gradients, optimizer and reference take {persistent / GIB:.1f} GiB by plan, a micro-batch"
    text += f" {sum(passing.values()) / GIB:.1f}"
    if used is not None:
        text += f" (at most {used / GIB:.1f} were in use in all)"
    return f"{text}; {largest} is the largest part with {planned[largest] / GIB:.1f}"
