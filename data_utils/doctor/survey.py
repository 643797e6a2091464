"""The one pass over the rows: reads, checks, measures; keeps about 200 bytes per row and the first faults."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from data_utils.doctor.duplicates import SKETCH_SIZE, sketch
from data_utils.doctor.report import Refused
from data_utils.doctor.texts import BITS, CUES, PairTexts, cue_outcomes, plain_texts, text_flags
from data_utils.repeats import text_hash
from data_utils.schema import PreferencePair, RowError, TokenizedPair
from data_utils.shards import ShardSet

CHUNK_ROWS = 256
MAX_PLACES = 3
MAX_NAMES = 10_000  # sources that are told apart
OTHER_SOURCES = "(other sources)"
EXAMPLE_TOKENS = (30, 400)  # a row of this many tokens is a good one to show

Tokenize = Callable[[list[PreferencePair], list[int]], list[TokenizedPair | RowError]]


@dataclass
class Refusals:
    """Rows that cannot be trained on, counted by cause."""

    by_cause: dict[str, Refused] = field(default_factory=dict)

    def add(self, cause: str, where: str, message: str) -> None:
        """Count one row."""
        old = self.by_cause.get(cause, Refused(cause, 0, [], message.removeprefix(f"{where}: ")))
        self.by_cause[cause] = Refused(cause, old.count + 1, [*old.places, where][:MAX_PLACES], old.message)

    @property
    def count(self) -> int:
        """Rows of all causes."""
        return sum(refused.count for refused in self.by_cause.values())


@dataclass
class Survey:
    """What is kept of a set of rows. Arrays have one entry for each pair that could be read, in the order of rows.

    Attributes:
        num_rows: all rows, unreadable ones included.
        rows: (pairs,) int64 index into the shard set.
        lengths: (pairs, 4) int64 of prompt, chosen, rejected, and of what both responses begin with.
        flags: (pairs,) int64 bits of `texts.FLAGS`.
        hashes: (pairs, 3) uint64 of prompt, chosen, rejected.
        prompt_sketches, response_sketches: (pairs, SKETCH_SIZE) uint8.
        cues: (cues, 2, 2) int64 pairs by whether chosen and whether rejected has the cue.
        example: a pair worth showing token by token.
    """

    num_rows: int
    rows: np.ndarray
    lengths: np.ndarray
    flags: np.ndarray
    hashes: np.ndarray
    prompt_sketches: np.ndarray
    response_sketches: np.ndarray
    cues: np.ndarray
    sources: Counter[str] = field(default_factory=Counter)
    families: Counter[str] = field(default_factory=Counter)
    refusals: Refusals = field(default_factory=Refusals)
    example: TokenizedPair | None = None

    @staticmethod
    def empty(num_rows: int) -> Survey:
        """Room for `num_rows` pairs."""
        return Survey(
            num_rows=num_rows,
            rows=np.empty(num_rows, np.int64),
            lengths=np.empty((num_rows, 4), np.int32),
            flags=np.empty(num_rows, np.int32),
            hashes=np.empty((num_rows, 3), np.uint64),
            prompt_sketches=np.empty((num_rows, SKETCH_SIZE), np.uint8),
            response_sketches=np.empty((num_rows, SKETCH_SIZE), np.uint8),
            cues=np.zeros((len(CUES), 2, 2), np.int64),
        )

    def cut(self, size: int) -> None:
        """Keep the first `size` entries of the arrays."""
        for name in ("rows", "lengths", "flags", "hashes", "prompt_sketches", "response_sketches"):
            setattr(self, name, getattr(self, name)[:size])


@dataclass(frozen=True)
class Measure:
    """How to tokenize pairs without cutting them, and what their ids are held against.

    Attributes:
        bos_id: None where the tokenizer has none.
        control_ids: what a response may end in.
    """

    tokenize: Tokenize
    bos_id: int | None
    control_ids: frozenset[int]


def survey(shards: ShardSet, measure: Measure | None, advance: Callable[[int], None]) -> Survey:
    """Read all rows once, in order.

    Args:
        measure: None: lengths are in characters.
        advance: told how many more rows were read.

    Raises:
        DataError: a file as a whole, or the tokenizer, cannot be used.
    """
    found = Survey.empty(len(shards))
    size = 0
    for start in range(0, len(shards), CHUNK_ROWS):
        indices = range(start, min(start + CHUNK_ROWS, len(shards)))
        pairs = _read(shards, indices, found.refusals)
        measured = _measure(pairs, measure, found)
        size = _note(found, size, measured)
        advance(len(indices))
    found.cut(size)
    return found


@dataclass(frozen=True)
class _Measured:
    row: int
    pair: PreferencePair
    lengths: tuple[int, int, int, int]
    flags: int


def _read(shards: ShardSet, indices: range, refusals: Refusals) -> list[tuple[int, PreferencePair]]:
    pairs = []
    for index in indices:
        try:
            pairs.append((index, shards.pair(index)))
        except RowError as error:
            refusals.add(error.cause, error.where, str(error))
    return pairs


def _measure(pairs: list[tuple[int, PreferencePair]], measure: Measure | None, found: Survey) -> list[_Measured]:
    if measure is None:
        return [_Measured(row, pair, (-1, -1, -1, -1), 0) for row, pair in pairs]
    measured = []
    results = measure.tokenize([pair for _, pair in pairs], [row for row, _ in pairs])
    for (row, pair), result in zip(pairs, results, strict=True):
        if isinstance(result, RowError):
            found.refusals.add(result.cause, result.where, str(result))
            continue
        measured.append(_Measured(row, pair, _token_lengths(result), _token_flags(result, measure)))
        found.example = _better_example(found.example, result)
    return measured


def _token_lengths(pair: TokenizedPair) -> tuple[int, int, int, int]:
    common = _common_length(pair.chosen_ids, pair.rejected_ids)
    return len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids), common


def _token_flags(pair: TokenizedPair, measure: Measure) -> int:
    starts_twice = measure.bos_id is not None and (pair.prompt_ids + pair.chosen_ids)[:2] == [measure.bos_id] * 2
    ends = {pair.chosen_ids[-1], pair.rejected_ids[-1]} <= measure.control_ids
    return (BITS["double_bos"] if starts_twice else 0) | (0 if ends else BITS["no_end"])


def _better_example(best: TokenizedPair | None, pair: TokenizedPair) -> TokenizedPair:
    """The first pair of a good length, preferably one of several turns of which not all are scored."""

    def rank(pair: TokenizedPair) -> tuple[bool, bool]:
        low, high = EXAMPLE_TOKENS
        has_spans = pair.chosen_scored is not None or pair.rejected_scored is not None
        return low <= sum(_token_lengths(pair)[:3]) <= high, has_spans

    return pair if best is None or rank(pair) > rank(best) else best


def _common_length(chosen: list[int] | str, rejected: list[int] | str) -> int:
    both = zip(chosen, rejected, strict=False)
    return next((place for place, (a, b) in enumerate(both) if a != b), min(len(chosen), len(rejected)))


def _note(found: Survey, size: int, measured: list[_Measured]) -> int:
    """Put a chunk into the arrays; returns how many entries they have now."""
    if not measured:
        return size
    texts = [plain_texts(item.pair) for item in measured]
    for place, (item, text) in enumerate(zip(measured, texts, strict=True), start=size):
        found.rows[place] = item.row
        found.lengths[place] = _char_lengths(text) if item.lengths[0] < 0 else item.lengths
        found.flags[place] = item.flags | text_flags(text)
        found.hashes[place] = [text_hash(key) for key in text.keys]
        for cue, (chosen, rejected) in enumerate(cue_outcomes(text)):
            found.cues[cue, int(chosen), int(rejected)] += 1
        _count_names(found, item.pair)
    end = size + len(measured)
    found.prompt_sketches[size:end] = sketch([text.user for text in texts])
    found.response_sketches[size:end] = sketch([f"{text.chosen}\n{text.rejected}" for text in texts])
    return end


def _char_lengths(texts: PairTexts) -> tuple[int, int, int, int]:
    return len(texts.prompt), len(texts.chosen), len(texts.rejected), _common_length(texts.chosen, texts.rejected)


def _count_names(found: Survey, pair: PreferencePair) -> None:
    source = pair.columns.source or pair.where.rpartition(":")[0]
    if source not in found.sources and len(found.sources) >= MAX_NAMES:
        source = OTHER_SOURCES
    found.sources[source] += 1
    found.families[pair.family] += 1
