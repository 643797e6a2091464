"""Rows of shards, as tests write and read them."""

from __future__ import annotations

import json
from collections.abc import Iterable

from data_utils.schema import RowError
from data_utils.shards import ShardSet


def row(number: int) -> dict[str, str]:
    """A pair of its own."""
    return {"prompt": f"prompt {number}", "chosen": f"good {number}", "rejected": f"bad {number}"}


def jsonl(numbers: Iterable[int]) -> bytes:
    """Lines of such rows."""
    return b"".join(json.dumps(row(number)).encode() + b"\n" for number in numbers)


def problems(shards: ShardSet) -> list[RowError]:
    """What is wrong with the pairs of a set, in their order."""
    found = []
    for index in range(len(shards)):
        try:
            shards.pair(index)
        except RowError as error:
            found.append(error)
    return found
