"""Answers to held-out prompts before and after training, as `eval.generate` leaves them in answers.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo.files import read_object, read_rows
from dpo.report.series import digits
from dpo.report.texts import plain, shorten

ANSWERS_FILE = "answers.jsonl"
JUDGE_FILE = "judge.json"
MAX_ANSWERS = 100
ANSWERS_BYTES = 700_000
SIDES = ("before", "after")


def answers(directory: Path, temperature: float = 0.0) -> dict[str, Any] | None:
    """What the page shows of a run's answers, which were chosen at a temperature; None where there are none.

    Grades are means: of all answers, and by the rows' source. A degenerate answer is empty, was cut, or repeats itself.
    """
    rows = read_rows(directory / ANSWERS_FILE)
    if not rows:
        return None
    chosen = [rows[place * len(rows) // min(len(rows), MAX_ANSWERS)] for place in range(min(len(rows), MAX_ANSWERS))]
    texts = [[plain(row["prompt"]), *(row[side]["text"] if row[side] else "" for side in SIDES)] for row in chosen]
    cut, _ = shorten(texts, ANSWERS_BYTES)
    shown = [
        {"prompt": text[0], "before": text[1], "after": text[2]}
        | {f"{side}_score": _of(row, side, "grade") for side in SIDES}
        for row, text in zip(chosen, cut, strict=True)
        if text is not None
    ]
    summary = read_object(directory / "summary.json")
    kl = [digits(summary[key]) for key in ("answers_kl", "answers_kl_per_token") if key in summary]
    found = {"count": len(rows), "rows": shown, "temperature": temperature, "kl": kl}
    return found | {"scores": [*_scores(rows), *_judged(directory)], "groups": _groups(rows)}


def _of(row: dict[str, Any], side: str, what: str) -> Any:
    return row[side][what] if row[side] else None


def _mean(rows: Sequence[dict[str, Any]], side: str, what: str) -> float | None:
    values = [float(value) for row in rows if (value := _of(row, side, what)) is not None]
    return digits(sum(values) / len(values)) if values else None


def _line(name: str, rows: Sequence[dict[str, Any]], what: str) -> dict[str, Any]:
    return {"name": name, "count": len(rows)} | {side: _mean(rows, side, what) for side in SIDES}


def _scores(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of all answers: the checker's grade, where there is a checker."""
    line = _line("Answers that pass the checker", rows, "grade")
    return [] if line["after"] is None else [line]


def _judged(directory: Path) -> list[dict[str, Any]]:
    """How often a judge preferred the answer after training to the one before; see `dpo.judge`."""
    verdict = read_object(directory / JUDGE_FILE)
    if not verdict:
        return []
    score = {"before": None, "after": digits(verdict["win_rate"])}
    return [{"name": "Preferred by the judge", "count": verdict["prompts"]} | score]


def _groups(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Grades by source, then the share of degenerate answers."""
    kinds = sorted({row["source"] for row in rows} - {""})
    graded = [_line(kind, [row for row in rows if row["source"] == kind], "grade") for kind in kinds]
    graded = [line for line in graded if line["after"] is not None]
    return [*_scores(rows), *graded, _line("Answers that are empty, cut or repeat themselves", rows, "degenerate")]
