"""An evaluation pair by pair, and the metrics that it comes to: float64 means over the whole held-out set.

Imports no torch, so that the report reads what a run has written at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

PAIRS_FILE = "eval_pairs.jsonl"
MAX_NAMED = 20
"""Sources that get metrics of their own, those with most pairs first; the rest are taken together as `other`."""
DRIFT_WARNING = -0.1
"""Nats per token that chosen responses may lose on average before a run says so."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Every pair of an evaluation, in the order of the held-out set; all are (B,) arrays.

    Attributes:
        index: the pair's number in the held-out set, int64.
        set_name, source: of what entry of `data.eval` it is, and of what source.
        prompt_tokens, chosen_tokens, rejected_tokens: the last two count what is scored.
        weight, beta: of the pair, resolved.
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: summed log-probs in nats, float64; the
            reference's NaN for losses without one.
        chosen_reward, rejected_reward: the rewards that the loss implies, float64.
        loss: of the pair before its weight, float64.
        chosen_kl, rejected_kl: KL(policy || reference) over the vocabulary, summed over the response's scored positions
            in nats, float64; None where it was not measured.
    """

    index: np.ndarray
    set_name: np.ndarray
    source: np.ndarray
    prompt_tokens: np.ndarray
    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray
    weight: np.ndarray
    beta: np.ndarray
    policy_chosen: np.ndarray
    policy_rejected: np.ndarray
    reference_chosen: np.ndarray
    reference_rejected: np.ndarray
    chosen_reward: np.ndarray
    rejected_reward: np.ndarray
    loss: np.ndarray
    chosen_kl: np.ndarray | None = None
    rejected_kl: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def chosen_logratio(self) -> np.ndarray:
        """log pi - log ref of the chosen responses."""
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected_logratio(self) -> np.ndarray:
        """log pi - log ref of the rejected responses."""
        return self.policy_rejected - self.reference_rejected

    @property
    def margin(self) -> np.ndarray:
        """Reward of chosen less reward of rejected."""
        return self.chosen_reward - self.rejected_reward

    def of(self, chosen: np.ndarray) -> Scores:
        """Some of the pairs: a mask, or places."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: column[chosen] for name, column in columns.items() if column is not None})


def right(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """1 where the first is larger, 1/2 for a tie, else 0."""
    return np.where(first == second, 0.5, first > second)


def length_controlled_accuracy(right_B: np.ndarray, chosen_tokens: np.ndarray, rejected_tokens: np.ndarray) -> float:
    """Accuracy with as much weight on pairs whose chosen response is the longer one as on those where it is shorter.

        (accuracy where chosen is longer + accuracy where it is shorter) / 2

    A pair of equal lengths counts half in either. A rule that goes by length alone gets 1/2, however many chosen
    responses are longer; the balanced accuracy of Brodersen et al. 2010 (ICPR, Eq. 4) with length as the class. The aim
    is that of length-controlled win rates (Dubois et al. 2024, arXiv 2404.04475). NaN where one kind is missing.
    """
    longer = right(chosen_tokens, rejected_tokens)
    parts = [(share.sum(), (share * right_B).sum()) for share in (longer, 1 - longer)]
    return float(np.mean([hits / size if size else np.nan for size, hits in parts]))


def means(scores: Scores) -> dict[str, float]:
    """Metrics of some pairs without a prefix, under the names of training where there are such; NaN without pairs."""
    if not len(scores):
        return dict.fromkeys(MEANS, float("nan"))
    right_B = right(scores.chosen_reward, scores.rejected_reward)
    lengths = scores.chosen_tokens, scores.rejected_tokens
    values = {
        "loss": scores.weight * scores.loss,
        "rewards/chosen": scores.chosen_reward,
        "rewards/rejected": scores.rejected_reward,
        "rewards/accuracies": right_B,
        "rewards/margins": scores.margin,
        "logps/chosen": scores.policy_chosen,
        "logps/rejected": scores.policy_rejected,
        "rewards/accuracies_length_controlled": length_controlled_accuracy(right_B, *lengths),
        "drift/chosen": scores.chosen_logratio / scores.chosen_tokens,
        "drift/rejected": scores.rejected_logratio / scores.rejected_tokens,
        "drift/chosen_fell": scores.chosen_logratio < 0,
    }
    assert tuple(values) == MEANS
    if scores.chosen_kl is not None and scores.rejected_kl is not None:
        columns = (scores.chosen_kl / scores.chosen_tokens, scores.rejected_kl / scores.rejected_tokens)
        values |= dict(zip(KL_MEANS, columns, strict=True))
    return {key: float(np.mean(value)) for key, value in values.items()}


PAIR_KEYS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
"""Those of training too."""
MEANS = (
    *PAIR_KEYS,
    "rewards/accuracies_length_controlled",
    "drift/chosen",
    "drift/rejected",
    "drift/chosen_fell",
)
KL_MEANS = ("kl_per_token/chosen", "kl_per_token/rejected")
"""Those of evaluations that measure it."""
GROUP_MEANS = ("loss", "rewards/accuracies", "rewards/margins", "drift/chosen")
"""Those that sources and length buckets get."""


def length_buckets(scores: Scores) -> dict[str, np.ndarray]:
    """Masks of the pairs whose longer response has 1-32, 33-64, 65-128, ... scored tokens; those that hold any."""
    longest = np.maximum(scores.chosen_tokens, scores.rejected_tokens)
    power = np.maximum(np.ceil(np.log2(np.maximum(longest, 1))).astype(int), 5)
    return {f"{2 ** (p - 1) + 1 if p > 5 else 1}-{2**p}": power == p for p in np.unique(power).tolist()}


def named_groups(names: np.ndarray) -> dict[str, np.ndarray]:
    """Masks of the pairs of each name, most pairs first; beyond `MAX_NAMED` together as `other`."""
    found, counts = np.unique(names, return_counts=True)
    ordered = [found[place] for place in np.lexsort((found, -counts))]
    if len(ordered) > MAX_NAMED:
        ordered = ordered[: MAX_NAMED - 1]
    groups = {metric_name(str(name)) or "unnamed": names == name for name in ordered}
    rest = ~np.isin(names, ordered)
    return groups | ({"other": rest} if rest.any() else {})


def metric_name(name: str) -> str:
    """A name as it can stand in a metric's: letters, digits, dots, dashes and underscores."""
    return "".join(letter if letter.isalnum() or letter in ".-_" else "_" for letter in name)


def evaluation_metrics(scores: Scores) -> dict[str, float]:
    """All metrics of an evaluation, with the prefix `eval_`, as a row of metrics.jsonl has them.

    Several sets add `eval_NAME_...` as TRL does; several sources `eval_by_source/NAME/...`; several length buckets
    `eval_by_length/33-64/...`.
    """
    row = {f"eval_{key}": value for key, value in means(scores).items()} | {"eval_pairs": len(scores)}
    sets = named_groups(scores.set_name)
    for name, mask in sets.items() if len(sets) > 1 else ():
        part = scores.of(mask)
        row |= {f"eval_{name}_{key}": value for key, value in means(part).items()} | {f"eval_{name}_pairs": len(part)}
    for kind, groups in (("source", named_groups(scores.source)), ("length", length_buckets(scores))):
        for name, mask in groups.items() if len(groups) > 1 else ():
            part = scores.of(mask)
            values = {key: value for key, value in means(part).items() if key in GROUP_MEANS} | {"pairs": len(part)}
            row |= {f"eval_by_{kind}/{name}/{key}": value for key, value in values.items()}
    return row


def set_names(paths: Sequence[str], names: Sequence[str]) -> list[str]:
    """A name for each entry of `data.eval`: its own, else what its path ends in, told apart by the folder above.

    Args:
        paths: of the entries.
        names: their names, empty where they have none.
    """
    stems = [_stem(path, 1) for path in paths]
    chosen = []
    for path, name, stem in zip(paths, names, stems, strict=True):
        chosen.append(metric_name(name or (stem if stems.count(stem) == 1 else _stem(path, 2))))
    return chosen


def _stem(path: str, parts: int) -> str:
    """The last parts of a path, without what follows the first dot of the last one."""
    *folders, last = [part for part in path.rstrip("/").split("/") if part]
    return "-".join([*folders[len(folders) - parts + 1 :], last.split(".")[0] or last])


def drift_warning(row: Mapping[str, float]) -> str | None:
    """What to say of an evaluation in which the chosen responses lost likelihood, else None."""
    drift = row["eval_drift/chosen"]
    if not drift < DRIFT_WARNING:
        return None
    return (
        f"chosen responses are less likely than under the reference: {drift:.2f} nats per token, in"
        f" {row['eval_drift/chosen_fell']:.0%} of the held-out pairs (arXiv 2410.05779); a larger loss.beta, a smaller"
        " optim.learning_rate or fewer steps hold them"
    )


# ---- the file of pairs


def pair_rows(scores: Scores, where: Iterable[str], step: int, before: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of `eval_pairs.jsonl`: one per pair, with what was before training and what is now.

    Args:
        where: "file:line" of each pair.
        step: steps taken.
        before: the earlier rows' `before` by place; empty at the first evaluation, which is its own `before`
            when no step was taken.
    """
    for place, at in enumerate(where):
        now = {"step": step} | _values(scores, place)
        yield {
            "where": at,
            "set": str(scores.set_name[place]),
            "source": str(scores.source[place]),
            "prompt_tokens": int(scores.prompt_tokens[place]),
            "chosen_tokens": int(scores.chosen_tokens[place]),
            "rejected_tokens": int(scores.rejected_tokens[place]),
            "weight": _short(scores.weight[place]),
            "beta": _short(scores.beta[place]),
            "reference_logps/chosen": _short(scores.reference_chosen[place]),
            "reference_logps/rejected": _short(scores.reference_rejected[place]),
            "before": now if step == 0 else before.get(at),
            "after": now,
        }


def _values(scores: Scores, place: int) -> dict[str, float | None]:
    values = {
        "loss": scores.loss,
        "logps/chosen": scores.policy_chosen,
        "logps/rejected": scores.policy_rejected,
        "rewards/chosen": scores.chosen_reward,
        "rewards/rejected": scores.rejected_reward,
        "rewards/margins": scores.margin,
    }
    if scores.chosen_kl is not None and scores.rejected_kl is not None:
        values |= {"kl/chosen": scores.chosen_kl, "kl/rejected": scores.rejected_kl}
    return {key: _short(value_B[place]) for key, value_B in values.items()}


def _short(value: float) -> float | None:
    """With the digits that an fp32 number has; None for what JSON does not have."""
    return float(f"{value:.9g}") if np.isfinite(value) else None
