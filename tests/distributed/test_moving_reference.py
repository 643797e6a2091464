"""TR-DPO: the moved reference is the same under every engine, and survives a stop, also at another number of ranks."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from dpo.files import read_rows
from tests.distributed.conftest import Lab
from tests.distributed.test_equivalence import FSDP2, PACKED, PADDED, SPLIT, deepspeed
from tests.distributed.test_resume import BF16, same_weights, steady

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

MOVING = ["--reference.sync_steps", "2", "--reference.mixup_alpha", "0.3"]
ONE_RANK = {
    "padded_split": [*PADDED, *SPLIT],
    "offload": ["--reference.offload", "true"],
    "compiled": ["--train.compile", "true"],
}
TWO_RANKS = {
    "fsdp2": FSDP2,
    "fsdp2_replicated": [*FSDP2, "--parallel.shard_size", "1"],
    "fsdp2_offload": [*FSDP2, "--reference.offload", "true"],
    "zero1": deepspeed(1),
    "zero2_offload": [*deepspeed(2), "--reference.offload", "true"],
    "zero3": [*PACKED, *deepspeed(3)],
    "zero3_offload": [*deepspeed(3), "--reference.offload", "true"],
}
RESUMED = {
    "single-bf16": (1, BF16),
    "fsdp2": (2, FSDP2),
    "fsdp2-bf16": (2, [*FSDP2, *BF16]),
    "zero2-bf16": (2, [*deepspeed(2), *BF16]),
    "zero3-bf16": (2, [*deepspeed(3), *BF16]),
}
ELASTIC = {"fsdp2": (FSDP2, FSDP2), "zero2-zero3": (deepspeed(2), deepspeed(3))}
"""Flags of the first job with two ranks, and of the next one with one."""


@pytest.fixture(scope="module")
def trained(lab: Lab) -> Lab:
    """All members; each of RESUMED undisturbed and stopped after three steps; each of ELASTIC in three jobs."""
    elastic = {name: lab.command(f"moved-elastic-{name}", *MOVING) for name in ELASTIC}
    for num_ranks, members in ((1, {"single": PACKED} | ONE_RANK), (2, TWO_RANKS)):
        commands = [lab.command(f"moved-{name}", *flags, *MOVING) for name, flags in members.items()]
        for name, (ranks, flags) in RESUMED.items():
            if ranks == num_ranks:
                stopped = lab.command(f"moved-stopped-{name}", *flags, *MOVING)
                commands += [lab.command(f"moved-undisturbed-{name}", *flags, *MOVING)]
                commands += [[*stopped, "--train.stop_after_steps", "3"], stopped]
        if num_ranks == 2:
            commands += [
                [*elastic[name], *first, "--train.stop_after_steps", "3"] for name, (first, _) in ELASTIC.items()
            ]
        lab.train(num_ranks, *commands)
    lab.train(1, *([*elastic[name], *later, "--train.stop_after_steps", "2"] for name, (_, later) in ELASTIC.items()))
    lab.train(2, *([*elastic[name], *later] for name, (_, later) in ELASTIC.items()))
    return lab


@pytest.mark.parametrize("member", [*ONE_RANK, *TWO_RANKS, *(f"elastic-{name}" for name in ELASTIC)])
def test_every_member_follows_one_trajectory(trained: Lab, member: str) -> None:
    expected, rows = trained.training_rows("moved-single"), trained.training_rows(f"moved-{member}")
    assert len(rows) == len(expected) == 8
    for ours, theirs in zip(rows, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        for key in ("rewards/margins", "logps/chosen"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-4)
    ours, theirs = (trained.rows(f"moved-{name}")[-1]["eval_loss"] for name in (member, "single"))
    assert ours == pytest.approx(theirs, abs=2e-5)


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_goes_on_with_the_moved_reference_bitwise(trained: Lab, name: str) -> None:
    left, right = (f"moved-{kind}-{name}" for kind in ("undisturbed", "stopped"))
    for row in (ours := steady(trained, left)) + (theirs := steady(trained, right)):
        row.pop("reference_forwards", None)  # a process that resumes scores the held-out set once more
    assert ours == theirs
    assert same_weights(trained.folder / left / "final", trained.folder / right / "final")


@pytest.mark.parametrize("name", RESUMED)
def test_a_checkpoint_has_the_reference_beside_the_weights_in_fp32(trained: Lab, name: str) -> None:
    """After three steps it has moved once, from the start by 0.3 of the way that the policy had gone in two."""
    stored: dict[str, torch.Tensor] = {}
    for file in sorted((trained.folder / f"moved-stopped-{name}" / "checkpoints/step-00000003").glob("training-*")):
        stored |= load_file(file)
    weights = {key.removeprefix("weight.") for key in stored if key.startswith("weight.")}
    assert weights == {key.removeprefix("reference.") for key in stored if key.startswith("reference.")}
    assert all(stored[f"reference.{weight}"].dtype == torch.float32 for weight in weights)
    assert any(not stored[f"reference.{weight}"].equal(stored[f"weight.{weight}"]) for weight in weights)


def test_evaluations_are_against_the_model_before_training(trained: Lab) -> None:
    trained.train(1, trained.command("moved-not", "--train.max_steps", "1"))
    for key in ("reference_logps/chosen", "reference_logps/rejected"):
        ours, theirs = (
            [row[key] for row in read_rows(trained.folder / name / "eval_pairs.jsonl")]
            for name in ("moved-elastic-fsdp2", "moved-not")
        )
        assert ours == pytest.approx(theirs, abs=1e-4), "of three jobs, of which two began with a moved one"
