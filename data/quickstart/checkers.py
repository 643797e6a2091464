"""Does this answer do what its instruction asks? One function per kind of instruction.

    obeys(pair, answer)     for `--eval.checker data/quickstart/checkers.py:obeys`: the kind is the pair's `source`

Each checker takes the instruction's text and the answer. What was asked for (a number of lines, a phrase, keys) is
read from the instruction itself: numbers are written as words or digits, phrases stand in double quotes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_utils.schema import PreferencePair

NUMBERS = {"two": 2, "three": 3, "four": 4}


def obeys(pair: PreferencePair, answer: str) -> bool:
    """Whether an answer does what the pair's prompt asks."""
    assert isinstance(pair.prompt, list)
    return CHECKERS[pair.columns.source](pair.prompt[-1]["content"], answer)


def words(text: str) -> list[str]:
    """Runs of letters, digits, apostrophes and hyphens."""
    return re.findall(r"\w[\w'’-]*", text)


def sentences(text: str) -> list[str]:
    """Pieces that end in a full stop, question or exclamation mark before white space or the end."""
    return [piece for piece in re.split(r"(?<=[.!?])[\"')]*\s+", text.strip()) if piece]


def quoted(instruction: str) -> list[str]:
    """What stands in double quotes."""
    return re.findall(r'"([^"]+)"', instruction)


def number(instruction: str) -> int:
    """The one number that an instruction names."""
    (found,) = re.findall(rf"\d+|{'|'.join(NUMBERS)}", instruction)
    return NUMBERS[found] if found in NUMBERS else int(found)


def one_word(instruction: str, answer: str) -> bool:
    """One word, with or without a full stop."""
    return re.fullmatch(r"\w[\w'’-]*[.!]?", answer.strip()) is not None


def bullets(instruction: str, answer: str) -> bool:
    """As many lines as asked for, each a dash and some text, and nothing else."""
    lines = [line for line in answer.strip().split("\n") if line.strip()]
    return len(lines) == number(instruction) and all(re.match(r"- *\w", line) for line in lines)


def numbered(instruction: str, answer: str) -> bool:
    """As many lines as asked for, numbered from 1, and nothing else."""
    lines = [line for line in answer.strip().split("\n") if line.strip()]
    marked = all(re.match(rf"{place}\. *\w", line) for place, line in enumerate(lines, 1))
    return len(lines) == number(instruction) and marked


def lowercase(instruction: str, answer: str) -> bool:
    """No capital letter, and at least three words."""
    return answer.islower() and len(words(answer)) >= 3


def starts_with(instruction: str, answer: str) -> bool:
    """The given phrase, then at least three words."""
    (phrase,) = quoted(instruction)
    start, rest = answer[: len(phrase)], answer[len(phrase) :]
    return start == phrase and len(words(rest)) >= 3


def ends_with(instruction: str, answer: str) -> bool:
    """At least three words, then the given phrase."""
    (phrase,) = quoted(instruction)
    rest, end = answer.strip()[: -len(phrase)], answer.strip()[-len(phrase) :]
    return end == phrase and len(words(rest)) >= 3


def max_words(instruction: str, answer: str) -> bool:
    """Three words at least, and no more than asked for."""
    return 3 <= len(words(answer)) <= number(instruction)


def exact_sentences(instruction: str, answer: str) -> bool:
    """As many sentences as asked for, in one line, each of at least three words and with its mark at the end."""
    found = sentences(answer)
    whole = all(len(words(piece)) >= 3 and re.search(r"[.!?][\"')]*$", piece) for piece in found)
    return len(found) == number(instruction) and whole and "\n" not in answer.strip()


def json_keys(instruction: str, answer: str) -> bool:
    """A JSON object with exactly the given keys and with texts that are not empty, and nothing else."""
    try:
        value = json.loads(answer)
    except ValueError:
        return False
    keys = sorted(quoted(instruction))
    texts = isinstance(value, dict) and all(isinstance(text, str) and text.strip() for text in value.values())
    return texts and sorted(value) == keys


def in_quotes(instruction: str, answer: str) -> bool:
    """The whole answer in one pair of double quotes, at least three words."""
    text = answer.strip()
    return re.fullmatch(r'"[^"]+"', text) is not None and len(words(text)) >= 3


def question(instruction: str, answer: str) -> bool:
    """One question and nothing else."""
    text = answer.strip()
    return text.endswith("?") and len(sentences(text)) == 1 and len(words(text)) >= 3 and "\n" not in text


CHECKERS: dict[str, Callable[[str, str], bool]] = {
    "one_word": one_word,
    "bullets": bullets,
    "numbered": numbered,
    "lowercase": lowercase,
    "starts_with": starts_with,
    "ends_with": ends_with,
    "max_words": max_words,
    "sentences": exact_sentences,
    "json_keys": json_keys,
    "in_quotes": in_quotes,
    "question": question,
}
