"""Runs at the edges of what is allowed: they end as well, under every engine."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from tests.distributed.conftest import Lab

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

ZERO3 = ["--parallel.engine", "deepspeed", "--parallel.ds_config", "ds_configs/zero3.json"]
ENGINES = {"fsdp2": ["--parallel.engine", "fsdp2"], "zero3": ZERO3}
LORA = ["--lora.r", "4", "--export.merge_lora", "true"]


@pytest.fixture(scope="module")
def trained(lab: Lab) -> Lab:
    """A merged adapter, and a window of which every row is skipped, under each engine."""
    rows = [json.loads(line) for line in (lab.folder / "train.jsonl").read_text().splitlines()]
    for row in rows[12:24]:
        row["chosen"] = " "
    (lab.folder / "gap.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    gap = ["--data.shuffle", "false", "--data.on_bad_row", "skip", "--data.max_bad_fraction", "0.9"]
    for num_ranks, engines in ((1, {"single": []}), (2, ENGINES)):
        commands = []
        for name, flags in engines.items():
            commands += [lab.command(f"merged-{name}", *flags, *LORA)]
            command = lab.command(f"gap-{name}", *flags, *gap)
            command[command.index("--data.train") + 1] = str(lab.folder / "gap.jsonl")
            commands += [command]
        lab.train(num_ranks, *commands)
    return lab


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_merges_the_adapter(trained: Lab, engine: str) -> None:
    ours = load_file(trained.folder / f"merged-{engine}" / "final" / "model.safetensors")
    theirs = load_file(trained.folder / "merged-single" / "final" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].allclose(theirs[name], atol=1e-5) for name in ours)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_without_a_pair_passes(trained: Lab, engine: str) -> None:
    ours, theirs = trained.training_rows(f"gap-{engine}"), trained.training_rows("gap-single")
    assert [row["pairs_seen"] for row in ours] == [12, 12, 24, 28, 40, 40, 52, 56]
    assert [row["skipped_steps"] for row in ours] == [0] * 8
    assert ours[1]["grad_norm"] == 0
    assert [row["loss"] for row in ours[2:5]] == pytest.approx([row["loss"] for row in theirs[2:5]], abs=2e-5)


def test_another_reference_kept_on_the_cpu_scores_alike_in_every_engine(lab: Lab) -> None:
    rows = []
    for num_ranks, engines in ((1, {"single": []}), (2, ENGINES)):
        flags = ["--reference.path", str(lab.folder / "model"), "--reference.offload", "true"]
        lab.train(num_ranks, *(lab.command(f"offload-{name}", *engine, *flags) for name, engine in engines.items()))
        rows += [[row["loss"] for row in lab.training_rows(f"offload-{name}")] for name in engines]
    assert rows[1] == pytest.approx(rows[0], abs=2e-5) and rows[2] == pytest.approx(rows[0], abs=2e-5)
