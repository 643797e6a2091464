"""Whether an export scores as the run did: loaded in plain transformers or peft, one unpadded sequence at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_utils.schema import DataError, RowError, Spans, TokenizedPair
from data_utils.shards import ShardSet
from data_utils.tokenize import PairTokenizer
from dpo.build import max_length
from dpo.config import Config
from dpo.files import read_rows
from dpo.pretrained import Pretrained, plain_base
from dpo.report.collect import Shards
from dpo.scores import PAIRS_FILE

Item = TypeVar("Item")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Nats per token; bf16 models round their logits to 8 bits."""


@dataclass(frozen=True)
class Parity:
    """How far the log-probs of an export are from those of the run.

    Attributes:
        against: what it was held against.
        pairs: that were scored; 2 responses each.
        largest_gap, tolerance: nats per token.
    """

    against: str
    pairs: int
    largest_gap: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether it is the model that was trained."""
        return self.largest_gap <= self.tolerance

    def told(self) -> str:
        """One line."""
        return (
            f"log-probs of {self.pairs} pairs are within {self.largest_gap:.2g} nats per token of {self.against}"
            f" (allowed {self.tolerance:g})"
        )


@dataclass(frozen=True)
class Trained:
    """What is exported.

    Attributes:
        folder: like a run's `final/`.
        step: after how many steps.
        name, evaluation: of it and of its evaluation, for people.
        model: makes one that scores as the run did.
    """

    folder: Path
    step: int
    name: str
    evaluation: str
    model: Callable[[], nn.Module]


def check_parity(run: Path, config: Config, trained: Trained, export: Path, num_pairs: int) -> Parity:
    """Score some pairs with the export and hold them against the run's evaluation at that step; without one that can be
    read, against what was trained, scored likewise.

    Raises:
        DataError: none of the run's pairs can be read any more.
    """
    model = load_plain(config, export)
    tolerance = TOLERANCE[torch.bfloat16] if torch.bfloat16 in _dtypes(model, config) else TOLERANCE[torch.float32]
    source = Pretrained.open(config.model.path, trust_remote_code=config.model.trust_remote_code)
    tokenizer = PairTokenizer(AutoTokenizer.from_pretrained(export), max_length(config, source))
    recorded, shards = read_rows(run / PAIRS_FILE), Shards(config)
    if recorded and isinstance(shards.held_out, ShardSet) and recorded[0]["after"]["step"] == trained.step:
        wanted = {row["where"]: row["after"] for row in _spread(recorded, num_pairs)}
        pairs = _tokenized(shards.held_out, tokenizer, wanted)
        if pairs:
            gaps = [_gap(model, pair, wanted[pair.where]) for pair in pairs]
            return Parity(trained.evaluation, len(pairs), max(gaps), tolerance)
    train = shards.train
    if isinstance(train, str):
        raise DataError(f"no pair can be read to check with: {train}")
    wanted = {train.where(index): None for index in _spread(range(len(train)), num_pairs)}
    pairs = _tokenized(train, tokenizer, wanted)
    measure = trained.model()
    gaps = [_gap(model, pair, _scores(measure, pair)) for pair in pairs]
    return Parity(trained.name, len(pairs), max(gaps), tolerance)


def load_plain(config: Config, folder: Path) -> nn.Module:
    """As anybody would load it: the model, or the base model with the adapter on it."""
    trust = config.model.trust_remote_code
    if not (folder / "adapter_config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=trust).eval()
    dtype = torch.bfloat16 if config.model.dtype == "bfloat16" else torch.float32
    base = plain_base(config.model, dtype)
    return PeftModel.from_pretrained(base, str(folder)).eval()


def _dtypes(model: nn.Module, config: Config) -> set[torch.dtype]:
    """Of the export's weights, and of what the run computed in where its config says so."""
    asked = {torch.bfloat16} if config.model.dtype == "bfloat16" else set()
    return {parameter.dtype for parameter in model.parameters()} | asked


def _spread(items: Sequence[Item], number: int) -> list[Item]:
    number = min(number, len(items))
    return [items[place * len(items) // number] for place in range(number)]


def _tokenized(shards: ShardSet, tokenizer: PairTokenizer, wanted: Mapping[str, object]) -> list[TokenizedPair]:
    found = []
    for index in range(len(shards)):
        if shards.where(index) in wanted:
            try:
                found.append(tokenizer(shards.pair(index), index))
            except RowError:
                continue
    return found


def _gap(model: nn.Module, pair: TokenizedPair, recorded: dict[str, float]) -> float:
    """The larger one of chosen and rejected, in nats per scored token."""
    ours = _scores(model, pair)
    lengths = {"logps/chosen": _num_scored(pair.chosen_ids, pair.chosen_scored)}
    lengths["logps/rejected"] = _num_scored(pair.rejected_ids, pair.rejected_scored)
    gaps = [abs(ours[key] - recorded[key]) / length for key, length in lengths.items()]
    return float("inf") if any(gap != gap for gap in gaps) else max(gaps)


def _num_scored(ids: list[int], spans: Spans | None) -> int:
    return len(ids) if spans is None else sum(end - start for start, end in spans)


@torch.no_grad()
def _scores(model: nn.Module, pair: TokenizedPair) -> dict[str, float]:
    """Summed log-probs of both responses from the model's own logits, in float64 sums of fp32 log-softmax."""
    found = {}
    for name, ids, spans in (
        ("chosen", pair.chosen_ids, pair.chosen_scored),
        ("rejected", pair.rejected_ids, pair.rejected_scored),
    ):
        sequence_T = torch.tensor(pair.prompt_ids + ids)
        logits_TV = model(input_ids=sequence_T[None]).logits[0, :-1].float()
        token_logps_T = logits_TV.log_softmax(-1).gather(1, sequence_T[1:, None]).squeeze(1).double()
        response_T = token_logps_T[len(pair.prompt_ids) - 1 :]
        found[f"logps/{name}"] = sum(response_T[start:end].sum().item() for start, end in spans or ((0, len(ids)),))
    return found
