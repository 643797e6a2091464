"""What is unpacked is unpacked once per machine, and nothing is left behind."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from data_utils.schema import DataError
from data_utils.scratch import Scratch

ROOT = Path(__file__).resolve().parents[2]

PROCESS = """
import sys, time
from pathlib import Path
from data_utils.scratch import Scratch
scratch = Scratch("shared")
def build(name, path):
    time.sleep(0.02)
    with open(sys.argv[1], "a") as built:
        built.write(name + "\\n")
    path.write_text(name)
scratch.make_all([f"entry-{number}" for number in range(8)], build)
assert all((scratch.folder / f"entry-{number}").read_text() == f"entry-{number}" for number in range(8))
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def home(tmp_path: Path) -> Path:
    return tmp_path / f"dpo-data-{os.getuid()}"


def start(tmp_path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "built.txt")]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None and process.stdout.readline() == "ready\n"


def test_many_processes_build_each_entry_once_and_the_last_one_cleans_up(tmp_path: Path) -> None:
    processes = [start(tmp_path) for _ in range(3)]
    for process in processes:
        wait_ready(process)
    assert sorted((tmp_path / "built.txt").read_text().split()) == [f"entry-{number}" for number in range(8)]
    for process in processes[1:]:
        process.communicate()
    assert len(list(home(tmp_path).iterdir())) == 1
    processes[0].communicate()
    assert list(home(tmp_path).iterdir()) == []


def test_what_a_killed_run_left_goes_with_the_next_one(tmp_path: Path) -> None:
    process = start(tmp_path)
    wait_ready(process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (left,) = home(tmp_path).iterdir()
    assert (left / "entry-3").exists()
    other = Scratch("another run")
    assert [folder.name for folder in home(tmp_path).iterdir()] == [other.folder.name]
    process = start(tmp_path)
    wait_ready(process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    same = Scratch("shared")
    assert same.folder == left and not (left / "entry-3").exists()


def test_a_folder_in_use_is_not_cleaned_up(tmp_path: Path) -> None:
    first = Scratch("one")
    entry = first.make("entry", lambda path: path.mkdir())
    second, third = Scratch("one"), Scratch("two")
    assert second.folder == first.folder != third.folder and entry.is_dir()
    first.close()
    third.close()
    assert entry.is_dir()
    second.close()
    assert not entry.exists()


def test_a_pickled_copy_does_not_keep_the_folder(tmp_path: Path) -> None:
    scratch = Scratch("one")
    copy = pickle.loads(pickle.dumps(scratch))
    assert copy.make("entry", Path.touch) == scratch.folder / "entry"
    scratch.close()
    assert not scratch.folder.exists()


def test_a_build_that_fails_leaves_nothing_and_may_be_repeated(tmp_path: Path) -> None:
    scratch = Scratch("one")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise DataError("broken")

    with pytest.raises(DataError, match="broken"):
        scratch.make("entry", fail)
    assert scratch.make("entry", Path.mkdir).is_dir()


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    scratch = Scratch("one")

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DataError, match=r"no room to unpack shards \([\d,]+ bytes free\); set TMPDIR"):
        scratch.make("entry", full)


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    home(tmp_path).mkdir(mode=0o777)
    home(tmp_path).chmod(0o777)
    with pytest.raises(DataError, match="not a folder that only you can write to"):
        Scratch("one")


def test_waiting_for_another_process_is_not_building(tmp_path: Path) -> None:
    scratch = Scratch("shared")
    since = time.monotonic()
    process = start(tmp_path)
    wait_ready(process)
    scratch.make_all([f"entry-{number}" for number in range(8)], lambda name, path: pytest.fail("built twice"))
    process.communicate()
    assert time.monotonic() - since < 30
