"""launch/environment.py decides for every launcher, and what the user has set stays."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from launch.environment import DEFAULTS, meeting_here, rank_environment

ROOT = Path(__file__).resolve().parents[2]
CORES = len(os.sched_getaffinity(0))


def test_cores_are_shared_out_and_the_user_decides() -> None:
    assert rank_environment(1, {})["OMP_NUM_THREADS"] == str(CORES)
    assert rank_environment(4096, {})["OMP_NUM_THREADS"] == "1"
    assert rank_environment(1, {}, threads=7)["OMP_NUM_THREADS"] == "7"
    mine = {"OMP_NUM_THREADS": "3", "NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "ib0"}
    assert mine.items() <= rank_environment(1, mine, threads=7, alone=True).items()
    assert "GLOO_SOCKET_IFNAME" not in rank_environment(1, {})
    assert rank_environment(1, {}, alone=True)["GLOO_SOCKET_IFNAME"] == "lo"


def test_ranks_of_one_machine_meet_at_a_free_port_unless_one_is_named() -> None:
    assert meeting_here({"MASTER_PORT": "4000"}) == {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "4000"}
    assert meeting_here({})["MASTER_PORT"].isdecimal()


LAUNCHERS = {
    "torchrun.sh": ["--gpus", "2"],
    "deepspeed.sh": ["--gpus", "2"],
    "slurm.sbatch": [],
}


@pytest.mark.parametrize("script", LAUNCHERS)
def test_every_launcher_finds_the_same(script: str) -> None:
    sizes = {"SLURM_NTASKS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "5"} if script == "slurm.sbatch" else {}
    done = subprocess.run(
        ["bash", f"launch/{script}", *LAUNCHERS[script], "--run.dir", "x"], cwd=ROOT, check=True,
        env={"PATH": "/usr/bin:/bin", "DRY_RUN": "1", "NCCL_DEBUG": "a b$(c)"} | sizes, capture_output=True, text=True,
    )  # fmt: skip
    (line,) = (line for line in done.stdout.splitlines() if not line.startswith("#"))
    words = shlex.split(line)
    found = dict(word.split("=", 1) for word in words[: next(i for i, word in enumerate(words) if "=" not in word)])
    assert found.pop("PYTHONPATH") == str(ROOT)
    expected = rank_environment(2, {"NCCL_DEBUG": "a b$(c)"}, threads=5 if sizes else None, alone=not sizes)
    assert found == expected and DEFAULTS.keys() <= found.keys()
