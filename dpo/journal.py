"""What a run counts and tells: sums behind the metrics, totals since its start, rows that were left out."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from data_utils.schema import PairBatch
from data_utils.skipped import Skipped
from dpo.checkpoint import TrainerState
from dpo.clock import Clock
from dpo.engine import StepResult
from dpo.loss_terms import PairLogps
from dpo.metrics import Tally, Throughput, means, memory_use, peak_flops
from dpo.numbers import BadSteps, SpikeRule
from dpo.parts import Parts
from dpo.scores import Scores, drift_warning, evaluation_metrics
from dpo.steps import AgreedStep
from dpo.stored import StoredReference
from dpo.terminal import count
from dpo.watchdog import Watchdog


@dataclass
class Totals:
    """What has happened since the start of the run, over all of its processes."""

    pairs_seen: int = 0
    rows_skipped: Counter[str] = field(default_factory=Counter)
    steps_skipped: int = 0
    seconds: float = 0.0
    eval_before: dict[str, float] = field(default_factory=dict)


class Journal:
    """Counts steps as they are taken, and writes and shows what they come to.

    Attributes:
        clock: where the time of this process goes.
        totals: since the start of the run; its steps_skipped as of the last log, its rows_skipped without this process.
    """

    def __init__(self, parts: Parts, clock: Clock, watchdog: Watchdog) -> None:
        self.clock, self._watchdog = clock, watchdog
        self._parts, self._world, self._log, self._plan = parts, parts.world, parts.log, parts.plan
        self._tally = Tally(self._world)
        self._throughput = Throughput(self._world, parts.sizes, peak_flops(self._world.device, parts.dtype))
        self.totals = Totals()
        train = parts.config.train
        self.bad_steps = BadSteps(self._world.device, train.max_bad_steps, train.spike_sigmas)
        self.spikes = SpikeRule(self._world, train.spike_sigmas)
        self._skipped = Skipped()  # by this rank, in this process
        self._num_skipped = 0  # by all ranks
        self._unread: set[str] = set()
        self._logged_forwards = 0
        self._since = time.perf_counter()

    # ---- at the start

    def restore(self, state: TrainerState) -> None:
        """Go on with the sums and totals of a checkpoint."""
        if self._world.is_main:
            self._tally.add_sums(state.sums, state.num_pairs)
        self.bad_steps.total = state.steps_skipped
        self.spikes.restore(state.losses)
        self.totals = Totals(
            state.pairs_seen, Counter(state.rows_skipped), state.steps_skipped, state.seconds, dict(state.eval_before)
        )

    def hello(self, first: int) -> None:
        """The first screen."""
        parts, plan, config = self._parts, self._plan, self._parts.config
        dtype = str(parts.dtype).removeprefix("torch.")
        num_all, num_trained = parts.sizes.all, parts.sizes.trained
        parts.terminal.facts(
            {
                "model": f"{config.model.path} ({count(num_all)} parameters, {dtype})",
                "trains": f"{count(num_trained)} ({num_trained / num_all:.2%}), {parts.trained}",
                "loss": f"{' + '.join(config.loss.type)}, beta {config.loss.beta:g}",
                **({"quantized": parts.quantized} if parts.quantized else {}),
                "loaded": f"in {parts.loading}",
                "reference": self._where_reference(),
                "engine": f"{plan.engine} on {plan.world_size} x {self._world.device.type}",
                "layout": f"{parts.layout} ({parts.why_layout})",
                "memory": memory_use(self._world),
                "pairs": f"{plan.pairs_per_epoch} for training{self._held_out()}",
                "steps": f"{plan.num_steps} of {config.batch.pairs_per_step} pairs"
                + (f", from {first}" if first else ""),
                "run": str(self._log.directory),
            }
        )
        for note in parts.notes:
            parts.terminal.say(note)

    def _held_out(self) -> str:
        held_out = self._parts.held_out
        return "" if held_out is None else f", {len(held_out)} held out"

    def _where_reference(self) -> str:
        if not self._parts.config.loss.needs_reference:
            return "none, the loss needs no reference"
        reference, source = self._parts.config.reference, self._parts.config.reference_source
        text = source + (f" of {reference.path}" if reference.path else "")
        if reference.sync_steps is not None:
            text += f", every {reference.sync_steps} steps {reference.mixup_alpha:g} of the way to the policy"
        if isinstance(self._parts.reference, StoredReference):
            store = self._parts.reference.store
            return f"{len(store):,} stored pairs of {store.folder}; {text} for others"
        return text

    def start(self, first: int) -> None:
        """Training begins now."""
        self._parts.terminal.start(first, self._plan.num_steps)
        self._throughput.clear()
        self._since = time.perf_counter()
        self.clock.enter("training")

    # ---- steps

    def watch_data(self, step: AgreedStep, first: int) -> None:
        """Stop when too many rows were left out; name columns that the loss does not read, once.

        Raises:
            DataError: more rows than `data.max_bad_fraction` allows were left out since step `first`.
        """
        config = self._parts.config
        self._skipped.add(step.skipped)
        self._num_skipped += step.num_skipped
        num_rows = self._plan.pairs_per_epoch * (step.epoch - first // self._plan.steps_per_epoch + 1)
        if self._num_skipped > config.data.max_bad_fraction * num_rows:
            self._everyones_skipped().judge(num_rows, config.data.max_bad_fraction)
        unread = {name for batch in step.micro_batches for name in self._parts.objective.unread_columns(batch)}
        if names := sorted(unread - self._unread):
            remedies = {"margin": "--loss.margin_scale 1", "label": "--loss.soft_labels true"}
            ways = " and ".join(f"{name} with {remedies[name]}" for name in names)
            self._parts.terminal.say(
                f"warning: the rows have columns that the loss does not read; it would read {ways}"
            )
        self._unread |= unread

    def count(self, batch: PairBatch, pairs: PairLogps, loss_B: Tensor) -> None:
        """Note a micro-batch."""
        self._tally.add(batch, pairs, loss_B)
        self._throughput.add(batch)

    def count_step(self, step: AgreedStep, result: StepResult) -> None:
        """Note a step."""
        self.totals.pairs_seen += step.num_pairs
        self._throughput.waited_s += step.waited_s
        self.clock.move("waiting for data", step.waited_s)
        self.bad_steps.note(result.skipped)
        if self._parts.config.log.ledger:
            self._write_ledger(step, bool(result.skipped))
        self._parts.terminal.advance(step.number + 1)

    def _write_ledger(self, step: AgreedStep, skipped: bool) -> None:
        """What all ranks computed in this step, in the order of its window."""
        mine = [index for batch in step.micro_batches if not batch.is_idle for index in batch.index_B]
        everyones = [index for share in self._world.gather_objects(mine) for index in share]
        place = {index: place for place, index in enumerate(self._parts.order.window(step.number)[1].tolist())}
        pairs = [self._parts.shards.where(index) for index in sorted(everyones, key=place.__getitem__)]
        self._log.ledger(step.number + 1, pairs, skipped)

    def write(self, done: int, result: StepResult, rate: float) -> None:
        """Metrics since the last call; one reduction over ranks. `rate`: the step's learning rate."""
        config, reference = self._parts.config, self._parts.reference
        forwards = reference.num_forwards - self._logged_forwards
        self._logged_forwards = reference.num_forwards
        seen, counted = self._watchdog.extras(), self._throughput.extras()
        sums, num_pairs, extras = self._tally.reduce([forwards, *seen, *counted])
        reference_forwards, seen, extras = extras[0], extras[1 : 1 + len(seen)], extras[1 + len(seen) :]
        skipped = self.bad_steps.read()
        row = {"step": done, "epoch": done / self._plan.steps_per_epoch}
        metrics = means(sums, num_pairs)
        row |= {"loss": metrics.pop("loss"), "grad_norm": result.grad_norm.item(), "learning_rate": rate, **metrics}
        row |= {"pairs_seen": self.totals.pairs_seen, **self._throughput.metrics(extras, num_pairs)}
        row |= {"skipped_steps": skipped, **self._skipped_rows()}
        row |= {"reference_forwards": round(reference_forwards)}
        self._log.metrics(row)
        self._log.status("running", done)
        self._parts.terminal.log(row, self._plan.num_steps, config.batch.pairs_per_step)
        if line := self._watchdog.straggler(seen):
            self._parts.terminal.say(line)
        if skipped > self.totals.steps_skipped:
            self._parts.terminal.say(f"warning: {self.bad_steps.cause}; {skipped} steps skipped so far")
        self.totals.steps_skipped = skipped
        self._tally.clear()
        self._throughput.clear()

    def write_evaluation(self, done: int, scores: Scores) -> dict[str, float]:
        """The row of an evaluation after `done` steps, and every pair of it; returns its metrics."""
        held_out, metrics = self._parts.held_out, evaluation_metrics(scores)
        assert held_out is not None
        self._log.metrics({"step": done, "epoch": done / self._plan.steps_per_epoch, **metrics})
        if self._world.is_main:
            self._log.eval_pairs(scores, map(held_out.where, scores.index.tolist()), done)
        if 0 < done < self._plan.num_steps:
            self._parts.terminal.evaluated(done, self._plan.num_steps, metrics)
        if warning := drift_warning(metrics):
            self._parts.terminal.say(f"warning: step {done}: {warning}")
        return metrics

    def _everyones_skipped(self) -> Skipped:
        """Rows left out in this process, over all ranks."""
        return Skipped.together(self._world.gather_objects(self._skipped)) if self._num_skipped else Skipped()

    def _skipped_rows(self) -> dict[str, int]:
        """Metrics: rows left out since the start of the run, and how many for each cause."""
        causes = self.totals.rows_skipped + self._everyones_skipped().causes
        return {"skipped_rows": causes.total()} | {f"skipped_rows/{cause}": causes[cause] for cause in sorted(causes)}

    # ---- saving and ending

    @property
    def seconds(self) -> float:
        """Of training, since the start of the run."""
        return self.totals.seconds + time.perf_counter() - self._since

    def state(self) -> dict[str, Any]:
        """The fields of `TrainerState` that `restore` reads; every rank calls it."""
        sums, num_pairs, _ = self._tally.reduce()
        return {
            "sums": sums,
            "num_pairs": num_pairs,
            "pairs_seen": self.totals.pairs_seen,
            "rows_skipped": dict(self.totals.rows_skipped + self._everyones_skipped().causes),
            "steps_skipped": self.bad_steps.read(),
            "losses": self.spikes.state(),
            "seconds": self.seconds,
            "eval_before": self.totals.eval_before,
        }

    def write_summary(self, after: dict[str, float], seconds: float, answers: dict[str, Any]) -> None:
        """summary.json of a run that has ended; `after` is its last evaluation, `answers` what they come to."""
        before = self.totals.eval_before
        self._log.summary(
            {
                **_before_after("loss", "eval_loss", before, after),
                **_before_after("accuracy", "eval_rewards/accuracies", before, after),
                **_before_after("margin", "eval_rewards/margins", before, after),
                **_before_after(
                    "accuracy_length_controlled", "eval_rewards/accuracies_length_controlled", before, after
                ),
                **_before_after("chosen_drift", "eval_drift/chosen", before, after),
                **_before_after("chosen_kl_per_token", "eval_kl_per_token/chosen", before, after),
                **answers,
                "steps": self._plan.num_steps,
                "pairs": self.totals.pairs_seen,
                "seconds": seconds,
                "seconds_by_phase": {phase: round(spent, 3) for phase, spent in self.clock.seconds.items()},
                "reference_forwards": sum(
                    number for (number,) in self._world.exchange([self._parts.reference.num_forwards])
                ),
            }
        )


def _before_after(name: str, key: str, before: dict[str, float], after: dict[str, float]) -> dict[str, float | None]:
    return {f"eval_{name}_before": before.get(key), f"eval_{name}_after": after.get(key)}
