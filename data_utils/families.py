"""Rows of well-known foreign data sets: recognised by their keys and brought to prompt, chosen and rejected."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from data_utils.ranked import LISTS, PROMPTS, SCORES, Ranked, convert_ranked, has_ranked_columns
from data_utils.schema import Message, RowError
from data_utils.transcripts import is_transcript, read_helpsteer_prompt, read_transcript
from data_utils.values import kind, list_keys, nearest, read_number, read_string

Row = dict[str, Any]
RANKED_LIST = "ranked list"
RATINGS = {  # (of chosen, of rejected) -> what such rows are called
    ("score_chosen", "score_rejected"): "UltraFeedback binarized",
    ("chosen-rating", "rejected-rating"): "pairs with ratings",
    ("chosen_avg_rating", "rejected_avg_rating"): "pairs with ratings",
    ("chosen_rating", "rejected_rating"): "pairs with ratings",
    ("rating_chosen", "rating_rejected"): "pairs with ratings",
    ("chosen_score", "rejected_score"): "pairs with ratings",
}
RATING_KEYS = frozenset(of_chosen for of_chosen, _ in RATINGS)
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "observation": "tool"}


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of foreign row.

    Attributes:
        columns: a row with all of them is of this family.
        convert: from (row, "file:line") to the columns prompt, chosen, rejected and, where the row says, margin.
        optional: further columns that `convert` reads.
    """

    name: str
    columns: tuple[str, ...]
    convert: Callable[[Row, str], Row]
    optional: tuple[str, ...] = ()


def is_canonical(row: Row) -> bool:
    """Whether a row is of our own kind, whatever further columns it has."""
    return "chosen" in row and "rejected" in row and ("prompt" in row or isinstance(row["chosen"], list))


def convert_row(row: Row, where: str, ranked: Ranked, pick: int) -> tuple[Row, str] | None:
    """Canonical columns and the name of the family; None where the row is of no known one.

    Raises:
        RowError: cause `schema`, `roles`, `transcript` or `tie`.
    """
    matching = matching_families(row)
    if len(matching) > 1 or (matching and has_ranked_columns(row)):
        names = [family.name for family in matching] + [RANKED_LIST] * has_ranked_columns(row)
        raise RowError(where, "schema", f"the row could be {' or '.join(names)}; drop the columns of one of them")
    if has_ranked_columns(row):
        return convert_ranked(row, where, ranked, pick), RANKED_LIST
    if matching:
        return matching[0].convert(row, where), matching[0].name
    if "chosen" in row and "rejected" in row and (is_transcript(row["chosen"]) or is_transcript(row["rejected"])):
        return _convert_hh(row, where), HH.name
    return None


def matching_families(keys: Collection[str]) -> list[Family]:
    """The families, but for HH and ranked lists, all of whose columns are there."""
    return [family for family in FAMILIES if all(column in keys for column in family.columns)]


def family_columns(keys: Collection[str]) -> set[str]:
    """Columns that a row with such keys may be converted by; empty where no family is known by them."""
    columns = {name for family in matching_families(keys) for name in (*family.columns, *family.optional)}
    return columns | ({*PROMPTS, *LISTS, *SCORES} if has_ranked_columns(keys) else set())


def nearest_family(keys: Collection[str]) -> str:
    """What a row of unknown columns lacks to be of the family that it shares at least half of the columns with."""
    shares = [(sum(column in keys for column in family.columns) / len(family.columns), family) for family in FAMILIES]
    share, family = max(shares, key=lambda item: item[0])
    if share < 0.5:
        return ""
    missing = [column for column in family.columns if column not in keys]
    unknown = [key for key in keys if key not in family.columns]
    renames = [f", rename {near!r}" for column in missing if (near := nearest(column, unknown, cutoff=0.7))]
    return f"; nearest: {family.name}, which lacks {list_keys(missing)}{''.join(renames)}"


def rating_margin(row: Row, where: str) -> tuple[float, str] | None:
    """Difference of the two ratings that a row of pairs brings, and what such rows are called. Raises RowError."""
    found = [pair for pair in RATINGS if row.get(pair[0]) is not None and row.get(pair[1]) is not None]
    if not found:
        return None
    if len(found) > 1:
        names = " and ".join("/".join(pair) for pair in found)
        raise RowError(where, "schema", f"ratings under several names ({names}); keep one or add a column margin")
    of_chosen, of_rejected = (read_number(row[name], name, where) for name in found[0])
    return of_chosen - of_rejected, RATINGS[found[0]]


def _convert_hh(row: Row, where: str) -> Row:
    sides = {name: read_transcript(read_string(row[name], name, where), name, where) for name in ("chosen", "rejected")}
    return {"prompt": None, **sides}


def _convert_question(row: Row, where: str, question: str, chosen: str, rejected: str) -> Row:
    """A question and two answers, all strings; `system`, and Alpaca's `history` and `input`, where the row has them."""
    text = read_string(row[question], question, where)
    if row.get("input"):
        text += "\n" + read_string(row["input"], "input", where)
    turns = [*_system(row, where), *_history(row, where), {"role": "user", "content": text}]
    return {"prompt": turns, **_answers(row, chosen, rejected, where)}


@dataclass(frozen=True, slots=True)
class Labelled:
    """Converts rows of two answers and a label that says which one is better.

    Attributes:
        winners: value of the label -> place of the better answer; None: neither is.
        margin: from the row, the place of the better answer and "file:line".
        read_prompt: from a prompt that is a string to turns.
    """

    prompt: str
    answers: tuple[str, str]
    label: str
    winners: Mapping[int, int | None]
    margin: Callable[[Row, int, str], float | None] = lambda row, winner, where: None
    read_prompt: Callable[[str], list[Message]] = lambda text: [{"role": "user", "content": text}]

    def __call__(self, row: Row, where: str) -> Row:
        winner = self._winner(row[self.label], where)
        prompt = row[self.prompt]
        turns = prompt if isinstance(prompt, list) else self.read_prompt(read_string(prompt, self.prompt, where))
        pair = _answers(row, self.answers[winner], self.answers[1 - winner], where)
        return {"prompt": turns, **pair, "margin": self.margin(row, winner, where)}

    def _winner(self, value: object, where: str) -> int:
        if not isinstance(value, int | float) or value not in self.winners:
            known = ", ".join(repr(known) for known in self.winners)
            found = f"column {self.label} is {reprlib.repr(value)}"
            raise RowError(where, "schema", f"{found}; it must be one of {known}")
        winner = self.winners[int(value)]
        if winner is None:
            raise RowError(where, "tie", f"column {self.label} is {value!r}: neither answer is better; drop the row")
        return winner


def _answers(row: Row, chosen: str, rejected: str, where: str) -> Row:
    return {
        "chosen": read_string(row[chosen], chosen, where),
        "rejected": read_string(row[rejected], rejected, where),
    }


def _shp_margin(row: Row, winner: int, where: str) -> float | None:
    """Difference of the two answers' votes."""
    names = ("score_A", "score_B")
    if any(row.get(name) is None for name in names):
        return None
    scores = [read_number(row[name], name, where) for name in names]
    return scores[winner] - scores[1 - winner]


def _helpsteer(prompt: str, answers: tuple[str, str], label: str) -> Labelled:
    """From -3, the first answer is much better, to 3, the second one is; the margin is the strength."""
    winners: dict[int, int | None] = {-3: 0, -2: 0, -1: 0, 0: None, 1: 1, 2: 1, 3: 1}
    return Labelled(
        prompt, answers, label, winners, lambda row, winner, where: abs(float(row[label])), read_helpsteer_prompt
    )


def _convert_arena(row: Row, where: str) -> Row:
    """Two whole conversations and the name of the winner."""
    winner = row["winner"]
    if winner in ("tie", "tie (bothbad)"):
        raise RowError(where, "tie", f"column winner is {winner!r}: neither conversation is better; drop the row")
    if winner not in ("model_a", "model_b"):
        known = "model_a, model_b, tie, tie (bothbad)"
        raise RowError(where, "schema", f"column winner is {reprlib.repr(winner)}; it must be one of {known}")
    chosen, rejected = ("a", "b") if winner == "model_a" else ("b", "a")
    return {"prompt": None, "chosen": row[f"conversation_{chosen}"], "rejected": row[f"conversation_{rejected}"]}


def _convert_sharegpt(row: Row, where: str) -> Row:
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise RowError(where, "schema", f"column conversations is {kind(turns)}; it must be a list of from and value")
    read = [_sharegpt_turn(turn, f"conversations, turn {number}", where) for number, turn in enumerate(turns, start=1)]
    sides = {name: [_sharegpt_turn(row[name], name, where)] for name in ("chosen", "rejected")}
    return {"prompt": [*_system(row, where), *read], **sides}


def _sharegpt_turn(turn: Any, name: str, where: str) -> Message:
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        found = f"an object with {list_keys(turn)}" if isinstance(turn, dict) else kind(turn)
        raise RowError(where, "schema", f"{name} is {found}; it must be an object with from and value")
    speaker, value = turn["from"], turn["value"]
    if speaker == "function_call":
        return {"role": "assistant", "tool_calls": _function_calls(value, name, where)}
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        known = ", ".join((*SHAREGPT_ROLES, "function_call"))
        raise RowError(where, "roles", f"{name} is from {reprlib.repr(speaker)}; known: {known}")
    return {"role": SHAREGPT_ROLES[speaker], "content": value}


def _function_calls(value: object, name: str, where: str) -> list[Row]:
    """LLaMA-Factory writes a call, or a list of calls, as JSON: {"name": ..., "arguments": ...}."""
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise RowError(where, "schema", f"{name} is a function call, but not JSON ({error}); fix the row") from error
    return [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]


def _system(row: Row, where: str) -> list[Message]:
    return [{"role": "system", "content": read_string(row["system"], "system", where)}] if row.get("system") else []


def _history(row: Row, where: str) -> list[Message]:
    turns: list[Message] = []
    for round in row.get("history") or ():
        if not isinstance(round, list) or len(round) != 2:
            raise RowError(where, "schema", "column history must be a list of [question, answer]")
        turns += [{"role": "user", "content": round[0]}, {"role": "assistant", "content": round[1]}]
    return turns


def _labelled(name: str, convert: Labelled, *optional: str) -> Family:
    return Family(name, (convert.prompt, *convert.answers, convert.label), convert, optional)


def _questions(name: str, question: str, chosen: str, rejected: str, *optional: str) -> Family:
    convert = partial(_convert_question, question=question, chosen=chosen, rejected=rejected)
    return Family(name, (question, chosen, rejected), convert, optional)


HH = Family("HH transcripts", ("chosen", "rejected"), _convert_hh)
FAMILIES = (
    _labelled("PKU-SafeRLHF", Labelled("prompt", ("response_0", "response_1"), "better_response_id", {0: 0, 1: 1})),
    _labelled(
        "SHP",
        Labelled("history", ("human_ref_A", "human_ref_B"), "labels", {1: 0, 0: 1}, _shp_margin),
        "score_A",
        "score_B",
    ),
    _labelled("HelpSteer2", _helpsteer("prompt", ("response_1", "response_2"), "preference_strength")),
    _labelled("HelpSteer3", _helpsteer("context", ("response1", "response2"), "overall_preference")),
    Family("arena battles", ("conversation_a", "conversation_b", "winner"), _convert_arena),
    _questions("stack-exchange-paired", "question", "response_j", "response_k"),
    _questions("argilla", "instruction", "chosen_response", "rejected_response"),
    _questions("Intel orca", "question", "chosen", "rejected", "system"),
    _questions("Alpaca pairs", "instruction", "chosen", "rejected", "input", "system", "history"),
    Family("ShareGPT pairs", ("conversations", "chosen", "rejected"), _convert_sharegpt, ("system",)),
)
