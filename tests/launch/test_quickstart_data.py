"""The quickstart's pairs: what the checkers accept, that the pairs keep to it, and how they are picked."""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_utils.schema import PairColumns, PreferencePair

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data" / "quickstart"
sys.path.insert(0, str(DATA))

import checkers  # noqa: E402
import instructions  # noqa: E402
import make_pairs  # noqa: E402


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def said(row: dict[str, Any], part: str) -> str:
    return row[part][0]["content"]


# ---- checkers


CASES = [
    ("one_word", "Answer with one word.", ["Rome", "Rome.", "well-known"], ["It is Rome.", "", "Rome, Italy", "?"]),
    (
        "bullets",
        "List two facts about tea.",
        ["- It is hot.\n- It is wet.", "- Hot\n\n- Wet\n"],
        ["- Hot", "- Hot\n- Wet\n- Brown", "* Hot\n* Wet", "Facts:\n- Hot\n- Wet", "- Hot\n- "],
    ),
    (
        "numbered",
        "Give me three.",
        ["1. A\n2. B\n3. C"],
        ["1. A\n2. B", "1. A\n3. B\n2. C", "A\nB\nC", "1. A\n2. B\n3."],
    ),
    ("lowercase", "Lower case.", ["bees can fly."], ["Bees can fly.", "bees fly", "12 34 56"]),
    ("starts_with", 'Start with "In short:"', ["In short: bees can fly."], ["in short: bees can fly.", "In short: no"]),
    (
        "ends_with",
        'End with "The end."',
        ["Bees can often fly. The end.", "Bees can often fly. The end.\n"],
        ["Bees can often fly. the end.", "The end.", "Bees can often fly. The end. Really."],
    ),
    ("max_words", "Use at most 5 words.", ["Bees can fly.", "Bees can fly very well."], ["Bees fly.", "a b c d e f"]),
    (
        "sentences",
        "Write exactly two sentences.",
        ["Bees can fly. They like honey!", 'They said "bees can fly." He did agree.'],
        [
            "Bees can fly.",
            "Bees can fly. They like honey. So do I.",
            "Bees can fly.\nThey like honey.",
            "Bees can fly. They like it",
        ],
    ),
    (
        "json_keys",
        'Use the keys "name" and "fact".',
        ['{"name": "Tea", "fact": "It is hot."}', '{\n "fact": "Hot", "name": "Tea"}\n'],
        ['{"name": "Tea"}', '{"name": "Tea", "fact": 3}', '{"name": "Tea", "fact": ""}', "name: Tea", "[1]", "3"],
    ),
    (
        "in_quotes",
        "In quotes.",
        ['"Bees can fly."'],
        ["Bees can fly.", '"Bees" can "fly"', '"Bees fly"', "'Bees can fly.'"],
    ),
    (
        "question",
        "Ask.",
        ["Can bees really fly?"],
        ["Bees can fly.", "Can bees fly? They can.", "Really? Can bees fly?", "Why?"],
    ),
]


@pytest.mark.parametrize(("kind", "instruction", "good", "bad"), CASES)
def test_a_checker_takes_what_obeys(kind: str, instruction: str, good: list[str], bad: list[str]) -> None:
    check = checkers.CHECKERS[kind]
    assert [answer for answer in good if not check(instruction, answer)] == []
    assert [answer for answer in bad if check(instruction, answer)] == []


def test_every_kind_is_asked_checked_and_tested() -> None:
    assert set(checkers.CHECKERS) == set(instructions.CONDITIONS) == {kind for kind, *_ in CASES}


def test_obeys_reads_the_kind_and_the_prompt_of_a_pair() -> None:
    prompt = [{"role": "user", "content": "Say something. Use at most 4 words."}]
    pair = PreferencePair(prompt, [], [], PairColumns(source="max_words"), "x:1")
    assert checkers.obeys(pair, "Tea is hot.")
    assert not checkers.obeys(pair, "Tea is hot and wet.")


def test_the_examples_shown_while_sampling_obey() -> None:
    for side in make_pairs.SIDES:
        for one in (one for group in instructions.groups(side) for one in group):
            assert all(checkers.CHECKERS[one.kind](*example) for example in one.examples), one


@pytest.mark.parametrize("kind", checkers.CHECKERS)
def test_an_instruction_in_other_words_is_obeyed_by_the_same_answer(kind: str) -> None:
    one = next(group[0] for group in instructions.groups("train") if group[0].kind == kind)
    answers = [answer for _, answer in one.examples]
    drawn = [instructions.reworded(one, answer, random.Random(seed)) for seed in range(60) for answer in answers]
    assert all(checkers.CHECKERS[kind](prompt, answer) and one.topic in prompt for prompt, answer in drawn)
    assert len({prompt for prompt, _ in drawn}) >= len(instructions.CONDITIONS[kind])
    assert drawn[0] == instructions.reworded(one, answers[0], random.Random(0))


# ---- pairs


@pytest.mark.parametrize("name", ["train.jsonl", "eval.jsonl"])
def test_chosen_obeys_and_rejected_does_not(name: str) -> None:
    for row in rows(name):
        assert sorted(row) == ["chosen", "prompt", "rejected", "source"]
        assert [row[part][0]["role"] for part in ("prompt", "chosen", "rejected")] == ["user", "assistant", "assistant"]
        check = checkers.CHECKERS[row["source"]]
        assert check(said(row, "prompt"), said(row, "chosen")), row
        assert not check(said(row, "prompt"), said(row, "rejected")), row


def test_there_are_enough_pairs_of_every_kind_and_none_twice() -> None:
    train, held_out = rows("train.jsonl"), rows("eval.jsonl")
    kinds = Counter(row["source"] for row in train)
    assert len(train) + len(held_out) >= 1000
    assert len(kinds) >= 8
    assert {row["source"] for row in held_out} == set(kinds)
    texts = [tuple(said(row, part) for part in ("prompt", "chosen", "rejected")) for row in train + held_out]
    assert len(set(texts)) == len(texts)


def test_no_prompt_and_no_topic_is_in_both_files() -> None:
    prompts = [{said(row, "prompt") for row in rows(name)} for name in ("train.jsonl", "eval.jsonl")]
    assert not prompts[0] & prompts[1]
    sides: tuple[instructions.Side, ...] = ("train", "eval")
    topics = {side: set(instructions.topics(side)) for side in sides}
    assert not topics["train"] & topics["eval"]
    for side, mine in zip(sides, prompts, strict=True):
        for prompt in mine:
            request = re.sub("(lowercase|capital) letters", "", prompt)
            (topic,) = (topic for topic in instructions.TOPICS if re.search(rf"\b{topic}\b", request))
            assert topic in topics[side], prompt


# ---- how they are picked


def test_pairs_are_picked_again_from_kept_answers(tmp_path: Path) -> None:
    (instruction, *_) = next(group for group in instructions.groups("eval") if group[0].kind == "lowercase")
    topic = instruction.topic
    good = [f"{topic} can be very nice.", f"{topic} are liked by many."]
    bad = ["They are nice. Everybody likes them. And that", "Nobody knows"]
    others = [f"{topic} so so nice so so nice.", "bees can be nice.", f"{topic.title()} are nice."]
    answers = {
        instruction.prompt: [*good, *others],
        instructions.plain(topic): bad,
    }
    lines = [
        json.dumps({"prompt": prompt, "answers": [{"text": text, "ended": text[-4:] != "that"} for text in texts]})
        for prompt, texts in answers.items()
    ]
    samples = tmp_path / "samples.jsonl"
    samples.write_text("\n".join(lines) + '\n{"prompt": "torn')
    make_pairs.main(["--only_pick", "--samples", str(samples), "--out", str(tmp_path)])
    (row,) = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert said(row, "chosen") == good[0]
    assert topic in said(row, "prompt")
    assert said(row, "rejected") == others[-1], "what was said in the same style comes before what was said without it"
    kept = make_pairs.kept(samples)
    accepted = make_pairs.good_answers(instruction, kept[instruction.prompt], set())
    assert accepted == good
    cut = kept[instructions.plain(topic)][:1]
    assert make_pairs.bad_answers(instruction, cut) == ["They are nice. Everybody likes them."]
