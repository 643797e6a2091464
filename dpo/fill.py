"""Fills the reference store ahead of training; `python -m dpo.reference` starts it.

The reference is held as for LoRA, whatever will be trained: its weights once, in the dtype of compute, under the engine
of the config, with a small adapter that is switched off. No gradients, no optimizer state to speak of.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import transformers

from data_utils.loader import StepLoader
from data_utils.order import Order
from data_utils.record import DataRecord
from data_utils.scratch import Scratch
from data_utils.shards import ShardSet
from data_utils.skipped import Skipped
from data_utils.tokenize import PairTokenizer
from dpo.build import (
    choose_layout,
    max_length,
    open_reference,
    open_scorer,
    open_shards,
    open_tokenizer,
    settle_layout,
)
from dpo.config import Config, ConfigError, DataSource, LoraSection
from dpo.ds_json import read_ds_json
from dpo.engine import Build, build_engine, compute_dtype
from dpo.identity import making_facts
from dpo.plan import make_plan
from dpo.pretrained import Pretrained
from dpo.signals import StopRequest
from dpo.steps import FILLER_ID, agree
from dpo.stored import StoredReference, open_store
from dpo.terminal import Terminal
from dpo.world import World


@dataclass(frozen=True)
class _Part:
    """Pairs to fill in: steps 0, ..., num_steps - 1 of an order of some shards."""

    shards: ShardSet
    order: Order
    num_steps: int
    num_workers: int


def fill(config: Config, world: World, stop: StopRequest) -> bool:
    """Compute what the store lacks; whether all of it was done (else it was asked to stop). Every rank calls it.

    Raises:
        ConfigError, DataError: as the trainer with this config, or when the disk is full.
    """
    transformers.utils.logging.disable_progress_bar()
    terminal = Terminal(world.is_main)
    directory = Path(config.run.dir)
    scratch, record = Scratch(str(directory.resolve())), DataRecord(directory / "data")
    shards, _ = open_shards(config.data.train, config, world, scratch, record)
    held_out = open_shards(config.data.eval, config, world, scratch, record)[0] if config.data.eval else None
    parts = _parts(config, world, shards, held_out)
    reference, tokenizer = _reference(config, world, parts, terminal)
    done = _fill_all(config, world, stop, parts, reference, tokenizer, terminal)
    reference.close()
    world.raise_together(None if reference.store.problem is None else ConfigError(reference.store.problem))
    computed = sum(number for (number,) in world.exchange([reference.num_forwards]))
    how = "" if done else " (stopped; the same command goes on)"
    reference.store.refresh()
    terminal.say(f"reference  {len(reference.store):,} pairs in {reference.store.folder}; {computed:,} forwards{how}")
    return done


def _parts(config: Config, world: World, shards: ShardSet, held_out: ShardSet | None) -> list[_Part]:
    """What training will ask for: the pairs of one epoch (of all, where weights below 1 give each others), and all
    held-out ones."""
    batch = config.batch
    order = Order(shards.parts, batch.pairs_per_step, config.train.seed, config.data.shuffle)
    plan = make_plan(config, world.size, order.pairs_per_epoch)
    weights = [source.weight for source in config.data.train if isinstance(source, DataSource)]
    is_same = all(weight == int(weight) for weight in weights)
    num_steps = min(plan.num_steps, plan.steps_per_epoch) if is_same else plan.num_steps
    parts = [_Part(shards, order, num_steps, config.data.num_workers)]
    if held_out is not None:
        num_steps = math.ceil(len(held_out) / batch.pairs_per_step)
        order = Order(held_out.parts, batch.pairs_per_step, config.train.seed, shuffle=False)
        parts.append(_Part(held_out, order, num_steps, 0))
    return parts


def _reference(
    config: Config, world: World, parts: list[_Part], terminal: Terminal
) -> tuple[StoredReference, PairTokenizer]:
    """The stored reference over a model that was loaded for it alone; and what makes token ids for the policy."""
    policy = Pretrained.of(config.model)
    source = open_reference(config, policy)
    tokenizer = open_tokenizer(config)
    making = making_facts(tokenizer, max_length(config, policy))
    alone = _alone(config)
    layout, _ = choose_layout(alone, source, source)
    dtype = compute_dtype(config.model.dtype, world.device)
    opened = open_store(config, source, making, dtype, world, terminal.say)
    ds_json = None if config.parallel.ds_config is None else read_ds_json(config.parallel.ds_config)
    plan = make_plan(alone, world.size, parts[0].order.pairs_per_epoch)
    engine = build_engine(Build(alone, plan, world, source, layout, dtype, ds_json))
    settle_layout(alone, source, engine, dtype, world)
    reference = StoredReference(
        open_scorer(alone, source, engine),
        opened,
        world,
        layout=engine.policy.layout,
        tokens_per_micro_batch=config.batch.tokens_per_micro_batch,
        dtype=dtype,
        steps_per_epoch=parts[0].num_steps,
        say=terminal.say,
    )
    return reference, PairTokenizer(tokenizer, max_length(config, policy))


def _alone(config: Config) -> Config:
    """The config of a policy that only serves as the reference."""
    return replace(
        config,
        model=replace(config.model, path=config.reference.path or config.model.path),
        lora=LoraSection(r=1),
        reference=replace(config.reference, mode="stored", path=None, offload=False),
        loss=replace(config.loss, router_aux_loss_coef=0.0),
        train=replace(config.train, gradient_checkpointing=False, recompute="full", activation_offload=False),
        export=replace(config.export, merge_lora=False),
    )


def _fill_all(
    config: Config,
    world: World,
    stop: StopRequest,
    parts: list[_Part],
    reference: StoredReference,
    tokenizer: PairTokenizer,
    terminal: Terminal,
) -> bool:
    total, before = sum(part.num_steps for part in parts), 0
    terminal.say(f"reference  {len(reference.store):,} pairs in {reference.store.folder}; looking up {total:,} steps")
    terminal.start(0, total)
    num_pairs = 0
    try:
        for part in parts:
            skipped = Skipped()
            loader = _loader(config, world, part, reference, tokenizer)
            steps = agree(loader.steps(0, part.num_steps), world, stop, loader.layout, reference.look_up)
            for step in map(reference.complete, steps):
                if step.stop:
                    return False
                skipped.add(step.skipped)
                num_pairs += step.num_pairs
                _show(terminal, before + step.number + 1, total, num_pairs)
            everyones = Skipped.together(world.gather_objects(skipped))
            everyones.judge(len(part.shards), config.data.max_bad_fraction)
            before += part.num_steps
    finally:
        terminal.stop()
    return True


def _loader(
    config: Config, world: World, part: _Part, reference: StoredReference, tokenizer: PairTokenizer
) -> StepLoader:
    return StepLoader(
        part.shards,
        tokenizer,
        part.order,
        rank=world.rank,
        world_size=world.size,
        layout=reference.layout,
        tokens_per_micro_batch=config.batch.tokens_per_micro_batch,
        pad_token_id=FILLER_ID,
        on_bad_row=config.data.on_bad_row,
        num_workers=part.num_workers,
    )


def _show(terminal: Terminal, done: int, total: int, num_pairs: int) -> None:
    """The live bar, or ten lines in a file."""
    terminal.advance(done, f"{num_pairs:,} pairs")
    if not terminal.console.is_terminal and done * 10 // total > (done - 1) * 10 // total:
        terminal.say(f"reference  {done:,} of {total:,} steps, {num_pairs:,} pairs")
