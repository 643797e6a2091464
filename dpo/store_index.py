"""The readable side of a store: what each folder was made from, and why a run finds nothing in it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo.store import SUFFIX, Store, read_json, write_json
from dpo.store_blocks import count_pairs

_ABOUT, _MADE = "about.json", "made.jsonl"
_MOST_FOLDERS = 50


def keep_about(store: Store, facts: Mapping[str, Any], model: str) -> None:
    """Write down what the folder's numbers were computed from."""
    if not (store.folder / _ABOUT).exists():
        write_json(store.folder / _ABOUT, {"facts": dict(facts), "model": model})


def keep_making(store: Store, making: Mapping[str, Any]) -> None:
    """Write down what the token ids of the pairs were made with, once for each kind."""
    if making not in _makings(store.folder):
        with open(os.open(store.folder / _MADE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a") as file:
            file.write(json.dumps(dict(making), sort_keys=True) + "\n")


def why_elsewhere(root: Path, identity: str, facts: Mapping[str, Any]) -> list[str]:
    """What other folders of the store hold and why it is not used, in a line each; the likest first."""
    found = []
    for folder in sorted(root.iterdir())[:_MOST_FOLDERS]:
        about = read_json(folder / _ABOUT).get("facts") if folder.name != identity else None
        if isinstance(about, dict) and (num_pairs := _num_pairs(folder)):
            differences = [_name(key, about.get(key)) for key in facts if about.get(key) != facts[key]]
            found.append((len(differences), f"the store holds {num_pairs:,} pairs of {', '.join(differences)}"))
    return [line for _, line in sorted(found)[:3]]


def why_missing(store: Store, making: Mapping[str, Any]) -> str:
    """Why pairs of a run are not among those of this model: what is most like, but not the same, in their making."""
    makings = _makings(store.folder)
    if not makings or making in makings:
        return "they are other pairs"
    likest = min(makings, key=lambda made: sum(made.get(key) != making[key] for key in making))
    differences = [f"{key} {likest.get(key)}, now {making[key]}" for key in making if likest.get(key) != making[key]]
    return f"those were made with {'; '.join(differences)}"


def _makings(folder: Path) -> list[dict[str, Any]]:
    try:
        lines = (folder / _MADE).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    made = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    return [entry for entry in made if isinstance(entry, dict)]


def _num_pairs(folder: Path) -> int:
    try:
        return sum(map(count_pairs, folder.glob(f"*{SUFFIX}")))
    except OSError:
        return 0


def _name(key: str, value: Any) -> str:
    if key == "weights":
        return f"other weights (sha {str(value)[:8]})"
    return "another config.json" if key == "config" else f"{key} {value}"
