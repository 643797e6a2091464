"""The whole examination, from paths to a report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from data_utils.doctor.diagnosis import diagnose
from data_utils.doctor.report import Habit, Report, Setting
from data_utils.doctor.survey import Measure, survey
from data_utils.doctor.tokens import UNLIMITED, open_tokenizer, template_habits, token_row
from data_utils.shards import ShardSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def examine(
    train: Sequence[str],
    held_out: Sequence[str],
    model: str | None,
    max_length: int,
    on_bad_row: Literal["error", "skip"] = "error",
    max_bad_fraction: float = 0.01,
) -> Report:
    """Read all rows and say what is wrong with them; shows progress on a terminal.

    Args:
        train, held_out: files, folders or globs; `held_out` may be empty.
        model: whose tokenizer counts; None: lengths are in characters, and `max_length` is not looked at.

    Raises:
        DataError: files or a model that cannot be used.
    """
    shards = ShardSet.open(train)
    eval_shards = ShardSet.open(held_out) if held_out else None
    tokenizer, limit = (None, None) if model is None else _open(model, max_length)
    clamped = [] if limit is None or limit == max_length else [_clamped(limit, max_length)]
    measure = None if tokenizer is None else _measure(tokenizer)
    with _progress(len(shards) + (len(eval_shards) if eval_shards else 0)) as advance:
        found = survey(shards, measure, advance)
        eval_found = None if eval_shards is None else (eval_shards, survey(eval_shards, measure, advance))
    example = None
    if tokenizer is not None and limit is not None and found.example is not None:
        example = token_row(tokenizer, found.example, limit)
    return diagnose(
        Setting(
            train=list(train),
            eval=list(held_out),
            model=model,
            unit="characters" if tokenizer is None else "tokens",
            max_length=limit,
            on_bad_row=on_bad_row,
            max_bad_fraction=max_bad_fraction,
        ),
        (shards, found),
        eval_found,
        None if tokenizer is None else [*clamped, *template_habits(tokenizer)],
        example,
    )


def _open(model: str, max_length: int) -> tuple[PreTrainedTokenizerBase, int]:
    """The tokenizer, and `max_length` as the trainer takes it: at most the model's positions."""
    tokenizer, positions = open_tokenizer(model)
    return tokenizer, max_length if positions is None else min(max_length, positions)


def _clamped(limit: int, asked: int) -> Habit:
    return Habit("note", "positions", f"The model has {limit:,} positions: max_length is {limit:,}, not {asked:,}.")


def _measure(tokenizer: PreTrainedTokenizerBase) -> Measure:
    from data_utils.tokenize import PairTokenizer, control_ids

    bos_id = tokenizer.bos_token_id
    assert bos_id is None or isinstance(bos_id, int)
    return Measure(PairTokenizer(tokenizer, UNLIMITED).many, bos_id, control_ids(tokenizer))


@contextmanager
def _progress(num_rows: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("reading"), MofNCompleteColumn(), BarColumn(bar_width=24), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=num_rows)
        yield lambda rows: progress.advance(task, rows)
