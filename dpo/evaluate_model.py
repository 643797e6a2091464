"""Scores pairs with a model that no run is training; `python -m dpo.evaluate` starts it."""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from dpo.config import Config, ConfigError, build
from dpo.files import read_object, write_atomically
from dpo.report.collect import config_of
from dpo.scores import Scores, evaluation_metrics, named_groups, pair_rows, right

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from data_utils.schema import Layout, PairBatch
    from data_utils.shards import ShardSet
    from dpo.evaluator import Evaluator
    from dpo.logps import HeadStatistic, Observer
    from dpo.policy import Policy
    from dpo.pretrained import Pretrained
    from dpo.reference import Reference
    from dpo.signals import StopRequest
    from dpo.world import World


Kept = Literal["none", "nf4", "int8"]


@dataclass(frozen=True)
class Target:
    """What is scored, and what it is held against.

    Attributes:
        base: the model whose weights are read.
        adapter: the folder of the adapter on it, or None.
        reference: another model, or None.
        quantization: how the base is kept, "nf4", "int8" or "none"; double_quantization as `model.double_quantization`.
        note: why, for people.
    """

    base: str
    adapter: str | None
    reference: str | None
    quantization: Kept = "none"
    double_quantization: bool = True
    note: str = ""

    @property
    def has_reference(self) -> bool:
        """Whether there are rewards."""
        return self.adapter is not None or self.reference is not None

    @staticmethod
    def of(model: str, reference: str | None, beta: float | None, quantization: str = "auto") -> Target:
        """Read what kind of model it is.

        Raises:
            ConfigError: an option would do nothing.
        """
        _refuse_folders_of_runs(Path(model))
        adapter = read_object(Path(model) / "adapter_config.json")
        base = adapter.get("base_model_name_or_path") if adapter else model
        if not base:
            raise ConfigError(f"--model {model}: its adapter_config.json names no base model: add it there")
        target = Target(str(base), model if adapter else None, reference)
        if quantization != "auto":
            target = replace(target, quantization=cast(Kept, quantization))
        elif adapter:
            target = target._as_in_the_run(Path(model).resolve().parent)
        if beta is not None and not target.has_reference:
            raise ConfigError("--beta scales rewards, which need a reference: give --reference, or drop it")
        return target

    def _as_in_the_run(self, run: Path) -> Target:
        """With the base kept as the run did, where the adapter's folder is in a run directory."""
        if not (run / "config.yaml").is_file():
            return self
        section = config_of(run).model
        note = f"{self.base} in {section.quantization}, as {run}/config.yaml says"
        return replace(
            self,
            quantization=section.quantization,
            double_quantization=section.double_quantization,
            note="" if section.quantization == "none" else note,
        )


def _refuse_folders_of_runs(model: Path) -> None:
    """Say which folder of a run is its model. Raises ConfigError."""
    if (model / "trainer.json").is_file():
        raise ConfigError(f"--model {model}: a checkpoint; python -m dpo.export {model} makes a model of it")
    if (model / "metrics.jsonl").is_file() and not (model / "config.json").is_file():
        raise ConfigError(
            f"--model {model}: a run directory; give {model}/final, or python -m dpo.export makes a model of it"
        )


def config_for(arguments: argparse.Namespace, target: Target) -> Config:
    """The trainer's config that stands for the arguments; nothing of it trains. Raises ConfigError."""
    return build(
        {
            "model.path": target.base,
            "model.dtype": arguments.dtype,
            "model.trust_remote_code": arguments.trust_remote_code,
            "data.train": tuple(arguments.data),
            "data.eval": tuple(arguments.data),
            "data.max_length": arguments.max_length,
            "data.on_bad_row": arguments.on_bad_row,
            "loss.beta": 0.1 if arguments.beta is None else arguments.beta,
            "batch.layout": arguments.layout,
            "batch.tokens_per_micro_batch": arguments.tokens,
            "parallel.device": arguments.device,
            "run.dir": tempfile.gettempdir(),
        }
    )


class _Frozen:
    """The part of an engine that scoring asks for: a model that only scores, whole on every rank."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def forward(
        self,
        batch: PairBatch,
        statistic: HeadStatistic | None = None,
        own_logits: bool = False,
        observe: Observer | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """See `Engine`."""
        return self.policy(batch, statistic, own_logits, observe)


def evaluate_model(
    config: Config, target: Target, world: World, stop: StopRequest, *, json_file: Path | None, pairs_file: Path | None
) -> None:
    """Score all pairs, print what they come to, and write what was asked for; every rank calls it.

    Raises:
        ConfigError, DataError: as the trainer, or a file that cannot be written.
    """
    from dpo.build import open_shards
    from dpo.terminal import Terminal

    terminal = Terminal(world.is_main)
    with tempfile.TemporaryDirectory() as folder:
        from data_utils.record import DataRecord
        from data_utils.scratch import Scratch

        ours = world.gather_objects(folder)[0]
        scratch = world.together(lambda: Scratch(ours))
        shards, notes = open_shards(config.data.eval, config, world, scratch, DataRecord(Path(folder)))
        for note in [*notes, target.note]:
            if note:
                terminal.say(note)
        scores = _evaluator(config, target, shards, world, stop).run()
    metrics = measured(scores, target.has_reference)
    where = [shards.where(index) for index in scores.index.tolist()]
    world.together(lambda: _write(metrics, scores, where, json_file, pairs_file) if world.is_main else None)
    terminal.metrics(f"{target.adapter or target.base}: {len(scores):,} pairs", metrics)


def _write(
    metrics: dict[str, Any], scores: Scores, where: list[str], json_file: Path | None, pairs_file: Path | None
) -> None:
    if json_file is not None:
        plain = {key: None if value != value else value for key, value in metrics.items()}
        write_atomically(json_file, json.dumps(plain, indent=1) + "\n")
    if pairs_file is not None:
        write_atomically(pairs_file, (json.dumps(row) + "\n" for row in pair_rows(scores, where, 0, {})))


def measured(scores: Scores, has_reference: bool) -> dict[str, float]:
    """Metrics of a model: likelihoods, and with a reference all that the trainer's evaluation has.

    `likelihood/accuracies`: how often chosen has the higher log-prob; `..._per_token`: the higher one per scored token.
    """
    row = _likelihoods(scores)
    for name, mask in named_groups(scores.set_name).items():
        if not mask.all():
            row |= {f"{name}_{key}": value for key, value in _likelihoods(scores.of(mask)).items()}
    return row | (evaluation_metrics(scores) if has_reference else {"pairs": len(scores)})


def _likelihoods(scores: Scores) -> dict[str, float]:
    chosen, rejected = scores.policy_chosen, scores.policy_rejected
    per_token = chosen / scores.chosen_tokens, rejected / scores.rejected_tokens
    values = {
        "likelihood/accuracies": right(chosen, rejected),
        "likelihood/accuracies_per_token": right(*per_token),
        "likelihood/chosen_per_token": per_token[0],
        "likelihood/rejected_per_token": per_token[1],
    }
    return {key: float(np.mean(value)) for key, value in values.items()}


# ---- building


def _evaluator(config: Config, target: Target, shards: ShardSet, world: World, stop: StopRequest) -> Evaluator:
    from data_utils.loader import StepLoader
    from data_utils.order import Order
    from data_utils.tokenize import PairTokenizer
    from dpo.build import choose_layout, max_length, open_tokenizer, settle_layout
    from dpo.engine import Engine, compute_dtype
    from dpo.evaluator import Evaluator, set_of, whole_set
    from dpo.objective import Objective
    from dpo.pretrained import Pretrained
    from dpo.quantize import Quantization
    from dpo.steps import FILLER_ID, agree

    source = Pretrained.open(config.model.path, trust_remote_code=config.model.trust_remote_code)
    if target.quantization != "none":
        source = replace(source, quantization=Quantization(target.quantization, target.double_quantization))
    other = None
    if target.reference is not None:
        other = Pretrained.open(target.reference, None, config.model.trust_remote_code, "--reference")
    tokenizer = open_tokenizer(config)
    layout, _ = choose_layout(config, source, other or source)
    dtype = compute_dtype(config.model.dtype, world.device)
    engine = cast(Engine, _Frozen(_policy(source, target.adapter, layout, dtype, world.device)))
    settle_layout(config, source, engine, dtype, world)
    layout = engine.policy.layout
    loader = StepLoader(
        shards,
        PairTokenizer(tokenizer, max_length(config, source)),
        Order(shards.parts, len(shards), shuffle=False),
        rank=world.rank,
        world_size=world.size,
        layout=layout,
        tokens_per_micro_batch=config.batch.tokens_per_micro_batch,
        pad_token_id=FILLER_ID,
        on_bad_row=config.data.on_bad_row,
    )
    steps = agree(loader.steps(0, 1), world, stop, layout)
    batches = whole_set(steps, loader.order.pairs_per_epoch, world, config.data.max_bad_fraction)
    reference = _reference(engine.policy, other, dtype, world.device)
    with_kl = target.has_reference and (other is None or source.has_vocabulary_of(other))
    return Evaluator(batches, Objective(config.loss), engine, reference, world, set_of(config, shards), with_kl)


def _policy(
    source: Pretrained, adapter: str | None, layout: Layout, dtype: torch.dtype, device: torch.device
) -> Policy:
    """The model as it is loaded from disk, with its adapter where it has one."""
    from peft import PeftModel

    from dpo.policy import Policy, frozen_policy

    if adapter is None:
        return frozen_policy(source, layout, dtype).to(device)
    try:
        model = PeftModel.from_pretrained(source.load(dtype, device), adapter)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"--model {adapter}: {str(error).strip().splitlines()[0]}") from error
    return Policy(model, source.logit_transform, layout).requires_grad_(False).eval().to(device)


def _reference(policy: Policy, other: Pretrained | None, dtype: torch.dtype, device: torch.device) -> Reference:
    """Another model, the base without its adapter, or the model itself, which makes every reward 0."""
    from dpo.engine import make_scorer
    from dpo.policy import frozen_policy
    from dpo.reference import Reference

    if other is not None:
        return Reference(make_scorer(frozen_policy(other, policy.layout, dtype).to(device)))
    scorer = make_scorer(policy)
    if not policy.is_lora:
        return Reference(scorer)

    def without_adapter(batch: PairBatch, observe: Observer | None = None) -> Tensor:
        with policy.adapter_off():
            return scorer(batch, observe)

    return Reference(without_adapter, shares_head=True)
