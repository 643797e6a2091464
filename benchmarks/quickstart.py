#!/usr/bin/env python
"""What runs of the quickstart measured: a record with a plot, and README.md's table.

launch/quickstart.sh --train.seed 0 --run.dir runs/seed-0          and so with seeds 1 and 2
python -m benchmarks.quickstart runs/seed-0 runs/seed-1 runs/seed-2 --record benchmarks/records
python -m benchmarks.quickstart --table benchmarks/records/DATE-quickstart.json
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.record import cpu_name, write_record
from dpo.config import build, load_record, to_dict
from dpo.config_text import RECORD_KEY, yaml_values
from dpo.files import read_object

COLORS = {"before": "#c9a227", "after": "#2f6f9f"}
LEFT, BAR, WIDTH, TOP = 96, 10, 640, 40
ROWS: tuple[tuple[str, str, Callable[[Any], Any], str], ...] = (
    ("answers that do as they are told", "checker", lambda share: share["all"], ".0%"),
    ("answers that are empty, repeat themselves or are cut", "degenerate", float, ".0%"),
    ("accuracy", "eval_accuracy", float, ".2f"),
    ("margin", "eval_margin", float, ".2f"),
    ("chosen answers' log-prob against the reference, nats per token", "eval_chosen_drift", float, "+.2f"),
)
"""What README's table says: label, key of summary.json, its number, format."""


def make_record(folders: Sequence[Path]) -> dict[str, Any]:
    """The record of finished runs that differ in nothing but their seed.

    Raises:
        ValueError: a folder holds no finished run, or the runs differ in more.
    """
    runs: list[dict[str, Any]] = []
    settings: list[dict[str, Any]] = []
    for folder in folders:
        path = str(folder / "config.yaml")
        document = load_record(path)
        config = to_dict(build(yaml_values(document, path)))
        del config["run"]
        runs.append({"seed": config["train"].pop("seed"), "summary": read_object(folder / "summary.json")})
        settings.append({**document[RECORD_KEY], "config": config})
        if not runs[-1]["summary"].get("checker_after"):
            raise ValueError(f"{folder / 'summary.json'} has no checker_after: has the run finished?")
        if settings[-1] != settings[0]:
            raise ValueError(f"{folder} and {folders[0]} differ in more than seed and run.dir")
    return {
        "benchmark": "quickstart",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": {"cpu": cpu_name(), "cores": os.cpu_count()},
        **settings[0],
        "runs": runs,
    }


def table(record: dict[str, Any]) -> str:
    """Before and after as Markdown: means over the seeds, and of several the least and the most after training."""
    runs = record["runs"]
    several = len(runs) > 1
    seeds = f"seed{'s' if several else ''} {', '.join(str(run['seed']) for run in runs)}"
    head = [seeds, "before", "after", *(["least to most"] if several else [])]
    lines = [head, ["---"] * len(head)]
    for label, key, number, form in ROWS:
        before, after = ([number(run["summary"][f"{key}_{side}"]) for run in runs] for side in ("before", "after"))
        cells = [statistics.mean(before), statistics.mean(after), min(after), max(after)]
        first, mean, least, most = (format(cell, form).replace("%", " %") for cell in cells)
        lines.append([label, first, mean, *([f"{least} to {most}"] if several else [])])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plot(record: dict[str, Any]) -> str:
    """An SVG: the share of obeying answers of each kind, before and after, means over the seeds."""
    summaries = [run["summary"] for run in record["runs"]]
    shares = {
        side: {kind: statistics.mean(one[f"checker_{side}"][kind] for one in summaries) for kind in _kinds(summaries)}
        for side in COLORS
    }
    height = TOP + len(_kinds(summaries)) * (2 * BAR + 8)
    parts = ['<text x="8" y="18" font-weight="bold">Held-out answers that do as they are told</text>']
    for number, (side, color) in enumerate(COLORS.items()):
        x = WIDTH - 150 + number * 74
        parts.append(
            f'<rect x="{x}" y="9" width="10" height="10" fill="{color}"/><text x="{x + 14}" y="18">{side}</text>'
        )
    for row, kind in enumerate(_kinds(summaries)):
        y = TOP + row * (2 * BAR + 8)
        parts.append(f'<text x="8" y="{y + 14}"{_bold(kind)}>{kind.replace("_", " ")}</text>')
        for below, (side, color) in enumerate(COLORS.items()):
            length, top = (WIDTH - LEFT - 60) * shares[side][kind], y + below * BAR
            parts.append(
                f'<rect x="{LEFT}" y="{top}" width="{length:.1f}" height="{BAR}" fill="{color}"/>'
                f'<text x="{LEFT + 4 + length:.1f}" y="{top + 9}" font-size="10">{shares[side][kind]:.0%}</text>'
            )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif"'
        ' font-size="12"><rect width="100%" height="100%" fill="white"/>' + "".join(parts) + "</svg>\n"
    )


def _read(path: Path) -> dict[str, Any]:
    """A record from its file. Raises ValueError where that is none."""
    record = read_object(path)
    if record.get("benchmark") != "quickstart":
        raise ValueError(f"{path} is no record of the quickstart")
    return record


def _kinds(summaries: Sequence[dict[str, Any]]) -> list[str]:
    """ "all", then the kinds in the order of the alphabet."""
    return sorted(summaries[0]["checker_after"], key=lambda kind: (kind != "all", kind))


def _bold(kind: str) -> str:
    return ' font-weight="bold"' if kind == "all" else ""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", help="run directories, one per seed")
    parser.add_argument("--record", type=Path, metavar="FOLDER", help="keep the record, dated, with a plot")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of this record instead")
    options = parser.parse_args(argv)
    if bool(options.runs) == bool(options.table):
        parser.error("give the run directories, or --table and a record")
    try:
        record = _read(options.table) if options.table else make_record(options.runs)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(record), end="")
    if options.record:
        path = options.record / f"{record['date'][:10]}-quickstart.json"
        write_record(path, record)
        path.with_suffix(".svg").write_text(plot(record), encoding="utf-8")
        print(f"record: {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
