"""Small files of the run directory: read as a crash has left them, written completely or not at all. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; nothing where there is no file or it is torn."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of one object per line; nothing where there is no such file. A torn last row is left out.

    Raises:
        ValueError: another row is no JSON.
    """
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("}\n")]


def write_atomically(path: Path, text: str | Iterable[str]) -> None:
    """Write a file that appears under its name only when it is complete."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("w", encoding="utf-8") as file:
        file.writelines([text] if isinstance(text, str) else text)
    os.replace(aside, path)
