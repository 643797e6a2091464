"""Weights on a local disk (ZeRO-3 with `offload_param` to "nvme"): the page-locked buffers through which they pass.

DeepSpeed keeps `buffer_count` buffers of `buffer_size` elements on every rank, whatever the model: one that is too
small ends in an assertion as the model is partitioned, large ones take the machine's memory. So the file leaves
`buffer_size` to the trainer, which knows the model. Arithmetic, no torch.
"""

from __future__ import annotations

import math
import os
import resource
from typing import Any

from dpo.refusals import ConfigError

GIB = 2**30
ALIGNMENT = 4096
"""Elements; DeepSpeed rounds a buffer up to 1024 bytes for each thread that reads."""
BUFFER_COUNT = 5
"""DeepSpeed's own default."""


def largest_share(num_elements: int, world_size: int) -> int:
    """Elements of a buffer that holds one rank's share of a weight of so many elements."""
    share = -(-num_elements // world_size)
    return -(-share // ALIGNMENT) * ALIGNMENT


def pinned_bytes(offload: dict[str, Any], share: int, dtype_bytes: int) -> int:
    """Bytes of one rank's buffers under an `offload_param`; `share`: elements of each where it does not say."""
    return offload.get("buffer_count", BUFFER_COUNT) * offload.get("buffer_size", share) * dtype_bytes


def with_buffers(
    zero: dict[str, Any], share: int, *, dtype_bytes: int, ranks_here: int, will_lock: bool = True
) -> dict[str, Any]:
    """A `zero_optimization` whose buffers fit the model, and the memory of this machine.

    Args:
        share: elements of the largest share of a weight (`largest_share`).
        ranks_here: ranks on this machine, each of which has buffers of its own.
        will_lock: this process is a rank, or runs where ranks will; false: its own limits say nothing.

    Raises:
        ConfigError: they do not fit; says what would.
    """
    offload = zero.get("offload_param") or {}
    if offload.get("device") != "nvme":
        return zero
    size = offload.get("buffer_size", share)
    key = "zero_optimization.offload_param.buffer_size"
    if size < share:
        raise ConfigError(
            f"{key}={size:,} is less than the largest share of a weight that a rank has ({share:,} elements): drop the"
            " key, and the trainer sets it"
        )
    own = pinned_bytes(offload, share, dtype_bytes)
    total = own * ranks_here
    if total > host_memory_bytes():
        count = offload.get("buffer_count", BUFFER_COUNT)
        remedy = "drop the key, and the trainer sets it" if size > share else "lower buffer_count, or take more nodes"
        raise ConfigError(
            f"{key}: {count} page-locked buffers of {size:,} elements for each rank ({ranks_here} here) take"
            f" {total / GIB:.1f} GiB of this machine's {host_memory_bytes() / GIB:.1f}: {remedy}"
        )
    if will_lock and own > lockable_bytes():
        raise ConfigError(
            f"zero_optimization.offload_param: its buffers lock {own / GIB:.2f} GiB of a rank's memory, and"
            f" {lockable_bytes() / GIB:.2f} may be locked here: ulimit -l unlimited (limits.conf, or slurmd's unit)"
        )
    return zero | {"offload_param": offload | {"buffer_size": size}}


def host_memory_bytes() -> float:
    """Memory of this machine."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def lockable_bytes() -> float:
    """What a process of this user may lock; DeepSpeed hands out no buffer beyond it."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return math.inf if limit == resource.RLIM_INFINITY or os.geteuid() == 0 else float(limit)
