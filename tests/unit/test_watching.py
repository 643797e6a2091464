"""What ranks find out about themselves and each other: skipped steps, phases, stragglers, what may differ on resume."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dpo.differences import refuse
from dpo.faults import Faults
from dpo.numbers import LEAST_LOSSES, WINDOW, BadSteps, SpikeRule
from dpo.refusals import ConfigError
from dpo.watchdog import PHASES, Watchdog, look
from dpo.world import World


def test_bad_steps_are_counted_and_end_a_run_when_they_are_too_many_in_a_row() -> None:
    bad = BadSteps(torch.device("cpu"), 3)
    for done, (flag, total) in enumerate(zip((1, 1, 0, 1, 1), (1, 2, 2, 3, 4), strict=True), start=1):
        bad.note(torch.tensor(float(flag)))
        bad.require(done)
        assert bad.total == total
    bad.note(torch.tensor(1.0))
    with pytest.raises(ConfigError, match=r"^steps 4 to 6: the gradient was not finite 3 times in a row"):
        bad.require(6)


def multiples(rule: SpikeRule, losses: list[float]) -> list[float]:
    """What a step's gradient is multiplied by, for each of these losses in turn, given in two micro-batches."""
    found = []
    for loss in losses:
        parts = [torch.tensor(part, requires_grad=True) for part in (0.25 * loss, 0.75 * loss)]
        for part, last in zip(parts, (False, True), strict=True):
            rule.guard(part, last).backward()
        assert parts[0].grad == 1
        found.append(float(parts[1].grad))  # type: ignore[arg-type]
    return found


def test_a_loss_that_leaps_is_told_from_those_that_vary() -> None:
    """Losses of 1 +- 0.1 alternate, so that 6 standard deviations above their mean is 1.6, then more."""
    rule = SpikeRule(World(0, 1, 0, torch.device("cpu"), None), 6.0)
    calm = [0.9, 1.1] * (LEAST_LOSSES // 2)
    assert multiples(rule, [0.9, 100.0, 1.1]) == [1, 1, 1]  # too few to judge by
    rule.restore([])
    assert multiples(rule, calm) == [1] * len(calm)
    seen = multiples(rule, [1.59, 2.0, -5.0, float("nan"), 1.61])
    assert seen[0] == 1 and seen[1] != seen[1] and seen[2:4] == [1, 1]
    kept = json.loads(json.dumps(rule.state()))
    assert kept[:-3] == pytest.approx(calm) and kept[-3:] == pytest.approx([1.59, -5.0, 1.61])
    again = SpikeRule(World(0, 1, 0, torch.device("cpu"), None), 6.0)
    again.restore(kept)
    longer = [1.0, 30.0, *calm * 5]
    assert str(multiples(rule, longer)) == str(multiples(again, longer))
    assert len(again.state()) == WINDOW and again.state() == rule.state()


def test_without_the_rule_the_loss_is_what_it_was() -> None:
    loss = torch.tensor(3.0)
    assert SpikeRule(World(0, 1, 0, torch.device("cpu"), None), 0.0).guard(loss, True) is loss


def test_a_stack_tells_its_phase() -> None:
    phase, is_waiting, place = look(sys._getframe())
    assert (phase, is_waiting) == ("other", False) and place
    code = "def forward(): return look(sys._getframe())\ndef run(): return forward()"
    for file, expected in (("dpo/engine.py", "forward"), ("dpo/evaluator.py", "evaluation")):
        names: dict[str, Any] = {"look": look, "sys": sys}
        exec(compile(code, file, "exec"), names)
        assert names["run"]()[0] == expected
    names = {"look": look, "sys": sys}
    exec(compile("def wait(): return look(sys._getframe())", "x/torch/distributed/c10d.py", "exec"), names)
    assert names["wait"]()[1]


def watchdog(num_ranks: int) -> Watchdog:
    world: Any = SimpleNamespace(size=num_ranks, rank=0)
    dog = Watchdog(world, "here", 3600, lambda: sys.stderr, lambda reason: None)
    dog.close()
    return dog


@pytest.mark.parametrize(
    ("shares", "slow"),
    [((0.8, 0.1, 0.9), 1), ((0.1, 0.1, 0.9), None), ((0.5, 0.4, 0.5), None), ((0.0, 0.7, 0.8), 0)],
)
def test_a_rank_for_which_all_others_wait_is_told_of_once(shares: tuple[float, ...], slow: int | None) -> None:
    dog, busiest = watchdog(3), [float(PHASES.index("data"))] * 3
    line = dog.straggler([*shares, *busiest])
    assert line is None if slow is None else line is not None and f"rank {slow} is slow" in line and "data" in line
    assert dog.straggler([*shares, *busiest]) is None


def test_what_may_not_differ_is_refused_with_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    changes = [("loss.beta", 0.1, 0.3), ("train.seed", 1, 2)]
    assert refuse(changes, ["loss.beta", "train.seed"], "x", show=True) == changes
    with pytest.raises(ConfigError) as caught:
        refuse(changes, ["loss.beta"], "runs/a holds a run", show=True)
    message = "runs/a holds a run with another config (train.seed: 1 there, 2 now): give another --run.dir"
    assert str(caught.value) == f"{message}, or --checkpoint.allow_changes loss.beta train.seed"
    assert capsys.readouterr().err.splitlines() == [
        "changed     in the run  in this command",
        "train.seed  1           2",
    ]


def test_faults_are_those_of_this_rank() -> None:
    assert Faults.of({}, 0) is None
    faults = Faults.of({"DPO_FAULT": "0:3:slow,1:4:kill"}, 1)
    assert faults is not None and faults._faults == [(4, "kill")]
    for text in ("1:4", "1:x:kill", "1:4:sleep"):
        with pytest.raises(ConfigError, match="not RANK:STEP:KIND"):
            Faults.of({"DPO_FAULT": text}, 1)
