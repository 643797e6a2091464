"""The reference store on disk: what is written is found again, and what is damaged, foreign or untrusted is not."""

from __future__ import annotations

import errno
import logging
import os
import stat
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_utils.schema import PairColumns, TokenizedPair
from dpo.refusals import ConfigError
from dpo.store import FLUSH_PAIRS, SUFFIX, Store, default_store, own_folder
from dpo.store_blocks import count_pairs, decode, encode, pair_key

ROOT = Path(__file__).resolve().parents[2]
IDENTITY = b"0123456789abcdef0123456789abcdef"
PAIR = TokenizedPair([1, 2], [3, 4], [5], PairColumns(), "a.jsonl:1", 0)


def pairs(num_pairs: int, seed: int = 0) -> tuple[list[int], np.ndarray]:
    """Keys and log-probs of so many pairs."""
    generator = np.random.default_rng(seed)
    keys = generator.integers(0, 2**64, num_pairs, dtype=np.uint64)
    return keys.tolist(), -generator.random((num_pairs, 2), dtype=np.float32) * 1000


def opened(folder: Path) -> Store:
    return Store(folder / IDENTITY.decode())


def filled(folder: Path, num_pairs: int = 300, seed: int = 0) -> Path:
    """The file of a store with so many pairs, written by a process that has ended."""
    store = opened(folder)
    store.append(*pairs(num_pairs, seed))
    store.close()
    return max(store.folder.glob(f"*{SUFFIX}"), key=os.path.getmtime)


# ---- keys and blocks


@pytest.mark.parametrize("num_pairs", [1, 7, 256, 3000])
def test_a_block_gives_back_bit_for_bit_what_went_in(num_pairs: int) -> None:
    keys, logps = pairs(num_pairs)
    block = encode(np.array(keys, np.uint64), logps, IDENTITY)
    ((found_keys, found, end),) = decode(block + b"dpoR", IDENTITY)
    order = np.argsort(np.array(keys, np.uint64))
    assert end == len(block) and found_keys.tolist() == sorted(keys)
    assert np.array_equal(found, logps[order])


@pytest.mark.parametrize(("num_pairs", "limit"), [(56, 16), (100, 15.7), (1000, 15.2)])
def test_a_pair_takes_less_than_sixteen_bytes(num_pairs: int, limit: float) -> None:
    keys, logps = pairs(num_pairs)
    assert len(encode(np.array(keys, np.uint64), logps, IDENTITY)) / num_pairs <= limit


def test_neither_a_changed_bit_nor_another_store_is_read() -> None:
    keys, logps = pairs(9)
    block = encode(np.array(keys, np.uint64), logps, IDENTITY)
    assert list(decode(block, b"f" * 32)) == []
    for place in range(len(block)):
        damaged = bytearray(block)
        damaged[place] ^= 1
        assert list(decode(bytes(damaged), IDENTITY)) == []


def test_the_key_is_of_what_is_scored_and_nothing_else() -> None:
    others = [
        replace(PAIR, prompt_ids=[1], chosen_ids=[2, 3, 4]),  # the same sequences, parted elsewhere
        replace(PAIR, chosen_ids=[3, 5]),
        replace(PAIR, rejected_ids=[5, 6]),
        replace(PAIR, chosen_ids=[5], rejected_ids=[3, 4]),
        replace(PAIR, chosen_scored=((0, 1),)),
        replace(PAIR, rejected_scored=((0, 0),)),
    ]
    assert len({pair_key(pair) for pair in [PAIR, *others]}) == 7
    same = replace(PAIR, columns=PairColumns(weight=2.0, beta=0.3), where="b.jsonl:9", index=7)
    assert pair_key(same) == pair_key(PAIR) == pair_key(replace(PAIR, chosen_scored=((0, 2),)))


# ---- files


def test_what_one_process_wrote_another_finds(tmp_path: Path) -> None:
    keys, logps = pairs(300)
    file = filled(tmp_path)
    store = opened(tmp_path)
    assert len(store) == 300 == count_pairs(file)
    assert np.array_equal(store.look_up(keys), logps)
    assert np.isnan(store.look_up(pairs(5, seed=1)[0])).all()
    assert file.stat().st_size / 300 < 16 and stat.S_IMODE(file.stat().st_mode) == 0o600


def test_an_open_store_sees_what_others_flush(tmp_path: Path) -> None:
    reader, writer = opened(tmp_path), opened(tmp_path)
    keys, logps = pairs(FLUSH_PAIRS)
    writer.append(keys, logps)
    assert np.isnan(reader.look_up(keys)).all()
    reader.refresh()
    assert np.array_equal(reader.look_up(keys), logps)
    more, values = pairs(10, seed=1)
    writer.append(more, values)
    reader.refresh()
    assert np.isnan(reader.look_up(more)).all() and np.array_equal(writer.look_up(more), values)
    writer.flush()
    reader.refresh()
    assert np.array_equal(reader.look_up(more), values)


def test_what_is_known_or_not_finite_is_not_written(tmp_path: Path) -> None:
    file = filled(tmp_path, 10)
    store = opened(tmp_path)
    store.append(*pairs(10))
    store.append([1, 2], np.array([[np.nan, -1], [-1, -np.inf]], np.float32))
    store.close()
    assert list(store.folder.glob(f"*{SUFFIX}")) == [file]
    assert np.isnan(store.look_up([1, 2])).all()


@pytest.mark.parametrize("cut", [1, 100, 3000])
def test_a_torn_tail_is_ignored_and_said_once(tmp_path: Path, cut: int, caplog: pytest.LogCaptureFixture) -> None:
    """Two blocks, of which the second loses its end: the first is read, nothing wrong is."""
    store = opened(tmp_path)
    (first, first_logps), (second, second_logps) = pairs(FLUSH_PAIRS), pairs(FLUSH_PAIRS, seed=1)
    store.append(first, first_logps)
    store.append(second, second_logps)
    store.close()
    (file,) = store.folder.glob(f"*{SUFFIX}")
    os.truncate(file, file.stat().st_size - cut)
    with caplog.at_level(logging.WARNING):
        again = opened(tmp_path)
        again.refresh()
    assert np.array_equal(again.look_up(first), first_logps) and np.isnan(again.look_up(second)).all()
    assert [record.message.endswith("half-written or damaged; ignored") for record in caplog.records] == [True]


def test_a_tail_that_is_being_written_is_read_when_it_is_complete(tmp_path: Path) -> None:
    writer, reader = opened(tmp_path), opened(tmp_path)
    writer.append(*pairs(FLUSH_PAIRS))
    (file,) = writer.folder.glob(f"*{SUFFIX}")
    keys, logps = pairs(20, seed=1)
    block = encode(np.array(keys, np.uint64), logps, IDENTITY)
    with file.open("ab") as half:
        half.write(block[:50])
    reader.refresh()
    assert len(reader) == FLUSH_PAIRS
    with file.open("ab") as half:
        half.write(block[50:])
    reader.refresh()
    assert np.array_equal(reader.look_up(keys), logps)


def test_a_process_killed_while_it_fills_loses_what_was_not_flushed_at_most(tmp_path: Path) -> None:
    script = f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from tests.unit.test_store import opened, pairs
        from pathlib import Path
        store = opened(Path({str(tmp_path)!r}))
        for seed in range(1000):
            store.append(*pairs(100, seed))
            print(seed, flush=True)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    last = 0
    while last < 20:
        last = int(process.stdout.readline())
    process.kill()
    process.wait()
    store = opened(tmp_path)
    assert len(store) >= 100 * last - FLUSH_PAIRS
    for seed in range(last - 4):
        keys, logps = pairs(100, seed)
        assert np.array_equal(store.look_up(keys), logps)


def test_two_processes_fill_one_folder_at_once(tmp_path: Path) -> None:
    script = f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from tests.unit.test_store import opened, pairs
        from pathlib import Path
        store = opened(Path({str(tmp_path)!r}))
        for seed in range(int(sys.argv[1]), 40, 2):
            store.append(*pairs(50, seed))
            store.append(*pairs(50, 99))
            store.flush()
            store.refresh()
        store.close()
    """
    commands = [[sys.executable, "-c", textwrap.dedent(script), str(number)] for number in (0, 1)]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait() for process in processes] == [0, 0]
    store = opened(tmp_path)
    assert len(store) == 41 * 50
    for seed in [*range(40), 99]:
        keys, logps = pairs(50, seed)
        assert np.array_equal(store.look_up(keys), logps)


def test_a_full_disk_ends_the_writing_with_one_line_and_no_torn_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened(tmp_path)
    (first, first_logps), (second, second_logps) = pairs(FLUSH_PAIRS), pairs(FLUSH_PAIRS, seed=1)
    store.append(first, first_logps)
    write = os.write
    rooms = [700]  # the disk takes the start of the next block

    def write_while_there_is_room(descriptor: int, data: memoryview) -> int:
        if not rooms:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[: rooms.pop()])

    monkeypatch.setattr(os, "write", write_while_there_is_room)
    with caplog.at_level(logging.WARNING):
        store.append(second, second_logps)
        store.append(*pairs(FLUSH_PAIRS, seed=2))
        store.close()
    assert store.problem is not None and "no room left" in store.problem and len(caplog.records) == 1
    assert np.array_equal(store.look_up(second), second_logps)
    monkeypatch.undo()
    caplog.clear()
    again = opened(tmp_path)
    assert len(again) == FLUSH_PAIRS and not caplog.records
    assert np.array_equal(again.look_up(first), first_logps)


# ---- trust


def test_folders_that_others_can_write_to_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match=r"reference\.store=.*open: it is not yours, or others can write to it"):
        own_folder(folder)
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(ConfigError, match=r"reference\.store=.*file/below: .*: give a folder that can be written"):
        own_folder(blocked / "below")
    assert stat.S_IMODE(own_folder(tmp_path / "new").stat().st_mode) == 0o700


def test_files_that_others_can_write_to_and_links_are_not_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = filled(tmp_path)
    file.chmod(0o666)
    filled(tmp_path / "elsewhere", seed=1).rename(tmp_path / "target")
    (file.parent / f"link{SUFFIX}").symlink_to(tmp_path / "target")
    with caplog.at_level(logging.WARNING):
        assert len(opened(tmp_path)) == 0
    assert "others can write to it; ignored" in caplog.text and len(caplog.records) == 2


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_files_and_folders_of_other_users_are_not_read(tmp_path: Path) -> None:
    file = filled(tmp_path)
    os.chown(file, 65534, 65534)
    assert len(opened(tmp_path)) == 0
    os.chown(file.parent, 65534, 65534)
    with pytest.raises(ConfigError, match="it is not yours"):
        opened(tmp_path)


def test_the_default_store_is_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_store() == Path("/somewhere/dpo/reference")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_store() == Path("/home/me/.cache/dpo/reference")
