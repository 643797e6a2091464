"""From surveys to the report: what repeats, what leaks, what the trainer would refuse, which rows to look at."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np

from data_utils.doctor import duplicates, lengths
from data_utils.doctor.findings import find, judge
from data_utils.doctor.report import (
    EXIT_CODES,
    Count,
    Cue,
    FlagCount,
    Habit,
    Leak,
    Leakage,
    LengthBias,
    NearPair,
    PartLengths,
    Reason,
    Repeats,
    Report,
    SetCounts,
    Setting,
    Suspect,
    TokenRow,
)
from data_utils.doctor.survey import MAX_PLACES, Survey
from data_utils.doctor.texts import BITS, CUES, FLAGS, evidence, plain_texts
from data_utils.shards import ShardSet

NUM_SUSPECTS = 10
NUM_EXAMPLES = 5
SHOWN_CHARS = 400
PARTS = ("prompt", "chosen", "rejected")


def diagnose(
    setting: Setting,
    train: tuple[ShardSet, Survey],
    held_out: tuple[ShardSet, Survey] | None,
    template: list[Habit] | None,
    token_row: TokenRow | None,
) -> Report:
    """Everything there is to say. Adds to the surveys' flags and refusals what only all rows together show."""
    shards, found = train
    if setting.max_length is not None:
        _refuse_by_length(shards, found, setting.max_length)
        if held_out is not None:
            _refuse_by_length(*held_out, setting.max_length)
    has_pairs = len(found.rows) > 0
    repeats = _repeats(shards, found)
    leakage = None if held_out is None else _leakage(shards, found, *held_out)
    counts, eval_counts = _set_counts(found), None if held_out is None else _set_counts(held_out[1])
    cuts = lengths.cuts(found.lengths, setting.max_length) if has_pairs and setting.max_length is not None else None
    bias = _length_bias(found) if has_pairs else None
    cues, flags = _cues(found), _flag_counts(shards, found)
    findings = find(setting, counts, eval_counts, flags, bias, cues, cuts, template or [])
    verdict = judge(findings)
    return Report(
        verdict=verdict,
        exit_code=EXIT_CODES[verdict],
        findings=findings,
        setting=setting,
        train=counts,
        eval=eval_counts,
        lengths=_part_lengths(found) if has_pairs else None,
        cuts=cuts,
        layouts=lengths.layouts(found.lengths, setting.max_length),
        repeats=repeats,
        length_bias=bias,
        cues=cues,
        leakage=leakage,
        flags=flags,
        template=template,
        suspects=_suspects(shards, found),
        token_row=token_row,
        cpu_seconds=time.process_time(),
    )


def _refuse_by_length(shards: ShardSet, found: Survey, max_length: int) -> None:
    """Count the rows that the tokenizer refuses at `max_length`, with its causes; flag those cut on both sides."""
    too_long, identical = lengths.refused_by_length(found.lengths, max_length)
    remedy = "raise it or drop the row"
    for row in np.flatnonzero(too_long):
        message = f"{found.lengths[row, 0]} tokens of prompt leave no room for a response within {max_length}; {remedy}"
        found.refusals.add("prompt_too_long", shards.where(int(found.rows[row])), message)
    for row in np.flatnonzero(identical):
        message = f"chosen equals rejected in all that max_length {max_length} leaves; {remedy}"
        found.refusals.add("identical", shards.where(int(found.rows[row])), message)
    room = max_length - found.lengths[:, 0]
    both = (found.lengths[:, 1:3] > room[:, None]).all(axis=1) & ~too_long & ~identical
    found.flags[both] |= BITS["both_cut"]


def _set_counts(found: Survey) -> SetCounts:
    refused = sorted(found.refusals.by_cause.values(), key=lambda item: -item.count)
    return SetCounts(
        rows=found.num_rows,
        pairs=found.num_rows - found.refusals.count,
        sources=_counts(found.sources),
        families=_counts(found.families),
        refused=refused,
    )


def _counts(counter: Counter[str]) -> list[Count]:
    return [Count(name, pairs) for name, pairs in counter.most_common()]


def _repeats(shards: ShardSet, found: Survey) -> Repeats:
    """Also flags the rows."""
    prompts, chosen, rejected = found.hashes.T
    again, _ = duplicates.repeats(duplicates.join_keys(prompts, chosen, rejected))
    swapped = duplicates.contradictions(prompts, chosen, rejected)
    near, values = duplicates.near_pairs(found.response_sketches, found.prompt_sketches)
    is_new = np.ones(len(found.rows), bool)
    is_new[again] = False
    is_new[swapped] = False  # both orders have the same sketch
    near, values = near[is_new[near].all(axis=1)], values[is_new[near].all(axis=1)]
    repeated = np.flatnonzero(duplicates.first_of_cluster(near, len(found.rows)) != np.arange(len(found.rows)))
    found.flags[again] |= BITS["duplicate"]
    found.flags[swapped] |= BITS["contradictory"]
    found.flags[repeated] |= BITS["near_duplicate"]
    _, rows_of_prompt = np.unique(prompts, return_counts=True)
    nearest = np.argsort(-values, kind="stable")[:NUM_EXAMPLES]
    return Repeats(
        distinct_prompts=len(rows_of_prompt),
        rows_with_a_shared_prompt=int(rows_of_prompt[rows_of_prompt > 1].sum()),
        most_rows_of_a_prompt=int(rows_of_prompt.max(initial=0)),
        duplicates=len(again),
        contradictory=len(swapped),
        near_duplicates=len(repeated),
        nearest=[
            NearPair(_where(shards, found, later), _where(shards, found, earlier), round(value, 3))
            for (earlier, later), value in zip(near[nearest].tolist(), values[nearest].tolist(), strict=True)
        ],
    )


def _where(shards: ShardSet, found: Survey, entry: int) -> str:
    return shards.where(int(found.rows[entry]))


def _leakage(shards: ShardSet, found: Survey, eval_shards: ShardSet, held_out: Survey) -> Leakage:
    """Also flags the training rows."""
    pair_keys = duplicates.join_keys(*found.hashes.T)
    matches = {
        "leaked_pair": _first_match(pair_keys, duplicates.join_keys(*held_out.hashes.T)),
        "leaked_prompt": _first_match(found.hashes[:, 0], held_out.hashes[:, 0]),
        "leaked_near_prompt": duplicates.near_across(found.prompt_sketches, held_out.prompt_sketches),
    }
    is_counted = np.zeros(len(held_out.rows), bool)
    counts: list[int] = []
    examples: list[Leak] = []
    for name, match in matches.items():
        is_new = (match >= 0) & ~is_counted
        is_counted |= is_new
        found.flags[np.unique(match[is_new])] |= BITS[name]
        counts.append(int(is_new.sum()))
        entries = np.flatnonzero(is_new)[:NUM_EXAMPLES]
        examples += [
            Leak(_where(eval_shards, held_out, asked), _where(shards, found, known))
            for asked, known in zip(entries.tolist(), match[entries].tolist(), strict=True)
        ]
    same_pair, same_prompt, near_prompt = counts
    return Leakage(len(held_out.rows), same_pair, same_prompt, near_prompt, examples[:NUM_EXAMPLES])


def _first_match(keys: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """(asked,) the first place of each key asked for, or -1."""
    if not len(keys):
        return np.full(len(asked), -1, np.int64)
    known, first = np.unique(keys, return_index=True)
    place = np.minimum(np.searchsorted(known, asked), len(known) - 1)
    return np.where(known[place] == asked, first[place], -1)


def _part_lengths(found: Survey) -> dict[str, PartLengths]:
    return {
        part: PartLengths(float(values.mean()), lengths.percentiles(values), lengths.histogram(values))
        for part, values in zip(PARTS, found.lengths[:, :3].T, strict=True)
    }


def _length_bias(found: Survey) -> LengthBias:
    difference = found.lengths[:, 1] - found.lengths[:, 2]
    longer, equal = int((difference > 0).sum()), int((difference == 0).sum())
    return LengthBias(longer, equal, len(difference) - longer - equal, accuracy=(longer + equal / 2) / len(difference))


def _cues(found: Survey) -> list[Cue]:
    cues = []
    num_pairs = max(1, len(found.rows))
    for cue, counts in zip(CUES, found.cues, strict=True):
        chosen_only, rejected_only = int(counts[1, 0]), int(counts[0, 1])
        decided = chosen_only + rejected_only
        cues.append(
            Cue(
                cue.name,
                cue.what,
                chosen=int(counts[1].sum()) / num_pairs,
                rejected=int(counts[:, 1].sum()) / num_pairs,
                decides=decided / num_pairs,
                accuracy=chosen_only / decided if decided else None,
            )
        )
    return cues


def _flag_counts(shards: ShardSet, found: Survey) -> list[FlagCount]:
    counts = []
    for flag in FLAGS:
        entries = np.flatnonzero(found.flags & BITS[flag.name])
        places = [_where(shards, found, entry) for entry in entries[:MAX_PLACES].tolist()]
        counts.append(FlagCount(flag.name, flag.level, flag.what, len(entries), places))
    return counts


def _suspects(shards: ShardSet, found: Survey) -> list[Suspect]:
    """The rows whose flags weigh most, the first ones among equals."""
    scores = np.zeros(len(found.rows), np.int64)
    for flag in FLAGS:
        scores += flag.weight * ((found.flags & BITS[flag.name]) != 0)
    worst = np.argsort(-scores, kind="stable")[:NUM_SUSPECTS]
    return [_suspect(shards, found, int(entry), int(scores[entry])) for entry in worst if scores[entry] > 0]


def _suspect(shards: ShardSet, found: Survey, entry: int, score: int) -> Suspect:
    pair = shards.pair(int(found.rows[entry]))
    texts = plain_texts(pair)
    raised = [flag for flag in FLAGS if found.flags[entry] & BITS[flag.name]]
    reasons = [
        Reason(flag.what, flag.weight, evidence(flag.name, texts))
        for flag in sorted(raised, key=lambda flag: -flag.weight)
    ]
    return Suspect(pair.where, score, reasons, *map(shorten, (texts.prompt, texts.chosen, texts.rejected)))


def shorten(text: str) -> str:
    """Start and end of a text."""
    if len(text) <= SHOWN_CHARS:
        return text
    half = SHOWN_CHARS // 2
    return f"{text[:half]} […{len(text) - 2 * half:,} characters…] {text[-half:]}"
