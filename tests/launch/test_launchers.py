"""torchrun.sh, deepspeed.sh and submit.sh without hosts or hardware: what they would run, and what they refuse."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.test_scripts import NASTY

ROOT = Path(__file__).resolve().parents[2]
TRAINER = str(ROOT / "train_dpo.py")


def dry(script: str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A launcher with DRY_RUN=1 and next to nothing in its environment."""
    base = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "DRY_RUN": "1"}
    command = ["bash", str(ROOT / "launch" / script), *args]
    return subprocess.run(command, env=base | environment, capture_output=True, text=True, check=False, timeout=60)


def commands(script: str, *args: str, **environment: str) -> list[list[str]]:
    """The words of each command that a dry run prints."""
    done = dry(script, *args, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    return [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]


def after(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def flags_of(words: list[str]) -> list[str]:
    return words[words.index(TRAINER) + 1 :]


def test_torchrun_prints_the_same_command_for_every_node() -> None:
    found = commands("torchrun.sh", "--nodes", "3", "--gpus", "8", "--master", "head.cluster:4000", *NASTY)
    assert len(found) == 3
    assert found[0] == found[1] == found[2]
    words = found[0]
    assert [after(words, flag) for flag in ("--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint")] == [
        "3", "8", "c10d", "head.cluster:4000",
    ]  # fmt: skip
    assert after(words, "--max-restarts") == "0"
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in words
    assert flags_of(words) == NASTY


def test_torchrun_on_one_node_needs_no_address_and_takes_a_free_port() -> None:
    (words,) = commands("torchrun.sh", "--gpus", "2", "--config", "x.yaml")
    assert after(words, "--rdzv-endpoint") == "localhost:0"
    assert flags_of(words) == ["--config", "x.yaml"]


def test_deepspeed_without_ssh_prints_one_command_per_node() -> None:
    found = commands("deepspeed.sh", "--nodes", "4", "--gpus", "8", "--master", "n0:5000", *NASTY)
    assert [after(words, "--node_rank") for words in found] == ["0", "1", "2", "3"]
    for words in found:
        assert "--no_ssh" in words
        assert (after(words, "--master_addr"), after(words, "--master_port")) == ("n0", "5000")
        assert flags_of(words) == NASTY


def test_deepspeed_on_one_node() -> None:
    (words,) = commands("deepspeed.sh", "--gpus", "4", *NASTY)
    assert (after(words, "--num_gpus"), after(words, "--master_port")) == ("4", "29500")
    assert flags_of(words) == NASTY


def hostfile(folder: Path, text: str) -> str:
    path = folder / "hostfile"
    path.write_text(text)
    return str(path)


def test_deepspeed_over_ssh_is_one_command_with_words_quoted_for_the_remote_shell(tmp_path: Path) -> None:
    hosts = hostfile(tmp_path, "# two nodes\nn1 slots=2\n\n  n2.lan slots=2 # second\n")
    (words,) = commands("deepspeed.sh", "--hostfile", hosts, "--run.dir", "$(id)", "--x", "a $(id) `id` b")
    assert after(words, "--master_addr") == "n1"
    assert flags_of(words) == ["--run.dir", "'$(id)'", "--x", "a \\$(id) \\`id\\` b"]


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("n1\n", ":1: 'n1' is not `HOST slots=GPUS`"),
        ("n1 slots=two\n", ":1: slots takes a whole number, at least 1, not 'two'"),
        ("n1 slots=0\n", ":1: slots takes a whole number"),
        ("n1 slots=8\nn2 slots=4\n", ":2: 4 slots, but 8 before: every node needs as many"),
        ("n1 slots=8\nn1 slots=8\n", ":2: host n1 is listed twice"),
        ("-oProxyCommand=id slots=8\n", ":1: '-oProxyCommand=id' is no host name"),
        ("$(id) slots=8\n", ":1: '$(id)' is no host name"),
        ("a;id slots=8\n", ":1: 'a;id' is no host name"),
        ("n1 slots=8 extra\n", "is not `HOST slots=GPUS`"),
        ("# nothing\n", "names no host"),
    ],
)
def test_a_wrong_hostfile_is_refused_with_its_line(tmp_path: Path, text: str, refusal: str) -> None:
    done = dry("deepspeed.sh", "--hostfile", hostfile(tmp_path, text))
    assert done.returncode == 2
    assert refusal in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "refusal"),
    [
        ("torchrun.sh --gpus 2 --nodes 2", "--nodes 2 needs --master HOST[:PORT]"),
        ("torchrun.sh --config x.yaml", "--gpus takes a whole number, at least 1, not 'missing'"),
        ("torchrun.sh --gpus", "--gpus takes a whole number"),
        ("torchrun.sh --gpus 08", "--gpus takes a whole number, at least 1, not '08'"),
        ("torchrun.sh --gpus 2 --master -x:1", "--master: '-x' is no host name"),
        ("torchrun.sh --gpus 2 --master a:b:c", "--master: port 'b:c' is not in 1024 ... 65534"),
        ("torchrun.sh --gpus 2 --master a:80", "port '80' is not in"),
        ("torchrun.sh --gpus 2 --restarts -1", "--restarts takes a whole number, at least 0, not '-1'"),
        ("deepspeed.sh --nodes 2 --gpus 2", "needs --hostfile FILE, or --master HOST[:PORT] and --node-rank R"),
        ("deepspeed.sh --nodes 2 --gpus 2 --master a --node-rank 2", "--node-rank 2: the nodes are 0 to 1"),
        ("deepspeed.sh --gpus 2 --node-rank 0", "--node-rank belongs to --nodes and --master"),
        ("deepspeed.sh --hostfile /nope", "--hostfile '/nope': no such file"),
        ("submit.sh --nodes 0", "argument --nodes: '0' is no whole number"),
        ("submit.sh --partition --time=1", "argument --partition: expected one argument"),
        ("submit.sh --partition=-x", "argument --partition: '-x' is no name"),
        ("submit.sh --job-name=$(id)", "argument --job-name: '$(id)' is no name"),
        ("submit.sh --time tomorrow", "argument --time: 'tomorrow' is no time limit such as 24:00:00"),
        ("submit.sh --partitoin gpu", "unrecognized arguments: --partitoin gpu"),
        ("submit.sh --cluster /nope.yaml", "--cluster /nope.yaml: No such file"),
    ],
)
def test_wrong_options_are_refused_in_one_line(command: str, refusal: str) -> None:
    script, *args = command.split()
    done = dry(script, *args, PATH=os.environ["PATH"])
    assert (done.returncode, done.stdout) == (2, "")
    assert refusal in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("word", ["a\nb", "a\rb"])
def test_a_line_break_is_quoted_exactly_or_refused(tmp_path: Path, word: str) -> None:
    """pdsh cannot carry it; the other ways do."""
    hosts = hostfile(tmp_path, "n1 slots=2\n")
    for dry_run in ("1", "0"):
        done = dry("deepspeed.sh", "--hostfile", hosts, "--run.dir", word, DRY_RUN=dry_run, VIRTUAL_ENV=sys.prefix)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: a flag with a line break cannot be passed through ssh: $'a")
        assert done.stderr.count("\n") == 1
    for script in ("torchrun.sh", "deepspeed.sh"):
        line = dry(script, "--gpus", "2", "--run.dir", word, "--x", "-y z").stdout.split(TRAINER)[1]
        again = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True)
        assert again.stdout.decode().split("\0")[:-1] == ["--run.dir", word, "--x", "-y z"]


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh", "submit.sh"])
def test_help_shows_how_to_call_it(script: str) -> None:
    done = dry(script, "--help", PATH=os.environ["PATH"])
    assert (done.returncode, done.stderr) == (0, "")
    assert f"launch/{script} --" in done.stdout
    assert "--gpus" in done.stdout


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
@pytest.mark.parametrize(("flag", "said"), [("--no.such", "unknown flag '--no.such'"), ("--config", "no-such.yaml")])
def test_a_wrong_config_is_one_line_before_anything_is_started(script: str, flag: str, said: str) -> None:
    done = dry(script, "--gpus", "2", flag, "no-such.yaml", DRY_RUN="0", VIRTUAL_ENV=sys.prefix)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
def test_a_master_that_does_not_exist_is_one_line_at_once(script: str) -> None:
    options = ["--nodes", "2", "--gpus", "1", "--master", "no-such-host.invalid"]
    options += ["--node-rank", "0"] if script == "deepspeed.sh" else []
    done = dry(script, *options, DRY_RUN="0", VIRTUAL_ENV=sys.prefix)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --master: host no-such-host.invalid does not resolve")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["job\nname", "a b", "$(touch hit)", "-J", "'x'", ""])
def test_names_with_anything_strange_are_refused(name: str) -> None:
    done = dry("submit.sh", f"--job-name={name}", PATH=os.environ["PATH"])
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_submit_prints_what_it_would_submit_and_what_the_job_would_run() -> None:
    options = "--nodes 4 --gpus 8 --partition gpu --account proj-7 --time 2-00:00:00 --max-restarts 5".split()
    sbatch, srun = commands("submit.sh", *options, *NASTY, PATH=os.environ["PATH"])
    assert sbatch[:2] == [f"DPO_ROOT={ROOT}", "DPO_MAX_RESTARTS=5"]
    wanted = (
        "--nodes=4 --ntasks-per-node=8 --gres=gpu:8 --partition=gpu --account=proj-7 --time=2-00:00:00 "
        "--cpus-per-task=8 --signal=B:USR1@300"
    )
    assert set(wanted.split()) <= set(sbatch)
    assert sbatch[sbatch.index(str(ROOT / "launch/slurm.sbatch")) + 1 :] == NASTY
    assert {"srun", "--nodes=4", "--ntasks=32", "--ntasks-per-node=8", "--kill-on-bad-exit=1"} <= set(srun)
    assert flags_of(srun) == NASTY


def test_submit_reads_a_cluster_file_and_the_command_line_wins(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("partition: gpu\nnodes: 2\ngpus: 4\ncpus_per_task: 12\ncontainer: /images/my image.sif\n")
    sbatch, srun = commands("submit.sh", "--cluster", str(path), "--nodes", "3", PATH=os.environ["PATH"])
    assert {"--partition=gpu", "--nodes=3", "--gres=gpu:4", "--cpus-per-task=12"} <= set(sbatch)
    assert "DPO_CONTAINER=/images/my image.sif" in sbatch
    at = srun.index("apptainer")
    assert srun[at:] == ["apptainer", "exec", "--nv", "--bind", str(ROOT), "/images/my image.sif", "python", TRAINER]
    path.write_text("partition: gpu\nnoodles: 2\n")
    done = dry("submit.sh", "--cluster", str(path), PATH=os.environ["PATH"])
    assert "unknown option 'noodles': one of account" in done.stderr


def test_an_image_of_a_registry_goes_to_pyxis() -> None:
    _, srun = commands("submit.sh", "--container", "nvcr.io#nvidia/pytorch:26.01-py3", PATH=os.environ["PATH"])
    assert "--container-image=nvcr.io#nvidia/pytorch:26.01-py3" in srun
    assert srun[-2:] == ["python", TRAINER]
