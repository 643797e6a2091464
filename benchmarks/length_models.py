"""Seeded models of the token lengths of well-known preference sets, for benchmarks without their texts.

Each length is log-normal: a median and a spread of its logarithm, so that its 10th and 90th percentiles are median *
exp(-+1.2816 spread). Chosen and rejected lengths are correlated. A pair longer than `max_length` is drawn again, as a
set that was filtered for it would be. Texts are random words of one token each (`random_model`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from benchmarks.random_model import random_words
from data_utils.schema import PairColumns, PreferencePair

Z90 = 1.2816
"""The 90th percentile of a standard normal."""


@dataclass(frozen=True, slots=True)
class Length:
    """A log-normal number of tokens."""

    median: float
    spread: float

    @property
    def percentiles(self) -> tuple[int, int, int]:
        """10th, 50th and 90th."""
        return tuple(round(self.median * math.exp(z * self.spread)) for z in (-Z90, 0, Z90))  # type: ignore[return-value]

    @property
    def mean(self) -> float:
        """Of the untruncated distribution."""
        return self.median * math.exp(self.spread**2 / 2)

    def at(self, normal: float) -> int:
        """The length at a standard normal's value; at least one token."""
        return max(1, round(self.median * math.exp(self.spread * normal)))


@dataclass(frozen=True, slots=True)
class LengthModel:
    """Tokens of prompt, chosen and rejected of a preference set.

    Attributes:
        correlation: of the logarithms of chosen and rejected lengths.
        source: where the numbers come from.
    """

    prompt: Length
    chosen: Length
    rejected: Length
    correlation: float
    source: str

    @property
    def prompt_factor(self) -> float:
        """(2P + C + R) / (P + C + R) of the means: what computing the prompt once saves."""
        once = self.prompt.mean + self.chosen.mean + self.rejected.mean
        return 1 + self.prompt.mean / once

    def draw(self, random: Random, max_length: int) -> tuple[int, int, int]:
        """Lengths of one pair whose longer sequence, with an EOS token, fits `max_length`."""
        while True:
            prompt = self.prompt.at(random.gauss(0, 1))
            shared, own = random.gauss(0, 1), random.gauss(0, 1)
            chosen = self.chosen.at(shared)
            rejected = self.rejected.at(self.correlation * shared + math.sqrt(1 - self.correlation**2) * own)
            if prompt + max(chosen, rejected) + 1 <= max_length:
                return prompt, chosen, rejected


LENGTH_MODELS = {
    "hh": LengthModel(
        Length(84, 1.0),
        Length(33, 0.73),
        Length(39, 0.79),
        0.3,
        "fitted to the 2,299 sound pairs of the harmless-base test split, 32k BPE",
    ),
    "ultrafeedback": LengthModel(
        Length(78, 1.2),
        Length(290, 0.9),
        Length(260, 0.9),
        0.53,
        "prompts and correlation fitted to 994 pairs, 32k BPE; responses to the factor of 1.17 of the whole set",
    ),
    "capybara": LengthModel(
        Length(400, 0.7),
        Length(330, 0.6),
        Length(290, 0.7),
        0.5,
        "the 8.6 kB per row of prompt and conversation that the 15k KTO form's card gives; spreads are guesses",
    ),
    "metamath": LengthModel(
        Length(650, 0.35),
        Length(105, 0.45),
        Length(105, 0.45),
        0.97,
        "the 3.07 kB per row and 6.5 % edits that MetaMath_DPO_FewShot's card gives; spreads are guesses",
    ),
    "helpsteer": LengthModel(
        Length(400, 0.7),
        Length(95, 0.7),
        Length(95, 0.7),
        0.6,
        "a guess at long contexts with short answers: no published percentiles were found",
    ),
    "tldr": LengthModel(
        Length(330, 0.45),
        Length(33, 0.3),
        Length(31, 0.32),
        0.4,
        "the 1.69 kB per comparison that the card of openai_summarize_comparisons gives, and its factor of 1.85",
    ),
    "p64": LengthModel(
        Length(64, 0.0),
        Length(200, 0.6),
        Length(200, 0.6),
        0.5,
        "made up: prompts of 64 tokens, where sharing them saves little",
    ),
}


def drawn_pairs(model: LengthModel, max_length: int, vocabulary: int, seed: int) -> Iterator[PreferencePair]:
    """Endless pairs of random words with the model's lengths; the same ones for the same arguments."""
    random = Random(seed)
    number = 0
    while True:
        sides = (f" {random_words(random, length, vocabulary)}" for length in model.draw(random, max_length))
        yield PreferencePair(*sides, columns=PairColumns(), where=f"drawn:{number}")
        number += 1
