"""Exports of any engine's checkpoints, and `python -m dpo.evaluate` on several ranks and on quantized bases."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpo import evaluate, export
from dpo.files import read_rows
from tests.distributed.conftest import Lab, launcher, run
from tests.distributed.test_equivalence import FSDP2, deepspeed

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

LORA = ["--lora.r", "4", "--optim.learning_rate", "1e-2"]
KINDS = {"full": [], "lora": LORA, "nf4": [*LORA, "--model.quantization", "nf4"]}
ENGINES = {"fsdp2": FSDP2, "zero2": deepspeed(2), "zero3": deepspeed(3)}
TWO_RANKS = ("full-fsdp2", "full-zero2", "full-zero3", "lora-zero3", "nf4-fsdp2", "nf4-zero3")
ONE_RANK = {"full-8bit": ["--optim.name", "adamw_8bit"], "full-bf16": ["--model.dtype", "bfloat16"]}
MEMBERS = [*TWO_RANKS, *ONE_RANK]


@pytest.fixture(scope="module")
def trained(lab: Lab) -> Lab:
    """Each member twice: three steps, and stopped after three of eight."""
    constant = ["--optim.scheduler", "constant", "--optim.warmup_ratio", "0"]
    two = {name: KINDS[name.split("-")[0]] + ENGINES[name.split("-")[1]] for name in TWO_RANKS}
    for num_ranks, members in ((1, ONE_RANK), (2, two)):
        commands = []
        for name, flags in members.items():
            commands.append(lab.command(f"ended-{name}", *constant, *flags, "--train.max_steps", "3"))
            commands.append(lab.command(f"halfway-{name}", *constant, *flags, "--train.stop_after_steps", "3"))
        lab.train(num_ranks, *commands)
    return lab


def exported(lab: Lab, run: str, *options: str) -> dict[str, Any]:
    facts = lab.folder / "facts.json"
    assert export.main([str(lab.folder / run), "--json", str(facts), *options]) == 0
    return json.loads(facts.read_text())


@pytest.mark.parametrize("member", MEMBERS)
def test_a_checkpoint_is_exported_as_the_end_of_a_run_at_that_step(trained: Lab, member: str) -> None:
    found, expected = exported(trained, f"halfway-{member}"), exported(trained, f"ended-{member}")
    assert found["step"] == expected["step"] == 3 and found["files"] == expected["files"]
    assert found["parity"]["against"] == "the checkpoint of step 3"
    assert max(found["parity"]["largest_gap"], expected["parity"]["largest_gap"]) < (0.1 if "bf16" in member else 1e-4)
    name = "model.safetensors" if member.startswith("full") else "adapter_model.safetensors"
    left, right = (load_file(Path(one["directory"]) / name) for one in (found, expected))
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_a_quantized_runs_checkpoint_is_merged_into_what_its_base_stands_for(trained: Lab) -> None:
    found = exported(trained, "halfway-nf4-zero3/checkpoints/step-00000003", "--form", "model")
    assert found["form"] == "model" and found["parity"]["largest_gap"] < 1e-4
    assert "quantization_config" not in json.loads((Path(found["directory"]) / "config.json").read_text())


# ---- evaluation


def command(lab: Lab, model: str, out: Path, *options: str) -> list[str]:
    paths = [str(lab.folder / "eval.jsonl"), str(lab.folder / "train.jsonl")]
    return [
        *("--model", str(lab.folder / model), "--data", *paths, "--tokens", "64"),
        *("--json", f"{out}.json", "--pairs", f"{out}.jsonl", *options),
    ]


def test_several_ranks_evaluate_as_one_and_each_pair_once(trained: Lab) -> None:
    one, two = trained.folder / "one", trained.folder / "two"
    assert evaluate.main(command(trained, "ended-lora-zero3/final", one)) == 0
    done = run([*launcher(2), "-m", "dpo.evaluate", *command(trained, "ended-lora-zero3/final", two)])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("49 pairs") == 1, "one rank speaks"
    expected, found = (json.loads(Path(f"{path}.json").read_text()) for path in (one, two))
    assert found == {key: pytest.approx(value, rel=1e-5, abs=1e-6, nan_ok=True) for key, value in expected.items()}
    assert found["eval_kl_per_token/chosen"] > 0
    rows, others = read_rows(Path(f"{two}.jsonl")), read_rows(Path(f"{one}.jsonl"))
    assert [row["where"] for row in rows] == [row["where"] for row in others]
    assert len({row["where"] for row in rows}) == 49


def test_torchrun_starts_it_too(trained: Lab) -> None:
    out = trained.folder / "torchrun"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    alone = ["--data", str(trained.folder / "few.jsonl")]
    lines = (trained.folder / "eval.jsonl").read_text().splitlines(keepends=True)
    (trained.folder / "few.jsonl").write_text("".join(lines[:2]))
    words = ["-m", "dpo.evaluate", *command(trained, "model", out), *alone]
    done = run([*torchrun, *words])
    assert done.returncode == 0, done.stderr
    assert json.loads(Path(f"{out}.json").read_text())["pairs"] == 2, "a rank that has none takes part all the same"


@pytest.mark.parametrize("option", [[], ["--quantization", "nf4"]])
def test_an_adapter_of_a_quantized_run_is_held_against_the_quantized_base(
    trained: Lab, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The base is kept as the run did, which its directory says; elsewhere the option does."""
    out = trained.folder / "quantized"
    assert (
        evaluate.main(
            [*command(trained, "ended-nf4-zero3/final", out, *option), "--data", str(trained.folder / "eval.jsonl")]
        )
        == 0
    )
    assert ("in nf4, as" in capsys.readouterr().out) == (not option)
    found, last = json.loads(Path(f"{out}.json").read_text()), trained.rows("ended-nf4-zero3")[-1]
    for key in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen", "eval_kl_per_token/chosen"):
        assert found[key] == pytest.approx(last[key], abs=1e-4)
    assert (
        evaluate.main(
            [
                *command(trained, "ended-nf4-zero3/final", out, "--quantization", "none"),
                "--data",
                str(trained.folder / "eval.jsonl"),
            ]
        )
        == 0
    )
    other = json.loads(Path(f"{out}.json").read_text())
    assert abs(other["eval_logps/chosen"] - last["eval_logps/chosen"]) > 1e-3
