"""`python -m dpo.judge RUN --command '...'`: how often a judge prefers a run's answers to those before training.

The command is started once, without a shell. It reads one JSON object per line, {"prompt", "a", "b"}, and writes one
line for each: a, b or tie. Every prompt is asked twice, with the answers changing places, so that a judge who likes
what comes first wins nothing by it.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo.files import read_rows, write_atomically
from dpo.refusals import ConfigError
from dpo.report.answers import ANSWERS_FILE, JUDGE_FILE
from dpo.report.texts import plain

POINTS = {"a": 1.0, "b": 0.0, "tie": 0.5}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dpo.judge",
        description=__doc__,
        epilog="exit codes: 0 judged; 2 no answers, or the judge failed.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="a run directory with answers (eval.generate=true)")
    parser.add_argument("--command", required=True, metavar="CMD", help="the judge and its arguments, in one word")
    parser.add_argument(
        "--json", metavar="FILE", type=Path, help=f"result (default RUN/{JUDGE_FILE}, which reports show)"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Ask, count, write; returns the exit code."""
    arguments = parser().parse_args(argv)
    try:
        result = judge(arguments.run, arguments.command)
        write_atomically(arguments.json or arguments.run / JUDGE_FILE, json.dumps(result, indent=1) + "\n")
    except (ConfigError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(
        f"preferred to the answers before training: {result['win_rate']:.1%} ({result['low']:.1%} to"
        f" {result['high']:.1%}) of {result['prompts']} prompts; {result['consistent']:.0%} judged alike in both orders"
    )
    return 0


def judge(run: Path, command: str) -> dict[str, Any]:
    """Win rate of the answers after training against those before: 1 for a win, 1/2 for a tie, over both orders.

    Returns:
        win_rate with its 95 % interval (low, high: mean +- 1.96 standard errors over prompts), prompts, consistent: the
        share of prompts with one verdict in both orders, by_source: win rates, command.

    Raises:
        ConfigError: there are no answers to compare, or the judge did not answer for each.
    """
    rows = [row for row in read_rows(run / ANSWERS_FILE) if row["before"] and row["after"]]
    if not rows:
        raise ConfigError(f"{run}: no {ANSWERS_FILE} with answers before and after; train with --eval.generate true")
    first = [_question(row, "after", "before") for row in rows]
    second = [_question(row, "before", "after") for row in rows]
    verdicts = _ask(command, [*first, *second])
    forth, back = verdicts[: len(rows)], [1 - points for points in verdicts[len(rows) :]]
    wins = [(one + two) / 2 for one, two in zip(forth, back, strict=True)]
    rate = math.fsum(wins) / len(wins)
    spread = math.sqrt(math.fsum((win - rate) ** 2 for win in wins) / max(1, len(wins) - 1) / len(wins))
    kinds = sorted({row["source"] for row in rows} - {""})
    by_source = {kind: [win for row, win in zip(rows, wins, strict=True) if row["source"] == kind] for kind in kinds}
    return {
        "win_rate": rate,
        "low": max(0.0, rate - 1.96 * spread),
        "high": min(1.0, rate + 1.96 * spread),
        "prompts": len(rows),
        "consistent": sum(one == two for one, two in zip(forth, back, strict=True)) / len(rows),
        "by_source": {kind: math.fsum(values) / len(values) for kind, values in by_source.items()},
        "command": command,
    }


def _question(row: dict[str, Any], a: str, b: str) -> dict[str, str]:
    return {"prompt": plain(row["prompt"]), "a": row[a]["text"], "b": row[b]["text"]}


def _ask(command: str, questions: Sequence[dict[str, str]]) -> list[float]:
    """Points of answer a for each question."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"--command {command!r}: {error}") from None
    if not words:
        raise ConfigError("--command is empty: name the judge")
    lines = "".join(json.dumps(question) + "\n" for question in questions)
    try:
        done = subprocess.run(words, input=lines, capture_output=True, text=True, encoding="utf-8", check=False)
    except OSError as error:
        raise ConfigError(f"--command {words[0]}: {error.strerror}") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise ConfigError(f"the judge ended with exit code {done.returncode}: {last}")
    answers = [line.strip().lower() for line in done.stdout.splitlines()]
    if len(answers) != len(questions):
        raise ConfigError(f"the judge wrote {len(answers)} lines for {len(questions)} questions: one line for each")
    for number, answer in enumerate(answers, start=1):
        if answer not in POINTS:
            raise ConfigError(f"line {number} of the judge is {answer[:40]!r}: it must be a, b or tie")
    return [POINTS[answer] for answer in answers]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
