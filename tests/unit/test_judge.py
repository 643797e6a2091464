"""Win rates by a command of the user's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dpo.judge import main
from dpo.report.answers import answers

LONGER = """
import json, sys
for line in sys.stdin:
    question = json.loads(line)
    gap = len(question["a"]) - len(question["b"])
    print("A" if gap > 0 else "b" if gap < 0 else "tie")
"""


def run_with_answers(folder: Path) -> Path:
    texts = [("short", "longer one"), ("the longer one", "short"), ("same", "same"), ("x", "xyz $(touch owned) '\"")]
    rows = [
        {
            "where": f"x:{number}",
            "source": "caps" if number < 2 else "",
            "prompt": "Say it",
            "before": {"text": before, "ended": True, "degenerate": False, "grade": None},
            "after": {"text": after, "ended": True, "degenerate": False, "grade": None},
        }
        for number, (before, after) in enumerate(texts)
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(folder: Path, script: str) -> str:
    (folder / "judge it.py").write_text(script)
    return f"{sys.executable} '{folder}/judge it.py'"


def test_wins_ties_and_losses_are_counted_over_both_orders(tmp_path: Path) -> None:
    run = run_with_answers(tmp_path)
    assert main([f"{run}", "--command", command(tmp_path, LONGER)]) == 0
    result = json.loads((run / "judge.json").read_text())
    assert (result["win_rate"], result["prompts"], result["consistent"]) == (2.5 / 4, 4, 1)
    assert result["by_source"] == {"caps": 0.5} and result["low"] < 2.5 / 4 < result["high"]
    found = answers(run)
    assert found is not None
    assert found["scores"] == [{"name": "Preferred by the judge", "count": 4, "before": None, "after": 0.625}]


def test_a_judge_who_likes_what_comes_first_finds_a_draw(tmp_path: Path) -> None:
    run = run_with_answers(tmp_path)
    script = "import sys\nfor line in sys.stdin: print('a')"
    assert main([f"{run}", "--command", command(tmp_path, script), "--json", f"{tmp_path}/mine.json"]) == 0
    result = json.loads((tmp_path / "mine.json").read_text())
    assert (result["win_rate"], result["consistent"]) == (0.5, 0)
    assert not (run / "judge.json").exists()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("import sys\nsys.exit('no key')", "the judge ended with exit code 1: no key"),
        ("print('a')", "the judge wrote 1 lines for 8 questions"),
        ("print('a\\n' * 7 + 'the first')", "line 8 of the judge is 'the first': it must be a, b or tie"),
    ],
)
def test_a_judge_that_fails_is_said_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], script: str, message: str
) -> None:
    run = run_with_answers(tmp_path)
    assert main([f"{run}", "--command", command(tmp_path, script)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not (run / "judge.json").exists()


def test_without_answers_there_is_nothing_to_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"{tmp_path}", "--command", "true"]) == 2
    assert "train with --eval.generate true" in capsys.readouterr().err
    assert main([f"{run_with_answers(tmp_path)}", "--command", "no-such-judge"]) == 2
    assert main([f"{tmp_path}", "--command", "'"]) == 2
