"""What can happen to two real ranks: each fault of `dpo.faults`, one error line or none, and the weights of the
undisturbed run in the end."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from random import Random
from subprocess import CompletedProcess

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.conftest import ENVIRONMENT, ROOT, Lab, launcher, run

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

HOST = socket.gethostname()


def deepspeed(stage: int) -> list[str]:
    return ["--parallel.engine", "deepspeed", "--parallel.ds_config", f"ds_configs/zero{stage}.json"]


ENGINES = {"fsdp2": ["--parallel.engine", "fsdp2"], "zero1": deepspeed(1), "zero3": deepspeed(3)}
SAVING = ["--checkpoint.every_steps", "2", "--checkpoint.keep", "1"]


def train(lab: Lab, name: str, fault: str, *flags: str, timeout_s: float = 240) -> CompletedProcess[str]:
    """A run of two ranks with faults."""
    environment = ENVIRONMENT | {"DPO_FAULT": fault}
    command = [*launcher(2), "train_dpo.py", *lab.command(name, *flags)]
    return run(command, timeout_s, environment)


@pytest.fixture(scope="module")
def steady(lab: Lab) -> Lab:
    """The undisturbed runs."""
    lab.train(2, *(lab.command(f"calm-{name}", *flags) for name, flags in ENGINES.items()))
    return lab


def same_weights(lab: Lab, name: str, other: str) -> bool:
    ours, theirs = (load_file(lab.folder / each / "final" / "model.safetensors") for each in (name, other))
    return ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours)


def assert_resumes_as_if_undisturbed(lab: Lab, name: str, engine: str, *flags: str) -> None:
    done = train(lab, name, "", *ENGINES[engine], *flags)
    assert done.returncode == 0, done.stderr
    assert same_weights(lab, name, f"calm-{engine}")


def errors(done: CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if "error: " in line]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_rank_killed_in_the_middle_of_a_save(steady: Lab, engine: str) -> None:
    name = f"torn-{engine}"
    done = train(steady, name, "1:4:kill_in_save", *ENGINES[engine], *SAVING)
    (line,) = errors(done)
    assert done.returncode == 4
    assert line.startswith(f"error: rank 1 on {HOST} was ended by SIGKILL after step 4, and the other ranks with it; ")
    assert f"to resume: launch/local.sh -n 2 --model.path {steady.folder}/model" in line
    status = steady.status(name)
    assert (status["state"], status["step"], status["exit_code"]) == ("failed", 4, 4)
    kept = sorted(path.name for path in (steady.folder / name / "checkpoints").iterdir())
    assert kept == [".step-00000004.part", "step-00000002"]
    assert_resumes_as_if_undisturbed(steady, name, engine, *SAVING)


def test_a_loss_that_is_not_a_number_on_one_rank_is_skipped_by_all(steady: Lab) -> None:
    members = steady.folder / "nan.json"
    members.write_text(json.dumps([steady.command(f"nan-{name}", *flags, *SAVING) for name, flags in ENGINES.items()]))
    command = [*launcher(2), str(ROOT / "tests/distributed/members.py"), str(members)]
    done = run(command, 300, ENVIRONMENT | {"DPO_FAULT": "1:3:nan"})
    assert done.returncode == 0, done.stderr
    for name in ENGINES:
        rows, before = steady.training_rows(f"nan-{name}"), steady.training_rows(f"calm-{name}")
        assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1, 1, 1, 1], name
        rates = [row["learning_rate"] for row in before]
        assert [row["learning_rate"] for row in rows] == [*rates[:3], rates[2], *rates[3:-1]]
        assert rows[2]["loss"] is None and all(row["loss"] is not None for row in rows[3:])
        assert all(tensor.isfinite().all() for tensor in final(steady, f"nan-{name}").values())


def test_a_loss_that_leaps_on_one_rank_is_skipped_by_all(steady: Lab) -> None:
    flags = [*SAVING, "--train.spike_sigmas", "6"]
    members = steady.folder / "spike.json"
    commands = [steady.command(f"spike-{name}", *ENGINES[name], *flags) for name in ("fsdp2", "zero3")]
    stopped = steady.command("spike-resumed", *ENGINES["fsdp2"], *flags)
    members.write_text(json.dumps([*commands, [*stopped, "--train.stop_after_steps", "4"], stopped]))
    command = [*launcher(2), str(ROOT / "tests/distributed/members.py"), str(members)]
    done = run(command, 300, ENVIRONMENT | {"DPO_FAULT": "1:5:spike"})
    assert done.returncode == 0, done.stderr
    assert "warning: the gradient was not finite or the loss leapt (train.spike_sigmas); 1 steps skipped" in done.stdout
    calm = steady.training_rows("calm-fsdp2")
    for name in ("spike-fsdp2", "spike-zero3", "spike-resumed"):
        rows = steady.training_rows(name)
        assert [row["skipped_steps"] for row in rows] == [0, 0, 0, 0, 1, 1, 1, 1], name
        assert rows[5]["learning_rate"] == calm[4]["learning_rate"]
        assert rows[4]["loss"] > 50 * calm[4]["loss"]
    assert same_weights(steady, "spike-fsdp2", "spike-resumed")


def final(lab: Lab, name: str) -> dict[str, torch.Tensor]:
    return load_file(lab.folder / name / "final" / "model.safetensors")


def test_too_many_bad_steps_in_a_row_end_the_run(steady: Lab) -> None:
    faults = ",".join(f"1:{step}:nan" for step in range(3, 9))
    done = train(steady, "bad", faults, *ENGINES["fsdp2"], *SAVING, "--train.max_bad_steps", "3")
    assert done.returncode == 2
    (line,) = errors(done)
    assert line.startswith("error: steps 3 to 5: the gradient was not finite 3 times in a row (train.max_bad_steps): ")


def test_an_exception_is_shown_once_and_from_its_rank(steady: Lab) -> None:
    done = train(steady, "raises", "1:3:raise", *ENGINES["fsdp2"], *SAVING)
    assert done.returncode == 4
    assert done.stderr.count("[rank 1] RuntimeError: a fault on purpose\n") == 1
    assert "[rank 1] error: RuntimeError: a fault on purpose" in done.stderr
    assert "Traceback" in (steady.folder / "raises" / "logs" / "rank-00001.log").read_text()
    assert_resumes_as_if_undisturbed(steady, "raises", "fsdp2", *SAVING)


def test_a_crash_in_c_leaves_its_stacks(steady: Lab) -> None:
    done = train(steady, "crashes", "1:3:crash", *ENGINES["fsdp2"])
    log = steady.folder / "crashes" / "logs" / "rank-00001.log"
    assert done.returncode == 4
    assert f"error: rank 1 on {HOST} was ended by SIGSEGV (its stacks are in {log}) after step 2, and " in done.stderr
    assert "Fatal Python error: Segmentation fault" in log.read_text() and "in train\n" in log.read_text()


def test_an_early_exit_is_a_failure(steady: Lab) -> None:
    done = train(steady, "leaves", "1:3:exit", *ENGINES["fsdp2"])
    assert done.returncode == 4
    assert errors(done)[-1].startswith(f"error: rank 1 on {HOST} exited with code 0 after step 2, and ")


def test_the_status_is_true_when_rank_0_is_killed(steady: Lab) -> None:
    since = time.monotonic()
    done = train(steady, "headless", "0:3:kill", *ENGINES["fsdp2"])
    assert done.returncode == 4 and time.monotonic() - since < 120
    status = steady.status("headless")
    assert (status["state"], status["step"], status["exit_code"]) == ("failed", 2, 4)
    assert status["reason"].startswith(f"rank 0 on {HOST} was ended by SIGKILL after step 2, and ")


def test_a_stopped_rank_is_named_and_stacks_are_written(steady: Lab) -> None:
    done = train(steady, "hangs", "1:3:hang", *ENGINES["fsdp2"], *SAVING, "--parallel.timeout_s", "20")
    assert done.returncode == 4
    (line,) = errors(done)
    assert line.startswith(f"error: rank 1 on {HOST} is stopped (last seen in phase: ")
    assert line.endswith("stacks are in the ranks' logs; the same command resumes (parallel.timeout_s)")
    assert steady.status("hangs")["state"] == "failed" and steady.status("hangs")["reason"].startswith("rank 1 on ")
    log = (steady.folder / "hangs" / "logs" / "rank-00000.log").read_text()
    assert "most recent call first" in log and "engine" in log
    assert_resumes_as_if_undisturbed(steady, "hangs", "fsdp2", *SAVING)


def test_a_slow_rank_is_named_and_not_killed(steady: Lab) -> None:
    done = train(steady, "slow", "1:2:slow", *ENGINES["fsdp2"], "--log.every_steps", "2")
    assert done.returncode == 0, done.stderr
    assert "warning: rank 1 is slow: the others wait for it" in done.stdout and "(its phase: data)" in done.stdout


@pytest.mark.parametrize(
    ("engine", "fault"),
    [("zero1", "1:3:term,1:3:usr1"), ("zero3", "0:4:term_in_save,1:4:term_in_save"), ("fsdp2", "1:4:term_in_save")],
)
def test_a_request_to_any_rank_at_any_time_is_a_stop(steady: Lab, engine: str, fault: str) -> None:
    name = f"stop-{engine}"
    done = train(steady, name, fault, *ENGINES[engine], *SAVING, "--checkpoint.asynchronous", "true")
    assert done.returncode == 75, done.stderr
    assert errors(done) == []
    status = steady.status(name)
    newest = steady.folder / name / "checkpoints" / f"step-{status['step']:08d}"
    assert status["state"] == "stopped" and (newest / "manifest.json").is_file()
    assert_resumes_as_if_undisturbed(steady, name, engine, *SAVING, "--checkpoint.asynchronous", "true")


def test_a_full_disk_stops_the_run_or_is_told_as_configured(steady: Lab) -> None:
    done = train(steady, "full", "1:4:full_in_save", *ENGINES["fsdp2"], *SAVING)
    assert done.returncode == 3
    assert errors(done)[0].endswith("No space left on device")
    assert [path.name for path in (steady.folder / "full" / "checkpoints").iterdir()] == ["step-00000002"]
    going_on = [*SAVING, "--checkpoint.on_error", "continue", "--checkpoint.asynchronous", "true"]
    done = train(steady, "full", "0:4:full_in_save", *ENGINES["fsdp2"], *going_on)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("No space left on device; training goes on without this checkpoint") == 1
    assert same_weights(steady, "full", "calm-fsdp2")


def flip(checkpoints: Path, random: Random) -> None:
    """Damage a random file of the newest checkpoint."""
    newest = max(checkpoints.glob("step-*"))
    file = random.choice(sorted(newest.iterdir()))
    content = bytearray(file.read_bytes())
    content[random.randrange(len(content))] ^= 1
    file.write_bytes(content)


FATAL = ("kill", "raise", "exit", "term", "usr1", "kill_in_save", "full_in_save", "term_in_save")
NUM_FAULTS = 20


def test_twenty_random_faults_change_no_bit(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attempt ends by a fault some steps further on; now and then the newest checkpoint is damaged as well."""
    monkeypatch.setitem(ENVIRONMENT, "TMPDIR", str(tmp_path))
    flags = [*ENGINES["fsdp2"], "--train.epochs", "12", "--checkpoint.every_steps", "1", "--checkpoint.keep", "3"]
    flags += ["--checkpoint.asynchronous", "true"]
    lab.train(2, lab.command("unhurt", *flags))
    random, checkpoints, codes = Random(6), lab.folder / "soaked" / "checkpoints", []
    for number in range(NUM_FAULTS):
        step = lab.status("soaked")["step"] if number else 0
        kind, rank = random.choice(FATAL), random.randrange(2)
        done = train(lab, "soaked", f"{rank}:{step + random.randint(1, 2)}:{kind}", *flags)
        codes.append(done.returncode)
        expected = {"term": 75, "usr1": 75, "term_in_save": 75, "full_in_save": 3, "raise": (1, 4)}.get(kind, 4)
        assert done.returncode in (expected if isinstance(expected, tuple) else (expected,)), (kind, done.stderr)
        if number % 5 == 4:
            flip(checkpoints, random)
    done = train(lab, "soaked", "", *flags)
    assert done.returncode == 0, done.stderr
    assert same_weights(lab, "soaked", "unhurt")
    losses = [[row["loss"] for row in lab.training_rows(name)] for name in ("soaked", "unhurt")]
    assert losses[0] == losses[1] and lab.status("soaked")["attempt"] == NUM_FAULTS + 1
    assert not running(str(lab.folder / "soaked"))
    assert [path.name for path in tmp_path.glob("*/*")] == []  # of the data's scratch only its empty home is left


def running(argument: str) -> list[str]:
    """Processes with an argument in their command line."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = place.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        found += [place.parent.name] if argument in words and int(place.parent.name) != os.getpid() else []
    return found
