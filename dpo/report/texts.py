"""Texts and statistics of the pairs, read from the shards of the run; the run directory only says where they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import numpy as np

from data_utils.repeats import said
from data_utils.schema import DataError, PreferencePair, Text
from data_utils.shards import ShardSet
from data_utils.sources import SourceSpec
from dpo.report.series import digits
from dpo.sections import DataSource

Result = TypeVar("Result")
TEXT_BYTES = 2_800_000
"""What all texts of the page may take together."""
MAX_CHARS = 6_000
MAX_READ = 5_000
"""Training pairs that are read for the statistics."""


def open_shards(sources: Sequence[str | DataSource]) -> ShardSet | str:
    """The shards of a run, or why they cannot be read any more."""
    specs = [SourceSpec(entry) if isinstance(entry, str) else SourceSpec(**asdict(entry)) for entry in sources]
    if remote := [spec.path for spec in specs if "://" in spec.path]:
        return f"{remote[0]} is not on this machine"
    return _or_why(lambda: ShardSet.open(specs))


def _or_why(read: Callable[[], Result]) -> Result | str:
    try:
        return read()
    except (DataError, OSError) as error:
        return " ".join(str(error).split())


def read_texts(shards: ShardSet, where: Sequence[str]) -> list[tuple[str, str, str] | None]:
    """Prompt, chosen and rejected of each pair by its place; None where nothing of that name can be read now."""
    wanted = dict.fromkeys(where)
    index = {place: number for number in range(len(shards)) if (place := shards.where(number)) in wanted}
    texts = []
    for place in where:
        pair = None if place not in index else _or_why(lambda place=place: shards.pair(index[place]))
        texts.append(as_texts(pair) if isinstance(pair, PreferencePair) else None)
    return texts


def as_texts(pair: PreferencePair) -> tuple[str, str, str]:
    """Prompt, chosen and rejected as one reads them."""
    return plain(pair.prompt), plain(pair.chosen), plain(pair.rejected)


def plain(text: Text) -> str:
    """A text; of several messages each under its role."""
    if isinstance(text, str):
        return text
    if len(text) == 1:
        return said(text[0])
    return "\n\n".join(f"[{message['role']}]\n{said(message)}" for message in text)


def shorten(
    texts: Sequence[Sequence[str] | None], budget: int = TEXT_BYTES
) -> tuple[list[list[str] | None], int | None]:
    """Texts cut to one length, the largest at which all together fit the budget of UTF-8 bytes.

    Returns:
        the texts, a cut one ending in an ellipsis; and the length in characters, None where nothing was cut.
    """
    clean = [None if row is None else [_encodable(text) for text in row] for row in texts]
    flat = [text for row in clean if row is not None for text in row]
    limit = MAX_CHARS
    while limit > 50 and sum(_size(text[:limit]) for text in flat) > budget:
        limit = int(limit * 0.8)
    was_cut = any(len(text) > limit for text in flat)
    cut = [None if row is None else [_cut(text, limit) for text in row] for row in clean]
    return cut, limit if was_cut else None


def _encodable(text: str) -> str:
    """Without halves of surrogate pairs, which no encoding has; what is far beyond any limit is not looked at."""
    return text[: MAX_CHARS + 1].encode("utf-8", "replace").decode("utf-8")


def _size(text: str) -> int:
    """Bytes inside a JSON string, nearly: quotes, line ends and angle brackets are escaped."""
    return len(text.encode()) + 5 * (text.count("<") + text.count(">") + text.count("&")) + text.count("\n")


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[:limit] + "…"


def statistics(shards: ShardSet) -> dict[str, Any]:
    """What the training pairs are like, from `MAX_READ` of them at even distances: exact where there are no more."""
    total = len(shards)
    places = np.unique(np.linspace(0, total - 1, min(total, MAX_READ)).astype(int)).tolist()
    read = [
        pair for place in places if isinstance(pair := _or_why(lambda place=place: shards.pair(place)), PreferencePair)
    ]
    texts = [as_texts(pair) for pair in read]
    lengths = {
        name: [len(pair[place]) for pair in texts] for place, name in enumerate(("prompt", "chosen", "rejected"))
    }
    longer = np.sign(np.array(lengths["chosen"]) - np.array(lengths["rejected"]))
    sources = Counter(pair.columns.source or "unnamed" for pair in read)
    return {
        "pairs": total,
        "files": len(shards.files),
        "read": len(read),
        "unreadable": len(places) - len(read),
        "sources": sources.most_common(20),
        "lengths": {name: percentiles(values) for name, values in lengths.items()},
        "chosen_longer": [int((longer == sign).sum()) for sign in (1, 0, -1)],
        "distinct_prompts": len({prompt for prompt, _, _ in texts}),
    }


def percentiles(values: Sequence[float]) -> list[float | int | None]:
    """5th, 50th, 95th percentile and the largest."""
    if not len(values):
        return [None] * 4
    return [digits(value) for value in (*np.percentile(values, [5, 50, 95]).tolist(), float(max(values)))]
