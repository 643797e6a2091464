"""Losses of every kind under every engine: the single process's trajectory, whatever the ranks and micro-batches."""

from __future__ import annotations

import json

import pytest

from tests.distributed.conftest import Lab
from tests.distributed.test_equivalence import FSDP2, PACKED, PADDED, SHARED, SPLIT, deepspeed
from tests.distributed.test_resume import same_weights, steady

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

LOSSES = {
    "mixed": ["--loss.type", "sigmoid", "bco_pair", "sft", "--loss.weights", "0.8", "0.2", "1"],
    "aot": ["--loss.type", "aot", "--loss.label_smoothing", "0.1"],
    "aot_unpaired": ["--loss.type", "aot_unpaired"],
    "beta_dpo": ["--loss.beta_gain", "0.6"],
    "beta_filter": ["--loss.beta_gain", "0.6", "--loss.beta_filter", "0.25"],
    "ld": ["--loss.ld_alpha", "0.3", "--loss.f_divergence", "js_divergence"],
    "wpo": ["--loss.type", "hinge", "--loss.wpo", "true", "--loss.length_penalty", "0.01"],
    "simpo": ["--loss.type", "simpo", "--loss.beta", "2", "--loss.gamma", "1"],
}
ONE_RANK = {"split": [*SHARED, *SPLIT], "padded": [*PADDED, *SPLIT]}
TWO_RANKS = {"fsdp2": [*FSDP2, *SPLIT], "zero3": [*PACKED, *deepspeed(3)]}
RESUMED = {"fsdp2": FSDP2, "zero3": deepspeed(3)}


@pytest.fixture(scope="module")
def trained(lab: Lab) -> Lab:
    """Each loss by one process and by two ranks; and one stopped and resumed."""
    for num_ranks, members in ((1, {"single": PACKED} | ONE_RANK), (2, TWO_RANKS)):
        commands = [
            lab.command(f"loss-{loss}-{name}", "--train.epochs", "1", *flags, *options)
            for loss, options in LOSSES.items()
            for name, flags in members.items()
        ]
        for name, flags in RESUMED.items() if num_ranks == 2 else ():
            stopped = lab.command(f"stopped-{name}", *flags, *LOSSES["mixed"])
            commands += [lab.command(f"undisturbed-{name}", *flags, *LOSSES["mixed"])]
            commands += [[*stopped, "--train.stop_after_steps", "3"], stopped]
        lab.train(num_ranks, *commands)
    return lab


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("member", [*ONE_RANK, *TWO_RANKS])
def test_every_member_follows_one_trajectory(trained: Lab, loss: str, member: str) -> None:
    expected, rows = (trained.training_rows(f"loss-{loss}-{name}") for name in ("single", member))
    assert len(rows) == len(expected) == 4
    assert len({row["loss"] for row in expected}) > 1
    for ours, theirs in zip(rows, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        for key in ("rewards/margins", "rewards/accuracies", "logps/chosen"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-4)
    ours, theirs = (trained.rows(f"loss-{loss}-{name}")[-1]["eval_loss"] for name in (member, "single"))
    assert ours == pytest.approx(theirs, abs=2e-5)


@pytest.mark.parametrize("name", RESUMED)
def test_running_means_are_part_of_a_checkpoint(trained: Lab, name: str) -> None:
    left, right = trained.folder / f"undisturbed-{name}", trained.folder / f"stopped-{name}"
    (checkpoint,) = (right / "checkpoints").glob("step-00000003")
    assert json.loads((checkpoint / "trainer.json").read_text())["objective"]["num_rewards"] == 72
    assert steady(trained, left.name) == steady(trained, right.name)
    assert same_weights(left / "final", right / "final")
