"""Which rank this process is, and what happens when the others do not come."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo.config import ConfigError
from dpo.world import environment_ranks, first_host, slurm_variables

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("environ", "ranks"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (3, 8, 1)),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, (2, 4, 0)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1, 0)),  # the batch script itself
    ],
)
def test_ranks_are_read_as_each_launcher_names_them(environ: dict[str, str], ranks: tuple[int, int, int]) -> None:
    assert environment_ranks(environ) == ranks


@pytest.mark.parametrize("environ", [{"RANK": "a", "WORLD_SIZE": "2"}, {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1"}])
def test_a_variable_that_is_no_number_is_named(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"^(RANK='a'|SLURM_NTASKS='') is no number"):
        environment_ranks(environ)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[03-05,9],login1", "gpu03"),
        ("a-b.example,c", "a-b.example"),
        ("rack[2,4-6]-ib,x", "rack2-ib"),
    ],
)
def test_the_first_host_of_a_slurm_node_list(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_a_node_list_without_hosts_is_refused() -> None:
    with pytest.raises(ConfigError, match="SLURM_JOB_NODELIST='' names no host: set MASTER_ADDR"):
        first_host("")


SRUN = {"SLURM_STEP_ID": "1", "SLURM_JOB_ID": "5001", "SLURM_STEP_NODELIST": "n[3-4]", "SLURM_JOB_NODELIST": "n[1-4]"}
TASK = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}


def test_tasks_of_plain_srun_meet_at_the_first_host_of_their_step() -> None:
    variables = slurm_variables(SRUN | TASK)
    ranks = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert variables == ranks | {"MASTER_ADDR": "n3", "MASTER_PORT": str(15000 + 5008)}
    assert slurm_variables(SRUN | TASK | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}) == ranks | {
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "1234",
    }


@pytest.mark.parametrize("environ", [SRUN | TASK | {"RANK": "0", "WORLD_SIZE": "2"}, SRUN, TASK, {}])
def test_variables_of_other_launchers_stay(environ: dict[str, str]) -> None:
    assert slurm_variables(environ) == {}


@pytest.mark.slow
def test_ranks_that_do_not_come_are_given_up_within_30_seconds() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    program = "from dpo.world import World\nWorld.start('cpu')"
    since = time.monotonic()
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert time.monotonic() - since < 45
    assert f"MASTER_ADDR=127.0.0.1 MASTER_PORT={port} WORLD_SIZE=2: the ranks did not meet" in done.stderr
