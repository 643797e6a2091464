"""The ranks of a preflight: meet, measure, and gather what each of them finds on its machine."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.cuda.nccl import version as nccl_version

from dpo.config import Config
from dpo.world import choose_device, environment_ranks, slurm_variables
from launch.weights import buffer_problem

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("train_dpo.py", "dpo", "data_utils", "launch")
GPU_BYTES, CPU_BYTES = 256 * 2**20, 4 * 2**20


class Unmet(Exception):
    """Some ranks did not come."""


@dataclass(frozen=True)
class Ranks:
    """This rank among the others."""

    rank: int
    size: int
    device: torch.device

    @staticmethod
    def meet(kind: Literal["auto", "cpu", "cuda"], meeting: timedelta, collective: timedelta) -> Ranks:
        """Find the others. Raises Unmet, which names those who are missing."""
        os.environ.update(slurm_variables(os.environ))
        rank, size, local_rank = environment_ranks(os.environ)
        device = choose_device(kind, local_rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if size > 1:
            store = _meet(rank, size, meeting)
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=collective)
        return Ranks(rank, size, device)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks."""
        if self.size == 1:
            return [value]
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, value)
        return everyone

    def barrier(self) -> None:
        """Wait for all."""
        if self.size > 1:
            self.gather(None)

    def leave(self) -> None:
        """Wait for all, so that none loses the store too early, and leave."""
        self.barrier()
        if dist.is_initialized():
            dist.destroy_process_group()

    def facts(self, config: Config, config_text: str) -> list[dict[str, Any]]:
        """What every rank finds; see `preflight_checks.judge`."""
        mine = _machine(self) | _software(config_text) | _run_dir(self, Path(config.run.dir)) | _exchange(self)
        mine |= {"clock": self._clock(), "buffers": _buffers(self, config)}
        return self.gather(mine)

    def _clock(self) -> float:
        """The wall clock, read by all ranks at about the same moment, relative to rank 0's: the best of three."""
        rounds = []
        for _ in range(3):
            self.barrier()
            clocks = self.gather(time.time())
            rounds.append(clocks[self.rank] - clocks[0])
        return min(rounds, key=abs)


def _meet(rank: int, size: int, timeout: timedelta) -> dist.Store:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = dist.TCPStore(address, port, size, rank == 0, timeout, wait_for_workers=False)
    except (dist.DistError, RuntimeError) as error:
        raise Unmet(
            f"{socket.gethostname()}: nobody answers at MASTER_ADDR={address} MASTER_PORT={port}: {_first(error)}"
        ) from error
    host = socket.gethostname()
    store.set(f"here/{rank}", json.dumps([host, "any" if "GLOO_SOCKET_IFNAME" in os.environ else _own_address()]))
    keys = [f"here/{number}" for number in range(size)]
    try:
        store.wait(keys, timeout)
    except (dist.DistError, RuntimeError):
        missing = [number for number in range(size) if not store.check([keys[number]])]
        if missing:
            raise Unmet(
                f"ranks {_spans(missing)} did not come within {timeout.seconds} s{_suspects(missing, size)}"
            ) from None
    _require_reachable(json.loads(store.get(key)) for key in keys)
    return store


def _require_reachable(places: Iterable[tuple[str, str]]) -> None:
    """With several nodes, gloo tells the others the address to which a host's own name leads."""
    addresses = dict(places)
    lost = {host: address for host, address in addresses.items() if address == "" or address.startswith("127.")}
    if len(addresses) > 1 and lost:
        named = "; ".join(f"{host} resolves its own name to {address or 'nothing'}" for host, address in lost.items())
        remedy = (
            "correct /etc/hosts there, or set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to the network's interface"
        )
        raise Unmet(f"{named}: {remedy}")


def _first(error: Exception) -> str:
    return str(error).splitlines()[0]


def _spans(numbers: list[int]) -> str:
    """ "0-3, 7" for [0, 1, 2, 3, 7]."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _suspects(missing: list[int], size: int) -> str:
    """The nodes of missing ranks, where the launcher has told their order."""
    hosts = os.environ.get("DPO_HOSTS", "").split(",")
    if hosts == [""] and "SLURM_STEP_NODELIST" in os.environ:
        return f" (of the nodes {os.environ['SLURM_STEP_NODELIST']})"
    if hosts == [""] or size % len(hosts):
        return ""
    per_node = size // len(hosts)
    return ": " + ", ".join(dict.fromkeys(hosts[number // per_node] for number in missing))


def _machine(ranks: Ranks) -> dict[str, Any]:
    is_gpu = ranks.device.type == "cuda"
    properties = torch.cuda.get_device_properties(ranks.device) if is_gpu else None
    device = (
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB" if properties else f"CPU {platform.machine()}"
    )
    return {
        "rank": ranks.rank,
        "host": socket.gethostname(),
        "device": device,
        "driver": _driver() if is_gpu else "none",
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "locked_memory_bytes": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "shared_memory_bytes": shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0,  # noqa: S108
        "needs_shared_memory": is_gpu and ranks.size > 1,
        "has_infiniband": Path("/sys/class/infiniband").is_dir(),
        "busy_port": _busy_port(),
    }


def _buffers(ranks: Ranks, config: Config) -> str:
    """What is wrong with the buffers of weights that lie on a disk."""
    is_half = config.model.dtype == "bfloat16" or (config.model.dtype == "auto" and ranks.device.type == "cuda")
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
    return buffer_problem(config, dtype_bytes=2 if is_half else 4, world_size=ranks.size, ranks_here=ranks_here)


def _own_address() -> str:
    """The address of this host's name, by which gloo is found; empty where it has none."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "no answer from nvidia-smi"
    versions = sorted(set(done.stdout.split()))
    nccl = ".".join(map(str, nccl_version()))
    return f"driver {' '.join(versions)}, CUDA {torch.version.cuda}, NCCL {nccl}"


def _busy_port() -> int | None:
    """The port where the training will meet (DPO_MEETING=HOST:PORT), if HOST is this one and somebody listens there."""
    host, _, port = os.environ.get("DPO_MEETING", "").partition(":")
    if host == "":
        return None
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError as error:
            return int(port) if error.errno == errno.EADDRINUSE else None  # else HOST is another machine
    return None


def _software(config_text: str) -> dict[str, Any]:
    return {
        "code": _code(),
        "config": hashlib.sha256(config_text.encode()).hexdigest()[:12],
        "packages": _packages(),
    }


def _code() -> str:
    """Hash of our own sources, whether committed or not."""
    files = [
        path for name in SOURCES for path in ([ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("*.py"))
    ]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _packages() -> str:
    """Python and the pinned packages with their versions."""
    names = [line.split("==")[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line]
    found = [f"python {platform.python_version()}"]
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    digest = hashlib.sha256("\n".join(found).encode()).hexdigest()[:8]
    return ", ".join(found[:4]) + f" and {max(0, len(found) - 4)} more ({digest})"


def _run_dir(ranks: Ranks, directory: Path) -> dict[str, Any]:
    """Whether all ranks see a file that rank 0 has just written into run.dir, and what is free there."""
    token = ranks.gather(uuid.uuid4().hex)[0]
    probe = directory / f".preflight-{token}"
    problem, is_new = None, False
    if ranks.rank == 0:
        try:
            is_new = not directory.is_dir()
            directory.mkdir(parents=True, exist_ok=True)
            probe.write_text(token)
        except OSError as error:
            problem = f"run.dir={directory}: {error.strerror}"
    ranks.barrier()
    seen = _sees(probe, token)
    free = shutil.disk_usage(directory).free if directory.is_dir() else 0
    ranks.barrier()
    if ranks.rank == 0:
        probe.unlink(missing_ok=True)
        if is_new:
            with contextlib.suppress(OSError):
                directory.rmdir()
    return {
        "run_dir": str(directory.absolute()),
        "sees_run_dir": seen,
        "write_problem": problem,
        "free_bytes": free,
    }


def _sees(probe: Path, token: str) -> bool:
    """Network file systems may need a moment."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            os.listdir(probe.parent)  # asks the server anew
            if probe.read_text() == token:
                return True
        time.sleep(0.2)
    return False


def _exchange(ranks: Ranks) -> dict[str, Any]:
    """Whether an all-reduce gives the right sum on this rank, and bytes per second that it sends (ring: 2 (n-1)/n)."""
    if ranks.size == 1:
        return {"sum_is_right": True, "bytes_per_s": 0.0}
    numbers = torch.arange(2**16, dtype=torch.float32, device=ranks.device) % 251
    total = numbers * (ranks.rank + 1)
    dist.all_reduce(total)
    is_right = bool(torch.equal(total, numbers * (ranks.size * (ranks.size + 1) / 2)))
    num_bytes = GPU_BYTES if ranks.device.type == "cuda" else CPU_BYTES
    payload = torch.ones(num_bytes // 4, device=ranks.device)
    dist.all_reduce(payload)
    best = min(_timed(payload) for _ in range(3))
    return {"sum_is_right": is_right, "bytes_per_s": 2 * (ranks.size - 1) / ranks.size * num_bytes / best}


def _timed(payload: torch.Tensor) -> float:
    _finish(payload)
    since = time.perf_counter()
    dist.all_reduce(payload)
    _finish(payload)
    return time.perf_counter() - since


def _finish(payload: torch.Tensor) -> None:
    if payload.is_cuda:
        torch.cuda.synchronize()
