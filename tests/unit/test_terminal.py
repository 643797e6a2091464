"""The screen: live on a terminal, line by line elsewhere, within 80 columns."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from dpo.terminal import Terminal

ROW = {
    "step": 12345,
    "loss": 0.6931,
    "rewards/margins": -10.25,
    "rewards/accuracies": 0.5,
    "pairs_per_second": 0.123,
}


@pytest.mark.parametrize(("term", "is_terminal"), [("xterm", False), ("dumb", True)])
def test_logs_and_dumb_terminals_get_plain_lines_of_80_columns(
    monkeypatch: pytest.MonkeyPatch, term: str, is_terminal: bool
) -> None:
    monkeypatch.setenv("TERM", term)
    file = io.StringIO()
    terminal = Terminal(is_main=True)
    terminal.console = Console(file=file, width=80, force_terminal=is_terminal, highlight=False, soft_wrap=True)
    terminal.start(0, 20000)
    terminal.advance(1)
    terminal.log(ROW, 20000, 64)
    terminal.stop()
    (line,) = file.getvalue().splitlines()
    assert line.startswith("step 12345/20000  loss 0.6931 margin -10.25") and "\x1b" not in line
    assert len(line) <= 88  # an ETA of thousands of hours


def test_evaluations_on_the_way_get_a_line_and_what_is_no_number_a_dash() -> None:
    file = io.StringIO()
    terminal = Terminal(is_main=True)
    terminal.console = Console(file=file, width=80, highlight=False, soft_wrap=True)
    row = {"eval_loss": 0.5, "eval_rewards/margins": 1.0, "eval_rewards/accuracies": 0.75, "eval_pairs": 4}
    terminal.evaluated(3, 9, row)
    terminal.before_after({}, row | {"eval_loss": float("nan")})
    first, *table = file.getvalue().splitlines()
    assert first == "step 3/9  held out: loss 0.5000 margin 1.00 acc 0.75"
    loss, accuracy = (next(line.split() for line in table if name in line) for name in ("loss", "accuracy"))
    assert loss[3] == loss[5] == "-" == accuracy[3] and accuracy[5] == "0.7500"
    assert not any("KL" in line for line in table), "it was not measured"


def test_a_terminal_of_80_columns_gets_a_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    file = io.StringIO()
    terminal = Terminal(is_main=True)
    terminal.console = Console(file=file, width=80, force_terminal=True, highlight=False, soft_wrap=True)
    terminal.start(0, 20000)
    terminal.log(ROW | {"rewards/margins": 1.25, "pairs_per_second": 12.3}, 20000, 64)
    terminal.stop()
    assert "\x1b" in file.getvalue() and "12.3 pairs/s" in file.getvalue()
    assert "step 12345/20000" not in file.getvalue().splitlines()[0]


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(is_main=False)
    terminal.say("hello")
    terminal.metrics("numbers", {"loss": 0.5})
    assert capsys.readouterr().out == ""
