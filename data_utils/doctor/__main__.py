"""`python -m data_utils.doctor PATH...`: what is wrong with preference data, before it costs money."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_utils.doctor.report import Report

DEFAULT_MAX_LENGTH = 1024  # the trainer's data.max_length
EPILOG = """exit codes: 0 sound; 1 the trainer would run, but look at these; 2 it would refuse, or bad arguments.
The page shows rows of the data as they are."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_utils.doctor",
        description="Says what is wrong with preference data, on the terminal and as one HTML page.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", nargs="+", metavar="PATH", help="training shards: files, folders or globs")
    parser.add_argument("--eval", nargs="+", default=[], metavar="PATH", help="held-out shards, to find leakage")
    parser.add_argument(
        "--model", metavar="M", help="folder or hub name whose tokenizer counts; without it lengths are in characters"
    )
    parser.add_argument(
        "--max_length", type=int, metavar="N", help=f"the trainer's data.max_length (default {DEFAULT_MAX_LENGTH})"
    )
    parser.add_argument(
        "--on_bad_row", choices=("error", "skip"), default="error", help="the trainer's data.on_bad_row (default error)"
    )
    parser.add_argument(
        "--max_bad_fraction",
        type=float,
        metavar="F",
        help="the trainer's data.max_bad_fraction with --on_bad_row skip (default 0.01)",
    )
    parser.add_argument("--page", default="doctor.html", metavar="FILE", help="the page (default doctor.html)")
    parser.add_argument("--json", metavar="FILE", help="everything that the page shows, for programs")
    return parser


def check(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse what would be ignored or cannot be meant; ends the program with exit code 2."""
    if arguments.max_length is not None and arguments.model is None:
        parser.error("--max_length counts tokens: give the --model whose tokenizer counts them")
    if arguments.max_length is not None and arguments.max_length < 2:
        parser.error(f"--max_length must be at least 2, not {arguments.max_length}")
    if arguments.max_bad_fraction is not None and arguments.on_bad_row == "error":
        parser.error("--max_bad_fraction does nothing with --on_bad_row error: set --on_bad_row skip, or drop it")
    if arguments.max_bad_fraction is not None and not 0 <= arguments.max_bad_fraction < 1:
        parser.error(f"--max_bad_fraction must be in [0, 1), not {arguments.max_bad_fraction:g}")
    for path in (arguments.page, arguments.json):
        if path is not None and not os.path.isdir(os.path.dirname(path) or "."):
            parser.error(f"{path}: no such folder; make it, or name another file")


def main(argv: Sequence[str]) -> int:
    """Examine, print, write; returns the exit code."""
    command_line = parser()
    arguments = command_line.parse_args(argv)
    check(arguments, command_line)
    from data_utils.doctor.examine import examine
    from data_utils.doctor.page import page
    from data_utils.doctor.summary import print_summary
    from data_utils.schema import DataError

    try:
        report = examine(
            arguments.path,
            arguments.eval,
            arguments.model,
            arguments.max_length or DEFAULT_MAX_LENGTH,
            arguments.on_bad_row,
            0.01 if arguments.max_bad_fraction is None else arguments.max_bad_fraction,
        )
        _write(arguments.page, page(report))
        if arguments.json is not None:
            _write(arguments.json, _as_json(report))
    except (DataError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print_summary(report, arguments.page)
    return report.exit_code


def _as_json(report: Report) -> str:
    import json
    from dataclasses import asdict

    return json.dumps(asdict(report), indent=1, ensure_ascii=False) + "\n"


def _write(path: str, text: str) -> None:
    from pathlib import Path

    from data_utils.schema import DataError

    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot write ({error.strerror}); name another file") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
