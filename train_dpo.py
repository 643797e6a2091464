#!/usr/bin/env python
"""Align a causal language model to preferences with DPO: `python train_dpo.py --config FILE [--section.key value ...]`.

Runs alone or as one of many ranks under `launch/local.sh`, torchrun, deepspeed or srun. Exit codes: 0 done, 2 config or
data, 3 checkpoint, 4 a peer died or hung, 75 stopped on request (the same command resumes).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from dpo.config import parse_or_exit

if TYPE_CHECKING:
    from dpo.run import Run


def train(run: Run) -> bool:
    """Take the steps that are left; whether the run came to its end (else it was asked to stop, and saved)."""
    engine, reference, objective = run.engine, run.reference, run.objective
    for step in run.steps(run.resume()):
        if step.stop:
            run.stopped(step.number)
            return False
        for number, (batch, slopes) in enumerate(run.look_ahead(step), start=1):
            reference_logps_S = reference.logps(batch)
            policy_logps_S, statistic_S = engine.forward(batch, objective.statistic)
            pairs = objective.pairs(batch, policy_logps_S, statistic_S, reference_logps_S)
            loss_B = objective.with_routers(objective.loss(pairs, slopes), engine.policy.balance_B)
            loss, last = (batch.weight_B * loss_B).sum() * step.pair_weight, number == len(step.micro_batches)
            engine.backward(run.unless_spike(loss, last), last)
            run.count(batch, pairs, loss_B)
        result = engine.step(run.learning_rate(step.number))
        run.after(step, result)
    run.finish()
    return True


def main(argv: list[str]) -> int:
    """Parse, build, train; returns the exit code."""
    config = parse_or_exit(argv)
    from dpo.session import session

    return session(config, train)


if __name__ == "__main__":
    from dpo.session import end_process

    end_process(main(sys.argv[1:]))
