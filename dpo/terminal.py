"""What a person sees: a first screen, progress, a last table. Only rank 0 prints.

On a terminal a live bar; in a batch job's log or on a dumb terminal one line per logged step. All but paths fits 80
columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

LABELS = {"eval_loss": "loss", "eval_rewards/accuracies": "accuracy", "eval_rewards/margins": "margin"}


class Terminal:
    """The run's screen; silent on every rank but the main one."""

    def __init__(self, is_main: bool) -> None:
        self.console = Console(quiet=not is_main, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    @property
    def _is_live(self) -> bool:
        """Whether lines can be drawn over: no file, no batch job's log, no TERM=dumb."""
        return self.console.is_terminal and not self.console.is_dumb_terminal

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, markup=False)

    def facts(self, facts: Mapping[str, str]) -> None:
        """The first screen: a name and a value per line."""
        for name, value in facts.items():
            self.say(f"{name:<10} {value}")

    def start(self, step: int, num_steps: int) -> None:
        """Begin to show progress."""
        if not self._is_live:
            return
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=8),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        progress = Progress(*columns, console=self.console)
        self._task = progress.add_task("", total=num_steps, completed=step, note="")
        progress.start()
        self._progress = progress

    def advance(self, step: int, note: str | None = None) -> None:
        """A step was taken; `note` is shown beside the bar."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step)
            if note is not None:
                self._progress.update(self._task, note=note)

    def log(self, row: Mapping[str, Any], num_steps: int, pairs_per_step: int) -> None:
        """A logged step."""
        left_s = (
            (num_steps - row["step"]) * pairs_per_step / row["pairs_per_second"]
            if row["pairs_per_second"]
            else math.inf
        )
        note = (
            f"loss {row['loss']:.4f} margin {row['rewards/margins']:.2f} acc {row['rewards/accuracies']:.2f}"
            f" {row['pairs_per_second']:.3g} pairs/s"
        )
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=row["step"], note=note)
        else:
            self.say(f"step {row['step']}/{num_steps}  {note}  ETA {duration(left_s)}")

    def stop(self) -> None:
        """End the progress display."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def metrics(self, title: str, values: Mapping[str, float]) -> None:
        """Names and numbers, one per line."""
        table = Table(title=Text(title), title_justify="left", show_header=False)
        table.add_column()
        table.add_column(justify="right")
        for name, value in values.items():
            table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:.4f}")
        self.console.print(table)

    def before_after(self, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        """The held-out set before and after training."""
        table = Table(title=f"held-out pairs: {after['eval_pairs']:.0f}", title_justify="left")
        for heading in ("", "before", "after"):
            table.add_column(heading, justify="left" if not heading else "right")
        for key, label in LABELS.items():
            table.add_row(label, f"{before[key]:.4f}" if before else "-", f"{after[key]:.4f}")
        self.console.print(table)


def duration(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def count(number: float) -> str:
    """A count as 135M, 8.0B or 960."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.0f}"
