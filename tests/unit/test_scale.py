"""Ten million pairs start like two thousand, in little memory; and the ranks of a machine share the reading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.data_start import make_shards, measure_fresh
from data_utils import stores
from data_utils.manifest_command import describe
from data_utils.order import Order
from data_utils.reader import StepReader
from data_utils.scratch import Scratch
from data_utils.shards import ShardSet
from data_utils.tokenize import PairTokenizer
from tests.tiny import tiny_tokenizer

MILLION = 1_000_000


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_ten_million_pairs_start_at_once_and_take_little_memory(tmp_path: Path, kind: str) -> None:
    """CPU seconds, since other tests may share the machine; one shard under ten names stands for ten."""
    make_shards(tmp_path / "few", 2000, kind)
    folder = tmp_path / "many"
    make_shards(folder, MILLION, kind)
    if kind == "jsonl":
        describe(tmp_path / "few", check=False, num_workers=1)
    for number in range(1, 10):
        (folder / f"shard-{number:05d}.{kind}").hardlink_to(folder / f"shard-00000.{kind}")
    if kind == "jsonl":
        describe(folder, check=False, num_workers=2)
    few, many = measure_fresh(tmp_path / "few"), measure_fresh(folder)
    assert (few["rows"], many["rows"]) == (2000, 10 * MILLION)
    assert few["first_step_cpu_s"] < 2 and many["first_step_cpu_s"] < 2

    def grown(found: dict[str, Any]) -> float:
        return found["resident_mib_after"] - found["resident_mib_before"]

    assert (grown(many) - grown(few)) / 10 < 64


WORLD, ROWS = 4, 2000


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_each_rank_reads_its_share_of_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """An epoch of four ranks of one machine, step by step."""
    rows = [{"prompt": f"the cat {n} " * 9, "chosen": f"sat {n}", "rejected": f"mat {n}"} for n in range(ROWS)]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=20, compression="none")
    describe(tmp_path, check=False, num_workers=1)
    scratch = Scratch(str(tmp_path))
    num_read = [0] * WORLD
    original = stores.read_range

    def counted(path: str, start: int, num_bytes: int) -> bytes:
        content = original(path, start, num_bytes)
        num_read[reading.rank] += len(content)
        return content

    monkeypatch.setattr(stores, "read_range", counted)
    tokenizer = PairTokenizer(tiny_tokenizer(), 128)
    shards = [ShardSet.open([str(tmp_path)], scratch) for _ in range(WORLD)]
    order = Order(shards[0].parts, 64)
    readers = [StepReader(shards[rank], tokenizer, order, rank, WORLD, "error") for rank in range(WORLD)]
    for number in range(order.steps_per_epoch):
        for reading in readers:
            reading.read(number)
    size = path.stat().st_size
    assert 0.9 * size < sum(num_read) < size + WORLD * (1 << 16)  # a table's footer is read by every rank
    assert max(num_read) < (1.1 if kind == "jsonl" else 1.5) * size / WORLD + (1 << 16)
