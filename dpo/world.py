"""The ranks of a job: who we are, on which device, and the small facts that ranks agree on over the CPU.

Counts, stop flags and errors travel over a gloo side group, so that the device queue is never drained for bookkeeping.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from dpo.refusals import ConfigError

Kind = Literal["auto", "cpu", "cuda"]
Result = TypeVar("Result")
RENDEZVOUS_TIMEOUT = timedelta(seconds=30)
BOARD_TIMEOUT = timedelta(seconds=3)
WATCHDOG_FIRST = timedelta(minutes=1)
"""A collective times out so much later than the watchdog, which knows more, ends the run."""


_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


def lost_a_peer(error: Exception) -> bool:
    """Whether a collective failed for another rank's sake; gloo says so in a plain RuntimeError."""
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in _LOST)


def environment_ranks(environ: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, world size, local rank) as torchrun, deepspeed or SLURM's `srun` name them; else (0, 1, 0)."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        local_rank = _whole(environ, "LOCAL_RANK") if "LOCAL_RANK" in environ else 0
        return _whole(environ, "RANK"), _whole(environ, "WORLD_SIZE"), local_rank
    if "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ:
        return _whole(environ, "SLURM_PROCID"), _whole(environ, "SLURM_NTASKS"), _whole(environ, "SLURM_LOCALID")
    return 0, 1, 0


def _whole(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except (KeyError, ValueError):
        raise ConfigError(f"{name}={environ.get(name, '')!r} is no number: a launcher has to set it") from None


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list such as `gpu[03-05,9],login1`: "gpu03"."""
    if match := re.match(r"([^,\[\]]+)(?:\[([0-9]+)[^\]]*\])?([^,\[\]]*)", nodelist):
        return "".join(part or "" for part in match.groups())
    raise ConfigError(f"SLURM_JOB_NODELIST={nodelist!r} names no host: set MASTER_ADDR to the first node")


def slurm_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have set, for a task that plain `srun` has started; nothing elsewhere.

    The address is the first host of the step, which has task 0. The port follows from the numbers of job and step, so
    that all tasks find the same one and jobs that share a node another: 15000 to 24999, below Linux's ephemeral ports.
    """
    if "RANK" in environ or "SLURM_STEP_ID" not in environ or "SLURM_PROCID" not in environ:
        return {}
    rank, size, local_rank = environment_ranks(environ)
    nodelist = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    port = 15000 + (7 * _whole(environ, "SLURM_JOB_ID") + _whole(environ, "SLURM_STEP_ID")) % 10000
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(local_rank),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or first_host(nodelist),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(port),
    }


def choose_device(kind: Kind, local_rank: int) -> torch.device:
    """The device of this rank: its GPU where there is one and `kind` allows it.

    Raises:
        ConfigError: a GPU was asked for and this rank has none.
    """
    num_gpus = torch.cuda.device_count()
    if kind == "cuda" and num_gpus == 0:
        raise ConfigError("parallel.device=cuda: this machine shows no GPU (see nvidia-smi); set --parallel.device cpu")
    if kind == "cpu" or num_gpus == 0:
        return torch.device("cpu")
    if local_rank >= num_gpus:
        raise ConfigError(
            f"local rank {local_rank} has no GPU: {num_gpus} visible; start at most {num_gpus} ranks per node"
        )
    return torch.device("cuda", local_rank)


def _meet(size: int, timeout: timedelta) -> dist.Store:
    """The store through which all ranks find each other; waits `RENDEZVOUS_TIMEOUT` for them, not the time that a
    collective may take."""
    try:
        store, _, _ = next(rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT))
    except (dist.DistError, ValueError) as error:
        place = f"MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={os.environ['MASTER_PORT']}"
        raise ConfigError(
            f"{place} WORLD_SIZE={size}: the ranks did not meet there within {RENDEZVOUS_TIMEOUT.seconds} s"
            f" ({str(error).splitlines()[0]}): check the variables and that all {size} ranks were started"
        ) from error
    store.set_timeout(timeout)
    return store


@dataclass(frozen=True)
class World:
    """This process among the job's `size` processes.

    Attributes:
        side_group: the gloo group for bookkeeping; None where the default group is gloo already.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    side_group: Any

    @staticmethod
    def start(kind: Kind = "auto", sharded: bool = False, timeout_s: float = 1800) -> World:
        """Join the job that the environment describes.

        Args:
            kind: which device to take.
            sharded: the engine needs a process group even for a single process.
            timeout_s: `parallel.timeout_s`.

        Raises:
            ConfigError: the device does not exist, or a rendezvous variable is missing.
        """
        os.environ.update(slurm_variables(os.environ))  # torch and DeepSpeed read them as well
        rank, size, local_rank = environment_ranks(os.environ)
        device = choose_device(kind, local_rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else every import of DeepSpeed warns that it chose it
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if size == 1:
            if sharded and not dist.is_initialized():
                dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
            return World(rank, size, local_rank, device, None)
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise ConfigError(
                    f"{name} is not set: start {size} ranks with launch/local.sh, torchrun, deepspeed or srun"
                )
        if not dist.is_initialized():
            timeout = timedelta(seconds=timeout_s) + WATCHDOG_FIRST
            store = _meet(size, timeout)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        side_group = dist.new_group(backend="gloo") if device.type == "cuda" else None
        return World(rank, size, local_rank, device, side_group)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes what is written once."""
        return self.rank == 0

    def exchange(self, values: Sequence[int]) -> list[list[int]]:
        """Every rank's `values` (equally many on each), in the order of ranks: (size, len(values))."""
        if self.size == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.int64)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine, group=self.side_group)
        return torch.stack(everyone).tolist()

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's `value`, in the order of ranks (a small picklable; from our own processes only)."""
        if self.size == 1:
            return [value]
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, value, group=self.side_group)
        return everyone

    def sum_on_device(self, sums: torch.Tensor) -> torch.Tensor:
        """Sum a tensor on this rank's device over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(sums)
        return sums

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier(group=self.side_group)

    def together(self, action: Callable[[], Result]) -> Result:
        """Run something that may refuse on some ranks only; then all refuse. No collectives inside `action`."""
        try:
            result, error = action(), None
        except (ValueError, OSError) as refusal:
            result, error = None, refusal
        self.raise_together(error)
        return result  # type: ignore[return-value]

    def raise_together(self, error: Exception | None) -> None:
        """Raise on every rank when any of them failed: one's own error, else the first failed rank's message.

        Ranks thus never wait in a collective for one that has already given up.

        Raises:
            ConfigError: some rank had an error.
        """
        messages = self.gather_objects(None if error is None else str(error))
        if error is not None:
            raise error
        for message in messages:
            if message is not None:
                raise ConfigError(message)

    def leave(self) -> None:
        """End membership in the job."""
        if dist.is_initialized():
            dist.destroy_process_group()


class Board:
    """Short texts, one of each rank, in the store through which the ranks met: for a thread, beside all collectives.

    A store that does not answer within seconds is that of a stopped rank 0; then nothing is posted or read.
    """

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self._store: dist.Store | None = None

    def post(self, text: str) -> None:
        """Put up this rank's text, in place of its last one."""
        with contextlib.suppress(dist.DistError, RuntimeError):
            self._open().set(f"board/{self._rank}", text)

    def read(self) -> dict[int, str]:
        """The texts of the ranks that have posted one."""
        found = {}
        with contextlib.suppress(dist.DistError, RuntimeError):
            for rank in range(self._size):
                if self._open().check([f"board/{rank}"]):
                    found[rank] = self._open().get(f"board/{rank}").decode()
        return found

    def _open(self) -> dist.Store:
        """A connection of our own: the main thread may wait in another one."""
        if self._store is None:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self._store = dist.TCPStore(address, port, is_master=False, timeout=BOARD_TIMEOUT, wait_for_workers=False)
        return self._store
