"""One rank's rows of a step, read, parsed and tokenized: the part of making a step that needs no torch."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from data_utils.assign import assign
from data_utils.order import Order
from data_utils.schema import PreferencePair, RowError, TokenizedPair
from data_utils.shards import ShardSet
from data_utils.tokenize import PairTokenizer

RETRY_PAUSES_S = (0.5, 1.0, 2.0)

logger = logging.getLogger("data_utils")


@dataclass(frozen=True, slots=True)
class TokenizedStep:
    """One rank's share of a step's window in token ids, in the window's order.

    Attributes:
        number: 0-based step.
        epoch: 0-based epoch that the window lies in.
        skipped: why this rank's other rows of the window were left out.
    """

    number: int
    epoch: int
    pairs: list[TokenizedPair]
    skipped: tuple[RowError, ...]


@dataclass(frozen=True)
class StepReader:
    """Reads the steps of one rank; a pure function of its fields and the step. Picklable, for worker processes."""

    shards: ShardSet
    tokenizer: PairTokenizer
    order: Order
    rank: int
    world_size: int
    on_bad_row: Literal["error", "skip"]

    def read(self, number: int, pause: Callable[[float], object] = time.sleep) -> TokenizedStep:
        """The pairs of a step, and with on_bad_row="skip" the rows left out.

        Args:
            pause: waits for so many seconds before a file that could not be read is tried again.

        Raises:
            RowError: with on_bad_row="error", of the first bad row in the window's order.
            DataError: the data cannot be used as a whole.
            OSError: a file cannot be read, also after `RETRY_PAUSES_S`.
        """
        epoch, _ = self.order.window(number)
        indices, rows = self._parse_patiently(number, pause)
        results = [_bare(row) if isinstance(row, RowError) else row for row in self._tokenize(rows, indices)]
        skipped = tuple(result for result in results if isinstance(result, RowError))
        if skipped and self.on_bad_row == "error":
            raise skipped[0]
        return TokenizedStep(number, epoch, [pair for pair in results if not isinstance(pair, RowError)], skipped)

    def indices(self, number: int) -> list[int]:
        """Global row numbers of this rank's share of a step, in the window's order."""
        _, window = self.order.window(number)
        return window[assign(self.shards.row_bytes(window), self.world_size)[self.rank]].tolist()

    def _parse_patiently(
        self, number: int, pause: Callable[[float], object]
    ) -> tuple[list[int], list[PreferencePair | RowError]]:
        """Row numbers and rows; a network mount may come back, so a file that cannot be read is tried again."""
        for attempt, seconds in enumerate(RETRY_PAUSES_S):
            try:
                return self._parse(number)
            except OSError as error:
                if attempt == 0:
                    patience = f"trying again for {sum(RETRY_PAUSES_S):g} s"
                    logger.warning("step %d: cannot read a shard (%s); %s", number, error, patience)
            pause(seconds)
        return self._parse(number)

    def _parse(self, number: int) -> tuple[list[int], list[PreferencePair | RowError]]:
        indices = self.indices(number)
        self.shards.unpack(indices)
        return indices, [self._row(index) for index in indices]

    def _row(self, index: int) -> PreferencePair | RowError:
        try:
            return self.shards.pair(index)
        except RowError as error:
            return error
        except OSError as error:
            if error.filename is None:  # a read of an open file says what went wrong, but not where
                error.filename = self.shards.where(index)
            raise

    def _tokenize(self, rows: list[PreferencePair | RowError], indices: list[int]) -> list[TokenizedPair | RowError]:
        """All parsed rows at once; rows that could not be parsed stay the errors that they are."""
        parsed = [(row, index) for row, index in zip(rows, indices, strict=True) if not isinstance(row, RowError)]
        tokenized = iter(self.tokenizer.many([row for row, _ in parsed], [index for _, index in parsed]))
        return [row if isinstance(row, RowError) else next(tokenized) for row in rows]


def _bare(error: RowError) -> RowError:
    """The error without its traceback and cause, whose frames hold the row's text for as long as it is kept."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
