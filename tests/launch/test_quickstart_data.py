"""The pairs shipped with the quickstart: reproducible, sound, disjoint, short."""

from __future__ import annotations

import json
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data" / "quickstart"


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def prompt(row: dict[str, Any]) -> str:
    return row["prompt"][0]["content"]


def test_the_script_writes_the_same_bytes_again(tmp_path: Path) -> None:
    # It also asserts for every pair that its checker accepts chosen and refuses rejected.
    runpy.run_path(str(DATA / "make_pairs.py"))["main"]([str(tmp_path)])
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


def test_there_are_enough_pairs_of_every_kind_and_none_twice() -> None:
    train, held_out = rows("train.jsonl"), rows("eval.jsonl")
    kinds = Counter(row["source"] for row in train)
    assert len(train) >= 300
    assert len(held_out) >= 64
    assert len(kinds) >= 6
    assert min(kinds.values()) >= 20
    assert {row["source"] for row in held_out} == set(kinds)
    assert len({prompt(row) for row in train + held_out}) == len(train) + len(held_out)


@pytest.mark.parametrize("name", ["train.jsonl", "eval.jsonl"])
def test_rows_are_message_lists(name: str) -> None:
    for row in rows(name):
        assert sorted(row) == ["chosen", "prompt", "rejected", "source"]
        roles = [[message["role"] for message in row[key]] for key in ("prompt", "chosen", "rejected")]
        assert roles == [["user"], ["assistant"], ["assistant"]]


@pytest.mark.parametrize(
    ("kind", "asked", "good", "bad"),
    [
        ("one_word", None, "Rome.", "It is Rome."),
        ("bullets", 2, "- Cow\n- Pig", "- Cow\n- Pig\n- Goat"),
        ("numbered", 2, "1. Cow\n2. Pig", "1. Cow\n1. Pig"),
        ("all_caps", None, "BEES FLY.", "BEES fly."),
        ("lowercase", None, "bees fly.", "Bees fly."),
        ("ends_with", "cold", "It is cold.", "The cold came."),
        ("starts_with", "In short:", "In short: yes.", "Yes. In short: yes."),
        ("max_words", 3, "Bees make honey.", "Bees make much honey."),
        ("sentences", 2, "One. Two!", "One, two."),
        ("json_keys", ["a", "b"], '{"b": "1", "a": "2"}', '{"a": "1"}'),
        ("json_keys", ["a"], '{"a": "1"}', "a: 1"),
        ("without_letter", "z", "A bee.", "A Zebra."),
    ],
)
def test_a_checker_tells_kept_from_broken(kind: str, asked: object, good: str, bad: str) -> None:
    check = runpy.run_path(str(DATA / "make_pairs.py"))["CHECKS"][kind]
    assert check(good, asked)
    assert not check(bad, asked)
