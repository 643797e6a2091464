"""`python -m dpo.report RUN [RUN ...]`: the report of a run, or several runs beside each other."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dpo.refusals import ConfigError

DESCRIPTION = """Write the report of a run as one HTML page that needs nothing else; of several runs, a comparison.

One run: report.html in its directory, as the trainer does at its end; of a run that still trains, what there is so far.
Several: comparison.html in this folder."""
EPILOG = "exit codes: 0 written; 2 not a run directory, or the page cannot be written."


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dpo.report",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", nargs="+", metavar="RUN", type=Path, help="run directories (run.dir)")
    parser.add_argument("--page", metavar="FILE", type=Path, help="where to write the page")
    parser.add_argument("--json", metavar="FILE", type=Path, help="all that the page shows, for programs")
    return parser


def main(argv: Sequence[str]) -> int:
    """Collect and write; returns the exit code."""
    arguments = parser().parse_args(argv)
    from dpo.report.collect import document
    from dpo.report.page import REPORT_FILE, write

    runs: list[Path] = arguments.run
    default = runs[0] / REPORT_FILE if len(runs) == 1 else Path("comparison.html")
    try:
        data = document(runs)
        path = write(arguments.page or default, data)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except ConfigError as error:
        return _refuse(str(error))
    except OSError as error:
        return _refuse(f"{error.filename}: {error.strerror}; name another file with --page or --json")
    print(path)
    return 0


def _refuse(reason: str) -> int:
    print(f"error: {' '.join(reason.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
