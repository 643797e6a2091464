"""One run: what happens at its start, after each step and at its end. `dpo.parts` builds, `dpo.journal` counts and
tells, `dpo.saving` saves and resumes."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator

from torch import Tensor

from data_utils.schema import PairBatch
from dpo.ahead import look_ahead
from dpo.beat import Beat
from dpo.clock import Clock
from dpo.config import Config
from dpo.engine import StepResult
from dpo.final import export, loading_code
from dpo.gates import require_step0, step0_gap
from dpo.journal import Journal
from dpo.loss_terms import PairLogps
from dpo.objective import Slopes
from dpo.parts import Parts
from dpo.plan import learning_rate
from dpo.report.collect import Shards
from dpo.report.page import write_report
from dpo.runlog import RunLog
from dpo.saving import Saver
from dpo.signals import StopRequest
from dpo.steps import AgreedStep
from dpo.terminal import Terminal, duration
from dpo.watchdog import Watchdog
from dpo.world import World

logger = logging.getLogger("dpo")


class Run:
    """A run as the loop sees it.

    Attributes:
        parts: what it is built from.
        engine, reference, objective: those of them that the loop names.
        plan, order, loader: and those that tools name.
    """

    def __init__(self, config: Config, world: World, log: RunLog, stop: StopRequest) -> None:
        self.config, self.world, self.log, self.stop = config, world, log, stop
        self.terminal = Terminal(world.is_main)
        timeout_s = config.parallel.timeout_s
        self.watchdog = Watchdog(world, socket.gethostname(), timeout_s, log.stacks, log.fail_from_watchdog)
        self.clock = Clock("start")
        self.parts = parts = Parts(config, world, log, stop, self.terminal)
        self.engine, self.reference, self.objective = parts.engine, parts.reference, parts.objective
        self.plan, self.order, self.loader = parts.plan, parts.order, parts.loader
        self.beat = Beat(os.environ, world.rank, log.directory)
        self.journal = Journal(parts, self.clock, self.watchdog)
        self.saver = Saver(parts, self.journal)
        self._rate = 0.0

    # ---- starting

    def resume(self) -> int:
        """Load the checkpoint that there is to resume; returns the number of the first step to take.

        Raises:
            ConfigError: the data are not those of the checkpoint.
            CheckpointError: it cannot be used.
        """
        if self.parts.evaluator is not None and self.config.reference.sync_steps is not None:
            self.parts.evaluator.ask_reference()  # as it is before it moves, or is moved to where it was
        return self.saver.resume()

    def steps(self, first: int) -> Iterator[AgreedStep]:
        """The steps from `first` to the end of the plan; before the very first one, policy and reference must agree.

        Raises:
            ValueError: data that cannot be used; what was trained until then is saved.
        """
        self.journal.hello(first)
        if first == 0:
            self._check_step0()
            if self.config.eval.before:
                self._measure_before()
        self.journal.start(first)
        self.watchdog.step = done = first
        self.beat.step(first)
        try:
            for step in self.parts.steps(first, self.plan.num_steps):
                if step.is_written:
                    self.saver.settle()
                self.journal.watch_data(step, first)
                yield step if self.parts.faults is None else self.parts.faults.before(step)
                done = step.number + 1
        except ValueError:
            if done > first:
                self.saver.save(done)
            self.reference.close()
            raise

    def _measure_before(self) -> None:
        """Evaluate and answer with the model before training."""
        self.journal.totals.eval_before = self.evaluate(0)
        if self.parts.answers is not None:
            with self.clock.phase("answers"):
                self.parts.answers.before(self.engine.policy)

    def _check_step0(self) -> None:
        """Hold policy against reference on this rank's first pairs."""
        if self.config.reference.path is not None or not self.config.loss.needs_reference:
            return
        (step,) = self.parts.steps(0, 1)
        batch = step.micro_batches[0].to(self.world.device)
        gap = max(self.world.gather_objects(step0_gap(self.engine, self.reference, batch)))
        require_step0(gap, self.parts.dtype, self.reference.remedy)

    # ---- steps

    def look_ahead(self, step: AgreedStep) -> Iterator[tuple[PairBatch, Slopes | None]]:
        """The step's micro-batches on the device, with what a loss that looks across its pairs has to know of them."""
        return look_ahead(step, self.engine, self.reference, self.objective, self.world)

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step; its schedule stands still for a step that was skipped.

        Raises:
            ConfigError: on every rank, when too many steps in a row were skipped.
        """
        bad_steps = self.journal.bad_steps
        bad_steps.require(step)
        self._rate = learning_rate(step - bad_steps.total, self.plan, self.config.optim)
        return self._rate

    def unless_spike(self, loss: Tensor, last: bool) -> Tensor:
        """This rank's part of a step's loss, made NaN where the step's loss leapt, so that the step is skipped."""
        return self.journal.spikes.guard(loss, last)

    def count(self, batch: PairBatch, pairs: PairLogps, loss_B: Tensor) -> None:
        """Note a micro-batch."""
        self.journal.count(batch, pairs, loss_B)

    def after(self, step: AgreedStep, result: StepResult) -> None:
        """Note a step; log, evaluate and save when it is time."""
        done = step.number + 1
        is_last = done == self.plan.num_steps
        self.watchdog.step = done
        self.beat.step(done)
        self.stop.count_step()
        self.reference.after_step(done)
        self.journal.count_step(step, result)
        if done % self.config.log.every_steps == 0 or is_last:
            self.journal.write(done, result, self._rate)
        if _due(done, self.config.eval.every_steps) and not is_last:
            self.evaluate(done)
        if _due(done, self.config.checkpoint.every_steps) and not is_last:
            self.saver.save(done, is_periodic=True)

    def evaluate(self, done: int) -> dict[str, float]:
        """Evaluate the held-out set, where there is one, and log it."""
        if self.parts.evaluator is None:
            return {}
        with self.clock.phase("evaluation"):
            return self.journal.write_evaluation(done, self.parts.evaluator.run())

    # ---- ending

    def stopped(self, done: int) -> None:
        """Save and leave, to be resumed by the same command."""
        self.terminal.stop()
        self.saver.save(done)
        reasons = self.world.gather_objects(self.stop.reason if self.stop.is_requested else None)
        reason = next(reason for reason in reasons if reason is not None)
        self.reference.close()
        self.log.status("stopped", done, 75, reason)
        self.terminal.say(f"stopped at step {done} of {self.plan.num_steps} ({reason}); the same command resumes")

    def finish(self) -> None:
        """Evaluate, export, and say how it went."""
        steps, seconds, totals = self.plan.num_steps, self.journal.seconds, self.journal.totals
        self.terminal.stop()
        self.journal.bad_steps.require(self.plan.num_steps)
        self.saver.settle()
        after = self.evaluate(steps)
        parts = self.parts
        if parts.answers is not None:
            with self.clock.phase("answers"):
                parts.answers.after(self.engine.policy)
                parts.answers.measure_kl(self.engine, self.reference)
        directory = self.log.directory / "final"
        with self.clock.phase("export"):
            final = export(directory, self.engine, parts.source, parts.tokenizer, self.config, parts.dtype, self.world)
        self.journal.write_summary(after, seconds, {} if parts.answers is None else parts.answers.summary())
        self.reference.close()
        self.log.status("finished", steps, 0)
        if after:
            self.terminal.before_after(totals.eval_before, after)
        if parts.answers is not None:
            parts.answers.show()
        self.terminal.say(f"{steps} steps, {totals.pairs_seen} pairs in {duration(seconds)}")
        self.terminal.say(f"model      {final}; to load it:\n{loading_code(final)}")
        if self.world.is_main:
            self._report()

    def _report(self) -> None:
        """Write report.html; the run is finished by now, whatever becomes of its page."""
        shards = Shards(self.config, self.parts.shards, self.parts.held_out)
        try:
            self.terminal.say(f"report     {write_report(self.log.directory, shards)}")
        except Exception as error:
            logger.exception("report.html")
            remedy = f"see logs/, and python -m dpo.report {self.log.directory}"
            self.terminal.say(f"warning: report.html was not written ({type(error).__name__}: {error}); {remedy}")


def _due(done: int, every: int | None) -> bool:
    return every is not None and done % every == 0
