"""Sums over pairs that become the logged metrics: added up on the device, reduced once per log."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from data_utils.schema import PairBatch
from dpo.estimate import train_flops
from dpo.loss import pair_metrics
from dpo.loss_terms import PairLogps
from dpo.nvme import host_memory_bytes
from dpo.policy import Sizes
from dpo.scores import PAIR_KEYS
from dpo.world import World


class Tally:
    """Sums of per-pair metrics on this rank since the last `clear`; fp64, on the device, without a sync.

    The loss is summed with the pairs' weights, as it is minimized; every other metric plainly. Means are taken
    over the pairs of all ranks, never over batches.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._sums = torch.zeros(len(PAIR_KEYS), dtype=torch.float64, device=world.device)
        self._num_pairs = 0

    def add(self, batch: PairBatch, pairs: PairLogps, loss_B: Tensor) -> None:
        """Count a micro-batch (idle ones count for nothing)."""
        if batch.is_idle:
            return
        metrics = pair_metrics(pairs, loss_B * batch.weight_B)
        self._sums += torch.stack([metrics[key].sum(dtype=torch.float64) for key in PAIR_KEYS])
        self._num_pairs += batch.num_pairs

    def add_sums(self, sums: Mapping[str, float | None], num_pairs: int) -> None:
        """Count sums of an earlier process (all ranks' together, so on one rank only); None: not a number."""
        values = [math.nan if (value := sums[key]) is None else value for key in PAIR_KEYS]
        self._sums += torch.tensor(values, dtype=torch.float64, device=self._world.device)
        self._num_pairs += num_pairs

    def reduce(self, extras: Iterable[float] = ()) -> tuple[dict[str, float], int, list[float]]:
        """Sums over all ranks, the number of pairs, and `extras` summed: one collective, one device-to-host copy."""
        counts = torch.tensor([self._num_pairs, *extras], dtype=torch.float64, device=self._world.device)
        reduced = self._world.sum_on_device(torch.cat([self._sums, counts])).tolist()
        sums: dict[str, float] = dict(zip(PAIR_KEYS, reduced[: len(PAIR_KEYS)], strict=True))
        return sums, round(reduced[len(PAIR_KEYS)]), reduced[len(PAIR_KEYS) + 1 :]

    def clear(self) -> None:
        """Start over."""
        self._sums.zero_()
        self._num_pairs = 0


def means(sums: dict[str, float], num_pairs: int) -> dict[str, float]:
    """Metrics per pair; NaN where there was no pair."""
    return {key: value / num_pairs if num_pairs else float("nan") for key, value in sums.items()}


def peak_memory_gib(world: World) -> float:
    """Most memory this rank has used: allocated on the GPU, or resident in this process."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 2**30
    return host_peak_gib()


def host_peak_gib() -> float:
    """Most host memory that this process has had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def memory_use(world: World) -> str:
    """What this rank has used so far, of what its device has."""
    used = peak_memory_gib(world)
    if world.device.type == "cuda":
        total = torch.cuda.get_device_properties(world.device).total_memory / 2**30
        return f"{used:.1f} of {total:.1f} GiB of each GPU, before the first step"
    total = host_memory_bytes() / 2**30
    return f"{used:.1f} of {total:.1f} GiB by each rank, before the first step"


def model_flops(sizes: Sizes, tokens: float, scored_tokens: float) -> float:
    """`train_flops` of a model of these sizes."""
    return train_flops((sizes.body, sizes.body_trained), (sizes.head, sizes.head_trained), tokens, scored_tokens)


class Throughput:
    """Host-side counters of this rank since the last reading: tokens, slots, scored tokens, seconds waited for data."""

    def __init__(self, world: World, sizes: Sizes, peak_flops: float | None) -> None:
        self._world = world
        self._sizes = sizes
        self._peak_flops = peak_flops
        self.clear()

    def clear(self) -> None:
        """Start over."""
        self.tokens, self.slots, self.scored, self.waited_s = 0, 0, 0, 0.0
        self._since = time.perf_counter()

    def add(self, batch: PairBatch) -> None:
        """Count a micro-batch."""
        if not batch.is_idle:
            self.tokens += batch.num_tokens
            self.slots += batch.num_slots
            self.scored += batch.labels_N.numel()

    def extras(self) -> list[float]:
        """What to sum over ranks; each rank's memory has a place of its own, so that the largest can be told."""
        memory = [0.0] * self._world.size
        memory[self._world.rank] = peak_memory_gib(self._world)
        return [self.tokens, self.slots, self.scored, self.waited_s, *memory]

    def metrics(self, extras: list[float], num_pairs: int) -> dict[str, float | None]:
        """Rates from the summed extras. mfu = `model_flops` over the time and the devices' peak; None where the peak is
        not known."""
        tokens, slots, scored, waited_s, *memory = extras
        elapsed_s = max(time.perf_counter() - self._since, 1e-9)
        rate = model_flops(self._sizes, tokens, scored) / elapsed_s
        return {
            "pairs_per_second": num_pairs / elapsed_s,
            "tokens_per_second": tokens / elapsed_s,
            "padding_fraction": 1 - tokens / slots if slots else 0.0,
            "mfu": None if self._peak_flops is None else rate / (self._peak_flops * self._world.size),
            "peak_memory_gib": max(memory),
            "data_wait_fraction": waited_s / (elapsed_s * self._world.size),
        }


_PEAK_BF16_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense bf16 peak of one device by its maker's data sheet; None for other devices and dtypes."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for card, peak in _PEAK_BF16_FLOPS.items() if card in name), None)
