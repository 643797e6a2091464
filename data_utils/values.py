"""Reading single values of a row, and words for what was found where something else was due."""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Iterable

from data_utils.schema import RowError

MAX_NUMBER = 1e30  # finite in float32 too
KINDS = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def kind(value: object) -> str:
    """What a value is, in the words of JSON."""
    return KINDS.get(type(value), f"a {type(value).__name__}")


def list_keys(keys: Iterable[str]) -> str:
    """Keys for a message of one line, however many or strange they are."""
    shown = [key if key.isidentifier() and len(key) < 40 else reprlib.repr(key) for key in keys]
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "") or "none"


def nearest(name: str, keys: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The key that `name` could have been meant by, whatever its case; None where none is near."""
    by_lower_case = {key.lower(): key for key in keys}
    close = difflib.get_close_matches(name, by_lower_case, n=1, cutoff=cutoff)
    return by_lower_case[close[0]] if close else None


def read_number(value: object, name: str, where: str, allowed: str = "any number") -> float:
    """A finite number, in float32 too. Raises RowError, cause `schema`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError(where, "schema", f"column {name} is {kind(value)}; it must be a number, {allowed}")
    number = float(value) if abs(value) < MAX_NUMBER else math.inf
    if not math.isfinite(number):
        raise RowError(where, "schema", f"column {name} is {number}; it must be a finite number, {allowed}")
    return number


def read_string(value: object, name: str, where: str) -> str:
    """A string. Raises RowError, cause `schema`."""
    if not isinstance(value, str):
        raise RowError(where, "schema", f"column {name} is {kind(value)}; it must be a string")
    return value
