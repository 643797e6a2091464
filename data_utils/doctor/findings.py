"""From numbers to a verdict: what is refused, what to look at, what to know."""

from __future__ import annotations

from collections.abc import Sequence

from data_utils.doctor.lengths import Cut
from data_utils.doctor.report import (
    Cue,
    Finding,
    FlagCount,
    Habit,
    LengthBias,
    SetCounts,
    Setting,
    Unit,
    Verdict,
)
from data_utils.doctor.survey import MAX_PLACES

BIASED = 0.1  # accuracy of "pick the longer" this far from one half is worth a look ...
TELLING = 0.8  # a cue that is right (or wrong) so often ...
TELLING_FRACTION = 0.2  # ... in so many of the pairs is worth a look ...
ENOUGH_PAIRS = 50  # ... in at least so many pairs; below, it may be chance
CUT_FRACTION = 0.05  # of pairs that max_length may cut before that is worth a look
LEVELS = ("refused", "look", "note")


def find(
    setting: Setting,
    train: SetCounts,
    held_out: SetCounts | None,
    flags: Sequence[FlagCount],
    bias: LengthBias | None,
    cues: Sequence[Cue],
    cuts: Sequence[Cut] | None,
    template: Sequence[Habit],
) -> list[Finding]:
    """All findings, worst first."""
    findings = [
        *_refusals(setting, train, "training"),
        *([] if held_out is None else _refusals(setting, held_out, "evaluation")),
        *[Finding(flag.level, flag.name, flag.count, _capital(flag.what), flag.places) for flag in flags if flag.count],
        *([] if bias is None else _bias(bias, setting.unit)),
        *_cues(cues, train.pairs),
        *_cuts(cuts or [], setting, train.pairs),
        *[Finding(habit.level, habit.name, 0, habit.what, []) for habit in template if habit.level != "fine"],
    ]
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


def judge(findings: Sequence[Finding]) -> Verdict:
    """The worst level decides; notes do not count."""
    levels = {finding.level for finding in findings}
    return "refused" if "refused" in levels else "look" if "look" in levels else "sound"


def _refusals(setting: Setting, counts: SetCounts, name: str) -> list[Finding]:
    """Whether the rows that cannot be used end a run: any does, or more than a fraction when they are skipped."""
    bad = counts.rows - counts.pairs
    if not bad:
        return []
    causes = ", ".join(f"{item.cause} {item.count:,}" for item in counts.refused)
    what = f"of {counts.rows:,} {name} rows cannot be used ({causes})"
    places = [place for item in counts.refused for place in item.places][:MAX_PLACES]
    if setting.on_bad_row == "error":
        return [Finding("refused", f"bad_{name}_rows", bad, f"{what}; the trainer stops at the first", places)]
    limit = f"{setting.max_bad_fraction:g} of them"
    if counts.pairs == 0 or bad > setting.max_bad_fraction * counts.rows:
        return [Finding("refused", f"bad_{name}_rows", bad, f"{what}; the trainer skips at most {limit}", places)]
    return [Finding("look", f"bad_{name}_rows", bad, f"{what}; the trainer skips them", places)]


def _bias(bias: LengthBias, unit: Unit) -> list[Finding]:
    if abs(bias.accuracy - 0.5) < BIASED or bias.chosen_longer + bias.equal + bias.rejected_longer < ENOUGH_PAIRS:
        return []
    longer, count = ("longer", bias.chosen_longer) if bias.accuracy > 0.5 else ("shorter", bias.rejected_longer)
    share = max(bias.accuracy, 1 - bias.accuracy)
    what = f"The chosen response is the {longer} one (in {unit}): picking it is right for {share:.0%} of pairs"
    return [Finding("look", "length_bias", count, what, [])]


def _cues(cues: Sequence[Cue], num_pairs: int) -> list[Finding]:
    findings = []
    for cue in cues:
        if cue.accuracy is None or cue.decides < TELLING_FRACTION or cue.decides * num_pairs < ENOUGH_PAIRS:
            continue
        if TELLING > cue.accuracy > 1 - TELLING:
            continue
        side, share = ("chosen", cue.accuracy) if cue.accuracy > 0.5 else ("rejected", 1 - cue.accuracy)
        what = f"Where only one response {cue.what}, it is the {side} one in {share:.0%} of cases"
        findings.append(Finding("look", f"cue_{cue.name}", round(cue.decides * num_pairs), what, []))
    return findings


def _cuts(cuts: Sequence[Cut], setting: Setting, num_pairs: int) -> list[Finding]:
    for cut in cuts:
        if cut.max_length == setting.max_length and cut.pairs_cut:
            level = "look" if cut.pairs_cut > CUT_FRACTION * num_pairs else "note"
            what = (
                f"max_length {cut.max_length:,} cuts a response ({cut.lost_fraction:.1%} of response tokens are lost)"
            )
            return [Finding(level, "truncated", cut.pairs_cut, what, [])]
    return []


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
