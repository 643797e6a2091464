"""The shape of everything that the doctor says. `--json` writes it key for key; page and summary read nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data_utils.doctor.lengths import Cut, Histogram, Layouts, Percentiles

Verdict = Literal["sound", "look", "refused"]
FindingLevel = Literal["refused", "look", "note"]
Unit = Literal["tokens", "characters"]
EXIT_CODES: dict[Verdict, int] = {"sound": 0, "look": 1, "refused": 2}


@dataclass(frozen=True)
class Finding:
    """One line of the verdict.

    Attributes:
        count: rows that it concerns, 0 where it concerns none in particular.
        places: the first few of them, "file:line".
    """

    level: FindingLevel
    name: str
    count: int
    what: str
    places: list[str]


@dataclass(frozen=True)
class Setting:
    """What was examined, and as if trained how."""

    train: list[str]
    eval: list[str]
    model: str | None
    unit: Unit
    max_length: int | None
    on_bad_row: Literal["error", "skip"]
    max_bad_fraction: float


@dataclass(frozen=True)
class Count:
    """Pairs of one source or family."""

    name: str
    pairs: int


@dataclass(frozen=True)
class Refused:
    """Rows that the trainer refuses, of one cause; `message` is the first one's."""

    cause: str
    count: int
    places: list[str]
    message: str


@dataclass(frozen=True)
class SetCounts:
    """One set of rows: all of them, those that can be trained on, and the others by cause."""

    rows: int
    pairs: int
    sources: list[Count]
    families: list[Count]
    refused: list[Refused]


@dataclass(frozen=True)
class PartLengths:
    """Lengths of prompts, chosen or rejected responses, in the report's unit."""

    mean: float
    percentiles: Percentiles
    histogram: Histogram


@dataclass(frozen=True)
class LengthBias:
    """Attributes:
    chosen_longer, equal, rejected_longer: pairs.
    accuracy: of a rule that picks the longer response; ties count half.
    """

    chosen_longer: int
    equal: int
    rejected_longer: int
    accuracy: float


@dataclass(frozen=True)
class Cue:
    """How often a shallow property tells chosen from rejected.

    Attributes:
        chosen, rejected: fractions of the responses that have it.
        decides: fraction of pairs in which exactly one response has it.
        accuracy: of a rule that picks that response, in those pairs; None where there are none.
    """

    name: str
    what: str
    chosen: float
    rejected: float
    decides: float
    accuracy: float | None


@dataclass(frozen=True)
class NearPair:
    """Two rows that say nearly the same, and their estimated similarity."""

    where: str
    earlier: str
    similarity: float


@dataclass(frozen=True)
class Repeats:
    """Rows that come more than once; a row that others repeat counts as the first, not as a repeat."""

    distinct_prompts: int
    rows_with_a_shared_prompt: int
    most_rows_of_a_prompt: int
    duplicates: int
    contradictory: int
    near_duplicates: int
    nearest: list[NearPair]


@dataclass(frozen=True)
class Leak:
    """An evaluation row and the training row that gives it away."""

    eval: str
    train: str


@dataclass(frozen=True)
class Leakage:
    """Evaluation pairs by what training holds of them; each counts once, under the first that applies."""

    eval_pairs: int
    same_pair: int
    same_prompt: int
    near_prompt: int
    examples: list[Leak]


@dataclass(frozen=True)
class FlagCount:
    """Rows that raise one flag."""

    name: str
    level: Literal["look", "note"]
    what: str
    count: int
    places: list[str]


@dataclass(frozen=True)
class Habit:
    """One thing that the tokenizer or its chat template does."""

    level: Literal["look", "note", "fine"]
    name: str
    what: str


@dataclass(frozen=True)
class Reason:
    """Why a row is suspicious, how much that adds to its score, and the place in its text, if it is one place."""

    what: str
    weight: int
    evidence: str


@dataclass(frozen=True)
class Suspect:
    """A row to look at; texts are shortened."""

    where: str
    score: int
    reasons: list[Reason]
    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Token:
    """One token as it is read."""

    id: int
    text: str
    scored: bool


@dataclass(frozen=True)
class TokenRow:
    """One pair token by token; long parts are shown in part, `hidden` counts what is left out of each."""

    where: str
    prompt: list[Token]
    chosen: list[Token]
    rejected: list[Token]
    hidden: list[int]


@dataclass(frozen=True)
class Report:
    """All of it. Parts that need a model, evaluation data or at least one pair are None without."""

    verdict: Verdict
    exit_code: int
    findings: list[Finding]
    setting: Setting
    train: SetCounts
    eval: SetCounts | None
    lengths: dict[str, PartLengths] | None
    cuts: list[Cut] | None
    layouts: Layouts | None
    repeats: Repeats
    length_bias: LengthBias | None
    cues: list[Cue]
    leakage: Leakage | None
    flags: list[FlagCount]
    template: list[Habit] | None
    suspects: list[Suspect]
    token_row: TokenRow | None
    cpu_seconds: float
