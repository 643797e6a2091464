"""The shell scripts of launch/: what they would run, how they quote, and how the environment is made."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NASTY = [
    "--run.dir",
    "a b; touch hit $(touch hit) `touch hit`",
    "--data.train",
    "*.jsonl",
    "--x",
    "quote \" and '",
    "\\n",
]


def call(script: Path, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script with nothing in its environment but PATH and what is given."""
    base = {"PATH": "/usr/bin:/bin", "HOME": os.environ.get("HOME", "/")}
    command = [str(script), *args]
    return subprocess.run(command, env={**base, **environment}, capture_output=True, text=True, check=False, timeout=60)


class StubEnvironment:
    """A copy of launch/ with a virtual environment whose python only notes its arguments."""

    def __init__(self, folder: Path, exit_code: int = 0) -> None:
        self.root = folder / "repo"
        self.log = folder / "calls"
        self.venv = folder / "venv"
        shutil.copytree(ROOT / "launch", self.root / "launch", ignore=shutil.ignore_patterns("__pycache__"))
        (self.root / "requirements.txt").write_text("torch==9.9  # tensors\ndeepspeed==8.8  # ZeRO\nnumpy==7.7\n")
        (self.root / "requirements-dev.txt").write_text("-r requirements.txt\npytest==6.6\n")
        (self.venv / "bin").mkdir(parents=True)
        python = self.venv / "bin" / "python"
        python.write_text(f"#!/bin/bash\nprintf '%q ' \"$@\" >>{self.log}\necho >>{self.log}\nexit {exit_code}\n")
        python.chmod(0o755)

    def call(self, script: str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return call(self.root / "launch" / script, *args, VIRTUAL_ENV=str(self.venv), **environment)

    def calls(self) -> list[list[str]]:
        return [shlex.split(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def installs(self) -> list[str]:
        """The requirements named in each pip install, in order."""
        return [" ".join(args[5:]) for args in self.calls() if args[:3] == ["-m", "pip", "install"]]


@pytest.fixture
def stub(tmp_path: Path) -> StubEnvironment:
    return StubEnvironment(tmp_path)


def test_dry_run_needs_nothing_and_quotes_every_value() -> None:
    done = call(ROOT / "launch/local.sh", "-n", "2", *NASTY, DRY_RUN="1", OMP_NUM_THREADS="3")
    python = str(ROOT / ".venv/bin/python")
    command = [python, str(ROOT / "launch/local.py"), "-n", "2", str(ROOT / "train_dpo.py"), *NASTY]
    assert done.returncode == 0
    assert done.stderr == ""
    assert shlex.split(done.stdout) == ["OMP_NUM_THREADS=3", *command]


def test_one_process_is_plain_python_and_the_cores_are_shared_out() -> None:
    done = call(ROOT / "launch/local.sh", "--config", "x.yaml", DRY_RUN="1")
    threads, *command = shlex.split(done.stdout)
    assert command == [str(ROOT / ".venv/bin/python"), str(ROOT / "train_dpo.py"), "--config", "x.yaml"]
    assert threads == f"OMP_NUM_THREADS={len(os.sched_getaffinity(0))}"
    many = call(ROOT / "launch/local.sh", "-n", "4096", DRY_RUN="1")
    assert many.stdout.startswith("OMP_NUM_THREADS=1 ")


def test_quickstart_dry_run_passes_flags_on() -> None:
    done = call(ROOT / "launch/quickstart.sh", "--train.max_steps", "2", DRY_RUN="1")
    setup, model, train = (shlex.split(line) for line in done.stdout.splitlines())
    assert setup == [str(ROOT / "launch/setup.sh")]
    assert model[1:] == [str(ROOT / "launch/quickstart_model.py")]
    assert train[2:] == [
        str(ROOT / "train_dpo.py"), "--config", "launch/recipes/quickstart.yaml",
        "--eval.generate", "true", "--eval.checker", "data/quickstart/checkers.py:obeys", "--eval.max_new_tokens", "64",
        "--train.max_steps", "2",
    ]  # fmt: skip


@pytest.mark.parametrize("procs", ["0", "-1", "two", "", "$(id)", "1;id"])
def test_a_wrong_number_of_processes_is_refused_in_one_line(procs: str) -> None:
    done = call(ROOT / "launch/local.sh", "-n", procs)
    assert done.returncode == 2
    assert done.stderr == f"error: -n takes the number of processes, at least 1, not '{procs}'\n"


def test_values_arrive_as_they_were_typed_and_the_exit_code_comes_back(tmp_path: Path) -> None:
    stub = StubEnvironment(tmp_path, exit_code=75)
    done = stub.call("local.sh", *NASTY)
    assert done.returncode == 75
    assert stub.calls() == [[str(stub.root / "train_dpo.py"), *NASTY]]
    assert not list(tmp_path.rglob("hit"))


def test_several_ranks_are_checked_before_they_train(stub: StubEnvironment) -> None:
    launcher = [str(stub.root / "launch/local.py"), "-n", "2"]
    assert stub.call("local.sh", "-n", "2", *NASTY).returncode == 0
    assert stub.call("local.sh", "-n", "2", *NASTY, PREFLIGHT="0").returncode == 0
    trains = [*launcher, str(stub.root / "train_dpo.py"), *NASTY]
    assert stub.calls() == [[*launcher, "-m", "launch.preflight", *NASTY], trains, trains]


def test_several_ranks_do_not_start_when_preflight_fails(tmp_path: Path) -> None:
    stub = StubEnvironment(tmp_path, exit_code=2)
    assert stub.call("local.sh", "-n", "2").returncode == 2
    assert len(stub.calls()) == 1


def test_setup_installs_torch_then_deepspeed_then_the_rest(stub: StubEnvironment) -> None:
    assert stub.call("setup.sh").returncode == 0
    torch, deepspeed, rest = stub.installs()
    assert torch.startswith("torch==9.9 setuptools wheel")
    assert deepspeed == "--no-build-isolation deepspeed==8.8"
    assert rest == f"-r {stub.root}/requirements.txt"


def test_setup_with_nothing_changed_does_nothing_at_once(stub: StubEnvironment) -> None:
    stub.call("setup.sh", "--dev")
    before = stub.calls()
    seconds = []
    for options in (["--dev"], [], ["--dev"]):
        start = time.monotonic()
        assert stub.call("setup.sh", *options).returncode == 0
        seconds.append(time.monotonic() - start)
    assert stub.calls() == before
    assert min(seconds) < 0.3


def test_setup_runs_again_when_requirements_change_or_more_is_asked_for(stub: StubEnvironment) -> None:
    stub.call("setup.sh")
    assert len(stub.installs()) == 3
    stub.call("setup.sh", "--dev")
    assert stub.installs()[-1] == f"-r {stub.root}/requirements.txt -r {stub.root}/requirements-dev.txt"
    with open(stub.root / "requirements.txt", "a") as file:
        file.write("rich==5.5\n")
    stub.call("setup.sh")
    assert len(stub.installs()) == 9


def test_two_starts_at_once_install_once(stub: StubEnvironment) -> None:
    environment = {**os.environ, "VIRTUAL_ENV": str(stub.venv)}
    command = [str(stub.root / "launch/setup.sh")]
    starts = [subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [start.wait(timeout=20) for start in starts] == [0, 0]
    assert len(stub.installs()) == 3


def test_a_failed_installation_is_an_error_and_is_tried_again(tmp_path: Path) -> None:
    stub = StubEnvironment(tmp_path)
    python = stub.venv / "bin/python"
    python.write_text('#!/bin/bash\n[[ "$3" != install ]] || { echo "ERROR: No matching distribution" >&2; exit 1; }\n')
    for _ in range(2):
        done = stub.call("setup.sh")
        assert done.returncode == 2
        assert "ERROR: No matching distribution" in done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: pip could not install torch==9.9")


def test_an_interrupted_installation_goes_on(stub: StubEnvironment) -> None:
    python = stub.venv / "bin/python"
    works = python.read_text()
    python.write_text(works.replace("exit 0", '[[ "$*" != *deepspeed==8.8* ]] || sleep 60; exit 0'))
    environment = {**os.environ, "VIRTUAL_ENV": str(stub.venv)}
    setup = subprocess.Popen(
        [str(stub.root / "launch/setup.sh")], env=environment, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while len(stub.installs()) < 2:
        assert setup.poll() is None
        time.sleep(0.05)
    os.killpg(setup.pid, signal.SIGINT)
    assert setup.wait(timeout=20) != 0
    python.write_text(works)
    assert stub.call("setup.sh").returncode == 0
    assert [install.split()[0] for install in stub.installs()[2:]] == ["torch==9.9", "--no-build-isolation", "-r"]
    assert stub.call("setup.sh").returncode == 0
    assert len(stub.installs()) == 5


def test_large_downloads_are_named_with_their_size_as_they_come(tmp_path: Path) -> None:
    stub = StubEnvironment(tmp_path)
    python = stub.venv / "bin/python"
    said = (
        "Collecting torch",
        "  Downloading https://mirror.example/a/torch-9.9-cp311-linux.whl (181.2 MB)",
        "Downloading tiny-1-py3-none-any.whl (9.4 MB)",
        "Downloading small-1-py3-none-any.whl (12 kB)",
        "Downloading cuda_libraries-1.whl (1.1 GB)",
    )
    lines = "".join(f"echo '{line}'\n" for line in said)
    python.write_text(f'#!/bin/bash\n[[ "$*" == *torch==9.9* ]] || exit 0\n{lines}')
    done = stub.call("setup.sh")
    fetched = [line for line in done.stderr.splitlines() if "fetching" in line]
    assert fetched == [
        "setup:   fetching torch-9.9-cp311-linux.whl (181.2 MB)",
        "setup:   fetching cuda_libraries-1.whl (1.1 GB)",
    ]
    assert all(line in (stub.root / ".cache/setup.log").read_text() for line in said)


def test_a_python_that_the_tests_run_on_is_preferred_to_a_newer_one(stub: StubEnvironment, tmp_path: Path) -> None:
    tools = tmp_path / "pythons"
    tools.mkdir()
    for name, version in (("python3", "(3, 15)"), ("python3.13", "(3, 10)"), ("python3.12", "(3, 12)")):
        fake = f"import sys; sys.version_info = (*{version}, 0); sys.argv = sys.argv[1:]; exec(sys.stdin.read())"
        script = f'#!/bin/bash\n[[ "$1" == - ]] && exec {sys.executable} -c "{fake}" "$@"\necho "$0 $*" >&2; exit 1\n'
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    call(stub.root / "launch/setup.sh", PATH=f"{tools}:/usr/bin:/bin")
    assert "python3.12 -m venv" in (stub.root / ".cache/setup.log").read_text()


def test_a_missing_python_is_one_clear_line(stub: StubEnvironment, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "cat", "mkdir", "find", "grep", "sed", "flock"):
        path = shutil.which(name)
        assert path is not None
        (tools / name).symlink_to(path)
    done = call(stub.root / "launch/setup.sh", PATH=str(tools))
    assert done.returncode == 2
    assert done.stderr.startswith("error: no Python 3.11 or newer with the venv module was found")
    assert done.stderr.count("\n") == 1


def test_only_a_dead_build_lock_is_removed(stub: StubEnvironment, tmp_path: Path) -> None:
    extensions = tmp_path / "extensions"
    dead, held = extensions / "py311_cpu/fused_adam/lock", extensions / "py311_cpu/cpu_adam/lock"
    for lock in (dead, held):
        lock.parent.mkdir(parents=True)
        lock.touch()
    with open(held):
        done = stub.call("setup.sh", TORCH_EXTENSIONS_DIR=str(extensions))
    assert done.returncode == 0
    assert not dead.exists()
    assert held.exists()
