"""Shards are found, indexed and read exactly; what is broken is named by file and line."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_utils import line_files, table_files
from data_utils.manifest_command import describe
from data_utils.schema import DataError, RowError
from data_utils.scratch import Scratch
from data_utils.shards import ShardSet
from data_utils.sources import SourceSpec
from tests.rows import problems


def row(number: int) -> dict[str, str]:
    return {"prompt": f"prompt {number}", "chosen": f"good é {number}", "rejected": f"bad {number}"}


def jsonl(rows: list[dict]) -> bytes:
    return b"".join(json.dumps(item, ensure_ascii=False).encode() + b"\n" for item in rows)


def write(path: Path, content: bytes) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def write_parquet(path: Path, rows: list[dict], **options) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return str(path)


def prompts(shards: ShardSet) -> list:
    return [shards.pair(index).prompt for index in range(len(shards))]


def test_all_kinds_read_alike(tmp_path: Path) -> None:
    rows = [row(number) for number in range(7)]
    paths = [write(tmp_path / "a.jsonl", jsonl(rows)), write(tmp_path / "b.jsonl.gz", jsonl(rows))]
    paths.append(write_parquet(tmp_path / "c.parquet", rows, row_group_size=3))
    shards = ShardSet.open(paths)
    assert len(shards) == 21 and shards.files == paths
    assert prompts(shards) == [f"prompt {number}" for number in range(7)] * 3
    assert [shards.where(index) for index in (0, 6, 7, 20)] == [
        f"{paths[0]}:1",
        f"{paths[0]}:7",
        f"{paths[1]}:1",
        f"{paths[2]}:7",
    ]
    row_bytes = shards.row_bytes(np.arange(21))
    assert row_bytes.dtype == np.int64
    assert row_bytes[:7].tolist() == [len(jsonl([item])) - 1 for item in rows]
    assert row_bytes[14] == len("prompt 0" + "good é 0" + "bad 0") + 1


def test_bom_crlf_and_blank_lines_keep_the_line_numbers(tmp_path: Path) -> None:
    lines = [b"", jsonl([row(1)])[:-1], b"  ", jsonl([row(2)])[:-1], b"\t", b"{oops"]
    shards = ShardSet.open([write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + b"\r\n".join(lines))])
    assert len(shards) == 3 and [shards.pair(0).prompt, shards.pair(1).prompt] == ["prompt 1", "prompt 2"]
    assert [shards.where(index).rpartition(":")[2] for index in range(3)] == ["2", "4", "6"]


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (b'{"prompt": "a", "chosen": "b", "rejec', "malformed_json"),
        (b"[" * 100_000, "malformed_json"),
        (b'{"weight": ' + b"9" * 5000 + b"}", "malformed_json"),
        (b'{"prompt": "a", "chosen": "b", "chosen": "c", "rejected": "d"}', "duplicate_key"),
        (b'{"chosen": [{"role": "user", "role": "user", "content": "c"}]}', "duplicate_key"),
        (b'{"prompt": "a", "chosen": "b", "rejected": "c", "weight": NaN}', "nan_literal"),
        (b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": -Infinity}', "nan_literal"),
        (b'{"prompt": "a", "chosen": "b\xff", "rejected": "c"}', "invalid_utf8"),
        (b'{"prompt": "a", "chosen": "b\\ud800", "rejected": "c"}', "invalid_utf8"),
        (b'{"prompt": "a", "chosen": "b"}', "schema"),
        (b"17", "schema"),
    ],
)
def test_bad_lines_name_their_place_and_cause(tmp_path: Path, line: bytes, cause: str) -> None:
    path = write(tmp_path / "a.jsonl", jsonl([row(1)]) + line + b"\n" + jsonl([row(3)]))
    shards = ShardSet.open([path])
    with pytest.raises(RowError) as caught:
        shards.pair(1)
    assert caught.value.cause == cause and caught.value.where == f"{path}:2"
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)
    assert [error.where for error in problems(shards)] == [f"{path}:2"]


def test_whole_surrogate_pairs_are_text(tmp_path: Path) -> None:
    line = b'{"prompt": "a", "chosen": "\\ud83d\\ude00", "rejected": "c"}'
    assert ShardSet.open([write(tmp_path / "a.jsonl", line)]).pair(0).chosen == "\N{GRINNING FACE}"


def test_folders_and_globs_are_sorted_by_path_streamed_files_last(tmp_path: Path) -> None:
    for number, name in enumerate(["b.jsonl", "a.jsonl.gz", "sub/c.jsonl"]):
        write(tmp_path / name, jsonl([row(number)]))
    write(tmp_path / "README.txt", b"not data")
    assert prompts(ShardSet.open([str(tmp_path)])) == ["prompt 0", "prompt 2", "prompt 1"]
    assert prompts(ShardSet.open([f"{tmp_path}/b.jsonl", f"{tmp_path}/a*"])) == ["prompt 0", "prompt 1"]
    assert len(ShardSet.open([f"{tmp_path}/**/*.jsonl"])) == 2


def test_source_names_reach_the_pairs(tmp_path: Path) -> None:
    a, b = (write(tmp_path / name, jsonl([row(1)])) for name in ("a.jsonl", "b.jsonl"))
    shards = ShardSet.open([SourceSpec(a, name="ours"), b])
    assert [shards.pair(index).columns.source for index in range(2)] == ["ours", ""]


def test_all_that_is_missing_is_listed(tmp_path: Path) -> None:
    there = write(tmp_path / "a.jsonl", jsonl([row(1)]))
    gone = [str(tmp_path / "x.jsonl"), str(tmp_path / "y*.jsonl"), "s/z.jsonl.zst"]
    with pytest.raises(DataError) as caught:
        ShardSet.open([gone[0], there, *gone[1:]])
    assert all(path in str(caught.value) for path in gone) and there not in str(caught.value)


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data sources"):
        ShardSet.open([])
    with pytest.raises(DataError, match="no shards in"):
        ShardSet.open([str(tmp_path)])
    with pytest.raises(DataError, match=r"no shards in .*notes\.txt"):
        ShardSet.open([write(tmp_path / "notes.txt", b"x")])
    empty = write(tmp_path / "empty.jsonl", b"\n \n")
    with pytest.raises(DataError, match=r"empty\.jsonl: no rows"):
        ShardSet.open([write(tmp_path / "a.jsonl", jsonl([row(1)])), empty])


def test_a_shard_listed_twice_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl([row(1)]))
    os.symlink(path, tmp_path / "link.jsonl")
    for sources in ([path, path], [path, f"{tmp_path}/a*"], [path, str(tmp_path / "link.jsonl")], [str(tmp_path)]):
        with pytest.raises(DataError, match="listed twice"):
            ShardSet.open(sources)


@pytest.mark.parametrize("keep", [0.3, 0.97])
def test_truncated_gzip_names_file_and_place(tmp_path: Path, keep: float) -> None:
    rng = np.random.default_rng(0)
    content = jsonl([row(int(number)) for number in rng.integers(0, 10**15, 5000)])
    path = Path(write(tmp_path / "a.jsonl.gz", content))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: truncated or corrupt gzip near line \d+"):
        ShardSet.open([str(path)])


def test_corrupt_files_are_named(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "a.jsonl.gz", jsonl([row(number) for number in range(900)])))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    for broken in (str(path), write(tmp_path / "b.parquet", b"PAR1 no")):
        with pytest.raises(DataError, match="truncated or corrupt"):
            ShardSet.open([broken])


def test_bombs_and_endless_lines_stop_at_a_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_files, "FREE_INFLATED_BYTES", 1 << 20)
    with pytest.raises(DataError, match=r"bomb\.jsonl\.gz: .* a bomb"):
        ShardSet.open([write(tmp_path / "bomb.jsonl.gz", b" " * (4 << 20))])
    monkeypatch.setattr(line_files, "MAX_LINE_BYTES", 1000)
    with pytest.raises(DataError, match=r"long\.jsonl:2: a line of more than 1,000 bytes"):
        ShardSet.open([write(tmp_path / "long.jsonl", b"{}\n" + b"x" * 1001)])


def test_parquet_messages_and_null_columns(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hé"}]
    rows: list[dict] = [
        {"chosen": [*turns, {"role": "assistant", "content": "abc"}], "rejected": None, "weight": None},
        {"chosen": [*turns, {"role": "assistant", "content": "abcd"}], "weight": 2.0},
    ]
    rows[1]["rejected"] = [*turns, {"role": "assistant", "content": "x"}]
    shards = ShardSet.open([write_parquet(tmp_path / "a.parquet", rows)])
    assert shards.row_bytes(np.arange(2)).tolist() == [19, 20 + 17]
    assert shards.pair(1).prompt == turns and shards.pair(1).columns.weight == 2.0
    assert [(error.cause, error.where) for error in problems(shards)] == [("schema", f"{tmp_path}/a.parquet:1")]


def test_parquet_rows_in_any_order_with_a_small_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_files, "_mapped", lru_cache(2)(table_files._mapped.__wrapped__))
    path = write_parquet(tmp_path / "a.parquet", [row(number) for number in range(50)], row_group_size=4)
    shards = ShardSet.open([path])
    for index in np.random.default_rng(0).permutation(50):
        assert shards.pair(index).prompt == f"prompt {index}"


def test_parquet_without_a_column_names_the_nearest(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"prompt": "a", "chosen": "b", "reject": "c"}])
    with pytest.raises(DataError, match=r"a\.parquet: no column rejected; .* rename 'reject' to 'rejected'"):
        ShardSet.open([path])


def test_fingerprint_follows_content_and_order_not_place(tmp_path: Path) -> None:
    for name, number in (("a.jsonl", 1), ("b.jsonl", 2)):
        write(tmp_path / "one" / name, jsonl([row(number)]))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    a, b = (str(tmp_path / "one" / name) for name in ("a.jsonl", "b.jsonl"))
    whole = ShardSet.open([str(tmp_path / "one")]).fingerprint
    assert ShardSet.open([str(tmp_path / "two")]).fingerprint == whole
    assert ShardSet.open([f"{tmp_path}/two/*.jsonl"]).fingerprint == whole == ShardSet.open([a, b]).fingerprint
    assert ShardSet.open([b, a]).fingerprint != whole
    write(tmp_path / "two" / "b.jsonl", jsonl([row(3)]))
    assert ShardSet.open([str(tmp_path / "two")]).fingerprint != whole


def test_a_file_that_changes_while_it_is_open_is_refused(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "a.jsonl", jsonl([row(1), row(2)])))
    shards = ShardSet.open([str(path)])
    path.write_bytes(path.read_bytes().replace(b"prompt 1", b"prompt 9"))
    assert shards.pair(1).prompt == "prompt 2"
    with pytest.raises(DataError, match=r"a\.jsonl:1: the shard was changed \(sha256 \w{16} now, \w{16} in its index"):
        shards.pair(0)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/a.jsonl", "https://h/a.parquet", "file:///etc/passwd.jsonl"])
def test_urls_of_unknown_kinds_are_refused_without_a_request(url: str) -> None:
    with pytest.raises(DataError, match=r"is no place for shards"):
        ShardSet.open([url])


def read_or_refused(folder: Path) -> list | str:
    """All prompts, or why they cannot be read."""
    try:
        return prompts(ShardSet.open([str(folder)]))
    except DataError as error:
        return str(error)


@pytest.mark.parametrize("seed", range(12))
def test_damaged_tables_are_refused_or_read_as_they_were_but_never_crash(tmp_path: Path, seed: int) -> None:
    """The manifest knows what they held; some bits of a file mean nothing."""
    table = pa.Table.from_pylist([row(number) for number in range(40)])
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    describe(tmp_path, check=True, num_workers=1)
    rng = np.random.default_rng(seed)
    content = bytearray((tmp_path / "a.arrow").read_bytes())
    for place in rng.integers(len(content) // 3, len(content), 3):
        content[place] ^= 1 << int(rng.integers(8))
    (tmp_path / "a.arrow").write_bytes(content)
    found = read_or_refused(tmp_path)
    assert f"{tmp_path}/a.arrow" in found if isinstance(found, str) else found == [f"prompt {n}" for n in range(40)]


def test_special_files_and_strange_names_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match=r"no shards in .*pipe\.jsonl"):
        ShardSet.open([str(tmp_path)])
    (tmp_path / "pipe.jsonl").unlink()
    write(tmp_path / "a\udcff.jsonl", jsonl([row(1)]))
    with pytest.raises(DataError, match="not in UTF-8; rename the file"):
        ShardSet.open([str(tmp_path)])


def test_folders_that_are_linked_are_read_and_hidden_files_are_not(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "b.jsonl", jsonl([row(2)]))
    write(tmp_path / "data" / "a.jsonl", jsonl([row(1)]))
    write(tmp_path / "data" / "._a.jsonl", b"\0\1")
    write(tmp_path / "data" / ".ipynb_checkpoints" / "c.jsonl", jsonl([row(3)]))
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    assert prompts(ShardSet.open([str(tmp_path / "data")])) == ["prompt 1", "prompt 2"]


def test_keys_that_only_other_rows_of_a_table_have_are_absent(tmp_path: Path) -> None:
    """A column of structs has all keys in all rows; the chat template must not see them."""
    tools = [
        {"type": "function", "function": {"name": "f", "parameters": {"properties": {key: {"type": "string"}}}}}
        for key in ("a", "b")
    ]
    turns = {"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "assistant", "content": "y"}]}
    turns["rejected"] = [{"role": "assistant", "content": "n"}]
    path = write_parquet(tmp_path / "a.parquet", [turns | {"tools": [tool]} for tool in tools])
    shards = ShardSet.open([path])
    assert [shards.pair(index).tools for index in range(2)] == [(tools[0],), (tools[1],)]


def test_many_small_files_are_indexed_together(tmp_path: Path) -> None:
    """Files are indexed by the hundred; a scratch entry for each would take half a minute."""
    for number in range(1000):
        (tmp_path / f"{number:05d}.jsonl").write_bytes(jsonl([row(number)]))
    scratch = Scratch(str(tmp_path))
    assert len(ShardSet.open([str(tmp_path)], scratch)) == 1000
    assert len([entry for entry in scratch.folder.iterdir() if entry.is_dir()]) == 4
