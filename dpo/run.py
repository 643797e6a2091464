"""One run, built and kept: its parts, and what happens between steps (log, evaluate, save, resume, finish)."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from torch import Tensor

from data_utils.loader import StepLoader
from data_utils.order import Order
from data_utils.record import DataRecord
from data_utils.schema import Layout, PairBatch, RowError
from data_utils.scratch import Scratch
from data_utils.shards import ShardSet
from data_utils.skipped import Skipped
from data_utils.tokenize import PairTokenizer
from dpo import checkpoint
from dpo.build import choose_layout, open_shards, open_tokenizer
from dpo.checkpoint import TrainerState
from dpo.config import Config, ConfigError
from dpo.ds_json import read_ds_json
from dpo.engine import Build, Engine, StepResult, build_engine, compute_dtype
from dpo.evaluate import Evaluator
from dpo.export import export
from dpo.gates import require_scoring, require_step0, scoring_gap, step0_gap
from dpo.loss import PairLogps
from dpo.metrics import Tally, Throughput, means, peak_flops
from dpo.objective import Objective
from dpo.plan import learning_rate, make_plan
from dpo.policy import Pretrained, Sizes
from dpo.reference import Reference, build_reference, open_reference
from dpo.runlog import RunLog
from dpo.signals import StopRequest
from dpo.steps import FILLER_ID, AgreedStep, agree
from dpo.terminal import Terminal, count, duration
from dpo.world import World

logger = logging.getLogger("dpo")


@dataclass
class Totals:
    """What has happened since the start of the run, over all of its processes."""

    pairs_seen: int = 0
    rows_skipped: Counter[str] = field(default_factory=Counter)
    steps_skipped: int = 0
    seconds: float = 0.0
    eval_before: dict[str, float] = field(default_factory=dict)


class Run:
    """The parts of a run, and its bookkeeping."""

    def __init__(self, config: Config, world: World, log: RunLog, stop: StopRequest) -> None:
        self.config, self.world, self.log, self.stop = config, world, log, stop
        transformers.utils.logging.disable_progress_bar()
        self.terminal = Terminal(world.is_main)
        self.scratch = world.together(lambda: Scratch(str(log.directory.resolve())))
        may_change = "data.train" in config.checkpoint.allow_changes or not checkpoint.any_in(self._checkpoints)
        self.record = DataRecord(log.directory / "data", forget=may_change)
        self.shards, self._notes = open_shards(config.data.train, config, world, self.scratch, self.record)
        self.order = Order(self.shards.parts, config.batch.pairs_per_step, config.train.seed, config.data.shuffle)
        self.plan = make_plan(config, world.size, self.order.pairs_per_epoch)
        self.source = Pretrained.open(
            config.model.path, config.model.attn_implementation, config.model.trust_remote_code
        )
        reference_source = open_reference(config, self.source)
        ds_json = None if config.parallel.ds_config is None else read_ds_json(config.parallel.ds_config)
        self.tokenizer = open_tokenizer(config)
        self._probe_tokenizer()
        self.layout: Layout
        self.layout, self._why_layout = choose_layout(config, self.source)
        self.dtype = compute_dtype(config.model.dtype, world.device)
        held_out = None
        if config.data.eval:
            held_out, notes = open_shards(config.data.eval, config, world, self.scratch, self.record)
            self._notes += notes
        world.together(log.lock)
        log.open(world)
        log.status("running", 0)
        world.together(self.record.open)
        self.objective = Objective(config.loss)
        build = Build(config, self.plan, world, self.source, self.layout, self.dtype, ds_json)
        self.engine: Engine = build_engine(build)
        self._check_scoring()
        self.reference: Reference = build_reference(config, reference_source, self.engine)
        self.loader = self._loader(self.shards, self.order, config.data.num_workers)
        self.evaluator = None if held_out is None else self._evaluator(held_out)
        self._sizes = Sizes.of(self.engine.policy)
        self.tally = Tally(world)
        self.throughput = Throughput(world, self._sizes, peak_flops(world.device, self.dtype))
        self.totals = Totals()
        self._steps_skipped = torch.zeros((), device=world.device)
        self._skipped = Skipped()  # by this rank, in this process
        self._num_skipped = 0  # by all ranks
        self._unread: set[str] = set()
        self._saved: int | None = None

    # ---- building

    def _check_scoring(self) -> None:
        """Hold our scoring against the model's own logits; `auto` falls back to padded rows when packing is wrong."""
        vocabulary = self.source.text_config.vocab_size
        gap = self._worst(scoring_gap(self.engine, vocabulary, self.world.device))
        try:
            require_scoring(gap, self.dtype, self.config.model.path, self.layout)
        except ConfigError as error:
            if self.layout == "padded" or self.config.batch.layout != "auto":
                raise
            logger.warning("packed rows: %s", error)
            self.layout, self._why_layout = "padded", "packed rows did not give the model's own log-probs"
            self.engine.policy.use_layout("padded")
            gap = self._worst(scoring_gap(self.engine, vocabulary, self.world.device))
            require_scoring(gap, self.dtype, self.config.model.path, self.layout)

    def _worst(self, gap: float) -> float:
        return max(self.world.gather_objects(gap))

    def _probe_tokenizer(self) -> None:
        """Tokenize one row before any weights are read: a missing chat template shows now, not after minutes."""
        with contextlib.suppress(RowError):  # this row's own fault, which the loader handles
            self._pair_tokenizer()(self.shards.pair(0), 0)

    def _pair_tokenizer(self) -> PairTokenizer:
        positions = self.source.max_positions
        max_length = self.config.data.max_length if positions is None else min(self.config.data.max_length, positions)
        return PairTokenizer(self.tokenizer, max_length)

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
        (step,) = self._agreed(loader, 0, 1)
        skipped = Skipped()
        skipped.add(step.skipped)
        whole = Skipped.together(self.world.gather_objects(skipped))
        whole.judge(loader.order.pairs_per_epoch, self.config.data.max_bad_fraction)
        return Evaluator(step.micro_batches, self.objective, self.engine, self.reference, self.world)

    def _everyones_skipped(self) -> Skipped:
        """Rows left out in this process, over all ranks."""
        return Skipped.together(self.world.gather_objects(self._skipped)) if self._num_skipped else Skipped()

    def _skipped_rows(self) -> dict[str, int]:
        """Metrics: rows left out since the start of the run, and how many for each cause."""
        causes = self.totals.rows_skipped + self._everyones_skipped().causes
        return {"skipped_rows": causes.total()} | {f"skipped_rows/{cause}": causes[cause] for cause in sorted(causes)}

    def _agreed(self, loader: StepLoader, first: int, last: int) -> Iterator[AgreedStep]:
        return agree(loader.steps(first, last), self.world, self.stop, self.layout)

    # ---- starting

    def resume(self) -> int:
        """Load the checkpoint that there is to resume; returns the number of the first step to take.

        Raises:
            ConfigError: the data are not those of the checkpoint.
            CheckpointError: it cannot be used.
        """
        resume = self.config.checkpoint.resume
        found = None if resume == "never" else checkpoint.find(self._checkpoints, resume, self.world)
        if found is None:
            self.log.rewind(-1)
            self._keep_facts()
            return 0
        path, state = found
        dtype = str(self.dtype).removeprefix("torch.")
        checkpoint.check_compatible(path, state, self.plan.engine, self._trained, dtype)
        if "data.train" not in self.config.checkpoint.allow_changes:
            if state.data != self.shards.fingerprint:
                changes = self.record.differences(self.shards.facts()) or "other files"
                remedy = "restore them, or set --checkpoint.allow_changes data.train"
                raise ConfigError(f"data.train: not the shards of {path} ({changes}): {remedy}")
            assert state.cursor == self.order.cursor(state.step)
        self._keep_facts()
        checkpoint.restore(path, self.engine, self.world)
        self.log.rewind(state.step or -1)  # from step 0 the evaluation before training is made again
        if self.world.is_main:
            self.tally.add_sums(state.sums, state.num_pairs)
        self._steps_skipped += state.steps_skipped
        self.totals = Totals(
            state.pairs_seen, Counter(state.rows_skipped), state.steps_skipped, state.seconds, dict(state.eval_before)
        )
        self.log.status("running", state.step)
        self.terminal.say(f"resume     {path.name}")
        return state.step

    def _keep_facts(self) -> None:
        facts = self.shards.facts() if self.world.is_main else []
        self.world.together(lambda: self.record.keep_facts(facts) if facts else None)

    def steps(self, first: int) -> Iterator[AgreedStep]:
        """The steps from `first` to the end of the plan; before the very first one, policy and reference must agree.

        Raises:
            ValueError: data that cannot be used; what was trained until then is saved.
        """
        self._say_hello(first)
        for note in self._notes:
            self.terminal.say(note)
        if first == 0:
            self._check_step0()
            self.totals.eval_before = self.evaluate(0) if self.config.eval.before else {}
        self.terminal.start(first, self.plan.num_steps)
        self.throughput.clear()
        self._since = time.perf_counter()
        done = first
        try:
            for step in self._agreed(self.loader, first, self.plan.num_steps):
                self._watch_data(step, first)
                yield step
                done = step.number + 1
        except ValueError:
            if done > first:
                self.save(done)
            raise

    def _watch_data(self, step: AgreedStep, first: int) -> None:
        """Stop when too many rows were left out; name columns that the loss does not read, once."""
        self._skipped.add(step.skipped)
        self._num_skipped += step.num_skipped
        num_rows = self.plan.pairs_per_epoch * (step.epoch - first // self.plan.steps_per_epoch + 1)
        if self._num_skipped > self.config.data.max_bad_fraction * num_rows:
            self._everyones_skipped().judge(num_rows, self.config.data.max_bad_fraction)
        unread = {name for batch in step.micro_batches for name in self.objective.unread_columns(batch)}
        if names := sorted(unread - self._unread):
            loss = self.config.loss.type[0]
            self.terminal.say(f"warning: the rows' {', '.join(names)} are not read by loss.type={loss}")
        self._unread |= unread

    def _check_step0(self) -> None:
        """Hold policy against reference on this rank's first pairs."""
        if self.config.reference.path is not None:
            return
        (step,) = self._agreed(self.loader, 0, 1)
        batch = step.micro_batches[0].to(self.world.device)
        require_step0(self._worst(step0_gap(self.engine, self.reference, batch)), self.dtype)

    def _say_hello(self, first: int) -> None:
        sizes = self._sizes
        plan, batch = self.plan, self.config.batch
        self.terminal.facts(
            {
                "model": f"{self.config.model.path} ({count(sizes.all)} parameters, {self.dtype})".replace(
                    "torch.", ""
                ),
                "trains": f"{count(sizes.trained)} ({sizes.trained / sizes.all:.2%}), {self._trained}",
                "reference": self.config.reference_source
                + (f" of {self.config.reference.path}" if self.config.reference.path else ""),
                "engine": f"{plan.engine} on {plan.world_size} x {self.world.device.type}",
                "layout": f"{self.layout} ({self._why_layout})",
                "pairs": f"{plan.pairs_per_epoch} for training",
                "steps": f"{plan.num_steps} of {batch.pairs_per_step} pairs" + (f", from {first}" if first else ""),
                "run": str(self.log.directory),
            }
        )

    # ---- between steps

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step."""
        return learning_rate(step, self.plan, self.config.optim)

    def count(self, batch: PairBatch, pairs: PairLogps, loss_B: Tensor) -> None:
        """Note a micro-batch."""
        self.tally.add(batch, pairs, loss_B)
        self.throughput.add(batch)

    def after(self, step: AgreedStep, result: StepResult) -> None:
        """Note a step; log, evaluate and save when it is time."""
        done = step.number + 1
        self.stop.count_step()
        self.totals.pairs_seen += step.num_pairs
        self.throughput.waited_s += step.waited_s
        self._steps_skipped += result.skipped
        if self.config.log.ledger:
            self._write_ledger(step, bool(result.skipped))
        self.terminal.advance(done)
        if done % self.config.log.every_steps == 0 or done == self.plan.num_steps:
            self._write_metrics(done, result)
        is_last = done == self.plan.num_steps
        if _due(done, self.config.eval.every_steps) and not is_last:
            self.evaluate(done)
        if _due(done, self.config.checkpoint.every_steps) and not is_last:
            self.save(done)

    def _write_ledger(self, step: AgreedStep, skipped: bool) -> None:
        """What all ranks computed in this step, in the order of its window."""
        mine = [index for batch in step.micro_batches if not batch.is_idle for index in batch.index_B]
        everyones = [index for share in self.world.gather_objects(mine) for index in share]
        place = {index: place for place, index in enumerate(self.order.window(step.number)[1].tolist())}
        pairs = [self.shards.where(index) for index in sorted(everyones, key=place.__getitem__)]
        self.log.ledger(step.number + 1, pairs, skipped)

    def _write_metrics(self, done: int, result: StepResult) -> None:
        sums, num_pairs, extras = self.tally.reduce(self.throughput.extras())
        grad_norm, skipped = torch.stack([result.grad_norm, self._steps_skipped]).tolist()
        rate = self.learning_rate(done - 1)
        row = {"step": done, "epoch": done / self.plan.steps_per_epoch}
        metrics = means(sums, num_pairs)
        row |= {"loss": metrics.pop("loss"), "grad_norm": grad_norm, "learning_rate": rate, **metrics}
        row |= {"pairs_seen": self.totals.pairs_seen, **self.throughput.metrics(extras, num_pairs)}
        row |= {"skipped_steps": round(skipped), **self._skipped_rows()}
        self.log.metrics(row)
        self.log.status("running", done)
        self.terminal.log(row, self.plan.num_steps, self.config.batch.pairs_per_step)
        if skipped > self.totals.steps_skipped:
            self.terminal.say(f"warning: gradient norm was not finite; {round(skipped)} steps skipped so far")
        self.totals.steps_skipped = round(skipped)
        self.tally.clear()
        self.throughput.clear()

    def evaluate(self, done: int) -> dict[str, float]:
        """Evaluate the held-out set, where there is one, and log it."""
        if self.evaluator is None:
            return {}
        result = self.evaluator.run()
        self.log.metrics({"step": done, "epoch": done / self.plan.steps_per_epoch, **result})
        return result

    # ---- saving and ending

    @property
    def _checkpoints(self) -> Path:
        return self.log.directory / "checkpoints"

    @property
    def _trained(self) -> str:
        return "lora" if self.config.lora.r else "full"

    def save(self, done: int) -> None:
        """Write a checkpoint after `done` steps, unless this process has just done so."""
        if self._saved == done:
            return
        self._saved = done
        sums, num_pairs, _ = self.tally.reduce()
        state = TrainerState(
            step=done,
            cursor=self.order.cursor(done),
            engine=self.plan.engine,
            world_size=self.world.size,
            trained=self._trained,
            data=self.shards.fingerprint,
            sums=sums,
            num_pairs=num_pairs,
            pairs_seen=self.totals.pairs_seen,
            rows_skipped=dict(self.totals.rows_skipped + self._everyones_skipped().causes),
            steps_skipped=round(self._steps_skipped.item()),
            seconds=self._seconds(),
            eval_before=self.totals.eval_before,
            dtype=str(self.dtype).removeprefix("torch."),
        )
        checkpoint.save(self._checkpoints, state, self.engine, self.world, self.config.checkpoint.keep)

    def _seconds(self) -> float:
        return self.totals.seconds + time.perf_counter() - self._since

    def stopped(self, done: int) -> None:
        """Save and leave, to be resumed by the same command."""
        self.terminal.stop()
        self.save(done)
        reasons = self.world.gather_objects(self.stop.reason if self.stop.is_requested else None)
        reason = next(reason for reason in reasons if reason is not None)
        self.log.status("stopped", done, 75, reason)
        self.terminal.say(f"stopped at step {done} of {self.plan.num_steps} ({reason}); the same command resumes")

    def finish(self) -> None:
        """Evaluate, export, and say how it went."""
        steps, seconds = self.plan.num_steps, self._seconds()
        self.terminal.stop()
        after = self.evaluate(steps)
        final = export(
            self.log.directory / "final", self.engine, self.source, self.tokenizer, self.config, self.dtype, self.world
        )
        self.log.summary(
            {
                **_before_after("loss", "eval_loss", self.totals.eval_before, after),
                **_before_after("accuracy", "eval_rewards/accuracies", self.totals.eval_before, after),
                **_before_after("margin", "eval_rewards/margins", self.totals.eval_before, after),
                "steps": steps,
                "pairs": self.totals.pairs_seen,
                "seconds": seconds,
            }
        )
        self.log.status("finished", steps, 0)
        if after:
            self.terminal.before_after(self.totals.eval_before, after)
        self.terminal.say(f"{steps} steps, {self.totals.pairs_seen} pairs in {duration(seconds)}; model in {final}")


def _before_after(name: str, key: str, before: dict[str, float], after: dict[str, float]) -> dict[str, float | None]:
    return {f"eval_{name}_before": before.get(key), f"eval_{name}_after": after.get(key)}


def _due(done: int, every: int | None) -> bool:
    return every is not None and done % every == 0
