"""What a run is built from. Everything is refused as early as it can be: data and config before weights are read."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import replace

import transformers

from data_utils.loader import StepLoader
from data_utils.order import Order
from data_utils.record import DataRecord
from data_utils.schema import Layout, RowError
from data_utils.scratch import Scratch
from data_utils.shards import ShardSet
from data_utils.tokenize import PairTokenizer
from dpo.advice import will_it_fit
from dpo.answers import Answers
from dpo.build import (
    choose_layout,
    describe_quantized,
    max_length,
    open_reference,
    open_scorer,
    open_shards,
    open_tokenizer,
    settle_layout,
)
from dpo.checkpoint import CheckpointWriter
from dpo.config import Config
from dpo.ds_json import read_ds_json
from dpo.engine import Build, Engine, build_engine, compute_dtype
from dpo.evaluator import Evaluator, set_of, whole_set
from dpo.faults import Faults
from dpo.identity import making_facts
from dpo.metrics import host_peak_gib
from dpo.objective import Objective
from dpo.plan import make_plan
from dpo.policy import Sizes
from dpo.pretrained import Pretrained
from dpo.reference import MovingReference, NoReference, Reference
from dpo.runlog import RunLog
from dpo.shelf import Shelf
from dpo.signals import StopRequest
from dpo.steps import FILLER_ID, AgreedStep, agree
from dpo.stored import StoredReference, open_store
from dpo.terminal import Terminal
from dpo.world import World


class Parts:
    """The parts of a run, built in the order in which they can refuse; nothing here changes as it trains.

    Attributes:
        held_out: the pairs of data.eval.
        shelf: the folder of checkpoints, for rank 0 to use.
        making: what token ids depend on.
        record: what the run directory remembers of the data.
        notes: lines for people about the data.
        layout, why_layout: of the batches, and why.
        dtype: of compute.
        answers: to the held-out prompts, where `eval.generate` asks for them.
        sizes: numbers of parameters.
        trained: "lora", "lora on nf4" or "full".
        loading: how long the policy took, and what it took of the host, in words.
        quantized: what is, in words.
    """

    def __init__(self, config: Config, world: World, log: RunLog, stop: StopRequest, terminal: Terminal) -> None:
        self.config, self.world, self.log, self.stop, self.terminal = config, world, log, stop, terminal
        self.shelf = Shelf(log.directory / "checkpoints", config.checkpoint.trust)
        self.trained = "lora" if config.lora.r else "full"
        if config.model.quantization != "none":
            self.trained += f" on {config.model.quantization}"
        transformers.utils.logging.disable_progress_bar()
        self.scratch = world.together(lambda: Scratch(str(log.directory.resolve())))
        may_change = "data.train" in config.checkpoint.allow_changes or not self.shelf.listed()
        self.record = DataRecord(log.directory / "data", forget=may_change)
        self.shards, self.notes = open_shards(config.data.train, config, world, self.scratch, self.record)
        self.order = Order(self.shards.parts, config.batch.pairs_per_step, config.train.seed, config.data.shuffle)
        self.plan = make_plan(config, world.size, self.order.pairs_per_epoch)
        self.source = Pretrained.of(config.model)
        reference_source = open_reference(config, self.source)
        ds_json = None if config.parallel.ds_config is None else read_ds_json(config.parallel.ds_config)
        self.tokenizer = open_tokenizer(config)
        self.making = making_facts(self.tokenizer, max_length(config, self.source))
        self._probe_tokenizer()
        self.layout: Layout
        self.layout, self.why_layout = choose_layout(config, self.source, reference_source)
        self.dtype = compute_dtype(config.model.dtype, world.device)
        self.held_out = self._held_out()
        self.answers = self._answers(self.held_out)
        if world.is_main and (warning := will_it_fit(config, world)):
            self.notes.append(warning)
        self._open_run_directory()
        self.objective = Objective(config.loss, config.train.seed)
        build = Build(config, self.plan, world, self.source, self.layout, self.dtype, ds_json)
        since = time.perf_counter()
        self.engine: Engine = build_engine(build)
        memory_gib = max(world.gather_objects(host_peak_gib()))
        self.loading = f"{time.perf_counter() - since:.1f} s, at most {memory_gib:.1f} GiB of host memory on a rank"
        self.quantized = describe_quantized(self.engine.policy, self.source, self.dtype)
        if why := settle_layout(config, self.source, self.engine, self.dtype, world):
            self.layout, self.why_layout = self.engine.policy.layout, why
        self.reference = self._reference(reference_source)
        self.faults = Faults.of(os.environ, world.rank)
        in_save = None if self.faults is None else self.faults.in_save
        self.writer = CheckpointWriter(self.shelf, self.engine, world, config.checkpoint.keep, in_save)
        self.sizes = Sizes.of(self.engine.policy)
        self.loader = self._loader(self.shards, self.order, config.data.num_workers)
        self.evaluator = None if self.held_out is None else self._evaluator(self.held_out)

    def _held_out(self) -> ShardSet | None:
        if not self.config.data.eval:
            return None
        shards, notes = open_shards(self.config.data.eval, self.config, self.world, self.scratch, self.record)
        self.notes += notes
        return shards

    def _answers(self, held_out: ShardSet | None) -> Answers | None:
        if not self.config.eval.generate:
            return None
        assert held_out is not None, "Config refuses it"
        path = self.log.directory / "answers.jsonl"
        pair_tokenizer = self._pair_tokenizer()
        return Answers(held_out, pair_tokenizer, self.tokenizer, self.config, self.world, self.terminal, path)

    def _open_run_directory(self) -> None:
        self.world.together(self.log.lock)
        self.log.open(self.world)
        self.log.status("running", 0)
        self.world.together(self.record.open)
        if self.world.is_main:
            self.shelf.clear_parts()

    def _reference(self, source: Pretrained) -> Reference:
        config = self.config
        if not config.loss.needs_reference:
            return NoReference()
        scorer = open_scorer(config, source, self.engine)
        if config.reference.sync_steps is not None:
            share = config.reference.mixup_alpha
            return MovingReference(scorer(), lambda: self.engine.move_reference(share), config.reference.sync_steps)
        if config.reference.mode != "stored":
            return Reference(scorer(), shares_head=config.reference_source == "adapter_off")
        opened = open_store(config, source, self.making, self.dtype, self.world, self.terminal.say)
        return StoredReference(
            scorer,
            opened,
            self.world,
            layout=self.layout,
            tokens_per_micro_batch=config.batch.tokens_per_micro_batch,
            dtype=self.dtype,
            steps_per_epoch=self.plan.steps_per_epoch,
            say=self.terminal.say,
        )

    def _probe_tokenizer(self) -> None:
        """Tokenize one row before any weights are read: a missing chat template shows now, not after minutes."""
        with contextlib.suppress(RowError):  # this row's own fault, which the loader handles
            self._pair_tokenizer()(self.shards.pair(0), 0)

    def _pair_tokenizer(self) -> PairTokenizer:
        return PairTokenizer(self.tokenizer, max_length(self.config, self.source))

    def _loader(self, shards: ShardSet, order: Order, num_workers: int = 0) -> StepLoader:
        return StepLoader(
            shards,
            self._pair_tokenizer(),
            order,
            rank=self.world.rank,
            world_size=self.world.size,
            layout=self.layout,
            tokens_per_micro_batch=self.config.batch.tokens_per_micro_batch,
            pad_token_id=FILLER_ID,
            on_bad_row=self.config.data.on_bad_row,
            pin_memory=self.world.device.type == "cuda",
            num_workers=num_workers,
        )

    def _evaluator(self, shards: ShardSet) -> Evaluator:
        """The whole held-out set as one window, so that it is balanced over ranks and packed at its best."""
        loader = self._loader(shards, Order(shards.parts, len(shards), self.config.train.seed, shuffle=False))
        steps = self._agreed(loader, 0, 1)
        most = self.config.data.max_bad_fraction
        batches = whole_set(steps, loader.order.pairs_per_epoch, self.world, most)
        sets = set_of(self.config, shards)
        with_kl = self.config.measures_kl
        return Evaluator(batches, self.objective, self.engine, self.reference, self.world, sets, with_kl)

    def steps(self, first: int, last: int) -> Iterator[AgreedStep]:
        """Steps first, ..., last - 1 of training, agreed on by all ranks, with all that the reference needs."""
        return self._agreed(self.loader, first, last)

    def _agreed(self, loader: StepLoader, first: int, last: int) -> Iterator[AgreedStep]:
        look_up, has_written = self.reference.look_up, lambda: self.writer.is_done
        steps = agree(loader.steps(first, last), self.world, self.stop, self.layout, look_up, has_written)
        for step in map(self.reference.complete, steps):
            weight = self.objective.tail_weight
            batches = [replace(batch, tail_weight=weight) for batch in step.micro_batches]
            yield step if weight == 1 else replace(step, micro_batches=batches)
