"""Rows of well-known data sets become pairs, each under its family's name; what cannot be told apart is refused."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_utils.formats import Ranked, missing_columns, num_pairs, parse_row, wanted_columns
from data_utils.schema import PreferencePair, RowError
from data_utils.scratch import Scratch
from data_utils.table_files import TableFile

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
WHERE = "b.jsonl:7"
SYSTEM = {"role": "system", "content": "Be kind."}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


ASK, GOOD, BAD = user("Hi"), assistant("Hello!"), assistant("Go away.")
HH = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: Go away."}
PKU = {"prompt": "Hi", "response_0": "Go away.", "response_1": "Hello!", "better_response_id": 1}
SHP = {"history": "Hi", "human_ref_A": "Hello!", "human_ref_B": "Go away.", "labels": 1, "score_A": 9, "score_B": 2}
HELPSTEER2 = {"prompt": "Hi", "response_1": "Hello!", "response_2": "Go away.", "preference_strength": -2}
HELPSTEER3 = {"context": [ASK], "response1": "Go away.", "response2": "Hello!", "overall_preference": 3}
ARENA = {"conversation_a": [ASK, BAD], "conversation_b": [ASK, GOOD], "winner": "model_b", "judge": "x"}
STACK = {"qid": 1, "question": "Hi", "response_j": "Hello!", "response_k": "Go away."}
ORCA = {"system": "", "question": "Hi", "chosen": "Hello!", "rejected": "Go away."}
ARGILLA = {
    "instruction": "Hi",
    "chosen_response": "Hello!",
    "rejected_response": "Go away.",
    "chosen_avg_rating": 4.5,
    "rejected_avg_rating": 3.0,
}
ALPACA = {"instruction": "Hi", "input": "", "chosen": "Hello!", "rejected": "Go away."}
SHAREGPT = {
    "conversations": [{"from": "human", "value": "Hi"}],
    "chosen": {"from": "gpt", "value": "Hello!"},
    "rejected": {"from": "gpt", "value": "Go away."},
}
ULTRAFEEDBACK = {
    "instruction": "Hi",
    "completions": [
        {"response": "Well.", "overall_score": 6.0, "critique": "so so"},
        {"response": "Hello!", "overall_score": 8.5},
        {"response": "Go away.", "overall_score": 1.0},
    ],
}
ROWS = {
    "HH transcripts": (HH, None),
    "PKU-SafeRLHF": (PKU, None),
    "SHP": (SHP, 7.0),
    "HelpSteer2": (HELPSTEER2, 2.0),
    "HelpSteer3": (HELPSTEER3, 3.0),
    "arena battles": (ARENA, None),
    "stack-exchange-paired": (STACK, None),
    "Intel orca": (ORCA, None),
    "argilla": (ARGILLA, 1.5),
    "Alpaca pairs": (ALPACA, None),
    "ShareGPT pairs": (SHAREGPT, None),
    "ranked list": (ULTRAFEEDBACK, 7.5),
}


@pytest.mark.parametrize("family", ROWS)
def test_rows_of_every_family_become_the_same_pair(family: str) -> None:
    row, margin = ROWS[family]
    pair = parse_row(row, WHERE, source="mine")
    assert (pair.prompt, pair.chosen, pair.rejected) == ([ASK], [GOOD], [BAD])
    assert (pair.family, pair.columns.margin, pair.columns.source, pair.where) == (family, margin, "mine", WHERE)
    assert missing_columns(row) is None


@pytest.mark.parametrize("family", ROWS)
def test_the_columns_wanted_of_a_file_are_enough(family: str) -> None:
    row, _ = ROWS[family]
    row = row | {"extra": "x"}
    wanted = wanted_columns(row)
    assert "extra" not in wanted
    assert parse_row({name: row[name] for name in wanted}, WHERE) == parse_row(row, WHERE)


@pytest.mark.parametrize("family", ROWS)
def test_own_columns_are_kept_beside_every_family(family: str) -> None:
    row, _ = ROWS[family]
    pair = parse_row(row | {"margin": 0.25, "weight": 2, "source": "theirs"}, WHERE, source="mine")
    assert (pair.columns.margin, pair.columns.weight, pair.columns.source) == (0.25, 2.0, "theirs")


@pytest.mark.parametrize("family", ROWS)
def test_canonical_rows_are_never_foreign(family: str) -> None:
    row, _ = ROWS[family]
    own = {"prompt": "P", "chosen": "yes", "rejected": "no"}
    others = {name: value for name, value in row.items() if "rating" not in name and name != "labels"}
    pair = parse_row(others | own, WHERE)
    assert (pair.prompt, pair.chosen, pair.rejected, pair.family) == ("P", "yes", "no", "")
    lists = {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}
    pair = parse_row({name: value for name, value in others.items() if name != "prompt"} | lists, WHERE)
    assert (pair.prompt, pair.chosen, pair.family) == ([ASK], [GOOD], "")


@pytest.mark.parametrize("family", ROWS)
def test_parquet_files_of_every_family_give_the_same_pairs(family: str, tmp_path: Path) -> None:
    row, _ = ROWS[family]
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist([row | {"extra": 1}, row]), path)
    pair = parse_row(TableFile(str(path), Scratch("families")).row(1), WHERE)
    assert pair == parse_row(row, WHERE)


def test_transcripts_of_several_turns() -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Who are\n\nyou? Human: x"
    row = {"chosen": f"{start}\n\nAssistant: A dog.", "rejected": f"{start}\n\nAssistant: Nobody."}
    pair = parse_row(row, WHERE)
    assert pair.prompt == [ASK, GOOD, user("Who are\n\nyou? Human: x")]
    assert (pair.chosen, pair.rejected) == ([assistant("A dog.")], [assistant("Nobody.")])


def test_transcripts_that_part_early_give_responses_of_several_turns() -> None:
    longer = HH["rejected"] + "\n\nHuman: Why?\n\nAssistant: So."
    pair = parse_row(HH | {"rejected": longer}, WHERE)
    assert (pair.prompt, pair.rejected) == ([ASK], [BAD, user("Why?"), assistant("So.")])
    other = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: {}\n\nAssistant: {}"
    pair = parse_row({"chosen": other.format("A?", "a"), "rejected": other.format("B?", "b")}, WHERE)
    assert pair.prompt == [ASK] and pair.chosen == [GOOD, user("A?"), assistant("a")]


@pytest.mark.parametrize(
    ("change", "cause", "says"),
    [
        ({"rejected": "Go away."}, "transcript", "rejected begins with 'Go away.'"),
        ({"rejected": "Well. \n\nHuman: Hi\n\nAssistant: x"}, "transcript", "rejected begins with"),
        ({"rejected": None}, "schema", "column rejected is null"),
        ({"chosen": "\n\nHuman: Hi"}, "roles", "the last turn of chosen is the user's"),
        ({"chosen": "\n\nHuman: Hi\n\nAssistant: a\n\nAssistant: b"}, "roles", "where the user's"),
        ({"chosen": "\n\nHuman: Hi\n\nAssistant:"}, "empty_response", "chosen is empty"),
        ({"chosen": "\n\nHuman: Yo\n\nAssistant: Hello!"}, "empty_prompt", "no user turn"),
        ({"chosen": HH["rejected"]}, "identical", "chosen equals rejected"),
    ],
)
def test_transcripts_that_cannot_be_used(change: dict, cause: str, says: str) -> None:
    refused(HH | change, cause, says)


def refused(row: dict, cause: str, says: str, ranked: Ranked = "best_worst") -> None:
    with pytest.raises(RowError) as caught:
        parse_row(row, WHERE, ranked=ranked)
    assert caught.value.cause == cause and caught.value.where == WHERE, str(caught.value)
    assert str(caught.value).startswith(WHERE + ": ") and says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "swapped"),
    [
        (PKU, {"better_response_id": 0}),
        (SHP, {"labels": 0}),
        (HELPSTEER2, {"preference_strength": 2}),
        (HELPSTEER3, {"overall_preference": -3.0}),
        (ARENA, {"winner": "model_a"}),
    ],
)
def test_the_label_says_which_answer_is_chosen(row: dict, swapped: dict) -> None:
    pair, other = parse_row(row, WHERE), parse_row(row | swapped, WHERE)
    assert (other.chosen, other.rejected) == (pair.rejected, pair.chosen)


def test_votes_against_the_label_give_a_negative_margin() -> None:
    assert parse_row(SHP | {"labels": 0}, WHERE).columns.margin == -7.0
    assert parse_row({name: SHP[name] for name in SHP if name != "score_B"}, WHERE).columns.margin is None


@pytest.mark.parametrize(
    ("row", "cause", "says"),
    [
        (HELPSTEER2 | {"preference_strength": 0}, "tie", "column preference_strength is 0"),
        (HELPSTEER3 | {"overall_preference": 0}, "tie", "neither answer is better"),
        (ARENA | {"winner": "tie"}, "tie", "neither conversation is better"),
        (ARENA | {"winner": "tie (bothbad)"}, "tie", "'tie (bothbad)'"),
        (ARENA | {"winner": "gpt-4"}, "schema", "column winner is 'gpt-4'; it must be one of model_a"),
        (ARENA | {"winner": None}, "schema", "column winner is None"),
        (ARENA | {"conversation_a": None}, "schema", "column rejected is null"),
        (ARENA | {"conversation_a": [user("Yo"), BAD]}, "empty_prompt", "no user turn"),
        (PKU | {"better_response_id": 2}, "schema", "must be one of 0, 1"),
        (PKU | {"better_response_id": [0]}, "schema", "column better_response_id is [0]"),
        (PKU | {"response_0": 3}, "schema", "column response_0 is a number"),
        (PKU | {"response_0": " "}, "empty_response", "rejected is empty or only white space"),
        (PKU | {"response_0": "Hello!"}, "identical", "(read as PKU-SafeRLHF)"),
        (SHP | {"score_A": "9"}, "schema", "column score_A is a string"),
        (SHP | {"history": None}, "schema", "column history is null"),
        (ORCA | {"question": 5}, "schema", "column question is a number"),
        (ORCA | {"system": 5}, "schema", "column system is a number"),
        (ARGILLA | {"chosen_avg_rating": "4"}, "schema", "column chosen_avg_rating is a string"),
        (ALPACA | {"history": ["x"]}, "schema", "column history"),
        (SHAREGPT | {"chosen": "Hello!"}, "schema", "chosen is a string; it must be an object with from and value"),
        (SHAREGPT | {"chosen": {"role": "a", "content": "b"}}, "schema", "chosen is an object with role, content"),
        (SHAREGPT | {"chosen": {"from": "bot", "value": "b"}}, "roles", "chosen is from 'bot'"),
        (SHAREGPT | {"chosen": {"from": "human", "value": "b"}}, "roles", "last turn of chosen is the user's"),
        (SHAREGPT | {"conversations": "Hi"}, "schema", "column conversations is a string"),
        (SHAREGPT | {"conversations": [{"from": "function_call", "value": "{"}]}, "schema", "but not JSON"),
    ],
)
def test_foreign_rows_that_cannot_be_used(row: dict, cause: str, says: str) -> None:
    refused(row, cause, says)


def test_system_input_and_history_are_read() -> None:
    assert parse_row(ORCA | {"system": "Be kind."}, WHERE).prompt == [SYSTEM, ASK]
    row = ALPACA | {"system": "Be kind.", "history": [["Yo", "Yes?"]], "input": "there"}
    assert parse_row(row, WHERE).prompt == [SYSTEM, user("Yo"), assistant("Yes?"), user("Hi\nthere")]


def test_marked_turns_in_the_prompt_of_helpsteer2() -> None:
    prompt = "Hi\n<extra_id_1>Assistant\nHello!\n<extra_id_1>User\nWho are\nyou?"
    assert parse_row(HELPSTEER2 | {"prompt": prompt}, WHERE).prompt == [ASK, GOOD, user("Who are\nyou?")]


def test_sharegpt_system_and_tools() -> None:
    call = {"name": "weather", "arguments": {"town": "Bonn"}}
    turns = [{"from": "function_call", "value": json.dumps(call)}, {"from": "observation", "value": "12 degrees"}]
    row = SHAREGPT | {
        "conversations": [*SHAREGPT["conversations"], *turns],
        "system": "Be kind.",
        "tools": json.dumps([{"name": "weather"}]),
    }
    pair = parse_row(row, WHERE)
    asks = {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]}
    assert pair.prompt == [SYSTEM, ASK, asks, {"role": "tool", "content": "12 degrees"}]
    assert pair.tools == ({"name": "weather"},)


@pytest.mark.parametrize(
    ("names", "family"),
    [
        (("score_chosen", "score_rejected"), "UltraFeedback binarized"),
        (("chosen_score", "rejected_score"), "pairs with ratings"),
        (("chosen-rating", "rejected-rating"), "pairs with ratings"),
        (("rating_chosen", "rating_rejected"), "pairs with ratings"),
    ],
)
def test_ratings_of_pairs_become_the_margin(names: tuple[str, str], family: str) -> None:
    row = {"prompt": "Hi", "chosen": [ASK, GOOD], "rejected": [ASK, BAD], "messages": [ASK, GOOD]}
    rated = row | dict(zip(names, (8.5, 6), strict=True))
    pair = parse_row(rated, WHERE)
    assert (pair.prompt, pair.chosen, pair.columns.margin, pair.family) == ([ASK], [GOOD], 2.5, family)
    assert parse_row(rated | {"margin": 1}, WHERE).columns.margin == 1.0
    assert parse_row(rated | {"margin": 1}, WHERE).family == ""
    assert parse_row(rated | {names[1]: None}, WHERE).columns.margin is None
    refused(rated | {names[0]: "high"}, "schema", f"column {names[0]} is a string")


def test_two_kinds_of_ratings_are_ambiguous() -> None:
    row = {"prompt": "Hi", "chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": 1}
    refused(row | {"chosen_score": 1, "rejected_score": 2}, "schema", "ratings under several names")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (ARGILLA | ULTRAFEEDBACK, "the row could be argilla or ranked list"),
        (ORCA | ALPACA, "the row could be Intel orca or Alpaca pairs"),
        (ULTRAFEEDBACK | {"prompt": "Hi"}, "more than one prompt (prompt, instruction)"),
        (ULTRAFEEDBACK | {"answers": ["a", "b"]}, "more than one list of responses"),
    ],
)
def test_what_could_be_two_families_is_refused(row: dict, says: str) -> None:
    refused(row, "schema", says)


def test_an_unknown_row_is_refused_with_its_nearest_family() -> None:
    row = {"question": "Hi", "response_j": "a", "response_K": "b"}
    refused(row, "schema", "nearest: stack-exchange-paired, which lacks response_k, rename 'response_K'")
    refused({"instruction": "Hi", "output": "a"}, "schema", "no column chosen and rejected; found: instruction, output")


def ranked_rows() -> dict[str, dict]:
    texts, scores = ["Well.", "Hello!", "Go away."], [6, 8.5, 1]
    objects = [{"text": text, "score": score} for text, score in zip(texts, scores, strict=True)]
    lists = [[assistant(text)] for text in texts]
    return {
        "strings": {"instruction": "Hi", "responses": texts, "scores": scores},
        "ratings": {"question": "Hi", "answers": texts, "ratings": scores},
        "objects": {"messages": [ASK], "candidates": objects},
        "objects beside scores": {
            "messages": [ASK],
            "candidates": [{"text": text} for text in texts],
            "scores": scores,
        },
        "message lists": {"prompt": "Hi", "responses": lists, "scores": scores},
        "transcript": {"prompt": "\n\nHuman: Hi\n\nAssistant: ", "answers": texts, "scores": scores},
    }


@pytest.mark.parametrize("name", ranked_rows())
def test_ranked_lists_of_every_shape(name: str) -> None:
    pair = parse_row(ranked_rows()[name], WHERE)
    assert (pair.prompt, pair.chosen, pair.rejected) == ([ASK], [GOOD], [BAD])
    assert (pair.columns.margin, pair.family) == (7.5, "ranked list")


def test_a_low_rank_is_better() -> None:
    texts = ["Well.", "Hello!", "Go away."]
    for row in (
        {"prompt": [ASK], "responses": texts, "ranks": [2, 1, 3]},
        {"prompt": [ASK], "answers": [{"answer": text, "rank": rank} for text, rank in zip(texts, (2, 1, 3))]},  # noqa: B905
    ):
        pair = parse_row(row, WHERE)
        assert (pair.chosen, pair.rejected, pair.columns.margin) == ([GOOD], [BAD], 2.0)


def test_a_plain_prompt_with_plain_responses_stays_plain() -> None:
    pair = parse_row({"prompt": "Once", "responses": [" upon", " more"], "scores": [0, 1]}, WHERE)
    assert (pair.prompt, pair.chosen, pair.rejected) == ("Once", " more", " upon")


def all_pairs(row: dict) -> list[PreferencePair]:
    return [parse_row(row, WHERE, ranked="all", pick=pick) for pick in range(num_pairs(row, "all"))]


def test_all_pairs_with_different_scores() -> None:
    row = {"prompt": "P", "responses": list("abcd"), "scores": [1, 3, 3, 0]}
    found = {(str(pair.chosen), str(pair.rejected), pair.columns.margin) for pair in all_pairs(row)}
    expected = {("b", "a", 2), ("c", "a", 2), ("b", "d", 3), ("c", "d", 3), ("a", "d", 1)}
    assert found == expected and len(all_pairs(row)) == 5
    assert num_pairs(row, "best_worst") == num_pairs(row, "best_random") == 1
    assert num_pairs(PKU, "all") == num_pairs("text", "all") == num_pairs(row | {"scores": None}, "all") == 1


def test_best_random_is_drawn_by_content() -> None:
    rows = [{"prompt": f"P{n}", "responses": list("abcd"), "scores": [1, 3, 2, 0]} for n in range(60)]
    drawn = [parse_row(row, WHERE, ranked="best_random") for row in rows]
    again = [parse_row(row | {"id": 5}, "c.jsonl:9", ranked="best_random").rejected for row in rows]
    assert [pair.rejected for pair in drawn] == again
    assert all(pair.chosen == "b" for pair in drawn)
    counts = Counter(str(pair.rejected) for pair in drawn)
    assert set(counts) == set("acd") and min(counts.values()) >= 10
    assert all(pair.columns.margin == {"a": 2, "c": 1, "d": 3}[str(pair.rejected)] for pair in drawn)


def test_best_random_of_values_that_only_parquet_has() -> None:
    texts = [[assistant(text) | {"at": datetime(2026, 1, 2, tzinfo=UTC)}] for text in ("Hello!", "Go away.")]
    pair = parse_row({"prompt": "Hi", "responses": texts, "scores": [2, 1]}, WHERE, ranked="best_random")
    assert (pair.chosen, pair.rejected) == ([GOOD], [BAD])


@pytest.mark.parametrize(
    ("change", "cause", "says"),
    [
        ({"scores": [2, 2, 2]}, "tie", "all 3 responses have the same score"),
        ({"scores": [2, 1]}, "schema", "column scores is a list of 2; it must be a list of 3 numbers"),
        ({"scores": None}, "schema", "no list of scores; found: prompt, responses, scores"),
        ({"scores": [1, 2, None]}, "schema", "column scores is null"),
        ({"scores": [1, 2, float("nan")]}, "schema", "finite"),
        ({"ranks": [1, 2, 3]}, "schema", "more than one list of scores (scores, ranks)"),
        ({"responses": ["a"]}, "schema", "column responses is a list of 1"),
        ({"responses": "a"}, "schema", "column responses is a string"),
        ({"responses": ["a", "b", ""], "scores": [1, 2, 0]}, "empty_response", "(read as ranked list)"),
        ({"responses": ["a", "a", "a"]}, "identical", "chosen equals rejected"),
        ({"responses": [{"text": "a", "answer": "b"}] * 3}, "schema", "more than one text in responses"),
        ({"responses": [{"body": "a"}] * 3}, "schema", "no text in responses; found: body; known: text"),
        ({"responses": [{"text": "a", "score": 1, "rank": 2}] * 2, "scores": None}, "schema", "more than one score"),
        ({"responses": [{"text": "a", "score": 1}, {"text": "b"}], "scores": None}, "schema", "score in responses is"),
        ({"prompt": 5}, "schema", "column prompt is a number"),
        ({"prompt": None}, "schema", "no prompt"),
    ],
)
@pytest.mark.parametrize("ranked", ["best_worst", "best_random", "all"])
def test_ranked_lists_that_cannot_be_used(change: dict, cause: str, says: str, ranked: Ranked) -> None:
    row = {"prompt": "P", "responses": ["a", "b", "c"], "scores": [3, 2, 1]} | change
    refused(row, cause, says, ranked)
    assert num_pairs(row, ranked) >= 1


@pytest.mark.parametrize(
    ("path", "accepted", "refused"),
    [
        ("hh-harmless-test/test.jsonl.gz", 2299, {"empty_response": 4, "roles": 4}),
        ("ultrafeedback-sample/train.jsonl.gz", 994, {"identical": 4, "empty_response": 2}),
        ("ultrafeedback-sample/test.jsonl.gz", 199, {"identical": 1}),
        ("llamafactory-dpo-en-demo/train.jsonl.gz", 300, {}),
        ("pandalm/dirty.jsonl", 6, {"empty_response": 52}),
    ],
)
def test_real_sets(path: str, accepted: int, refused: dict[str, int]) -> None:
    if not (DATA / path).is_file():
        pytest.skip("the shared material is not here")
    counts: Counter[str] = Counter()
    with (gzip.open if path.endswith(".gz") else open)(DATA / path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                parse_row(json.loads(line), f"{path}:{number}")
                counts["accepted"] += 1
            except RowError as error:
                counts[error.cause] += 1
    assert counts == {"accepted": accepted} | refused
