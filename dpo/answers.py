"""Held-out prompts answered before and after training, and graded by the user's checker."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import PreTrainedTokenizerBase

from data_utils.schema import PreferencePair, RowError
from data_utils.shards import ShardSet
from data_utils.tokenize import PairTokenizer, control_ids
from dpo.checker import Checker, load_checker
from dpo.config import Config
from dpo.divergence import kl_of_answers
from dpo.engine import Engine
from dpo.files import read_rows, write_atomically
from dpo.generate import Answer, Decoding, answer
from dpo.policy import Policy, evaluating
from dpo.pretrained import can_pack
from dpo.reference import Reference
from dpo.terminal import Terminal
from dpo.world import World

MAX_ROWS = 64
"""Answers that are written at a time."""


@dataclass(frozen=True, slots=True)
class Graded:
    """One answer: its text, whether the model ended it, whether it is degenerate, and its grade from 0 to 1."""

    text: str
    ended: bool
    degenerate: bool
    grade: float | None


@dataclass(frozen=True, slots=True)
class Asked:
    """One held-out prompt.

    Attributes:
        pair: the row it comes from; its `source` is the kind that grades are counted by.
        ids: the prompt's token ids.
    """

    pair: PreferencePair
    ids: list[int]


class Answers:
    """Answers held-out prompts with one process's policy, grades them, and keeps them side by side in a file.

    Args:
        shards: the held-out set; `eval.num_prompts` rows spread over it are asked.
        path: the file, one object per prompt: where, source, prompt, before, after.
    """

    def __init__(
        self,
        shards: ShardSet,
        pair_tokenizer: PairTokenizer,
        tokenizer: PreTrainedTokenizerBase,
        config: Config,
        world: World,
        terminal: Terminal,
        path: Path,
    ) -> None:
        self._config, self._world, self._terminal, self._path = config, world, terminal, path
        self._tokenizer = tokenizer
        self._checker: Checker | None = None if config.eval.checker is None else load_checker(config.eval.checker)
        self._asked = list(_asked(shards, pair_tokenizer, config.eval.num_prompts))
        self._before: list[Graded] = []
        self._after: list[Graded] = []
        self._said: dict[int, Answer] = {}
        self._kl: dict[str, float] = {}

    def before(self, policy: Policy) -> None:
        """Answer with the model before training."""
        with policy.adapter_off() if policy.is_lora else contextlib.nullcontext():
            self._before = self._all_graded(policy, "before")
        self._write()

    def after(self, policy: Policy) -> None:
        """Answer with the model as it is now; a resumed run reads what its first process answered before training."""
        if not self._before:
            self._before = self._read_before()
        self._after = self._all_graded(policy, "after")
        self._write()

    def measure_kl(self, engine: Engine, reference: Reference) -> None:
        """The divergence of the answers after training from the reference, where they are samples of the policy."""
        if self._config.eval.temperature != 1 or not self._config.measures_kl:
            return
        stop_ids = sorted(control_ids(self._tokenizer))[:1]  # any of them: it is a position, not a choice
        said = [self._said[place].ids + stop_ids * self._said[place].ended for place in range(len(self._asked))]
        budget = self._config.batch.tokens_per_micro_batch
        kl = kl_of_answers([asked.ids for asked in self._asked], said, engine, reference, budget, self._world.device)
        per_token = [nats / len(ids) for nats, ids in zip(kl, said, strict=True)]
        self._kl = {"answers_kl": fmean(kl), "answers_kl_per_token": fmean(per_token)}

    # ---- answering

    def _all_graded(self, policy: Policy, when: str) -> list[Graded]:
        settings, stop_ids = self._config.eval, control_ids(self._tokenizer)
        decoding = Decoding(
            settings.max_new_tokens, stop_ids, temperature=settings.temperature, seed=self._config.train.seed
        )
        graded: dict[int, Graded] = {}
        with evaluating(policy), policy.own_attention():
            for batch in self._terminal.progress(self._batches(policy), f"answers {when} training", "batches"):
                answers = answer(
                    policy.causal_lm, [self._asked[place].ids for place in batch], decoding, self._world.device
                )
                self._said |= {place: said for place, (said,) in zip(batch, answers, strict=True)}
                graded |= {
                    place: self._grade(self._asked[place].pair, said)
                    for place, (said,) in zip(batch, answers, strict=True)
                }
        return [graded[place] for place in range(len(self._asked))]

    def _batches(self, policy: Policy) -> list[list[int]]:
        """Places of prompts of about equal length; one by one where layers carry state, which padding would enter."""
        rows = MAX_ROWS if can_pack(policy.causal_lm) else 1
        places = sorted(range(len(self._asked)), key=lambda place: len(self._asked[place].ids))
        return [places[first : first + rows] for first in range(0, len(places), rows)]

    def _grade(self, pair: PreferencePair, said: Answer) -> Graded:
        text = str(self._tokenizer.decode(said.ids, skip_special_tokens=True)).strip()
        grade = None if self._checker is None else self._checker(pair, text)
        return Graded(text, said.ended, is_degenerate(text, said.ended), grade)

    # ---- telling

    def summary(self) -> dict[str, Any]:
        """For summary.json: shares that pass the checker and that are degenerate, of all prompts and by kind; and the
        divergence from the reference in nats, where it was measured."""
        sides = {"before": self._before, "after": self._after}
        return (
            self._kl
            | {f"checker_{side}": self._shares(graded) for side, graded in sides.items()}
            | {f"degenerate_{side}": _mean([answer.degenerate for answer in graded]) for side, graded in sides.items()}
        )

    def _shares(self, graded: Sequence[Graded]) -> dict[str, float | None] | None:
        """ "all" and each kind: mean grade; None without a checker."""
        if self._checker is None or not graded:
            return None
        grades: dict[str, list[float]] = {"all": []}
        for asked, mine in zip(self._asked, graded, strict=True):
            assert mine.grade is not None
            for kind in ("all", asked.pair.columns.source):
                if kind:
                    grades.setdefault(kind, []).append(mine.grade)
        return {kind: _mean(values) for kind, values in grades.items()}

    def show(self) -> None:
        """The tables for people: shares before and after, then three answers side by side."""
        summary = self.summary()
        self._terminal.shares(
            len(self._asked),
            summary["checker_before"],
            summary["checker_after"],
            (summary["degenerate_before"], summary["degenerate_after"]),
        )
        if self._kl:
            nats, per_token = self._kl.values()
            self._terminal.say(f"KL of the answers to the reference: {nats:.4f} nats, {per_token:.4f} per token")
        before: Sequence[Graded | None] = self._before or [None] * len(self._asked)
        for place in self._examples(3):
            mine = before[place]
            after = self._after[place]
            self._terminal.side_by_side(
                prompt_text(self._asked[place].pair),
                ("before" + _verdict(mine), "" if mine is None else mine.text),
                ("after" + _verdict(after), after.text),
            )

    def _examples(self, count: int) -> list[int]:
        """Places of the prompts that the screen shows."""
        before = self._before or self._after
        changed = [mine.grade != now.grade for mine, now in zip(before, self._after, strict=True)]
        return pick_examples([asked.pair.columns.source for asked in self._asked], changed, count)

    # ---- the file

    def _write(self) -> None:
        rows = []
        for place, asked in enumerate(self._asked):
            row: dict[str, Any] = {
                "where": asked.pair.where,
                "source": asked.pair.columns.source,
                "prompt": asked.pair.prompt,
            }
            for side, graded in (("before", self._before), ("after", self._after)):
                row[side] = asdict(graded[place]) if graded else None
            rows.append(json.dumps(row, ensure_ascii=False) + "\n")
        write_atomically(self._path, rows)

    def _read_before(self) -> list[Graded]:
        """Answers of this run's first process, unless the held-out prompts have changed since."""
        rows = read_rows(self._path)
        same = [row["prompt"] for row in rows] == [asked.pair.prompt for asked in self._asked]
        return [Graded(**row["before"]) for row in rows] if same and all(row["before"] for row in rows) else []


def _asked(shards: ShardSet, tokenizer: PairTokenizer, num_prompts: int | None) -> Iterator[Asked]:
    """The prompts, spread over the held-out set; rows that cannot be used are left to those who count them."""
    count = len(shards) if num_prompts is None else min(num_prompts, len(shards))
    for index in (place * len(shards) // count for place in range(count)):
        with contextlib.suppress(RowError):
            pair = shards.pair(index)
            yield Asked(pair, tokenizer(pair, index).prompt_ids)


def pick_examples(kinds: Sequence[str], changed: Sequence[bool], count: int) -> list[int]:
    """Places of the first prompts of different kinds; those whose grade training changed, up or down, come first."""
    found: dict[str, int] = {}
    for place in sorted(range(len(kinds)), key=lambda place: not changed[place]):
        found.setdefault(kinds[place] or str(place), place)
    return list(found.values())[:count]


def is_degenerate(text: str, ended: bool) -> bool:
    """Whether an answer is empty, was cut, or repeats itself: three words in a row thrice, or a word thrice on end."""
    words = text.lower().split()
    triples = list(zip(words, words[1:], words[2:], strict=False))
    repeats = any(triples.count(triple) >= 3 or len(set(triple)) == 1 for triple in triples)
    return not ended or not words or repeats


def prompt_text(pair: PreferencePair) -> str:
    """What the user said last."""
    return pair.prompt if isinstance(pair.prompt, str) else str(pair.prompt[-1].get("content"))


def _verdict(graded: Graded | None) -> str:
    if graded is None or graded.grade is None:
        return ""
    return ": passes" if graded.grade == 1 else ": fails" if graded.grade == 0 else f": {graded.grade:.2f}"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
