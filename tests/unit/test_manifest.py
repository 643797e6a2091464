"""A manifest is believed about places, never about content, and names only files of its own folder."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_utils import stores
from data_utils.manifest_command import describe, main
from data_utils.schema import DataError
from data_utils.shards import ShardSet
from tests.rows import jsonl, row


def stored(content: bytes) -> bytes:
    """A gzip file of a size that does not depend on the content."""
    return gzip.compress(content, compresslevel=0, mtime=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four shards of ten rows, one of each kind."""
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(jsonl(range(10)))
    (folder / "sub" / "b.jsonl.gz").write_bytes(stored(jsonl(range(10, 20))))
    pq.write_table(pa.Table.from_pylist([row(n) for n in range(20, 30)]), folder / "c.parquet", row_group_size=4)
    with pa.OSFile(str(folder / "d.arrow"), "wb") as sink:
        table = pa.Table.from_pylist([row(n) for n in range(30, 40)])
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    return folder


def prompts(shards: ShardSet) -> list[str]:
    return sorted(str(shards.pair(index).prompt) for index in range(len(shards)))


def edit(path: Path, old: bytes, new: bytes) -> None:
    """Change a file in place, with its size and time stamps as they were."""
    status = path.stat()
    content = path.read_bytes()
    assert old in content and len(old) == len(new)
    path.write_bytes(content.replace(old, new))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_with_and_without_a_manifest_the_data_are_the_same(folder: Path) -> None:
    before = ShardSet.open([str(folder)])
    describe(folder, check=True, num_workers=1)
    after = ShardSet.open([str(folder)])
    assert prompts(before) == prompts(after) == sorted(f"prompt {number}" for number in range(40))
    everything = np.arange(40)
    assert before.row_bytes(everything).tolist() == after.row_bytes(everything).tolist()
    assert before.fingerprint == after.fingerprint == ShardSet.open([str(folder / "manifest.json")]).fingerprint
    assert [before.where(index) for index in range(40)] == [after.where(index) for index in range(40)]
    assert len(before.unchecked()) == 4 and after.unchecked() == []


def test_the_command_counts_bad_rows_and_says_where(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (folder / "a.jsonl").open("ab") as file:
        file.write(b'{"prompt": "x", "chosen": "", "rejected": "y"}\n{oops\n')
    summary = folder.parent / "summary.json"
    assert main([str(folder), "--workers", "1", "--json", str(summary)]) == 1
    printed = capsys.readouterr().out
    assert "4 shards, 42 rows" in printed and f"{folder}/a.jsonl:11: chosen is empty" in printed
    assert json.loads(summary.read_text())["bad"] == {"empty_response": 1, "malformed_json": 1}
    causes, first = ShardSet.open([str(folder)]).bad_rows()
    assert causes == {"empty_response": 1, "malformed_json": 1} and first.startswith(f"{folder}/a.jsonl:11")


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    assert main([str(tmp_path), "--workers", "1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "no shards in" in lines[0] and "a.parquet: truncated or corrupt Parquet" in lines[1]
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize(
    ("name", "old", "new", "place"),
    [
        ("a.jsonl", b"good 3", b"evil 3", r"a\.jsonl:4: .*sha256 \w{16} now, \w{16} in manifest\.json"),
        ("c.parquet", b"good 25", b"evil 25", r"c\.parquet:5-8: .*hash \w{32} now, \w{32} when"),
        ("d.arrow", b"good 35", b"evil 35", r"d\.arrow:\d+-\d+: .*hash \w{32} now, \w{32} when"),
    ],
)
def test_a_shard_edited_in_place_is_named_when_it_is_read(
    folder: Path, name: str, old: bytes, new: bytes, place: str
) -> None:
    pq.write_table(
        pa.Table.from_pylist([row(n) for n in range(20, 30)]),
        folder / "c.parquet",
        row_group_size=4,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
    )
    describe(folder, check=True, num_workers=1)
    edit(folder / name, old, new)
    shards = ShardSet.open([str(folder)])
    with pytest.raises(DataError, match=place):
        prompts(shards)


def test_a_compressed_shard_edited_in_place_is_named(folder: Path) -> None:
    describe(folder, check=True, num_workers=1)
    path = folder / "sub" / "b.jsonl.gz"
    before = path.stat().st_size
    path.write_bytes(stored(jsonl(range(10, 20)).replace(b"good 13", b"evil 13")))
    assert path.stat().st_size == before
    with pytest.raises(DataError, match=r"b\.jsonl\.gz:4: the shard was changed"):
        prompts(ShardSet.open([str(folder)]))


def test_what_does_not_fit_the_folder_is_refused_at_the_start(folder: Path) -> None:
    describe(folder, check=False, num_workers=1)
    (folder / "new.jsonl").write_bytes(jsonl(range(3)))
    with pytest.raises(DataError, match=r"manifest\.json does not list .*new\.jsonl; .* write"):
        ShardSet.open([str(folder)])
    (folder / "new.jsonl").unlink()
    (folder / "a.jsonl").write_bytes(jsonl(range(9)))
    with pytest.raises(DataError, match=r"a\.jsonl: \d+ bytes, \d+ in the manifest \(sha256 \w{16} now, \w{16} in"):
        ShardSet.open([str(folder)])
    (folder / "a.jsonl").unlink()
    with pytest.raises(DataError, match=r"no such data: .*a\.jsonl; .*manifest\.json lists them"):
        ShardSet.open([str(folder)])


@pytest.mark.parametrize(
    "path",
    ["../x.jsonl", "sub/../../x.jsonl", "/etc/x.jsonl", "file:///etc/x.jsonl", "http://127.0.0.1/x.jsonl", "", "~/x"],
)
def test_paths_out_of_the_folder_are_refused_before_anything_is_opened(
    folder: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe(folder, check=False, num_workers=1)
    document = json.loads((folder / "manifest.json").read_text())
    document["files"][0]["path"] = path
    (folder / "manifest.json").write_text(json.dumps(document))
    monkeypatch.setattr(stores, "open_file", None)
    monkeypatch.setattr(stores, "read_range", None)
    with pytest.raises(DataError, match=r"is not a file below .*; a manifest names files of its own folder"):
        ShardSet.open([str(folder)])


def test_links_out_of_the_folder_are_refused(folder: Path) -> None:
    describe(folder, check=False, num_workers=1)
    (folder / "a.jsonl").rename(folder.parent / "outside.jsonl")
    (folder / "a.jsonl").symlink_to(folder.parent / "outside.jsonl")
    with pytest.raises(DataError, match="is not a file below"):
        ShardSet.open([str(folder)])


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"files": [{"path": "a.jsonl"}]},
        {"files": [{"path": "a.jsonl", "rows": -1, "bytes": 1, "sha256": "", "identity": ""}]},
        {"files": {"a": 1}},
        {"files": []},
    ],
)
def test_what_is_no_manifest_is_refused_in_one_line(folder: Path, change: dict) -> None:
    describe(folder, check=False, num_workers=1)
    document = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(document | change))
    with pytest.raises(DataError, match=r"manifest\.(json|rows): ") as caught:
        ShardSet.open([str(folder)])
    assert "\n" not in str(caught.value)


def test_a_torn_index_is_refused(folder: Path) -> None:
    describe(folder, check=False, num_workers=1)
    rows = folder / "manifest.rows"
    rows.write_bytes(rows.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"manifest\.rows: 959 bytes, where 40 rows need 960"):
        ShardSet.open([str(folder)])
    rows.write_bytes(bytes(960))
    with pytest.raises(DataError, match=r"the rows of manifest\.json do not fit it; write the manifest again"):
        prompts(ShardSet.open([str(folder)]))


def test_a_dictionary_edited_in_an_arrow_file_is_found(tmp_path: Path) -> None:
    texts = pa.array(["good one", "good two"]).dictionary_encode()
    table = pa.table({"prompt": ["a", "b"], "chosen": texts, "rejected": ["c", "d"]})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    describe(tmp_path, check=True, num_workers=1)
    edit(tmp_path / "a.arrow", b"good", b"evil")
    with pytest.raises(DataError, match=r"a\.arrow:1-2: the shard was changed"):
        prompts(ShardSet.open([str(tmp_path)]))


def test_the_command_refuses_links_out_of_the_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder.parent / "other.jsonl").write_bytes(jsonl(range(3)))
    (folder / "link.jsonl").symlink_to(folder.parent / "other.jsonl")
    assert main([str(folder), "--workers", "1"]) == 2
    assert "'link.jsonl' is not a file below" in capsys.readouterr().err
