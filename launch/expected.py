"""Hold a run against the values that its recipe expects: `python -m launch.expected RECIPE RUN_DIR [--json FILE]`.

A recipe states them in comments, such as `# expect: step 100 eval_loss 0.6098 +- 0.02`. A value is that of the row of
metrics.jsonl at or next before the step. Exit code 0, 1 when one is off, 2 when nothing is expected or no run is there.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LINE = re.compile(r"^# expect: step (\d+) (\S+) ([\d.]+) \+- ([\d.]+)$", flags=re.MULTILINE)


@dataclass(frozen=True)
class Expected:
    """A metric's value at a step, within a tolerance."""

    step: int
    metric: str
    value: float
    tolerance: float


def expectations(recipe: str) -> list[Expected]:
    """What the text of a recipe expects. Raises ValueError for a line that is malformed."""
    found = [Expected(int(step), name, float(value), float(by)) for step, name, value, by in _LINE.findall(recipe)]
    if len(found) != recipe.count("# expect:"):
        raise ValueError("an expectation is written `# expect: step 100 eval_loss 0.61 +- 0.02`")
    return found


def measured(rows: list[dict[str, Any]], expected: Expected) -> tuple[int, float] | None:
    """(step, value) of the last row up to the expected step that has the metric; None when the run is not there yet."""
    if not rows or rows[-1]["step"] < expected.step:
        return None
    having = [row for row in rows if row["step"] <= expected.step and row.get(expected.metric) is not None]
    return (having[-1]["step"], having[-1][expected.metric]) if having else None


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.expected", description=__doc__, formatter_class=Raw)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--json", metavar="FILE", help="write the comparison there")
    options = parser.parse_args(argv)
    try:
        wanted = expectations(options.recipe.read_text())
        rows = [json.loads(line) for line in (options.run_dir / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report = []
    for expected in wanted:
        found = measured(rows, expected)
        is_off = found is not None and abs(found[1] - expected.value) > expected.tolerance
        verdict = "not there yet" if found is None else "OFF" if is_off else "ok"
        value = "" if found is None else f"{found[1]:.4f} at step {found[0]}, "
        print(f"{verdict:<14}{expected.metric} {value}expected {expected.value} +- {expected.tolerance}")
        report.append(vars(expected) | {"found": found and found[1], "verdict": verdict})
    if options.json is not None:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    if not wanted:
        print(f"error: {options.recipe} expects nothing", file=sys.stderr)
        return 2
    return 1 if any(row["verdict"] == "OFF" for row in report) else 0


Raw = argparse.RawDescriptionHelpFormatter

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
