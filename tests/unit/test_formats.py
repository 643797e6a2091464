"""Every known row becomes one of two shapes; every other row is refused with its cause, place and remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_utils.formats import missing_columns, near_misses, parse_row, wanted_columns
from data_utils.schema import PairColumns, RowError
from data_utils.shards import ShardSet
from tests.rows import problems

USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be kind."}
DEVELOPER = {"role": "developer", "content": "Be brief."}
GOOD = {"role": "assistant", "content": "Hello!"}
BAD = {"role": "assistant", "content": "Go away."}
CALL = {"type": "function", "id": "c1", "function": {"name": "weather", "arguments": {"town": "Bonn"}}}
ASKS = {"role": "assistant", "tool_calls": [CALL]}
TOOL = {"role": "tool", "content": "12 degrees", "tool_call_id": "c1"}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
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
        {
            "prompt": [USER | {"id": 5, "name": None}],
            "chosen": [GOOD | {"score": 9, "tool_calls": []}],
            "rejected": [BAD],
        },
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


def test_a_response_may_have_several_turns() -> None:
    more = {"role": "user", "content": "More"}
    for prompt in (None, [USER]):
        pair = parse_row({"prompt": prompt, "chosen": [USER, GOOD, more, BAD], "rejected": [USER, BAD]}, WHERE)
        assert (pair.prompt, pair.chosen, pair.rejected) == ([USER], [GOOD, more, BAD], [BAD])


def test_an_implicit_prompt_ends_where_both_go_on_with_the_assistant() -> None:
    """Turns that both share but that a user's turn (or one of two tool results) parts belong to the responses."""
    more, less = {"role": "user", "content": "More"}, {"role": "user", "content": "Less"}
    pair = parse_row({"chosen": [USER, GOOD, more, BAD], "rejected": [USER, GOOD, less, GOOD]}, WHERE)
    assert (pair.prompt, pair.chosen, pair.rejected) == ([USER], [GOOD, more, BAD], [GOOD, less, GOOD])
    other = TOOL | {"content": "13 degrees"}
    pair = parse_row({"chosen": [USER, ASKS, TOOL, TOOL, GOOD], "rejected": [USER, ASKS, TOOL, other, BAD]}, WHERE)
    assert (pair.prompt, pair.chosen[0]) == ([USER], ASKS)


def test_tools_and_tool_turns() -> None:
    asks_null, after_tool = ASKS | {"content": None}, {"role": "user", "content": "And Rome?"}
    prompt = [DEVELOPER, USER, asks_null, TOOL, TOOL, GOOD, after_tool, ASKS, TOOL]
    for tools in ([WEATHER], json.dumps([WEATHER])):
        pair = parse_row({"prompt": prompt, "chosen": [GOOD], "rejected": [ASKS, TOOL, BAD], "tools": tools}, WHERE)
        assert pair.tools == (WEATHER,)
        assert pair.prompt == [DEVELOPER, USER, ASKS, TOOL, TOOL, GOOD, after_tool, ASKS, TOOL]
        assert pair.rejected == [ASKS, TOOL, BAD]
    for tools in (None, [], "", "[]"):
        assert parse_row({"prompt": [USER], "chosen": [ASKS], "rejected": [BAD], "tools": tools}, WHERE).tools == ()


def test_only_keys_that_a_template_reads_are_kept() -> None:
    turn = {"role": "user", "content": "Hi", "name": "Ann", "weight": 1, "tool_calls": None}
    pair = parse_row({"prompt": [turn], "chosen": [GOOD], "rejected": [BAD]}, WHERE)
    assert pair.prompt == [USER | {"name": "Ann"}]


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "Hel", "image_url": None}, {"type": "text", "text": "lo!"}]
    pair = parse_row({"prompt": [USER], "chosen": [GOOD | {"content": parts}], "rejected": [BAD]}, WHERE)
    assert pair.chosen == [GOOD]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tools": 5}, "column tools is a number"),
        ({"tools": "{"}, "column tools is a string, but not JSON"),
        ({"tools": WEATHER}, "column tools is an object; it must be a list"),
        ({"tools": ["weather"]}, "column tools, number 1 is a string"),
        ({"tools": [{"type": "function", "function": {"description": "x"}}]}, "names no function"),
        ({"chosen": [ASKS | {"tool_calls": CALL}]}, "tool_calls of chosen, message 1 is an object"),
        ({"chosen": [ASKS | {"tool_calls": [{"type": "function"}]}]}, "names no function; found: type"),
        ({"chosen": [{"role": "assistant", "tool_calls": []}]}, "needs the keys role and content"),
        ({"chosen": [GOOD | {"content": [{"type": "image", "url": "x"}]}]}, "a content part of the type 'image'"),
        ({"chosen": [GOOD | {"content": ["x"]}]}, "a content part of the type a string"),
        ({"chosen": [GOOD | {"content": [{"type": "text", "text": None}]}]}, "a content part of the type 'text'"),
    ],
)
def test_bad_tools_and_contents_are_refused(change: dict, says: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_row({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]} | change, WHERE)
    assert caught.value.cause == "schema" and says in str(caught.value) and "\n" not in str(caught.value)


def test_tools_beside_strings_would_be_ignored() -> None:
    with pytest.raises(RowError, match=r"a.jsonl:3: tools need message lists"):
        parse_row(STRINGS | {"tools": [WEATHER]}, WHERE)
    assert parse_row(STRINGS | {"tools": "[]"}, WHERE).tools == ()


def test_only_the_assistant_calls_tools() -> None:
    with pytest.raises(RowError, match="only an assistant's may"):
        parse_row({"prompt": [USER | {"tool_calls": [CALL]}], "chosen": [GOOD], "rejected": [BAD]}, WHERE)


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
        (None, [USER, GOOD], [USER | {"content": "Yo"}, BAD], "empty_prompt"),
        ([USER], [GOOD, USER], [BAD, USER], "roles"),
        ([USER], [GOOD, GOOD], [BAD], "roles"),
        ([USER], [USER, GOOD], [BAD], "roles"),
        ([USER], [GOOD, USER, GOOD | {"content": ""}], [BAD], "empty_response"),
        ([USER], [GOOD | {"content": "\n"}, USER, GOOD], [BAD], "empty_response"),
        ([SYSTEM, DEVELOPER, USER], [GOOD], [BAD], "roles"),
        ([USER, ASKS, USER, TOOL], [GOOD], [BAD], "roles"),
        ([USER, GOOD, TOOL], [GOOD], [BAD], "roles"),
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


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ("prompt chosen rejected messages score_chosen score_rejected id", "- - - no - - no"),
        ("chosen rejected weight tools chosen_score other", "- - - - no no"),
        ("prompt chosen rejected question system", "- - - no no"),
        ("question chosen rejected system", "- - - -"),
        ("history human_ref_A human_ref_B labels score_A score_B upvote_ratio", "- - - - - - no"),
        ("instruction completions models source", "- - no -"),
        ("prompt responses scores rank_of_model", "- - - no"),
    ],
)
def test_wanted_columns(keys: str, wanted: str) -> None:
    expected = [key for key, mark in zip(keys.split(), wanted.split(), strict=True) if mark == "-"]
    assert wanted_columns(keys.split()) == expected
    assert missing_columns(keys.split()) is None


def test_a_file_of_unknown_columns_is_named_with_the_nearest_family() -> None:
    assert "no column chosen and rejected; found: text; known" in str(missing_columns(["text"]))
    found = str(missing_columns(["prompt", "response_0", "response_1", "better_response"]))
    assert "nearest: PKU-SafeRLHF, which lacks better_response_id, rename 'better_response'" in found
    assert missing_columns(["prompt", "response_0", "response_1", "better_response_id"]) is None


@pytest.mark.parametrize(
    ("column", "meant"),
    [("Weight", "weight"), ("margins", "margin"), ("labels", "label"), ("wieght", "weight"), ("Source", "source")],
)
def test_a_misspelt_optional_column_is_a_near_miss(column: str, meant: str) -> None:
    assert near_misses([*STRINGS, column, "idx"]) == [f"column {column!r} is ignored; did you mean {meant!r}?"]
    assert near_misses([*STRINGS, column, meant]) == []


def test_other_columns_are_no_near_misses() -> None:
    common = "idx meta model chosen_model table resource_id data_source score prompt_id messages annotators_agreeing"
    assert near_misses([*STRINGS, *common.split()]) == []
    assert near_misses(["history", "human_ref_A", "human_ref_B", "labels"]) == []


FAULTS = {
    "missing key": ({"prompt": "Hi", "chosen": "Hello!"}, "schema", "no column rejected; found: prompt, chosen"),
    "integer": (STRINGS | {"chosen": 5}, "schema", "column chosen is a number"),
    "null": (STRINGS | {"rejected": None}, "schema", "column rejected is null"),
    "list of integers": (STRINGS | {"chosen": [1, 2]}, "schema", "chosen, message 1 is a number"),
    "nested": (STRINGS | {"chosen": {"text": "Hello!"}}, "schema", "column chosen is an object"),
    "empty": (STRINGS | {"chosen": ""}, "empty_response", "chosen is empty"),
    "white space": (STRINGS | {"rejected": " \n"}, "empty_response", "rejected is empty or only white space"),
    "identical": (STRINGS | {"chosen": STRINGS["rejected"]}, "identical", "chosen equals rejected"),
    "unknown family": ({"input": "Hi", "output": "Hello!"}, "schema", "found: input, output; known formats"),
    "roles not alternating": ({"chosen": [USER, USER, GOOD], "rejected": [USER, USER, BAD]}, "roles", "turn 2"),
    "last turn the user's": ({"chosen": [USER, GOOD, USER], "rejected": [USER, BAD]}, "roles", "last turn of chosen"),
}


def test_every_fault_of_a_row_is_named_with_its_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "shard.jsonl"
    lines = [json.dumps(row) for row, _, _ in FAULTS.values()]
    path.write_text("\n\n".join([json.dumps(STRINGS), *lines]) + "\n", encoding="utf-8")
    errors = problems(ShardSet.open([str(path)]))
    assert len(errors) == len(FAULTS)
    for place, (error, (_, cause, says)) in enumerate(zip(errors, FAULTS.values(), strict=True), start=1):
        assert error.cause == cause and str(error).startswith(f"{path}:{2 * place + 1}: ") and says in str(error)
