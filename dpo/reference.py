"""The frozen reference: log-probs of the model before training.

One method, `logps(batch)`, three sources: the policy with its adapter off (LoRA: same weights, no second copy), a
frozen copy held like the policy, or a store of what one of these has computed before (`dpo.stored`). All start from
`model.path` (or `reference.path`), never from a checkpoint, so that a resumed run still scores with the original
weights; a copy that moves (`reference.sync_steps`) goes on from where the checkpoint has it.

    python -m dpo.reference --config FILE [flags of train_dpo.py]

fills the store ahead of training. Nothing heavy is imported here, so that its --help answers at once.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from data_utils.schema import PairBatch, Step
    from dpo.engine import Scorer
    from dpo.logps import Observer
    from dpo.signals import StopRequest
    from dpo.steps import AgreedStep
    from dpo.world import World


DESCRIPTION = """Fill the store of reference log-probs ahead of training, for data.train and data.eval.

- Takes the config and the flags of train_dpo.py, and runs under the same launchers, on any number of ranks.
- What the store holds already is not computed again; a run that is stopped or killed goes on where it was.
- Train with --reference.mode stored afterwards; reference.store names the folder for both."""


class Reference:
    """Scores batches with the model before training.

    Attributes:
        num_forwards: forwards of this rank so far.
        shares_head: it is the policy with its adapter off.
        remedy: what to do when its numbers are not the policy's before training.
    """

    remedy = "the reference must be the model before training; set reference.path if another one is meant"

    def __init__(self, scorer: Scorer, shares_head: bool = False) -> None:
        self._scorer, self.shares_head = scorer, shares_head
        self.num_forwards = 0

    def logps(self, batch: PairBatch, observe: Observer | None = None) -> Tensor:
        """(S,) summed log-probs of the responses under the reference, without grad; those of the batch where it has
        them. `observe` is shown what the reference predicts."""
        if batch.reference_logps_S is not None and observe is None:
            return batch.reference_logps_S
        self.num_forwards += 1
        return self._scorer(batch, observe)

    def look_up(self, step: Step) -> int:
        """Forwards that this rank needs before a step can be taken; all ranks then make as many together."""
        return 0

    def complete(self, step: AgreedStep) -> AgreedStep:
        """The step with all in it that `logps` needs; every rank calls it."""
        return step

    def after_step(self, done: int) -> None:
        """So many steps are done; every rank calls it."""

    def close(self) -> None:
        """Nothing more is asked."""


class MovingReference(Reference):
    """A frozen copy that is moved towards the policy every so many steps (`dpo.moving`).

    Args:
        move: moves it.
    """

    def __init__(self, scorer: Scorer, move: Callable[[], None], every: int) -> None:
        super().__init__(scorer)
        self._move, self._every = move, every

    def after_step(self, done: int) -> None:
        """See `Reference`."""
        if done % self._every == 0:
            self._move()


class NoReference(Reference):
    """For losses that need none: no model, and log-probs of 0, so that log-ratios are the policy's log-probs."""

    def __init__(self) -> None:
        self.num_forwards = 0

    def logps(self, batch: PairBatch, observe: Observer | None = None) -> Tensor:
        """See `Reference`: (S,) zeros."""
        assert observe is None, "Config refuses it"
        return batch.response_lengths_S.new_zeros(2 * batch.num_pairs)


def main(argv: list[str]) -> int:
    """Parse and fill; returns the exit code of the trainer's contract."""
    if "--help" in argv or "-h" in argv:
        from dpo.config_help import show_help

        show_help("python -m dpo.reference [--config FILE.yaml]", DESCRIPTION)
        return 0
    from dpo.config import parse_or_exit
    from dpo.session import tool_session

    config = parse_or_exit([*argv, "--reference.mode", "stored"])

    def work(world: World, stop: StopRequest) -> bool:
        from dpo.fill import fill

        return fill(config, world, stop)

    return tool_session(config, work)


if __name__ == "__main__":
    from dpo.session import end_process

    end_process(main(sys.argv[1:]))
