"""What a person sees: a first screen, progress, a last table. Only rank 0 prints.

On a terminal a live bar; in a batch job's log or on a dumb terminal one line per logged step. All but paths fits 80
columns.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

LABELS = {
    "eval_loss": "loss",
    "eval_rewards/accuracies": "accuracy",
    "eval_rewards/margins": "margin",
    "eval_drift/chosen": "drift of log p(chosen)",
    "eval_drift/rejected": "drift of log p(rejected)",
    "eval_kl_per_token/chosen": "KL per token, chosen",
}
Item = TypeVar("Item")


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

    def evaluated(self, step: int, num_steps: int, row: Mapping[str, float]) -> None:
        """An evaluation on the way."""
        self.say(
            f"step {step}/{num_steps}  held out: loss {row['eval_loss']:.4f} margin {row['eval_rewards/margins']:.2f}"
            f" acc {row['eval_rewards/accuracies']:.2f}"
        )

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
            table.add_row(name, f"{value:,}" if isinstance(value, int) else _number(value))
        self.console.print(table)

    def progress(self, items: Sequence[Item], what: str, unit: str) -> Iterator[Item]:
        """The items one by one, with a bar on a terminal and a line elsewhere."""
        if not self._is_live:
            self.say(f"{what}: {len(items)} {unit}")
            yield from items
            return
        columns = (TextColumn(what), MofNCompleteColumn(), TextColumn(unit), BarColumn(bar_width=8))
        with Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True) as progress:
            yield from progress.track(items)

    def before_after(self, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        """The held-out set before and after training."""
        table = Table(title=f"held-out pairs: {after['eval_pairs']:.0f}", title_justify="left")
        for heading in ("", "before", "after"):
            table.add_column(heading, justify="left" if not heading else "right")
        for key, label in LABELS.items():
            if key in after:
                table.add_row(label, _number(before.get(key)), _number(after[key]))
        self.console.print(table)

    def shares(
        self,
        num_answers: int,
        before: Mapping[str, float | None] | None,
        after: Mapping[str, float | None] | None,
        degenerate: tuple[float | None, float | None],
    ) -> None:
        """Which share of the answers passes the checker, in all and by kind, and which is empty, cut or repeats."""
        table = Table(title=f"answers to held-out prompts: {num_answers}", title_justify="left")
        for heading in ("", "before", "after"):
            table.add_column(heading, justify="left" if not heading else "right")
        for kind, share in (after or {}).items():
            label = "pass the checker" if kind == "all" else f"  {kind}"
            table.add_row(label, _percent((before or {}).get(kind)), _percent(share))
        table.add_row("empty, cut or repeating", *map(_percent, degenerate))
        self.console.print(table)

    def side_by_side(self, title: str, left: tuple[str, str], right: tuple[str, str]) -> None:
        """Two texts, each with its heading, next to each other."""
        width = min(self.console.width, 100)
        self.say("")
        self.say(textwrap.fill(_printable(title), width))
        table = Table(width=width)
        for heading, _ in (left, right):
            table.add_column(Text(heading), ratio=1, overflow="fold")
        table.add_row(Text(_printable(left[1])), Text(_printable(right[1])))
        self.console.print(table)


def _printable(text: str) -> str:
    """The text without what would steer a terminal."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


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
