"""Stopped, killed and resumed runs end as if nothing had happened: bitwise, at the same number of ranks."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed.conftest import ENVIRONMENT, ROOT, Lab, launcher, run

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

LORA = ["--lora.r", "4", "--lora.dropout", "0.2"]
BF16 = ["--model.dtype", "bfloat16"]


def deepspeed(name: str, folder: str = "ds_configs") -> list[str]:
    return ["--parallel.engine", "deepspeed", "--parallel.ds_config", f"{folder}/{name}.json"]


SETTINGS = {
    "single-full": (1, []),
    "single-lora": (1, LORA),
    "fsdp2-full": (2, ["--parallel.engine", "fsdp2"]),
    "fsdp2-lora": (2, ["--parallel.engine", "fsdp2", *LORA]),
    "zero1-full": (2, deepspeed("zero1")),
    "zero1-bf16": (2, [*deepspeed("zero1"), *BF16]),
    "zero2-lora": (2, [*deepspeed("zero2"), *LORA]),
    "zero2-offload": (2, [*deepspeed("zero2_offload", "tests/distributed"), *BF16]),
    "zero3-full": (2, deepspeed("zero3")),
    "zero3-lora": (2, [*deepspeed("zero3"), *LORA]),
    "zero3-offload": (2, [*deepspeed("zero3_offload", "tests/distributed"), *BF16]),
}
# What a clock or a process decides.
UNSTEADY = {"pairs_per_second", "tokens_per_second", "peak_memory_gib", "data_wait_fraction", "mfu"}


@pytest.fixture(scope="module")
def trained(lab: Lab) -> Lab:
    """Each setting undisturbed, and stopped after three steps and resumed by the same command."""
    for num_ranks in (1, 2):
        commands = []
        for name, (ranks, flags) in SETTINGS.items():
            if ranks == num_ranks:
                stopped = lab.command(f"stopped-{name}", *flags)
                commands += [lab.command(f"undisturbed-{name}", *flags)]
                commands += [[*stopped, "--train.stop_after_steps", "3"], stopped]
        lab.train(num_ranks, *commands)
    return lab


def steady(lab: Lab, name: str) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in UNSTEADY} for row in lab.rows(name)]


def same_weights(left: Path, right: Path) -> bool:
    (file,) = [path.name for path in left.glob("*.safetensors")]
    ours, theirs = load_file(left / file), load_file(right / file)
    return ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_stopped_and_resumed_run_equals_the_undisturbed_one_bitwise(trained: Lab, name: str) -> None:
    left, right = trained.folder / f"undisturbed-{name}", trained.folder / f"stopped-{name}"
    assert steady(trained, left.name) == steady(trained, right.name)
    assert same_weights(left / "final", right / "final")
    assert trained.status(right.name) == {
        "state": "finished",
        "step": 8,
        "exit_code": 0,
        "reason": "",
        "attempt": 2,
    }


def test_a_stop_saves_and_exits_75(lab: Lab) -> None:
    command = [*launcher(1), "train_dpo.py", *lab.command("stops"), "--train.stop_after_steps", "2"]
    done = run(command)
    assert done.returncode == 75, done.stderr
    assert lab.status("stops")["state"] == "stopped" and lab.status("stops")["step"] == 2
    assert [path.name for path in (lab.folder / "stops" / "checkpoints").iterdir()] == ["step-00000002"]
    assert run(command).returncode == 75 and lab.status("stops")["step"] == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_launcher_stops_all_ranks_at_one_step(lab: Lab, number: signal.Signals) -> None:
    name = f"signal-{number.name}"
    flags = ("--train.epochs", "2000", "--parallel.engine", "fsdp2")
    process = start(lab, name, *flags)
    wait_for_step(lab, name, 3)
    process.send_signal(number)
    assert process.wait(timeout=60) == 75
    status = lab.status(name)
    assert status["state"] == "stopped" and status["exit_code"] == 75 and status["reason"] == number.name
    assert (lab.folder / name / "checkpoints" / f"step-{status['step']:08d}" / "manifest.json").is_file()


def test_a_killed_run_resumes_from_its_checkpoint_bitwise(trained: Lab) -> None:
    flags = ("--parallel.engine", "fsdp2", "--checkpoint.every_steps", "2", "--checkpoint.keep", "1")
    process = start(trained, "killed", *flags, "--train.epochs", "2")
    wait_for_step(trained, "killed", 3)
    process.kill()
    process.wait()
    trained.train(2, trained.command("killed", *flags))
    assert same_weights(trained.folder / "undisturbed-fsdp2-full" / "final", trained.folder / "killed" / "final")
    assert steady(trained, "killed") == steady(trained, "undisturbed-fsdp2-full")


def test_a_run_killed_before_its_first_checkpoint_starts_over(trained: Lab) -> None:
    process = start(trained, "early", "--parallel.engine", "fsdp2")
    wait_for_step(trained, "early", 2)
    process.kill()
    process.wait()
    trained.train(2, trained.command("early", "--parallel.engine", "fsdp2"))
    assert steady(trained, "early") == steady(trained, "undisturbed-fsdp2-full")


def test_a_damaged_checkpoint_is_passed_over(lab: Lab) -> None:
    command = lab.command("damaged", "--checkpoint.every_steps", "2")
    lab.train(1, [*command, "--train.stop_after_steps", "4"])
    newest = lab.folder / "damaged" / "checkpoints" / "step-00000004" / "training-00000-000.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    done = run([*launcher(1), "train_dpo.py", *command])
    assert done.returncode == 0, done.stderr
    aside = "(set aside as damaged-step-00000004); resuming from step-00000002"
    assert f"training-00000-000.safetensors: missing or damaged {aside}" in done.stdout


def test_a_checkpoint_of_another_engine_is_refused(lab: Lab) -> None:
    command = lab.command("engines")
    lab.train(1, [*command, "--train.stop_after_steps", "1"])
    done = run([*launcher(1), "train_dpo.py", *command, "--parallel.engine", "fsdp2"])
    assert done.returncode == 3
    assert done.stderr.count("written by engine single, not fsdp2: set --parallel.engine single, or go on with") == 1


def start(lab: Lab, name: str, *flags: str) -> subprocess.Popen[bytes]:
    command = [*launcher(2), "train_dpo.py", *lab.command(name, *flags)]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)


def wait_for_step(lab: Lab, name: str, step: int) -> None:
    """Until metrics.jsonl speaks of the step."""
    deadline = time.monotonic() + 60
    while not (lab.folder / name / "metrics.jsonl").is_file() or len(lab.rows(name)) <= step:
        assert time.monotonic() < deadline, "the run did not get going"
        time.sleep(0.05)
