"""Rows that are left out: counted by cause, and judged against the limit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from data_utils.schema import DataError, RowError


@dataclass
class Skipped:
    """Rows that were left out.

    Attributes:
        causes: how many for each cause.
        first: the place of one of each cause, the first in the order of places.
    """

    causes: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, errors: Iterable[RowError]) -> None:
        """Count more of them."""
        for error in errors:
            self.causes[error.cause] += 1
            self.first[error.cause] = min(error.where, self.first.get(error.cause, error.where))

    @staticmethod
    def together(shares: Iterable[Skipped]) -> Skipped:
        """What several have counted, such as all ranks."""
        whole = Skipped()
        for share in shares:
            whole.causes += share.causes
            whole.first |= {cause: min(where, whole.first.get(cause, where)) for cause, where in share.first.items()}
        return whole

    def judge(self, num_rows: int, max_bad_fraction: float) -> None:
        """Refuse data of which too much was left out.

        Args:
            num_rows: rows that these were left out of.

        Raises:
            DataError: more than `max_bad_fraction` of the rows; counts by cause, with the first place of each.
        """
        if self.causes.total() <= max_bad_fraction * num_rows:
            return
        causes = self.causes.most_common()
        table = ", ".join(f"{cause} {count} (first {self.first[cause]})" for cause, count in causes)
        raise DataError(
            f"{self.causes.total()} of {num_rows} rows are bad, more than data.max_bad_fraction={max_bad_fraction:g} "
            f"allows: {table}; clean the data or raise the limit"
        )
