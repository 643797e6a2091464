"""The report on a terminal of 80 columns."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_utils.doctor.report import Finding, Report

WIDTH = 80
VERDICTS = {
    "sound": ("green", "SOUND: nothing to worry about was found"),
    "look": ("yellow", "LOOK AT THESE: the trainer would run"),
    "refused": ("red", "REFUSED: the trainer would not run on this"),
}
MARKS = {"refused": ("red", "x"), "look": ("yellow", "!"), "note": ("dim", "-")}


def print_summary(report: Report, page: str) -> None:
    """The verdict and the main numbers; the rest is on the page."""
    console = Console(highlight=False)
    console = Console(highlight=False, width=min(console.width, WIDTH))
    color, title = VERDICTS[report.verdict]
    console.print(Text(f"{title} (exit code {report.exit_code})", style=f"bold {color}"))
    for finding in report.findings:
        _print_finding(console, finding)
    console.print(_counts(report))
    if report.lengths is not None:
        console.print(_lengths(report))
    if report.cuts is not None:
        console.print(_cuts(report))
    for line in _facts(report):
        console.print(Text(line))
    console.print(Text(f"page: {page}"), soft_wrap=True)


def _print_finding(console: Console, finding: Finding) -> None:
    color, mark = MARKS[finding.level]
    table = Table.grid(padding=(0, 1))
    table.add_column(style=color)
    table.add_column(justify="right", min_width=6)
    table.add_column()
    text = Text(finding.what) + Text(f" [{_short(finding)}]" if finding.places else "", style="dim")
    table.add_row(mark, f"{finding.count:,}" if finding.count else "", text)
    console.print(table)


def _short(finding: Finding) -> str:
    """The places, each file by its last name and only where it changes."""
    shown, last = [], ""
    for place in finding.places:
        file, _, line = place.rpartition(":")
        shown.append(line if file == last else f"{file.rpartition('/')[2]}:{line}")
        last = file
    return ", ".join([*shown, "..."] if finding.count > len(shown) else shown)


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), title_style="bold")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    return table


def _counts(report: Report) -> Table:
    table = _table("\nrows that could be read", "source", "pairs")
    sources = report.train.sources
    for source in sources[:8]:
        table.add_row(Text(source.name), f"{source.pairs:,}")
    if len(sources) > 8:
        table.add_row(f"{len(sources) - 8} more", f"{sum(source.pairs for source in sources[8:]):,}")
    for family in report.train.families:
        if family.name:
            table.add_row(Text(f"converted from {family.name}"), f"{family.pairs:,}")
    return table


def _lengths(report: Report) -> Table:
    assert report.lengths is not None
    table = _table(f"\nlengths in {report.setting.unit}", "", "p5", "p50", "p95", "p99", "max")
    for part, lengths in report.lengths.items():
        p = lengths.percentiles
        table.add_row(part, *(f"{value:,}" for value in (p.p5, p.p50, p.p95, p.p99, p.max)))
    return table


def _cuts(report: Report) -> Table:
    assert report.cuts is not None
    headings = ("max_length", "pairs cut", "responses cut", "prompts too long", "tokens lost")
    table = _table("\nwhat max_length cuts", *headings)
    for cut in report.cuts:
        name = f"{cut.max_length:,}{' (yours)' if cut.max_length == report.setting.max_length else ''}"
        counts = (f"{value:,}" for value in (cut.pairs_cut, cut.responses_cut, cut.prompts_too_long))
        table.add_row(name, *counts, f"{cut.lost_fraction:.1%}")
    return table


def _facts(report: Report) -> list[str]:
    lines = [""]
    if report.layouts is not None:
        saved = report.layouts
        lines.append(
            f"layouts: packed computes {saved.padded_over_packed:.2f}x less than padded, shared another "
            f"{saved.packed_over_shared:.2f}x"
        )
    if report.length_bias is not None:
        lines.append(f"picking the longer response is right for {report.length_bias.accuracy:.1%} of pairs")
    if report.leakage is not None:
        leak = report.leakage
        lines.append(
            f"evaluation pairs also in training: {leak.same_pair:,} same pair, {leak.same_prompt:,} same prompt, "
            f"{leak.near_prompt:,} nearly the same prompt, of {leak.eval_pairs:,}"
        )
    return lines
