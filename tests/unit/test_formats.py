"""Every known row becomes one of two shapes; every other row is refused with its cause, place and remedy."""

from __future__ import annotations

import json

import pytest

from data_utils.formats import parse_row
from data_utils.schema import PairColumns, RowError

USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be kind."}
GOOD = {"role": "assistant", "content": "Hello!"}
BAD = {"role": "assistant", "content": "Go away."}
STRINGS = {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go away."}
WHERE = "a.jsonl:3"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": "Hello!", "rejected": "Go away."},
        {"prompt": "Hi", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER | {"name": "Ann"}], "chosen": [GOOD | {"score": 9}], "rejected": [BAD]},
    ],
)
def test_message_rows_take_one_shape(row: dict) -> None:
    pair = parse_row(row, WHERE)
    assert (pair.prompt, pair.chosen, pair.rejected) == ([USER], [GOOD], [BAD])


def test_strings_stay_strings() -> None:
    pair = parse_row(STRINGS | {"idx": 5, "chosen_model": "x"}, WHERE, source="hh")
    assert (pair.prompt, pair.chosen, pair.rejected) == ("Hi", "Hello!", "Go away.")
    assert pair.where == WHERE and pair.columns == PairColumns(source="hh")


def test_implicit_prompt_is_all_the_common_turns() -> None:
    turns = [SYSTEM, USER, GOOD, USER]
    pair = parse_row({"chosen": [*turns, GOOD], "rejected": [*turns, BAD]}, WHERE)
    assert (pair.prompt, pair.chosen, pair.rejected) == (turns, [GOOD], [BAD])


def test_columns_are_carried() -> None:
    columns = {"weight": 0, "beta": 0.2, "margin": -1, "label": 1, "source": "mine"}
    pair = parse_row(STRINGS | columns, WHERE, source="ignored")
    assert pair.columns == PairColumns(weight=0.0, beta=0.2, margin=-1.0, label=1.0, source="mine")
    assert parse_row(STRINGS | dict.fromkeys(columns), WHERE).columns == PairColumns()


@pytest.mark.parametrize(
    ("change", "cause", "says"),
    [
        ({"chosen": None}, "schema", "column chosen is null"),
        ({"chosen": 5}, "schema", "column chosen is a number"),
        ({"rejected": True}, "schema", "column rejected is a boolean"),
        ({"chosen": [1, 2]}, "schema", "chosen, message 1 is a number"),
        ({"chosen": {"text": "x"}}, "schema", "column chosen is an object"),
        ({"chosen": [[GOOD]]}, "schema", "chosen, message 1 is a list"),
        ({"chosen": [{"from": "gpt", "value": "x"}]}, "schema", "ShareGPT"),
        ({"chosen": [GOOD | {"content": None}]}, "schema", "content that is null"),
        ({"chosen": [GOOD | {"role": ["user"]}]}, "roles", "role ['user']"),
        ({"chosen": [GOOD | {"role": "bot"}]}, "roles", "role 'bot'"),
        ({"chosen": [GOOD]}, "schema", "both strings or both message lists"),
        ({"prompt": None}, "schema", "column prompt is null"),
        ({"prompt": 7}, "schema", "column prompt is a number"),
        ({"prompt": []}, "empty_prompt", "no user turn"),
        ({"chosen": ""}, "empty_response", "chosen is empty"),
        ({"rejected": " \n\t"}, "empty_response", "rejected is empty or only white space"),
        ({"chosen": "Go away."}, "identical", "chosen equals rejected"),
        ({"weight": -1}, "schema", "column weight is -1.0; it must be a finite number, at least 0"),
        ({"beta": 0}, "schema", "above 0"),
        ({"label": 1.5}, "schema", "between 0 and 1"),
        ({"margin": True}, "schema", "column margin is a boolean"),
        ({"margin": float("inf")}, "schema", "finite"),
        ({"margin": 10**400}, "schema", "finite"),
        ({"weight": "1"}, "schema", "column weight is a string"),
        ({"source": 3}, "schema", "column source is a number"),
    ],
)
def test_bad_rows_are_refused(change: dict, cause: str, says: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_row(STRINGS | change, WHERE)
    assert caught.value.cause == cause and caught.value.where == WHERE
    assert str(caught.value).startswith(WHERE + ": ") and says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "cause"),
    [
        (None, [USER, GOOD], [USER, GOOD], "identical"),
        (None, [USER, GOOD | {"content": " "}], [USER, BAD], "empty_response"),
        (None, [GOOD], [BAD], "empty_prompt"),
        (None, [SYSTEM, GOOD], [SYSTEM, BAD], "empty_prompt"),
        (None, [USER, GOOD, USER], [USER, BAD, USER], "roles"),
        (None, [USER, USER, GOOD], [USER, USER, BAD], "roles"),
        (None, [USER, SYSTEM, GOOD], [USER, SYSTEM, BAD], "roles"),
        (None, [SYSTEM], [SYSTEM], "roles"),
        (None, [USER, GOOD, USER, GOOD], [USER, BAD, USER, BAD], "multi_turn_response"),
        (None, [USER, GOOD], [USER | {"content": "Yo"}, BAD], "multi_turn_response"),
        ([USER], [GOOD, USER, GOOD], [BAD], "multi_turn_response"),
        ([USER, GOOD], [GOOD], [BAD], "roles"),
        ("Yo", [USER, GOOD], [USER, BAD], "schema"),
        ([USER], [], [BAD], "empty_response"),
    ],
)
def test_bad_conversations_are_refused(prompt: object, chosen: list, rejected: list, cause: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_row({"prompt": prompt, "chosen": chosen, "rejected": rejected}, WHERE)
    assert caught.value.cause == cause


def test_a_missing_column_lists_the_keys_and_the_nearest() -> None:
    with pytest.raises(RowError, match=r"no column rejected; found: prompt, chosen, Rejection; rename 'Rejection'"):
        parse_row({"prompt": "a", "chosen": "b", "Rejection": "c"}, WHERE)
    with pytest.raises(RowError, match=r"no column prompt .* rename 'promt' to 'prompt'.* known formats"):
        parse_row({"promt": "a", "chosen": "b", "rejected": "c"}, WHERE)


@pytest.mark.parametrize("row", [None, 3, "text", [STRINGS]])
def test_a_row_is_an_object(row: object) -> None:
    with pytest.raises(RowError, match="a row is a JSON object"):
        parse_row(json.loads(json.dumps(row)), WHERE)


def test_strange_keys_keep_the_message_on_one_short_line() -> None:
    row = {"a\nb" * 500: 1, "chosen": "x"} | {f"key{number}": number for number in range(99)}
    with pytest.raises(RowError) as caught:
        parse_row(row, WHERE)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 and "and 89 more" in str(caught.value)
