"""A pair as plain text, what is suspicious about it, and shallow cues that a model could learn instead."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from data_utils.repeats import content_keys, said
from data_utils.schema import PreferencePair, Text

Level = Literal["look", "note"]
REPETITIVE_CHARS = 200  # shorter texts say nothing about repetition
REPETITIVE_RATIO = 0.12  # compressed / plain; prose lies near 0.5, source code and tables above 0.15
LENGTH_RATIO = 10
EVIDENCE_CHARS = 24  # shown on either side of what was found
LONG_RESPONSE_CHARS = 200
_CONTINUATION = re.escape("".join(chr(byte) + bytes([byte]).decode("cp1252", "ignore") for byte in range(0x80, 0xC0)))
MOJIBAKE = re.compile(f"\ufffd|[ÃÂ][{_CONTINUATION}]|[âã][{_CONTINUATION}]{{2}}|ðŸ|ï»¿")
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202d\u202e\ufeff]")
HTML_ENTITY = re.compile(r"&(?:amp|lt|gt|quot|apos|nbsp|#\d{1,6}|#x[0-9a-fA-F]{1,5});")
SPECIAL = re.compile(
    r"<\|[A-Za-z0-9_ -]{2,40}\|>|<｜[^｜<>]{2,40}｜>|</?s>|\[/?INST\]|<</?SYS>>"
    r"|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn)>"
)
REFUSAL = re.compile(
    r"\W*(?:(?:i'?m|i am|we'?re)\s+(?:very |really |so )?(?:sorry|unable|not able)|sorry\b|i apologi[sz]e|my apologies"
    r"|unfortunately,? i\b|i (?:can'?t|cannot|can not|won'?t|will not) |as an ai\b)",
    re.IGNORECASE,
)
EAGER = re.compile(r"\W*(?:sure|certainly|of course|absolutely|great question|happy to)\b", re.IGNORECASE)
MARKDOWN = re.compile(r"^(?: {0,3}(?:[-*+]|\d{1,2}[.)]) |#{1,6} |```)", re.MULTILINE)
_ENDINGS = tuple(".!?…。！？\"')]}*`:)”’»」")


@dataclass(frozen=True)
class PairTexts:
    """A pair as plain text; of message lists the contents, each turn on a line of its own.

    Attributes:
        user: the prompt without system turns, which many rows share.
        keys: canonical texts of prompt, chosen and rejected, equal only if roles, tools and contents are equal.
    """

    prompt: str
    chosen: str
    rejected: str
    user: str
    keys: tuple[str, str, str]


def plain_texts(pair: PreferencePair) -> PairTexts:
    """The texts of a pair that all checks look at."""
    return PairTexts(
        prompt=_plain(pair.prompt),
        chosen=_plain(pair.chosen),
        rejected=_plain(pair.rejected),
        user=_plain([turn for turn in pair.prompt if turn["role"] not in ("system", "developer")])
        if isinstance(pair.prompt, list)
        else pair.prompt,
        keys=content_keys(pair),
    )


def _plain(text: Text) -> str:
    return text if isinstance(text, str) else "\n".join(map(said, text))


@dataclass(frozen=True)
class Flag:
    """One thing that may be wrong with a row.

    Attributes:
        level: "look": enough for exit code 1; "note": worth knowing.
        weight: what it adds to a row's score of suspicion.
        what: of the row, in a few words.
    """

    name: str
    level: Level
    weight: int
    what: str


TextFlag = tuple[Flag, Callable[[PairTexts], bool]]


def _either(test: Callable[[str], object]) -> Callable[[PairTexts], bool]:
    return lambda texts: bool(test(texts.chosen) or test(texts.rejected))


def _anywhere(test: Callable[[str], object]) -> Callable[[PairTexts], bool]:
    return lambda texts: bool(test(texts.chosen) or test(texts.rejected) or test(texts.prompt))


def is_mojibake(text: str) -> bool:
    """Whether UTF-8 was read as Latin-1 or cp1252 somewhere, or bytes were replaced by U+FFFD."""
    return not text.isascii() and MOJIBAKE.search(text) is not None


def is_repetitive(text: str) -> bool:
    """Whether a text of some length compresses to almost nothing."""
    if len(text) < REPETITIVE_CHARS:
        return False
    plain = text.encode()[: 1 << 15]
    return len(zlib.compress(plain, 1)) < REPETITIVE_RATIO * len(plain)


def _words_equal(texts: PairTexts) -> bool:
    """Equal but for white space."""
    return _may_be_alike(texts) and texts.chosen.split() == texts.rejected.split()


def _letters_equal(texts: PairTexts) -> bool:
    """Equal but for white space and letter case, and not for white space alone."""
    if not _may_be_alike(texts) or texts.chosen.lower().split() != texts.rejected.lower().split():
        return False
    return not _words_equal(texts)


def _may_be_alike(texts: PairTexts) -> bool:
    """Whether the first letters agree: what most pairs are told apart by, and fast."""
    return texts.chosen.lstrip()[:1].lower() == texts.rejected.lstrip()[:1].lower()


def _is_prefix(texts: PairTexts) -> bool:
    a, b = texts.chosen.strip(), texts.rejected.strip()
    return a != b and (a.startswith(b) or b.startswith(a))


def _lengths_apart(texts: PairTexts) -> bool:
    short, long = sorted((len(texts.chosen), len(texts.rejected)))
    return long >= LONG_RESPONSE_CHARS and long >= LENGTH_RATIO * short


def _repeats_prompt(texts: PairTexts) -> bool:
    """Begins with the prompt; very short prompts do not count."""
    prompt = texts.user.strip()
    return len(prompt) >= 20 and texts.chosen.lstrip().startswith(prompt)


TEXT_FLAGS: tuple[TextFlag, ...] = (
    (Flag("mojibake", "look", 4, "broken characters (UTF-8 read as Latin-1, or U+FFFD)"), _anywhere(is_mojibake)),
    (Flag("control_characters", "look", 3, "control characters in the text"), _anywhere(CONTROL.search)),
    (Flag("special_tokens", "look", 3, "names of special tokens in the text"), _anywhere(SPECIAL.search)),
    (Flag("html_entities", "note", 1, "HTML entities left over"), _either(HTML_ENTITY.search)),
    (
        Flag("repetitive_chosen", "look", 4, "the chosen response repeats itself over and over"),
        lambda texts: is_repetitive(texts.chosen),
    ),
    (
        Flag("repetitive_rejected", "note", 1, "the rejected response repeats itself over and over"),
        lambda texts: is_repetitive(texts.rejected),
    ),
    (Flag("same_words", "look", 5, "the responses differ in white space only"), _words_equal),
    (Flag("same_letters", "note", 3, "the responses differ in letter case only"), _letters_equal),
    (Flag("one_begins_the_other", "note", 2, "one response is the beginning of the other"), _is_prefix),
    (
        Flag("refusal_chosen", "note", 2, "the chosen response is a refusal, the rejected one is not"),
        lambda texts: bool(REFUSAL.match(texts.chosen)) and not REFUSAL.match(texts.rejected),
    ),
    (Flag("lengths_apart", "note", 2, f"one response is {LENGTH_RATIO} times as long as the other"), _lengths_apart),
    (Flag("repeats_prompt", "note", 2, "the chosen response begins with the whole prompt"), _repeats_prompt),
    (Flag("no_prompt", "note", 2, "the prompt is empty"), lambda texts: not texts.prompt.strip()),
)
SET_FLAGS: tuple[Flag, ...] = (
    Flag("duplicate", "look", 3, "the same pair came before"),
    Flag("contradictory", "look", 5, "the same pair comes with chosen and rejected swapped"),
    Flag("near_duplicate", "look", 2, "nearly the same pair came before"),
    Flag("leaked_pair", "look", 5, "the same pair is in the evaluation data"),
    Flag("leaked_prompt", "look", 4, "the same prompt is in the evaluation data"),
    Flag("leaked_near_prompt", "look", 2, "nearly the same prompt is in the evaluation data"),
    Flag("double_bos", "look", 4, "two BOS tokens at the start"),
    Flag("no_end", "look", 4, "a response does not end in a control token"),
    Flag("both_cut", "note", 1, "both responses are cut by max_length"),
)
FLAGS: tuple[Flag, ...] = (*(flag for flag, _ in TEXT_FLAGS), *SET_FLAGS)
BITS = {flag.name: 1 << place for place, flag in enumerate(FLAGS)}


PATTERNS = {
    "mojibake": MOJIBAKE,
    "control_characters": CONTROL,
    "special_tokens": SPECIAL,
    "html_entities": HTML_ENTITY,
}


def evidence(name: str, texts: PairTexts) -> str:
    """What raised a flag, with a few characters around it; empty for flags that are about a text as a whole."""
    if name not in PATTERNS:
        return ""
    for text in (texts.chosen, texts.rejected, texts.prompt):
        if match := PATTERNS[name].search(text):
            return text[max(0, match.start() - EVIDENCE_CHARS) : match.end() + EVIDENCE_CHARS]
    return ""


def text_flags(texts: PairTexts) -> int:
    """The bits of the flags that a pair's own text raises."""
    return sum(1 << place for place, (_, test) in enumerate(TEXT_FLAGS) if test(texts))


@dataclass(frozen=True)
class CueTest:
    """A shallow property of a response."""

    name: str
    what: str
    test: Callable[[str], bool]


CUES: tuple[CueTest, ...] = (
    CueTest("refusal", "starts with a refusal or an apology", lambda text: REFUSAL.match(text) is not None),
    CueTest("eager", "starts with “Sure”, “Certainly”, “Of course”, ...", lambda text: EAGER.match(text) is not None),
    CueTest("ends_properly", "ends with punctuation", lambda text: text.rstrip().endswith(_ENDINGS)),
    CueTest("markdown", "has a list, a heading or a code block", lambda text: MARKDOWN.search(text) is not None),
    CueTest("question", "ends with a question", lambda text: text.rstrip().endswith(("?", "？"))),
)


def cue_outcomes(texts: PairTexts) -> Sequence[tuple[bool, bool]]:
    """For each of CUES whether chosen and rejected have it."""
    return [(cue.test(texts.chosen), cue.test(texts.rejected)) for cue in CUES]
