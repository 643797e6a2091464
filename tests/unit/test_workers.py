"""Worker processes change who makes a step, never the step; they come and go without a trace."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_utils.loader import PREFETCHED_STEPS, StepLoader
from data_utils.mixture import plain
from data_utils.order import Order
from data_utils.schema import DataError, RowError, Step
from data_utils.shards import ShardSet
from tests.unit import worker_doubles as doubles
from tests.unit.test_loader import equal, make_loader, no_thread_is_left, wait_until
from tests.unit.worker_doubles import Watched

ROOT = Path(__file__).resolve().parents[2]
IN_ORDER = Order(plain(60), pairs_per_step=5, shuffle=False)
AHEAD = 5 * (1 + PREFETCHED_STEPS + 1 + 2)  # rows of the steps taken, collated, waiting for room, and tokenized


def children() -> set[int]:
    """Processes that this one started and has not yet waited for."""
    lists = [path.read_text().split() for path in Path("/proc/self/task").glob("*/children")]
    return {int(pid) for pids in lists for pid in pids}


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = children()
    yield
    # A pool of another test's may still be on its way out.
    assert wait_until(lambda: children() <= before and no_thread_is_left())


def watched_loader(
    folder: Path,
    happening: doubles.Happening | None = None,
    *,
    on_arrival: doubles.Happening | None = None,
    bad_rows: dict[int, dict] | None = None,
    **changes,
) -> tuple[StepLoader, Watched]:
    """12 steps of 5 rows, by two workers."""
    watched = Watched(folder / "seen", happening, on_arrival)
    common = {"order": IN_ORDER, "tokenizer": watched, "num_workers": 2}
    return make_loader(folder, bad_rows, num_rows=60, **common | changes), watched


def take_all(loader: StepLoader, watched: Watched, last: int = 12) -> list[Step]:
    """All steps, of which workers make all that the loader may not yet make before they have started."""
    steps = loader.steps(0, last)
    first = next(steps)
    assert wait_until(watched.rows_of_workers)
    return [first, *steps]


def assert_undisturbed(loader: StepLoader, steps: list[Step]) -> None:
    expected = list(replace(loader, num_workers=0).steps(0, len(steps)))
    for step, same in zip(steps, expected, strict=True):
        assert (step.number, step.epoch, step.num_pairs) == (same.number, same.epoch, same.num_pairs)
        assert list(map(str, step.skipped)) == list(map(str, same.skipped))
        assert len(step.micro_batches) == len(same.micro_batches)
        assert all(map(equal, step.micro_batches, same.micro_batches))


@pytest.mark.parametrize("happening", [None, doubles.print_a_lot, doubles.refuse_torch])
def test_steps_come_in_order_and_are_those_of_no_workers(tmp_path: Path, happening: doubles.Happening | None) -> None:
    bad = {22: {"chosen": " "}, 55: {"chosen": None}, 57: {"prompt": "cat " * 99}}
    order = replace(IN_ORDER, shuffle=True)
    loader, watched = watched_loader(tmp_path, happening, bad_rows=bad, order=order, on_bad_row="skip")
    steps = take_all(loader, watched)
    assert [step.number for step in steps] == list(range(12))
    assert sum(len(step.skipped) for step in steps) == len(bad)
    made_by_workers = watched.rows_of_workers()
    assert len(made_by_workers) >= 5 * (12 - PREFETCHED_STEPS - 2) - len(bad)
    assert_undisturbed(loader, steps)


def test_workers_read_all_kinds_of_shards(tmp_path: Path) -> None:
    rows = [{"prompt": "the cat", "chosen": f" sat {n}", "rejected": f" ran {n}"} for n in range(30)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet", row_group_size=7)
    shards = ShardSet.open([str(tmp_path / "b.jsonl.gz"), str(tmp_path / "c.parquet")])
    loader, watched = watched_loader(tmp_path, shards=shards, num_workers=1)
    assert_undisturbed(loader, take_all(loader, watched))


def test_a_worker_killed_from_outside_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loader, watched = watched_loader(tmp_path, doubles.be_slow)
    before = children()
    steps = loader.steps(0, 12)
    made = [next(steps)]
    assert wait_until(watched.rows_of_workers)
    victim = next(pid for _, pid in watched.seen() if pid != watched.parent)
    assert victim in children() - before
    os.kill(victim, signal.SIGKILL)
    made += steps
    (warning,) = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(r"data worker [01] died at step \d+ \(SIGKILL\); starting another, which .* again", warning)
    assert_undisturbed(loader, made)


@pytest.mark.slow
def test_workers_killed_again_and_again_lose_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loader, watched = watched_loader(tmp_path, doubles.die_once_per_step)
    steps = take_all(loader, watched)
    deaths = [record for record in caplog.records if "SIGKILL" in record.getMessage()]
    assert len(deaths) >= 12 - PREFETCHED_STEPS - 2
    assert_undisturbed(loader, steps)


def test_two_deaths_at_a_step_are_survived(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loader, watched = watched_loader(tmp_path, doubles.die_twice_at_row_40, num_workers=1)
    steps = take_all(loader, watched)
    assert [record.getMessage().count("step 8 (SIGKILL)") for record in caplog.records] == [1, 1]
    assert_undisturbed(loader, steps)


def test_a_row_that_kills_its_reader_ends_the_run_with_its_step(tmp_path: Path) -> None:
    loader, watched = watched_loader(tmp_path, doubles.die_at_row_40)
    steps = loader.steps(0, 12)
    made = [next(steps)]
    assert wait_until(watched.rows_of_workers)
    with pytest.raises(DataError) as caught:
        made.extend(steps)
    assert [step.number for step in made] == list(range(8)) and watched.attempts_in_workers(40) == 3
    start = f"step 8 (5 rows over all ranks, the first {tmp_path}/a.jsonl:41) killed 3 data workers (SIGKILL, SIGKILL, "
    assert str(caught.value).startswith(start) and "a row that kills its reader" in str(caught.value)


def test_the_first_steps_do_not_wait_for_workers(tmp_path: Path) -> None:
    """Nor does the end, although none of them has started by then."""
    loader, watched = watched_loader(tmp_path, on_arrival=doubles.be_very_slow)
    since = time.monotonic()
    assert_undisturbed(loader, list(loader.steps(0, 12)))
    assert time.monotonic() - since < 5
    assert watched.rows_of_workers() == set()


def test_a_range_of_one_step_starts_no_worker(tmp_path: Path) -> None:
    loader, _ = watched_loader(tmp_path)
    before = children()
    (step,) = steps = [step for step in loader.steps(7, 8) if children() <= before]
    assert step.number == 7 and len(steps) == 1


def test_workers_are_ahead_but_not_without_bound(tmp_path: Path) -> None:
    loader, watched = watched_loader(tmp_path)
    steps = loader.steps(0, 12)
    next(steps)
    assert wait_until(lambda: len(watched.seen()) == AHEAD)
    time.sleep(0.3)
    assert len(watched.seen()) == AHEAD
    steps.close()


@pytest.mark.parametrize("happening", [None, doubles.be_very_slow])
def test_closing_early_ends_workers_at_once(tmp_path: Path, happening: doubles.Happening | None) -> None:
    loader, watched = watched_loader(tmp_path, happening)
    before = children()
    steps = loader.steps(0, 12)
    next(steps)
    assert wait_until(watched.rows_of_workers)
    assert len(children() - before) == 2
    since = time.monotonic()
    steps.close()
    assert time.monotonic() - since < 1


@pytest.mark.parametrize(
    ("happening", "error", "message"),
    [
        (doubles.lack_a_template, DataError, "no chat template"),
        (doubles.lose_a_file, FileNotFoundError, "No such file or directory: 'gone.jsonl'"),
        (doubles.have_a_bug, ZeroDivisionError, "a bug"),
        (doubles.raise_what_cannot_be_pickled, RuntimeError, "Odd: one and two"),
    ],
)
def test_an_error_keeps_its_type_and_leaves_its_trace_in_the_log(
    tmp_path: Path,
    happening: doubles.Happening,
    error: type[Exception],
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    loader, _ = watched_loader(tmp_path, happening, num_workers=1)
    steps = loader.steps(0, 12)
    next(steps)
    assert wait_until(lambda: caplog.records)
    with pytest.raises(error, match=message) as caught:
        list(steps)
    assert type(caught.value) is error
    assert re.match(r"data worker 0 failed:\nTraceback", caplog.messages[0])
    assert f", in {happening.__name__}\n" in caplog.messages[0]


def test_a_bad_row_surfaces_at_its_step(tmp_path: Path) -> None:
    """And of several in a step the first one in the window's order, whether parsing or tokenizing finds it."""
    bad = {42: {"prompt": "cat " * 99}, 43: {"chosen": None}}
    loader, watched = watched_loader(tmp_path, bad_rows=bad)
    steps = loader.steps(0, 12)
    made = [next(steps)]
    assert wait_until(watched.rows_of_workers)
    with pytest.raises(RowError, match=r"a\.jsonl:43: .* leave no room for a response") as caught:
        made.extend(steps)
    assert [step.number for step in made] == list(range(8)) and caught.value.cause == "prompt_too_long"


def test_a_reader_that_cannot_be_sent_is_an_error(tmp_path: Path) -> None:
    loader, watched = watched_loader(tmp_path, lambda tokenizer, indices: None)
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        for _ in loader.steps(0, 10**9):
            pass
    assert watched.rows_of_workers() == set()


def test_workers_that_cannot_start_are_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loader, _ = watched_loader(tmp_path, on_arrival=doubles.die, num_workers=1)
    with pytest.raises(DataError, match=r"data worker 0 died 3 times while it started \(exit code 7, exit code 7, "):
        for _ in loader.steps(0, 10**9):
            pass
    assert caplog.messages == ["data worker 0 died while it started (exit code 7); starting another"] * 3


def test_signals_to_the_group_do_not_end_workers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loader, watched = watched_loader(tmp_path, doubles.be_slow)
    before = children()
    steps = loader.steps(0, 12)
    made = [next(steps)]
    workers: set[int] = set()
    while len(workers) < 2:  # from their very first moment on
        workers = children() - before
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1) * 2:
        for pid in workers:
            os.kill(pid, number)
        wait_until(watched.rows_of_workers)
    made += steps
    assert {pid for _, pid in watched.seen()} - {watched.parent} <= workers
    assert not caplog.records
    assert_undisturbed(loader, made)


PARENT = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.unit import worker_doubles
from tests.unit.test_workers import AHEAD, children, wait_until, watched_loader
if __name__ == "__main__":
    loader, watched = watched_loader(Path("."), worker_doubles.{happening})
    steps = loader.steps(0, 12)
    next(steps)
    wait_until(lambda: len(watched.seen()) == AHEAD)
    print(*children(), flush=True)
    input()
"""


@pytest.mark.slow
@pytest.mark.parametrize("happening", ["refuse_torch", "be_very_slow"])
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path, happening: str) -> None:
    """Idle or busy. The parent runs outside the project's folder, which it alone has on its import path."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(root=str(ROOT), happening=happening))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(script)]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2 and all(map(is_running, workers))
        parent.kill()
        since = time.monotonic()
        assert wait_until(lambda: not any(map(is_running, workers)))
        assert time.monotonic() - since < 2


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False
