"""Pairs that are there more than once, by 64-bit hashes of their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from data_utils.schema import Message, PreferencePair, Text


def text_hash(text: str) -> int:
    """64 bits of BLAKE2b; by chance two of ten million texts share it with a probability of 3e-6."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def content_keys(pair: PreferencePair) -> tuple[str, str, str]:
    """Texts of prompt (with tools), chosen and rejected that are equal only if roles, tools and contents are."""
    tools = _as_text(pair.tools) if pair.tools else ""
    return _key(pair.prompt) + tools, _key(pair.chosen), _key(pair.rejected)


def pair_hash(pair: PreferencePair) -> int:
    """Of the three keys."""
    return text_hash("\x1d".join(content_keys(pair)))


def said(turn: Message) -> str:
    """What a turn says: its content, and the tools it calls."""
    calls = turn.get("tool_calls")
    content = turn.get("content") or ""
    return f"{content}\n{_as_text(calls)}".strip() if calls else content


def _as_text(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=repr)  # tables may hold dates and bytes


def _key(text: Text) -> str:
    """A lone turn is keyed like a plain string, so that the same prompt is found in either form."""
    if isinstance(text, str):
        return text
    if len(text) == 1:
        return said(text[0])
    return "\x1e".join(f"{turn['role']}\x1f{said(turn)}" for turn in text)


def num_repeats(hashes: Sequence[np.ndarray]) -> int:
    """How many pairs repeat an earlier one, of all parts together."""
    every = np.concatenate([np.empty(0, np.uint64), *hashes])
    return len(every) - len(np.unique(every))
