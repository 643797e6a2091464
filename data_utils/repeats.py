"""Pairs that are there more than once, by 64-bit hashes of their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from data_utils.schema import PreferencePair


def text_hash(text: str) -> int:
    """64 bits of BLAKE2b; by chance two of ten million texts share it with a probability of 3e-6."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def pair_hash(pair: PreferencePair) -> int:
    """Of prompt, chosen, rejected and tools."""
    return text_hash(json.dumps([pair.prompt, pair.chosen, pair.rejected, pair.tools], sort_keys=True))


def num_repeats(hashes: Sequence[np.ndarray]) -> int:
    """How many pairs repeat an earlier one, of all parts together."""
    every = np.concatenate([np.empty(0, np.uint64), *hashes])
    return len(every) - len(np.unique(every))
