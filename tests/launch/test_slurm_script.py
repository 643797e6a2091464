"""launch/slurm.sbatch without SLURM: stand-ins for srun and scontrol; what it does after each end of a start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
# srun: notes its arguments; training does what the file `script` says.
SRUN = """#!/bin/bash
echo "$*" >>"$WORK/srun"
[[ "$*" == *launch.preflight* ]] || source "$WORK/script"
"""
SCONTROL = """#!/bin/bash
echo "$*" >>"$WORK/scontrol"
kill -TERM "$PPID"  # as SLURM ends the script
"""


class Job:
    """A run directory and the stand-ins; `start` is one start of the batch script."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run_dir = folder, folder / "a run"
        (folder / "bin").mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)

    def start(self, script: str, restart: int = 0, **environment: str) -> tuple[int, str]:
        (self.folder / "script").write_text(script)
        flags = ["--model.path", "m", "--data.train", "d", "--run.dir", str(self.run_dir)]
        slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4", "SLURM_CPUS_PER_TASK": "6"}
        if restart:
            slurm["SLURM_RESTART_COUNT"] = str(restart)
        path = f"{self.folder}/bin:{os.environ['PATH']}"
        ours = {"WORK": str(self.folder), "PATH": path, "VIRTUAL_ENV": sys.prefix, "DPO_ROOT": str(ROOT)}
        done = subprocess.run(
            ["bash", str(ROOT / "launch/slurm.sbatch"), *flags],
            cwd=self.folder, env=os.environ | slurm | ours | environment,
            capture_output=True, text=True, check=False, timeout=100,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    def write(self, state: str, attempt: int, code: int | None = None, checkpoint: int | None = None) -> str:
        """Shell text that leaves this record, as the ranks do."""
        status = {"state": state, "step": 5, "exit_code": code, "reason": "why", "attempt": attempt}
        text = f"mkdir -p '{self.run_dir}'; echo '{json.dumps(status)}' >'{self.run_dir}/status.json'\n"
        if checkpoint is not None:
            text += f"mkdir -p '{self.run_dir}/checkpoints/step-{checkpoint:08d}'\n"
        return text

    @property
    def requeues(self) -> int:
        calls = self.folder / "scontrol"
        return calls.read_text().count("requeue 7") if calls.exists() else 0


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_a_finished_run_leaves_its_flag_and_is_not_started_again(job: Job) -> None:
    code, said = job.start(job.write("finished", 1, 0))
    assert (code, job.requeues) == (0, 0)
    assert (job.run_dir / "FINISHED").exists()
    assert "finished; " in said
    assert "run directory" in said
    preflight, train = (job.folder / "srun").read_text().splitlines()
    shape = "--nodes=2 --ntasks=8 --ntasks-per-node=4 --kill-on-bad-exit=1"
    assert preflight.startswith(shape)
    assert train.startswith(f"{shape} --output={job.run_dir}/logs/slurm-7-0/rank-%t.log")
    code, said = job.start("echo must not run; exit 1", restart=1)
    assert (code, "must not run" in said, "finished before" in said) == (0, False, True)


def test_a_stopped_run_is_requeued_while_it_makes_progress(job: Job) -> None:
    assert job.start(job.write("stopped", 1, 75, checkpoint=10) + "exit 1")[0] == 75
    assert job.start(job.write("stopped", 2, 75, checkpoint=20) + "exit 143", restart=1)[0] == 75
    assert job.requeues == 2
    code, said = job.start(job.write("stopped", 3, 75) + "exit 1", restart=2)
    assert (code, job.requeues) == (75, 2)
    assert "stopped twice at the same step: not requeued" in said


def test_a_crash_is_requeued_once_without_progress(job: Job) -> None:
    assert job.start(job.write("running", 1) + "exit 137")[0] == 75
    assert job.requeues == 1
    code, said = job.start(job.write("failed", 2, 4) + "exit 137", restart=1)
    assert (code, job.requeues) == (4, 1)
    assert "failed twice without a new checkpoint" in said


def test_the_number_of_requeues_is_capped(job: Job) -> None:
    script = job.write("stopped", 1, 75, checkpoint=10)
    code, said = job.start(script, restart=3, DPO_MAX_RESTARTS="3")
    assert (code, job.requeues) == (75, 0)
    assert "restart 3 is the last of DPO_MAX_RESTARTS=3" in said


@pytest.mark.parametrize(("code", "script"), [(2, "exit 2"), (3, None)])
def test_a_refusal_is_not_requeued(job: Job, code: int, script: str | None) -> None:
    assert job.start(script or job.write("failed", 1, 3) + "exit 3")[0] == code
    assert job.requeues == 0


def test_a_signal_before_the_limit_goes_to_srun_as_usr1(job: Job) -> None:
    step = "trap 'echo got >>\"$WORK/heard\"' USR1; kill -USR1 $PPID\n"
    step += "for i in {1..50}; do sleep 0.1; [[ -e $WORK/heard ]] && break; done\n"
    assert job.start(step + job.write("stopped", 1, 75, checkpoint=3) + "exit 138")[0] == 75
    assert (job.folder / "heard").exists()
    assert job.requeues == 1


def test_after_scancel_the_job_is_not_requeued(job: Job) -> None:
    step = "trap : USR1; kill -TERM $PPID; sleep 0.5\n"
    code, said = job.start(step + job.write("stopped", 1, 75, checkpoint=3))
    assert (code, job.requeues) == (75, 0)
    assert "SIGTERM received" in said
    assert "stopped and saved" in said


def test_a_wrong_config_ends_before_anything_is_started(job: Job) -> None:
    code, said = job.start("", DPO_MAX_RESTARTS="many")
    assert (code, said) == (2, "error: DPO_MAX_RESTARTS takes a whole number, at least 0, not 'many'\n")
    job.run_dir = job.folder / "a %j run"
    code, said = job.start("")
    assert (code, "SLURM would replace the % or backslash" in said) == (2, True)
    assert not (job.folder / "srun").exists()
