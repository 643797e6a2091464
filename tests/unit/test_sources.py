"""Sources of every kind stand for the files that they should, here and in object stores."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from data_utils import stores
from data_utils.schema import DataError
from data_utils.shards import ShardSet
from data_utils.sources import SourceSpec, find_files
from tests.rows import jsonl, row


def write_parquet(path: Path, numbers: range) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([row(number) for number in numbers]), path, row_group_size=3)


def prompts(shards: ShardSet) -> list[str]:
    return [str(shards.pair(index).prompt) for index in range(len(shards))]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that stands for the hub: datasets/owner/name/..."""
    root = tmp_path / "hub"
    (root / "datasets").mkdir(parents=True)

    class FakeHub(DirFileSystem):
        def __init__(self) -> None:
            super().__init__(path=str(root), fs=LocalFileSystem(skip_instance_cache=True), skip_instance_cache=True)

    fsspec.register_implementation("hf", FakeHub, clobber=True)
    monkeypatch.setattr(stores, "_RETRY_AFTER_S", ())
    yield root
    fsspec.register_implementation("hf", "huggingface_hub.HfFileSystem", clobber=True)


def test_the_hubs_parquet_files_of_the_split_train(hub: Path) -> None:
    repository = hub / "datasets" / "owner" / "name" / "data"
    for number in range(2):
        write_parquet(repository / f"train-0000{number}-of-00002.parquet", range(number * 5, number * 5 + 5))
    write_parquet(repository / "test-00000-of-00001.parquet", range(100, 104))
    shards = ShardSet.open(["hf://owner/name"])
    assert prompts(shards) == [f"prompt {number}" for number in range(10)]
    assert shards.where(6) == "hf://owner/name/data/train-00001-of-00002.parquet:2"
    assert len(ShardSet.open(["hf://owner/name/data/test-*.parquet"])) == 4
    assert len(ShardSet.open(["hf://datasets/owner/name/data/test-00000-of-00001.parquet"])) == 4
    assert len(ShardSet.open(["hf://owner/name/data"])) == 14


def test_the_hubs_own_conversion_stands_in_for_other_formats(hub: Path) -> None:
    (hub / "datasets" / "owner" / "name").mkdir(parents=True)
    (hub / "datasets" / "owner" / "name" / "data.csv").write_text("a,b")
    write_parquet(hub / "datasets/owner/name@refs%2Fconvert%2Fparquet/default/train/0000.parquet", range(4))
    write_parquet(hub / "datasets/owner/name@refs%2Fconvert%2Fparquet/default/test/0000.parquet", range(2))
    assert len(ShardSet.open(["hf://owner/name"])) == 4


def test_splits_that_must_be_chosen_are_listed(hub: Path) -> None:
    for split in ("train_prefs", "test_prefs"):
        write_parquet(hub / f"datasets/owner/name/data/{split}-00000-of-00001.parquet", range(4))
    with pytest.raises(DataError, match=r"hf://owner/name holds the splits test_prefs \(1 files\), train_prefs"):
        ShardSet.open(["hf://owner/name"])
    with pytest.raises(DataError, match="no such data: hf://owner/none"):
        ShardSet.open(["hf://owner/none"])


@pytest.fixture
def bucket() -> str:
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pipe("/bucket/a.jsonl", jsonl(range(5)))
    memory.pipe("/bucket/sub/b.jsonl.gz", gzip.compress(jsonl(range(5, 8))))
    return "memory://bucket"


def test_object_stores_are_read_through_fsspec(bucket: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / "c.parquet", range(8, 12))
    with pa.OSFile(str(tmp_path / "d.arrow"), "wb") as sink:
        table = pa.Table.from_pylist([row(n) for n in range(12, 14)])
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    for name in ("c.parquet", "d.arrow"):
        fsspec.filesystem("memory").pipe(f"/bucket/{name}", (tmp_path / name).read_bytes())
    shards = ShardSet.open([bucket])
    assert sorted(prompts(shards), key=lambda text: int(text.split()[1])) == [f"prompt {n}" for n in range(14)]
    assert [part.is_streamed for part in shards.parts] == [False, True]
    assert len(ShardSet.open([f"{bucket}/*.jsonl"])) == 5
    with pytest.raises(DataError, match=r"no such data: memory://bucket/none\.jsonl"):
        ShardSet.open([f"{bucket}/none.jsonl"])


def test_a_store_without_its_package_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"oss://bucket/a\.jsonl: .*ossfs"):
        ShardSet.open(["oss://bucket/a.jsonl"])


def test_names_do_not_depend_on_where_the_data_lie(tmp_path: Path) -> None:
    for folder in ("one", "two/deep"):
        (tmp_path / folder / "sub").mkdir(parents=True)
        for name in ("a.jsonl", "sub/b.jsonl.gz"):
            (tmp_path / folder / name).write_bytes(b"x")
    names = ["a.jsonl", "sub/b.jsonl.gz"]
    for source in (f"{tmp_path}/one", f"{tmp_path}/two/deep/", f"{tmp_path}/one/**/*.jsonl*"):
        assert [item.name for item in find_files([SourceSpec(source)])] == names
    assert [item.name for item in find_files([SourceSpec(f"{tmp_path}/one/a.jsonl")])] == ["a.jsonl"]


def test_sources_carry_name_beta_and_parts(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(jsonl(range(4)) + json.dumps(row(9) | {"beta": 0.7}).encode())
    a = SourceSpec(str(tmp_path / "a.jsonl"), name="ours", weight=2, cap=3, beta=0.3, loss_weight=0.5)
    shards = ShardSet.open([a, str(tmp_path / "b.jsonl")])
    assert [shards.pair(index).columns.beta for index in range(10)] == [0.3] * 4 + [0.7] + [None] * 4 + [0.7]
    assert [shards.pair(index).columns.weight for index in range(10)] == [0.5] * 5 + [None] * 5
    assert {shards.pair(index).columns.source for index in range(5)} == {"ours"}
    assert [(part.first, part.file_pairs, part.weight, part.cap) for part in shards.parts] == [
        (0, (5,), 2, 3),
        (5, (5,), 1, None),
    ]


def test_zstandard_is_read_and_checked(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    content = b"".join(json.dumps(row(int(n))).encode() + b"\n" for n in rng.integers(0, 10**15, 4000))
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    compressed = sink.getvalue().to_pybytes()
    (tmp_path / "a.jsonl.zst").write_bytes(compressed)
    assert len(ShardSet.open([str(tmp_path)])) == 4000
    (tmp_path / "a.jsonl.zst").write_bytes(compressed[: len(compressed) // 2])
    with pytest.raises(DataError, match=r"a\.jsonl\.zst: truncated or corrupt Zstandard near line \d+"):
        ShardSet.open([str(tmp_path)])
