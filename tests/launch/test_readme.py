"""Every command that README.md and launch/README.md show in a bash block is one that works.

Launchers are run with DRY_RUN=1, and the training command they print, like one that README.md shows itself, is handed
to train_dpo.py with --print-config: unknown flags, missing recipes and wrong values fail here. Modules are asked for
--help.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
SHOWN = [README, ROOT / "launch/README.md"]
# What a test cannot run here, and where it is covered.
COVERED = {
    "git": "CI starts from a clone",
    "cd": "CI starts from a clone",
    "tests/run.sh": ".ci/run calls it, and so runs this test",
    "pip": "launch/setup.sh installs the same files",
}


def commands(markdown: str) -> list[str]:
    """The command lines of all bash blocks, continuation lines joined, comments dropped."""
    blocks = re.findall(r"^ *```(?:bash|sh|console)\n(.*?)^ *```", markdown, flags=re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    parsed = [shlex.join(shlex.split(line, comments=True)) for line in lines]
    return list(dict.fromkeys(line for line in parsed if line))


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_training(arguments: list[str]) -> None:
    run(sys.executable, "train_dpo.py", *arguments, "--print-config")


def with_hostfile(words: list[str]) -> list[str]:
    """The command with a file of hosts that is there in place of the reader's own."""
    if "--hostfile" not in words:
        return words
    with tempfile.NamedTemporaryFile("w", suffix=".hosts", delete=False) as hosts:
        hosts.write("node1 slots=8\nnode2 slots=8\n")
    place = words.index("--hostfile") + 1
    return [*words[:place], hosts.name, *words[place + 1 :]]


def check_command(command: str) -> None:
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=.*", word)]
    if words[0] in COVERED:
        return
    if words[0].startswith("launch/"):
        printed = shlex.split(run(*with_hostfile(words), DRY_RUN="1"))
        trainer = [index for index, word in enumerate(printed) if word.endswith("train_dpo.py")]
        check_training(printed[trainer[-1] + 1 :])
    elif words[1] == "-m":
        assert "usage" in run(sys.executable, "-m", words[2], "--help")
    else:
        assert words[1] == "train_dpo.py", f"no test covers this command of README.md: {command}"
        check_training(words[2:])


def test_readme_shows_the_two_commands() -> None:
    shown = commands(README.read_text(encoding="utf-8"))
    assert "launch/quickstart.sh" in shown
    assert "tests/run.sh" in shown


@pytest.mark.parametrize("command", [line for path in SHOWN for line in commands(path.read_text(encoding="utf-8"))])
def test_a_command_of_the_readme_works(command: str) -> None:
    check_command(command)


@pytest.mark.parametrize("command", ["launch/local.sh --no.such_flag 1", "python other.py", "launch/none.sh"])
def test_a_command_that_does_not_work_is_noticed(command: str) -> None:
    with pytest.raises((AssertionError, FileNotFoundError)):
        check_command(command)


def test_commands_are_read_from_bash_blocks_only() -> None:
    text = "```bash\na --x \\\n  1  # why\n# note\nb 'c d'\n```\ntext\n```\nother\n```\n  ```bash\n  a --x 1\n  ```\n"
    assert commands(text) == ["a --x 1", "b 'c d'"]
