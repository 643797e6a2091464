"""The launchers on two real nodes: SLURM, ssh, torchrun. tests/cluster/run.sh starts the nodes and runs this.

Every disturbed run must end with the weights of an undisturbed one, bit for bit (ZeRO-3: as close as its sums allow).
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launch.signal_ranks import ranks_of
from tests.tiny import tiny_model, tiny_pairs

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = os.environ.get("DPO_TEST_CLUSTER", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.skipif(CLUSTER == "", reason="needs two cluster nodes: tests/cluster/run.sh starts them"),
]
NUM_STEPS = 120
DEADLINE_S = 400


def wait_until(what: str, ready: Callable[[], Any]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not ready():
        assert time.monotonic() < deadline, f"{what}: not within {DEADLINE_S} s"
        time.sleep(0.2)


@dataclass
class Nodes:
    """The two nodes, with a model and pairs that both see."""

    folder: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def flags(self, name: str, *flags: str) -> list[str]:
        return [
            *("--model.path", str(self.folder / "model"), "--data.train", str(self.folder / "train.jsonl")),
            *("--run.dir", str(self.folder / name), "--batch.pairs_per_step", "4", "--train.epochs", "12"),
            *("--optim.learning_rate", "1e-3", "--log.every_steps", "1", "--log.tensorboard", "false"),
            *("--checkpoint.every_steps", "10", *flags),
        ]

    @property
    def plain(self) -> Path:
        """A folder without a space in its path, from which DeepSpeed over ssh has to be started."""
        return self.folder.parent

    def start(
        self, node: str, *command: str, preflight: bool = False, cwd: Path | None = None
    ) -> subprocess.Popen[str]:
        """Start a command on a node; its output is kept. Preflight costs ten seconds of a core: few tests have it."""
        process = subprocess.Popen(
            [f"{CLUSTER}/on", node, *command],
            cwd=cwd or self.folder,
            env=os.environ | {"PREFLIGHT": str(int(preflight))},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started.append(process)
        return process

    def run(
        self, node: str, *command: str, preflight: bool = False, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        process = self.start(node, *command, preflight=preflight, cwd=cwd)
        out, _ = process.communicate(timeout=DEADLINE_S)
        self.started.remove(process)
        return subprocess.CompletedProcess(command, process.returncode, out, "")

    def status(self, name: str) -> dict[str, Any]:
        try:
            return json.loads((self.folder / name / "status.json").read_text())
        except FileNotFoundError:
            return {}

    def wait_for_step(self, name: str, step: int, attempt: int = 1) -> None:
        """Until an attempt has come so far; it must still be running then, and so must all launchers."""

        def there() -> bool:
            status = self.status(name)
            for process in self.started:
                assert process.poll() in (None, 0), process.communicate()[0]
            return status.get("attempt", 0) >= attempt and status["step"] >= step

        wait_until(f"step {step} of {name}", there)
        assert self.status(name)["state"] == "running"

    def weights(self, name: str) -> str:
        """Hash of the final weights."""
        return hashlib.sha256((self.folder / name / "final/model.safetensors").read_bytes()).hexdigest()

    def end_all(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.kill()
        self.started.clear()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Nodes:
    folder = tmp_path_factory.mktemp("shared folder")
    tiny_model(folder / "model")
    tiny_pairs(folder / "train.jsonl", 40, columns=True)
    found = Nodes(folder)
    command = [sys.executable, str(ROOT / "launch/local.py"), "-n", "2", str(ROOT / "train_dpo.py")]
    done = subprocess.run([*command, *found.flags("undisturbed")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return found


@pytest.fixture(autouse=True)
def _nothing_runs_on(nodes: Nodes) -> Iterator[None]:
    yield
    nodes.end_all()


def submit(nodes: Nodes, name: str, *options: str, preflight: bool = False) -> str:
    """Submit a job through submit.sh; returns its number."""
    options = ("--nodes", "2", "--gpus", "1", "--cpus-per-task", "2", "--mem", "64G", "--time", "10", *options)
    done = nodes.run("n1", str(ROOT / "launch/submit.sh"), *options, *nodes.flags(name), preflight=preflight)
    assert done.returncode == 0, done.stdout
    return done.stdout.split()[-1]


def job_state(nodes: Nodes, job: str) -> str:
    shown = nodes.run("n1", "scontrol", "show", "job", job).stdout
    return shown.partition("JobState=")[2].split()[0]


def test_slurm_signal_requeue_preemption_resume_finish(nodes: Nodes) -> None:
    job = submit(nodes, "slurm", preflight=True)
    nodes.wait_for_step("slurm", 25)
    # What SLURM sends to the batch script before the time limit.
    nodes.run("n1", "scancel", "--batch", "--signal=USR1", job)
    wait_until("the stop", lambda: nodes.status("slurm")["state"] == "stopped")
    stopped = nodes.status("slurm")
    assert (stopped["exit_code"], stopped["reason"], stopped["attempt"]) == (75, "SIGUSR1", 1)
    nodes.wait_for_step("slurm", stopped["step"] + 10, attempt=2)  # requeued by itself
    nodes.run("n1", "scontrol", "requeue", job)  # preemption: TERM to all, and SLURM requeues
    nodes.wait_for_step("slurm", stopped["step"] + 15, attempt=3)
    wait_until("the end", lambda: job_state(nodes, job) == "COMPLETED")
    assert nodes.status("slurm") == {"state": "finished", "step": NUM_STEPS, "exit_code": 0, "reason": "", "attempt": 3}
    assert (nodes.folder / "slurm/FINISHED").exists()
    assert nodes.weights("slurm") == nodes.weights("undisturbed")
    logs = nodes.folder / "slurm/logs"
    assert all((logs / f"slurm-{job}-{restart}/rank-{rank}.log").exists() for restart in (0, 1, 2) for rank in (0, 1))
    told = (nodes.folder / f"slurm-dpo-{job}.out").read_text()
    assert "restart 0: stopped and saved; requeued" in told
    assert "restart 2: finished" in told
    assert "preflight of 2 ranks" in told


def test_slurm_gives_up_at_the_cap_of_restarts(nodes: Nodes) -> None:
    job = submit(nodes, "capped", "--max-restarts", "0")
    nodes.wait_for_step("capped", 5)
    nodes.run("n1", "scancel", "--batch", "--signal=USR1", job)
    wait_until("the end", lambda: job_state(nodes, job) not in ("RUNNING", "COMPLETING"))
    assert job_state(nodes, job) == "FAILED"  # it is not done, and says so
    assert nodes.status("capped")["state"] == "stopped"
    told = (nodes.folder / f"slurm-dpo-{job}.out").read_text()
    assert "not requeued: restart 0 is the last of DPO_MAX_RESTARTS=0" in told


def test_plain_srun_with_one_task_per_rank(nodes: Nodes) -> None:
    command = ["srun", "-N2", "-n2", "-t5", sys.executable, str(ROOT / "train_dpo.py")]
    done = nodes.run("n1", *command, *nodes.flags("srun"))
    assert done.returncode == 0, done.stdout
    assert nodes.weights("srun") == nodes.weights("undisturbed")


ZERO3 = ["--parallel.engine", "deepspeed", "--parallel.ds_config", str(ROOT / "ds_configs/zero3.json")]


def test_deepspeed_over_ssh_stops_on_request_and_plain_deepspeed_resumes(nodes: Nodes) -> None:
    strange = 'zero3 $(touch hit) `touch hit` %h; it\'s "q"'
    flags = nodes.flags(strange, *ZERO3)
    command = [str(ROOT / "launch/deepspeed.sh"), "--hostfile", f"{CLUSTER}/hostfile"]
    refused = nodes.run("n1", *command, *flags)
    assert (refused.returncode, "pdsh needs a path of letters" in refused.stdout) == (2, True)
    launcher = nodes.start("n1", *command, *flags, cwd=nodes.plain)
    nodes.wait_for_step(strange, 10)
    # DeepSpeed's launcher on n2 never hears of it; the ranks agree.
    wrapper = next(pid for pid in descendants(launcher.pid) if "deepspeed.sh" in command_line(pid))
    os.kill(wrapper, signal.SIGTERM)
    out, _ = launcher.communicate(timeout=DEADLINE_S)
    assert (launcher.returncode, nodes.status(strange)["state"]) == (75, "stopped"), out
    assert not [*nodes.plain.glob("hit*"), *Path.home().glob("hit*")]
    # As people type it; the port is another job's default.
    plain = nodes.flags("plain", *ZERO3)
    os.rename(nodes.folder / strange, nodes.folder / "plain")
    command = ["deepspeed", "--hostfile", f"{CLUSTER}/hostfile", str(ROOT / "train_dpo.py")]
    done = nodes.run("n1", *command, *plain, cwd=nodes.plain)
    assert nodes.status("plain")["state"] == "finished", done.stdout
    ours = load_file(nodes.folder / "plain/final/model.safetensors")
    reference = load_file(nodes.folder / "undisturbed/final/model.safetensors")
    assert max((ours[name] - reference[name]).abs().max().item() for name in reference) < 1e-4
    assert ours.keys() == reference.keys()
    assert all(torch.isfinite(tensor).all() for tensor in ours.values())


def test_deepspeed_without_ssh_started_on_each_node(nodes: Nodes) -> None:
    command = [str(ROOT / "launch/deepspeed.sh"), "--nodes", "2", "--gpus", "1", "--master", "n1:29700"]
    started = [
        nodes.start(node, *command, "--node-rank", str(rank), *nodes.flags("no ssh"), preflight=True)
        for rank, node in enumerate(("n1", "n2"))
    ]
    outputs = [process.communicate(timeout=DEADLINE_S)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert nodes.weights("no ssh") == nodes.weights("undisturbed")


def test_torchrun_with_two_agents_of_which_one_is_killed(nodes: Nodes) -> None:
    command = [str(ROOT / "launch/torchrun.sh"), "--nodes", "2", "--gpus", "1", "--master", "n1:29600"]
    started = [nodes.start(node, *command, *nodes.flags("torchrun")) for node in ("n1", "n2")]
    nodes.wait_for_step("torchrun", 25)
    agents = [pid for pid in descendants(started[1].pid) if "torch.distributed.run" in command_line(pid)]
    os.kill(agents[0], signal.SIGKILL)
    outputs = [process.communicate(timeout=DEADLINE_S)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert nodes.status("torchrun")["attempt"] == 2, outputs
    assert nodes.weights("torchrun") == nodes.weights("undisturbed")


def test_torchrun_stops_on_both_nodes_when_one_is_asked(nodes: Nodes) -> None:
    command = [str(ROOT / "launch/torchrun.sh"), "--nodes", "2", "--gpus", "1", "--master", "n1:29610"]
    started = [nodes.start(node, *command, *nodes.flags("asked")) for node in ("n1", "n2")]
    nodes.wait_for_step("asked", 5)
    wrapper = next(pid for pid in descendants(started[1].pid) if "torchrun.sh" in command_line(pid))
    os.kill(wrapper, signal.SIGTERM)
    outputs = [process.communicate(timeout=DEADLINE_S)[0] for process in started]
    assert [process.returncode for process in started] == [75, 75], outputs
    assert nodes.status("asked")["state"] == "stopped"


def test_an_unreachable_host_is_one_line_within_30_seconds(nodes: Nodes) -> None:
    hosts = nodes.folder / "hosts"
    hosts.write_text("n1 slots=1\nn9 slots=1\n")
    since = time.monotonic()
    done = nodes.run(
        "n1", str(ROOT / "launch/deepspeed.sh"), "--hostfile", str(hosts), *nodes.flags("nowhere"), cwd=nodes.plain
    )
    assert time.monotonic() - since < 30
    assert done.returncode == 4
    assert done.stdout.splitlines()[-1].startswith("error: host n9 cannot be reached by ssh without a password")
    assert not (nodes.folder / "nowhere").exists()


def test_a_node_that_does_not_come_is_named_by_preflight(nodes: Nodes) -> None:
    since = time.monotonic()
    command = ["launch/deepspeed.sh", "--nodes", "2", "--gpus", "1", "--master", "n1:29720", "--node-rank", "0"]
    done = nodes.run("n1", str(ROOT / command[0]), *command[1:], *nodes.flags("alone"), preflight=True)
    assert time.monotonic() - since < 120  # of which 30 s wait for the other node
    assert done.returncode == 2, done.stdout
    assert "error: preflight: ranks 1 did not come within 30 s" in done.stdout
    assert not (nodes.folder / "alone").exists()


def test_no_rank_is_left(nodes: Nodes) -> None:
    left = [
        pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if str(nodes.folder) in command_line(pid)
    ]
    assert left == []
    assert ranks_of("slurm-1") == []


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def descendants(pid: int) -> list[int]:
    """Every process under this one, nearest first; the process itself is the first."""
    found = [pid]
    for parent in found:
        try:
            tasks = Path(f"/proc/{parent}/task").iterdir()
            found += [int(child) for task in tasks for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return found
