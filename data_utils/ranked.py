"""Ranked lists: one prompt, several responses with scores; which of their pairs is trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any, Literal

from data_utils.schema import RowError
from data_utils.transcripts import is_transcript, read_transcript_prompt
from data_utils.values import kind, list_keys, read_number

Ranked = Literal["best_worst", "best_random", "all"]
PROMPTS = ("prompt", "instruction", "question", "messages")
LISTS = ("responses", "completions", "answers", "candidates")
SCORES = ("scores", "ratings", "ranks")
TEXT_KEYS = ("text", "response", "answer", "content")
SCORE_KEYS = ("score", "rating", "overall_score", "rank")
LOWER_IS_BETTER = ("rank", "ranks")


def has_ranked_columns(keys: Iterable[str]) -> bool:
    """Whether there is a prompt and a list of responses under known names."""
    keys = set(keys)
    return not keys.isdisjoint(PROMPTS) and not keys.isdisjoint(LISTS)


def convert_ranked(row: dict[str, Any], where: str, ranked: Ranked, pick: int) -> dict[str, Any]:
    """prompt, chosen, rejected and margin (the difference of the scores, or of the ranks) of one pair of the list.

    Raises:
        RowError: cause `schema`, `transcript`, or `tie` where all scores are equal.
    """
    responses, scores = _responses_and_scores(row, where)
    pairs = _pairs(scores)
    if not pairs:
        raise RowError(where, "tie", f"all {len(scores)} responses have the same score, so none is better; drop it")
    prompt = _prompt(row, where)
    better, worse = pairs[pick] if ranked == "all" else _one_pair(pairs, scores, ranked, [prompt, responses, scores])
    margin = scores[better] - scores[worse]
    return {"prompt": prompt, "chosen": responses[better], "rejected": responses[worse], "margin": margin}


def num_ranked_pairs(row: dict[str, Any]) -> int:
    """How many pairs with different scores a list has. Raises RowError where it cannot be read."""
    return len(_pairs(_responses_and_scores(row, "")[1]))


def _pairs(scores: list[float]) -> list[tuple[int, int]]:
    """(better, worse) of every two responses with different scores, in the order of the list."""
    places = range(len(scores))
    return [(better, worse) for better in places for worse in places if scores[better] > scores[worse]]


def _one_pair(pairs: list[tuple[int, int]], scores: list[float], ranked: Ranked, content: list[Any]) -> tuple[int, int]:
    """The first of the best against the first of the worst, or against one that the row's content draws."""
    best = scores.index(max(scores))
    if ranked == "best_worst":
        return best, scores.index(min(scores))
    others = [pair for pair in pairs if pair[0] == best]
    digest = hashlib.blake2b(json.dumps(content, sort_keys=True, default=repr).encode(), digest_size=8).digest()
    return others[int.from_bytes(digest, "little") % len(others)]


def _prompt(row: dict[str, Any], where: str) -> Any:
    """`prompt` as it is in rows of pairs, though a transcript is taken apart; a question is the user's turn."""
    name = _only_one(PROMPTS, row, "prompt", where)
    prompt = row[name]
    if is_transcript(prompt):
        return read_transcript_prompt(prompt, name, where)
    return [{"role": "user", "content": prompt}] if name != "prompt" and isinstance(prompt, str) else prompt


def _responses_and_scores(row: dict[str, Any], where: str) -> tuple[list[Any], list[float]]:
    name = _only_one(LISTS, row, "list of responses", where)
    responses = row[name]
    if not isinstance(responses, list) or len(responses) < 2:
        found = f"a list of {len(responses)}" if isinstance(responses, list) else kind(responses)
        raise RowError(where, "schema", f"column {name} is {found}; it must be a list of two responses or more")
    if not all(isinstance(response, dict) for response in responses):
        return responses, _scores_beside(row, len(responses), where)
    texts = [response[_only_one(TEXT_KEYS, response, f"text in {name}", where)] for response in responses]
    beside = [key for key in SCORES if row.get(key) is not None]
    return texts, _scores_beside(row, len(texts), where) if beside else _scores_inside(responses, name, where)


def _scores_beside(row: dict[str, Any], size: int, where: str) -> list[float]:
    name = _only_one(SCORES, row, "list of scores", where)
    values = row[name]
    if not isinstance(values, list) or len(values) != size:
        found = f"a list of {len(values)}" if isinstance(values, list) else kind(values)
        raise RowError(where, "schema", f"column {name} is {found}; it must be a list of {size} numbers")
    return [_signed(value, name, name, where) for value in values]


def _scores_inside(responses: list[dict[str, Any]], name: str, where: str) -> list[float]:
    key = _only_one(SCORE_KEYS, responses[0], f"score in {name}", where)
    return [_signed(response.get(key), key, f"{key} in {name}", where) for response in responses]


def _signed(value: object, key: str, name: str, where: str) -> float:
    """The value of a score or rank, so that higher is better."""
    number = read_number(value, name, where)
    return -number if key in LOWER_IS_BETTER else number


def _only_one(names: Iterable[str], row: dict[str, Any], what: str, where: str) -> str:
    """The one of the names that the row has; two would leave it open which is meant."""
    found = [name for name in names if row.get(name) is not None]
    if len(found) != 1:
        problem = f"more than one {what} ({', '.join(found)}); keep one" if found else f"no {what}"
        known = "" if found else f"; found: {list_keys(row)}; known: {', '.join(names)}"
        raise RowError(where, "schema", problem + known)
    return found[0]
