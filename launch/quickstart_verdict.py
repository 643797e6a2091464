#!/usr/bin/env python
"""Say whether the quickstart's model learnt to do as it is told, from the run's summary.json.

    python launch/quickstart_verdict.py --config launch/recipes/quickstart.yaml [flags of train_dpo.py]

Exit codes: 0 the share of obeying answers rose, 1 it did not, 2 there is no such share.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dpo.config import parse_or_exit


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    path = Path(parse_or_exit(argv).run.dir) / "summary.json"
    if not path.is_file():
        print(f"error: {path} is not there: has the run finished?", file=sys.stderr)
        return 2
    summary = json.loads(path.read_text(encoding="utf-8"))
    before, after = ((summary.get(f"checker_{side}") or {}).get("all") for side in ("before", "after"))
    if before is None or after is None:
        print(f"error: {path} has no checker_before and checker_after: run it with eval.generate", file=sys.stderr)
        return 2
    if after <= before:
        print(f"error: {before:.0%} of the answers obeyed before training, {after:.0%} after it", file=sys.stderr)
        return 1
    print(f"It learnt: {before:.0%} of the answers did as they were told before, {after:.0%} do now.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
