"""From one row, as JSON or Parquet gives it, to a `PreferencePair`. README.md lists the formats."""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Callable, Iterable
from typing import Any

from data_utils.schema import Message, PairColumns, PreferencePair, RowError

RESPONSE_COLUMNS = ("chosen", "rejected")
NUMBER_COLUMNS: dict[str, tuple[Callable[[float], bool], str]] = {
    "weight": (lambda value: value >= 0, "at least 0"),
    "beta": (lambda value: value > 0, "above 0"),
    "margin": (lambda value: True, "any number"),
    "label": (lambda value: 0 <= value <= 1, "between 0 and 1"),
}
KNOWN_COLUMNS = ("prompt", *RESPONSE_COLUMNS, *NUMBER_COLUMNS, "source")
KNOWN_FORMATS = (
    "known formats: prompt/chosen/rejected as strings or as message lists, "
    "or chosen/rejected as message lists that begin with the same turns"
)
MAX_NUMBER = 1e30  # finite in float32 too
ROLES = ("system", "user", "assistant")


def num_pairs(row: object, ranked: str) -> int:
    return 1


def parse_row(row: object, where: str, source: str = "", ranked: str = "best_worst", pick: int = 0) -> PreferencePair:
    """Check one row and bring it to one of two shapes: three strings, or three message lists.

    As messages, `prompt` ends with a user turn and each response is one assistant turn. Columns that are not known
    are ignored.

    Args:
        where: "file:line" of the row.
        source: name of the row's source, unless the row has its own column `source`.

    Raises:
        RowError: cause `schema`, `roles`, `multi_turn_response`, `empty_prompt`, `empty_response` or `identical`.
    """
    if not isinstance(row, dict):
        raise RowError(where, "schema", f"a row is a JSON object, not {_kind(row)}; {KNOWN_FORMATS}")
    if problem := missing_columns(row):
        raise RowError(where, "schema", problem)
    for name in RESPONSE_COLUMNS:
        _check_text(row[name], name, where)
    if isinstance(row["chosen"], str) != isinstance(row["rejected"], str):
        raise RowError(where, "schema", "chosen and rejected must be both strings or both message lists")
    prompt, chosen, rejected = _split(row, where)
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if not _content(response).strip():
            raise RowError(where, "empty_response", f"{name} is empty or only white space; drop or fix the row")
    if chosen == rejected:
        raise RowError(where, "identical", "chosen equals rejected, so the row says nothing; drop it")
    return PreferencePair(prompt, chosen, rejected, _columns(row, where, source), where)


def missing_columns(keys: Iterable[str]) -> str | None:
    """What to say about a row or a file whose keys lack chosen or rejected, with the nearest key to each."""
    keys = [str(key) for key in keys]
    missing = [name for name in RESPONSE_COLUMNS if name not in keys]
    if not missing:
        return None
    near = [_nearest(name, keys) for name in missing]
    return f"no column {' and '.join(missing)}; found: {list_keys(keys)}{''.join(near)}; {KNOWN_FORMATS}"


def wanted_columns(keys: Iterable[str]) -> list[str]:
    """The columns of a file that `parse_row` reads."""
    return [key for key in keys if key in KNOWN_COLUMNS]


def _nearest(name: str, keys: list[str]) -> str:
    unknown = [key for key in keys if key not in KNOWN_COLUMNS]
    by_lower_case = {key.lower(): key for key in unknown}
    close = difflib.get_close_matches(name, by_lower_case, n=1)
    return f"; rename {reprlib.repr(by_lower_case[close[0]])} to '{name}'?" if close else ""


def _split(row: dict[str, Any], where: str) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected as three strings or three message lists."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if prompt is not None:
        _check_text(prompt, "prompt", where)
    elif isinstance(chosen, str):
        raise RowError(where, "schema", _missing_prompt(row))
    if isinstance(chosen, list):
        turns, chosen, rejected = _split_messages(prompt, _turns(chosen), _turns(rejected), where)
    elif isinstance(prompt, list):
        turns, chosen, rejected = _turns(prompt), [_message("assistant", chosen)], [_message("assistant", rejected)]
    else:
        return prompt, chosen, rejected
    _check_turns(turns, chosen, "chosen", where)
    _check_turns(turns, rejected, "rejected", where)
    return turns, chosen, rejected


def _missing_prompt(row: dict[str, Any]) -> str:
    if "prompt" in row:
        return "column prompt is null; it must be a string or a message list"
    keys = list(row)
    return f"no column prompt beside the strings; found: {list_keys(keys)}{_nearest('prompt', keys)}; {KNOWN_FORMATS}"


def list_keys(keys: Iterable[str]) -> str:
    """Keys for a message of one line, however many or strange they are."""
    shown = [key if key.isidentifier() and len(key) < 40 else reprlib.repr(key) for key in keys]
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "") or "none"


def _split_messages(
    prompt: Any, chosen: list[Message], rejected: list[Message], where: str
) -> tuple[list[Message], list[Message], list[Message]]:
    """Split off the prompt: the given one, whether or not the responses repeat it, or else the common first turns."""
    if prompt and isinstance(prompt, list):
        turns = _turns(prompt)
        size = len(turns)
        repeat_prompt = chosen[:size] == turns and rejected[:size] == turns
        return (turns, chosen[size:], rejected[size:]) if repeat_prompt else (turns, chosen, rejected)
    if isinstance(prompt, str) and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return [_message("user", prompt)], chosen, rejected
    size = 0
    while size < min(len(chosen), len(rejected)) - 1 and chosen[size] == rejected[size]:
        size += 1
    turns = chosen[:size]
    if isinstance(prompt, str) and all(turn["content"].strip() != prompt.strip() for turn in turns):
        raise RowError(
            where, "schema", "prompt is none of the turns that chosen and rejected share; drop the column or fix it"
        )
    return turns, chosen[size:], rejected[size:]


def _check_text(value: object, name: str, where: str) -> None:
    if isinstance(value, str):
        return
    if not isinstance(value, list):
        raise RowError(where, "schema", f"column {name} is {_kind(value)}; it must be a string or a message list")
    if not value and name in RESPONSE_COLUMNS:
        raise RowError(where, "empty_response", f"{name} is an empty list; drop or fix the row")
    for number, message in enumerate(value, start=1):
        _check_message(message, f"{name}, message {number}", where)


def _check_message(message: object, place: str, where: str) -> None:
    if not isinstance(message, dict):
        raise RowError(where, "schema", f"{place} is {_kind(message)}; it must be an object with role and content")
    if "role" not in message or "content" not in message:
        hint = "; ShareGPT turns? rename from/value to role/content" if "from" in message else ""
        raise RowError(where, "schema", f"{place} needs the keys role and content; found: {list_keys(message)}{hint}")
    if message["role"] not in ROLES:
        raise RowError(
            where, "roles", f"{place} has the role {reprlib.repr(message['role'])}; known: {', '.join(ROLES)}"
        )
    if not isinstance(message["content"], str):
        raise RowError(where, "schema", f"{place} has a content that is {_kind(message['content'])}, not a string")


def _check_turns(prompt: list[Message], response: list[Message], name: str, where: str) -> None:
    """An optional system turn, then user and assistant in turn; the response is the last one, an assistant's."""
    roles = [turn["role"] for turn in prompt + response]
    spoken = roles[1:] if roles[0] == "system" else roles
    if spoken[-1:] != ["assistant"]:
        raise RowError(where, "roles", f"the last turn of {name} is the {roles[-1]}'s; it must be the assistant's")
    if len(spoken) > 1:
        _check_alternation(roles, name, where)
    if len(response) != 1:
        size = len(response)
        message = f"{name} has {size} turns after the prompt that both share; a response is one assistant turn"
        raise RowError(where, "multi_turn_response", message)
    if spoken == ["assistant"]:
        raise RowError(where, "empty_prompt", f"{name} has no user turn before the response")


def _check_alternation(roles: list[str], name: str, where: str) -> None:
    num_system = int(roles[0] == "system")
    for place in range(num_system, len(roles)):
        expected = "assistant" if (place - num_system) % 2 else "user"
        if roles[place] != expected:
            message = f"turn {place + 1} of prompt + {name} is the {roles[place]}'s, where the {expected}'s is due"
            raise RowError(where, "roles", f"{message}; at most one system turn, then user and assistant in turn")


def _turns(messages: list[Message]) -> list[Message]:
    """The messages without any keys but role and content."""
    return [_message(message["role"], message["content"]) for message in messages]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _content(response: str | list[Message]) -> str:
    return response if isinstance(response, str) else response[-1]["content"]


def _columns(row: dict[str, Any], where: str, source: str) -> PairColumns:
    numbers = {name: _number(row[name], name, where) for name in NUMBER_COLUMNS if row.get(name) is not None}
    own_source = row.get("source")
    if own_source is None:
        own_source = source
    if not isinstance(own_source, str):
        raise RowError(where, "schema", f"column source is {_kind(own_source)}; it must be a string")
    return PairColumns(**numbers, source=own_source)


def _number(value: object, name: str, where: str) -> float:
    is_allowed, allowed = NUMBER_COLUMNS[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError(where, "schema", f"column {name} is {_kind(value)}; it must be a number, {allowed}")
    number = float(value) if abs(value) < MAX_NUMBER else math.inf
    if not math.isfinite(number) or not is_allowed(number):
        raise RowError(where, "schema", f"column {name} is {number}; it must be a finite number, {allowed}")
    return number


def _kind(value: object) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    names |= {list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")
