"""From one row, as JSON or Parquet gives it, to a `PreferencePair`. README.md lists the formats."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable
from typing import Any

from data_utils.families import (
    RATING_KEYS,
    RATINGS,
    convert_row,
    family_columns,
    is_canonical,
    matching_families,
    nearest_family,
    rating_margin,
)
from data_utils.messages import check_turns, read_messages, read_tools, shared_turns
from data_utils.ranked import Ranked, has_ranked_columns, num_ranked_pairs
from data_utils.schema import Message, PairColumns, PreferencePair, RowError, Text
from data_utils.values import kind, list_keys, nearest, read_number, read_string

__all__ = ["Ranked", "list_keys", "missing_columns", "near_misses", "num_pairs", "parse_row", "wanted_columns"]

Row = dict[str, Any]
RESPONSE_COLUMNS = ("chosen", "rejected")
NUMBER_COLUMNS: dict[str, tuple[Callable[[float], bool], str]] = {
    "weight": (lambda value: value >= 0, "at least 0"),
    "beta": (lambda value: value > 0, "above 0"),
    "margin": (lambda value: True, "any number"),
    "label": (lambda value: 0 <= value <= 1, "between 0 and 1"),
}
OPTIONAL_COLUMNS = (*NUMBER_COLUMNS, "source", "tools")
KNOWN_COLUMNS = ("prompt", *RESPONSE_COLUMNS, *OPTIONAL_COLUMNS)
KNOWN_FORMATS = (
    "known formats: prompt/chosen/rejected as strings or as message lists, "
    "or chosen/rejected as message lists that begin with the same turns; "
    "data_utils/README.md lists those of other data sets"
)


def parse_row(
    row: object, where: str, source: str = "", ranked: Ranked = "best_worst", pick: int = 0
) -> PreferencePair:
    """Check one row and bring it to one of two shapes: three strings, or three message lists.

    As messages, `prompt` ends with a user's or a tool's turn; each response begins and ends with an assistant's.
    Columns that are not known are ignored.

    Args:
        where: "file:line" of the row.
        source: name of the row's source, unless the row has its own column `source`.
        ranked: which pair a ranked list of responses gives: the best against the worst; the best against one of the
            others, drawn by a hash of the row's content; or the one that `pick` names.
        pick: with "all", which of the row's `num_pairs` pairs.

    Raises:
        RowError: cause `schema`, `roles`, `transcript`, `tie`, `empty_prompt`, `empty_response` or `identical`.
    """
    if not isinstance(row, dict):
        raise RowError(where, "schema", f"a row is a JSON object, not {kind(row)}; {KNOWN_FORMATS}")
    if is_canonical(row) or not (converted := convert_row(row, where, ranked, pick)):
        return _parse_canonical(row, where, source)
    columns, family = converted
    own = {name: row[name] for name in OPTIONAL_COLUMNS if row.get(name) is not None}
    ratings = {name: row[name] for pair in RATINGS for name in pair if name in row}
    try:
        return _parse_canonical({**ratings, **columns, **own}, where, source, family)
    except RowError as error:
        raise RowError(where, error.cause, f"{str(error).removeprefix(where + ': ')} (read as {family})") from error


def num_pairs(row: object, ranked: Ranked) -> int:
    """How many pairs `parse_row` can give of a row: 1, except for a ranked list of which all pairs are asked for.

    A list that `parse_row` will refuse counts as 1, so that it is refused once.
    """
    if ranked != "all" or not isinstance(row, dict) or is_canonical(row) or not has_ranked_columns(row):
        return 1
    try:
        return max(1, num_ranked_pairs(row))
    except RowError:
        return 1


def missing_columns(keys: Iterable[str]) -> str | None:
    """What to say about a row or a whole file by whose keys no format is known, with the nearest key to each."""
    keys = [str(key) for key in keys]
    missing = [name for name in RESPONSE_COLUMNS if name not in keys]
    if not missing or matching_families(keys) or has_ranked_columns(keys):
        return None
    near = "".join(_rename(name, keys) for name in missing) or nearest_family(keys)
    return f"no column {' and '.join(missing)}; found: {list_keys(keys)}{near}; {KNOWN_FORMATS}"


def wanted_columns(keys: Iterable[str]) -> list[str]:
    """The columns of a file that `parse_row` would read; the others need not be."""
    keys = list(keys)
    wanted = {*KNOWN_COLUMNS, *(name for pair in RATINGS if set(pair) <= set(keys) for name in pair)}
    if not {"prompt", *RESPONSE_COLUMNS} <= set(keys):
        wanted |= family_columns(keys)
    return [key for key in keys if key in wanted]


def near_misses(keys: Iterable[str]) -> list[str]:
    """A warning for each column that is ignored but spelt nearly like an optional one that is absent."""
    keys = list(keys)
    ignored = [key for key in keys if key not in wanted_columns(keys)]
    absent = [name for name in OPTIONAL_COLUMNS if name not in keys]
    near = [(nearest(name, ignored, cutoff=0.8), name) for name in absent]
    return [f"column {key!r} is ignored; did you mean {name!r}?" for key, name in near if key is not None]


def _rename(name: str, keys: list[str]) -> str:
    near = nearest(name, [key for key in keys if key not in KNOWN_COLUMNS])
    return f"; rename {reprlib.repr(near)} to '{name}'?" if near is not None else ""


def _parse_canonical(row: Row, where: str, source: str, family: str = "") -> PreferencePair:
    if problem := missing_columns(row):
        raise RowError(where, "schema", problem)
    prompt, chosen, rejected = _texts(row, where)
    if chosen == rejected:
        raise RowError(where, "identical", "chosen equals rejected, so the row says nothing; drop it")
    tools = read_tools(row["tools"], where) if row.get("tools") else ()
    if tools and isinstance(prompt, str):
        raise RowError(where, "schema", "tools need message lists, since only a chat template shows them")
    columns, rated = _columns(row, where, source)
    return PreferencePair(prompt, chosen, rejected, columns, where, tools, family or rated)


def _texts(row: Row, where: str) -> tuple[Text, Text, Text]:
    """Prompt, chosen and rejected as three strings or three message lists."""
    chosen, rejected = (_read_text(row[name], name, where) for name in RESPONSE_COLUMNS)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowError(where, "schema", "chosen and rejected must be both strings or both message lists")
    prompt = row.get("prompt")
    if prompt is not None:
        prompt = _read_text(prompt, "prompt", where)
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            raise RowError(where, "schema", _missing_prompt(row))
        for name, response in (("chosen", chosen), ("rejected", rejected)):
            if not response.strip():
                raise RowError(where, "empty_response", f"{name} is empty or only white space; drop or fix the row")
        if isinstance(prompt, str):
            return prompt, chosen, rejected
        chosen, rejected = [_message("assistant", chosen)], [_message("assistant", rejected)]
    assert isinstance(chosen, list) and isinstance(rejected, list)
    turns, chosen, rejected = _split(prompt, chosen, rejected, where)
    check_turns(turns, chosen, "chosen", where)
    check_turns(turns, rejected, "rejected", where)
    return turns, chosen, rejected


def _read_text(value: object, name: str, where: str) -> Text:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RowError(where, "schema", f"column {name} is {kind(value)}; it must be a string or a message list")
    if not value and name in RESPONSE_COLUMNS:
        raise RowError(where, "empty_response", f"{name} is an empty list; drop or fix the row")
    return read_messages(value, name, where)


def _missing_prompt(row: Row) -> str:
    if "prompt" in row:
        return "column prompt is null; it must be a string or a message list"
    keys = list(row)
    return f"no column prompt beside the strings; found: {list_keys(keys)}{_rename('prompt', keys)}; {KNOWN_FORMATS}"


def _split(
    prompt: Text | None, chosen: list[Message], rejected: list[Message], where: str
) -> tuple[list[Message], list[Message], list[Message]]:
    """Split off the prompt: the given one, whether or not the responses repeat it, or else the common first turns."""
    if prompt and isinstance(prompt, list):
        size = len(prompt)
        repeat_prompt = chosen[:size] == prompt and rejected[:size] == prompt
        return (prompt, chosen[size:], rejected[size:]) if repeat_prompt else (prompt, chosen, rejected)
    if isinstance(prompt, str) and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return [_message("user", prompt)], chosen, rejected
    size = shared_turns(chosen, rejected)
    turns = chosen[:size]
    if isinstance(prompt, str) and all(turn.get("content", "").strip() != prompt.strip() for turn in turns):
        raise RowError(
            where, "schema", "prompt is none of the turns that chosen and rejected share; drop the column or fix it"
        )
    return turns, chosen[size:], rejected[size:]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _columns(row: Row, where: str, source: str) -> tuple[PairColumns, str]:
    """The optional columns, and what rows are called whose margin comes from ratings."""
    numbers = {name: _number(row[name], name, where) for name in NUMBER_COLUMNS if row.get(name) is not None}
    rated = ""
    if "margin" not in numbers and not RATING_KEYS.isdisjoint(row) and (rating := rating_margin(row, where)):
        numbers["margin"], rated = rating
    own_source = row.get("source")
    name = source if own_source is None else read_string(own_source, "source", where)
    return PairColumns(**numbers, source=name), rated


def _number(value: object, name: str, where: str) -> float:
    is_allowed, allowed = NUMBER_COLUMNS[name]
    number = read_number(value, name, where, allowed)
    if not is_allowed(number):
        raise RowError(where, "schema", f"column {name} is {number}; it must be a finite number, {allowed}")
    return number
