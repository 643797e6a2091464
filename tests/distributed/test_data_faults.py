"""Bad data under two real ranks: every fault ends in one line and exit code 2 before the model is loaded, or is skipped
and counted."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_utils.manifest_command import describe
from tests.distributed.conftest import ENVIRONMENT, ROOT, launcher, run
from tests.tiny import tiny_model, tiny_pairs

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

ROWS = 50
"""Of each of the eight shards."""


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and 400 pairs in eight shards."""
    folder = tmp_path_factory.mktemp("faults")
    tiny_model(folder / "model", chat_template=None)
    tiny_pairs(folder / "all.jsonl", 8 * ROWS)
    lines = (folder / "all.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "data").mkdir()
    for number in range(8):
        (folder / "data" / f"shard-{number + 1}.jsonl").write_bytes(
            b"".join(lines[number * ROWS : number * ROWS + ROWS])
        )
    return folder


def lines_of(data: Path, shard: int) -> list[bytes]:
    return (data / f"shard-{shard}.jsonl").read_bytes().splitlines(keepends=True)


def set_line(line: bytes, shard: int = 5, number: int = 31) -> Callable[[Path], None]:
    """A fault: one line of a shard is another."""

    def apply(data: Path) -> None:
        lines = lines_of(data, shard)
        lines[number - 1] = line + b"\n"
        (data / f"shard-{shard}.jsonl").write_bytes(b"".join(lines))

    return apply


def set_row(row: object) -> Callable[[Path], None]:
    return set_line(json.dumps(row).encode())


def cut_last_line(data: Path) -> None:
    content = (data / "shard-8.jsonl").read_bytes()
    (data / "shard-8.jsonl").write_bytes(content[:-20])


def cut_gzip(data: Path) -> None:
    content = gzip.compress((data / "shard-3.jsonl").read_bytes())
    (data / "shard-3.jsonl").unlink()
    (data / "shard-3.jsonl.gz").write_bytes(content[:-40])


def empty_shard(data: Path) -> None:
    (data / "shard-2.jsonl").write_bytes(b"\n \n")


def bomb(data: Path) -> None:
    (data / "bomb.jsonl.gz").write_bytes(gzip.compress(b" " * (80 << 20)))


def long_line(data: Path) -> None:
    with (data / "long.jsonl").open("wb") as file:
        for _ in range(65):
            file.write(b"x" * (1 << 20))


def huge_line(data: Path) -> None:
    with (data / "huge.jsonl").open("wb") as file:
        file.truncate(1 << 30)


def few_rows(data: Path) -> None:
    for number in range(2, 9):
        (data / f"shard-{number}.jsonl").unlink()
    (data / "shard-1.jsonl").write_bytes(b"".join(lines_of(data, 1)[:7]))


def longer_than_in_manifest(data: Path) -> None:
    describe(data, check=True, num_workers=1)
    with (data / "shard-4.jsonl").open("ab") as file:
        file.write(json.dumps(PAIR).encode() + b"\n")


def missing_of_manifest(data: Path) -> None:
    describe(data, check=True, num_workers=1)
    (data / "shard-4.jsonl").unlink()
    (data / "shard-6.jsonl").unlink()


def bad_manifest_rows(data: Path) -> None:
    set_line(b"{oops")(data)
    describe(data, check=True, num_workers=1)


PAIR = {"prompt": "Say hello.", "chosen": " Hello!", "rejected": " No."}
LONG = "cat " * 300
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "malformed": (set_line(b'{"prompt": "a", "cho'), "shard-5.jsonl:31: malformed JSON at column 17"),
    "cut": (cut_last_line, "shard-8.jsonl:50: malformed JSON"),
    "cut_gzip": (cut_gzip, "shard-3.jsonl.gz: truncated or corrupt gzip near line 1"),
    "utf8": (set_line(b'{"prompt": "a\xff", "chosen": "b", "rejected": "c"}'), "shard-5.jsonl:31: not UTF-8"),
    "missing_key": (set_row({"prompt": "a", "chosen": "b"}), "shard-5.jsonl:31: no column rejected; found: prompt, ch"),
    "number": (set_row(PAIR | {"chosen": 3}), "shard-5.jsonl:31: column chosen is a number; it must be a string"),
    "null": (set_row(PAIR | {"chosen": None}), "shard-5.jsonl:31: column chosen is null"),
    "ints": (set_row(PAIR | {"chosen": [1, 2]}), "shard-5.jsonl:31: chosen, message 1 is a number"),
    "nested": (set_row(PAIR | {"chosen": {"a": 1}}), "shard-5.jsonl:31: column chosen is an object"),
    "empty": (set_row(PAIR | {"chosen": "  "}), "shard-5.jsonl:31: chosen is empty or only white space"),
    "identical": (set_row(PAIR | {"rejected": " Hello!"}), "shard-5.jsonl:31: chosen equals rejected"),
    "nan": (
        set_line(b'{"prompt": "a", "chosen": "b", "weight": NaN}'),
        "shard-5.jsonl:31: NaN is not",
    ),
    "twice": (
        set_line(b'{"prompt": "a", "chosen": "b", "chosen": "c"}'),
        "shard-5.jsonl:31: more than",
    ),
    "roles": (
        set_row({side: [{"role": "user", "content": "a"}, {"role": "user", "content": side}] for side in PAIR}),
        "shard-5.jsonl:31: the last turn of chosen is the user's; it must be the assistant's",
    ),
    "empty_shard": (empty_shard, "shard-2.jsonl: no rows; drop the empty shard or fill it"),
    "bomb": (bomb, "bomb.jsonl.gz: 81,"),
    "long_line": (long_line, "long.jsonl:1: a line of more than 67,108,864 bytes"),
    "huge_line": (huge_line, "huge.jsonl:1: a line of more than 67,108,864 bytes"),
    "few_rows": (few_rows, "fewer pairs than one global step: data.train has 7, batch.pairs_per_step is 12"),
    "manifest_size": (longer_than_in_manifest, "in the manifest (sha256 "),
    "manifest_missing": (missing_of_manifest, "shard-6.jsonl; "),
    "manifest_bad": (bad_manifest_rows, "shard-5.jsonl:31: malformed JSON"),
}


def command(clean: Path, data: Path, name: str, *flags: str) -> list[str]:
    return [
        *(*launcher(2), "train_dpo.py", "--model.path", str(clean / "model"), "--data.train", str(data)),
        *("--run.dir", str(clean / name), "--batch.pairs_per_step", "12", "--train.max_steps", "3"),
        *("--data.max_length", "64", "--log.every_steps", "1", "--log.tensorboard", "false", *flags),
    ]


@pytest.mark.parametrize("fault", REFUSED)
def test_a_fault_ends_the_run_in_one_line_before_the_model_is_loaded(clean: Path, tmp_path: Path, fault: str) -> None:
    apply, expected = REFUSED[fault]
    data = tmp_path / "data"
    shutil.copytree(clean / "data", data)
    apply(data)
    shutil.copytree(clean / "model", tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    done = run(command(clean, data, fault, "--model.path", str(tmp_path / "model")), timeout_s=150)
    assert done.returncode == 2, done.stdout + done.stderr
    error = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert expected in error and (fault == "few_rows" or str(data) in error), done.stderr
    assert "Traceback" not in done.stderr and not (clean / fault).exists()


def test_bad_rows_are_skipped_and_counted_by_cause(clean: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(clean / "data", data)
    set_line(b"{oops")(data)
    set_line(json.dumps(PAIR | {"chosen": ""}).encode(), 1, 1)(data)
    set_line(json.dumps(PAIR | {"prompt": LONG}).encode(), 2, 2)(data)
    set_line(json.dumps(PAIR | {"chosen": LONG + "a", "rejected": LONG + "b"}).encode(), 3, 3)(data)
    skip = ["--data.on_bad_row", "skip", "--log.ledger", "true", "--train.max_steps", "34"]
    done = run(command(clean, data, "skipped", *skip))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (clean / "skipped" / "metrics.jsonl").read_text().splitlines()]
    counts = {key: value for key, value in rows[-1].items() if key.startswith("skipped_rows")}
    causes = {"malformed_json": 1, "empty_response": 1, "prompt_too_long": 1, "identical": 1}
    assert counts == {"skipped_rows": 4, **{f"skipped_rows/{cause}": number for cause, number in causes.items()}}
    assert rows[-1]["pairs_seen"] == 396
    ledger = [json.loads(line) for line in (clean / "skipped" / "ledger.jsonl").read_text().splitlines()]
    trained = [pair for entry in ledger for pair in entry["pairs"]]
    bad = {f"{data}/shard-{shard}.jsonl:{number}" for shard, number in ((5, 31), (1, 1), (2, 2), (3, 3))}
    assert len(trained) == len(set(trained)) == 396 and not bad & set(trained)


def test_too_many_bad_rows_end_the_run_with_a_table(clean: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(clean / "data", data)
    for number in range(1, ROWS + 1):
        set_line(b"{oops", 5, number)(data)
        set_line(json.dumps(PAIR | {"chosen": ""}).encode(), 6, number)(data)
    done = run(command(clean, data, "too-many", "--data.on_bad_row", "skip", "--train.max_steps", "34"))
    assert done.returncode == 2
    assert "rows are bad, more than data.max_bad_fraction=0.01 allows: " in done.stderr
    assert "malformed_json " in done.stderr and "empty_response " in done.stderr


def test_a_shard_that_is_not_the_manifests_is_named_with_both_hashes_when_it_is_read(
    clean: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(clean / "data", data)
    describe(data, check=True, num_workers=1)
    edit(data / "shard-4.jsonl")
    done = run(command(clean, data, "others", "--train.max_steps", "34"))
    assert done.returncode == 2 and f"{data}/shard-4.jsonl:" in done.stderr, done.stderr
    assert re.search(r"the shard was changed \(sha256 \w{16} now, \w{16} in manifest.json\)", done.stderr)


def edit(path: Path) -> None:
    """Change texts in place; the file's size and time stamps stay."""
    status, content = path.stat(), path.read_bytes()
    path.write_bytes(content.replace(b"the", b"THE"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.read_bytes() != content and path.stat().st_size == status.st_size


def test_a_shard_edited_between_two_processes_of_a_run_is_named(clean: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(clean / "data", data)
    argv = command(clean, data, "edited")
    assert run([*argv, "--train.stop_after_steps", "1"]).returncode == 75
    edit(data / "shard-4.jsonl")
    done = run(argv)
    assert done.returncode == 2 and "shard-4.jsonl changed now" in done.stderr, done.stderr


def test_a_table_edited_between_two_processes_of_a_run_is_named_when_it_is_read(clean: Path, tmp_path: Path) -> None:
    """Its metadata, which is all that is read at the start, is as before."""
    rows = [json.loads(line) for line in (clean / "all.jsonl").read_text().splitlines()]
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=100, **plain)
    argv = command(clean, tmp_path / "a.parquet", "edited-table")
    assert run([*argv, "--train.stop_after_steps", "1"]).returncode == 75
    edit(tmp_path / "a.parquet")
    done = run(argv)
    assert done.returncode == 2 and "a.parquet:" in done.stderr, done.stderr
    assert "the shard was changed (hash " in done.stderr and "when it was recorded" in done.stderr


def test_a_shard_removed_during_the_run_stops_it_with_a_save(clean: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(clean / "data", data)
    argv = command(clean, data, "removed", "--train.max_steps", "100000", "--train.epochs", "100000")
    process = subprocess.Popen(
        argv, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (clean / "removed" / "metrics.jsonl").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    (data / "shard-7.jsonl").unlink()
    _, stderr = process.communicate(timeout=150)
    assert process.returncode == 2 and "shard-7.jsonl: " in stderr and "went away during the run" in stderr, stderr
    step = json.loads((clean / "removed" / "status.json").read_text())["step"]
    assert step >= 1 and (clean / "removed" / "checkpoints" / f"step-{step:08d}").is_dir()
