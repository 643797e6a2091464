"""docs/walkthrough.md shows code that stands where it says: a block below a link is in the file, at or near that line.

python -m tests.unit.test_walkthrough      writes the line numbers anew, where the code itself has not changed
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DRIFT = 30
"""Lines by which code may move, by edits above it, before the page must follow: the reader still lands near it."""
ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "walkthrough.md"
LINK = re.compile(r"\[`([\w/.]+):(\d+)`\]\(\.\./([\w/.]+)#L(\d+)\)\n```python\n(.*?)```", re.DOTALL)


def places(path: str, block: str) -> list[int]:
    """Lines, counted from 1, at which a file has a block."""
    lines, wanted = (ROOT / path).read_text(encoding="utf-8").splitlines(), block.splitlines()
    return [place + 1 for place in range(len(lines)) if lines[place : place + len(wanted)] == wanted]


def renumbered(page: str) -> str:
    """The page with each link at the one place that has its block."""

    def link(found: re.Match[str]) -> str:
        path, block = found[1], found[5]
        (place,) = places(path, block)
        return f"[`{path}:{place}`](../{path}#L{place})\n```python\n{block}```"

    return LINK.sub(link, page)


BLOCKS = LINK.findall(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("path", "line", "target", "target_line", "block"), BLOCKS)
def test_the_code_stands_where_the_page_says(path: str, line: str, target: str, target_line: str, block: str) -> None:
    assert (path, line) == (target, target_line)
    (place,) = places(path, block)
    near = abs(place - int(line)) <= DRIFT
    assert near, f"it is line {place} now: python -m tests.unit.test_walkthrough writes the numbers anew"


def test_every_block_and_every_file_is_looked_at() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert len(BLOCKS) == page.count("```python") >= 10
    for target in re.findall(r"\]\(\.\./([\w/.]+)(?:#L\d+)?\)", page):
        assert (ROOT / target).exists(), target


def test_another_line_is_noticed_and_corrected() -> None:
    page = PAGE.read_text(encoding="utf-8")
    (first, *_) = BLOCKS
    wrong = page.replace(f"{first[0]}:{first[1]}`", f"{first[0]}:1`").replace(
        f"{first[0]}#L{first[1]}", f"{first[0]}#L1"
    )
    assert wrong != page
    assert renumbered(wrong) == renumbered(page)


if __name__ == "__main__":
    PAGE.write_text(renumbered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
