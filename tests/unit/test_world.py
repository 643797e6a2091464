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
from dpo.world import environment_ranks

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
