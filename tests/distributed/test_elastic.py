"""Runs that stop and go on with another number of ranks: the same pairs in the same order, the same losses."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from tests.distributed.conftest import Lab
from tests.tiny import tiny_pairs

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def deepspeed(stage: int) -> list[str]:
    return ["--parallel.engine", "deepspeed", "--parallel.ds_config", f"ds_configs/zero{stage}.json"]


FSDP2 = ["--parallel.engine", "fsdp2"]
KINDS = {"full": [], "lora": ["--lora.r", "4", "--optim.learning_rate", "1e-2"]}
CHAINED = {
    "full-fsdp2": (FSDP2, FSDP2),
    "full-zero1": (deepspeed(1), deepspeed(1)),
    "full-zero2": (deepspeed(2), deepspeed(2)),
    "lora-zero2-zero3": (deepspeed(2), deepspeed(3)),
}
"""Flags in the first job and in later ones."""
AUDITED = {"fsdp2": FSDP2, "zero3": deepspeed(3)}
NUM_PAIRS, STEPS_PER_EPOCH = 401, 34
JOBS = ((3, 2, 20), (2, 3, 25), (1, 1, None), (3, 9, 99))
"""Ranks of each job, and the steps that a chained and an audited run take in it. The chained ones have two epochs of
four steps; the audited ones go from the middle of the first epoch over its end with two ranks, and skip job three."""


@pytest.fixture(scope="module")
def trained(lab: Lab) -> Lab:
    """All runs, stopped and resumed; and undisturbed: one for each kind of chained run and for each audited one."""
    tiny_pairs(lab.folder / "many.jsonl", NUM_PAIRS)
    for job, (num_ranks, chained_steps, audited_steps) in enumerate(JOBS):
        commands = []
        for name, (first, later) in CHAINED.items():
            flags = [*(first if job == 0 else later), *KINDS[name[:4]]]
            commands += [lab.command(f"chained-{name}", *flags, "--train.stop_after_steps", str(chained_steps))]
        if audited_steps is not None:
            for name, flags in AUDITED.items():
                stop = ("--train.stop_after_steps", str(audited_steps))
                commands += [audit(lab, f"audited-{name}", *flags, *stop)]
        if job == 1:
            commands += [lab.command(f"steady-{kind}", *deepspeed(3), *flags) for kind, flags in KINDS.items()]
            commands += [audit(lab, f"steady-{name}", *flags) for name, flags in AUDITED.items()]
        lab.train(num_ranks, *commands)
    return lab


def audit(lab: Lab, name: str, *flags: str) -> list[str]:
    """Command of a run over two epochs of 401 pairs in steps of 12 that keeps a ledger."""
    command = lab.command(name, *flags, "--log.ledger", "true", "--eval.before", "false")
    command[command.index("--data.train") + 1] = str(lab.folder / "many.jsonl")
    return command


def ledger(lab: Lab, name: str) -> list[list[str]]:
    """The pairs of each step."""
    rows = [json.loads(line) for line in (lab.folder / name / "ledger.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 2 * STEPS_PER_EPOCH + 1))
    return [row["pairs"] for row in rows]


def assert_same_losses(lab: Lab, name: str, steady: str, num_jobs: int) -> None:
    rows, expected = lab.training_rows(name), lab.training_rows(steady)
    assert (lab.status(name)["attempt"], lab.status(steady)["attempt"]) == (num_jobs, 1)
    assert [row["step"] for row in rows] == list(range(1, len(expected) + 1))
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], abs=1e-5)
    assert lab.rows(name)[-1]["eval_loss"] == pytest.approx(lab.rows(steady)[-1]["eval_loss"], abs=1e-5)


@pytest.mark.parametrize("name", CHAINED)
def test_every_engine_goes_on_with_any_number_of_ranks(trained: Lab, name: str) -> None:
    assert_same_losses(trained, f"chained-{name}", f"steady-{name[:4]}", len(JOBS))


@pytest.mark.parametrize("engine", AUDITED)
def test_the_losses_do_not_tell_how_many_ranks_there_were(trained: Lab, engine: str) -> None:
    assert_same_losses(trained, f"audited-{engine}", f"steady-{engine}", 3)


@pytest.mark.parametrize("engine", AUDITED)
def test_every_pair_comes_once_per_epoch_however_many_ranks_there_are(trained: Lab, engine: str) -> None:
    steps = ledger(trained, f"audited-{engine}")
    assert [len(pairs) for pairs in steps] == ([12] * 33 + [5]) * 2
    for epoch in (steps[:STEPS_PER_EPOCH], steps[STEPS_PER_EPOCH:]):
        counts = Counter(pair for pairs in epoch for pair in pairs)
        assert len(counts) == NUM_PAIRS and set(counts.values()) == {1}


@pytest.mark.parametrize("engine", AUDITED)
def test_the_order_is_that_of_the_undisturbed_run(trained: Lab, engine: str) -> None:
    steps = ledger(trained, f"audited-{engine}")
    assert steps == ledger(trained, f"steady-{engine}")
    assert steps[:STEPS_PER_EPOCH] != steps[STEPS_PER_EPOCH:]
