"""What a run was begun with and what this command says: told as a table, and refused unless it is allowed to differ."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from dpo.refusals import ConfigError


class Difference(NamedTuple):
    """One thing that is not as it was; `key` is what `checkpoint.allow_changes` has to name."""

    key: str
    old: Any
    new: Any


def refuse(
    differences: Sequence[Difference | tuple[str, Any, Any]], allowed: Sequence[str], what: str, show: bool
) -> list[Difference]:
    """The differences that are allowed.

    Args:
        allowed: `checkpoint.allow_changes`.
        what: which run or checkpoint they are differences from.
        show: also print them as a table (one rank does).

    Raises:
        ConfigError: some are not allowed; names them and the flag.
    """
    found = [Difference(*difference) for difference in differences]
    refused = [difference for difference in found if difference.key not in allowed]
    if not refused:
        return found
    if show:
        print(table(refused), file=sys.stderr)
    keys = " ".join(dict.fromkeys([*allowed, *(difference.key for difference in refused)]))
    listed = ", ".join(f"{key}: {old} there, {new} now" for key, old, new in refused)
    raise ConfigError(
        f"{what} with another config ({listed}): give another --run.dir, or --checkpoint.allow_changes {keys}"
    )


def table(differences: Sequence[Difference]) -> str:
    """Differences in three columns."""
    rows = [("changed", "in the run", "in this command"), *((d.key, str(d.old), str(d.new)) for d in differences)]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{key:<{widths[0]}}  {old:<{widths[1]}}  {new}" for key, old, new in rows)
