"""One equivalence class (and its LoRA twin): every engine, layout and split follows one trajectory.

fp32 on CPU; loss to 2e-5, gradient norm to 1e-5 relative, against one process with packed rows.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_utils.shards import ShardSet
from data_utils.tokenize import PairTokenizer
from dpo.files import read_rows
from tests.distributed.conftest import Lab
from tests.tiny import tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

FSDP2 = ["--parallel.engine", "fsdp2"]
PADDED, PACKED, SHARED = (["--batch.layout", layout] for layout in ("padded", "packed", "shared"))
CHECKPOINTING = ["--train.gradient_checkpointing", "true"]
SELECTIVE = [*CHECKPOINTING, "--train.recompute", "selective"]
OFFLOADED = ["--train.activation_offload", "true"]
COMPILED = ["--train.compile", "true"]
SPLIT = ["--batch.tokens_per_micro_batch", "64"]
KINDS = {"full": [], "lora": ["--lora.r", "4", "--optim.learning_rate", "1e-2"]}


def deepspeed(stage: int) -> list[str]:
    return ["--parallel.engine", "deepspeed", "--parallel.ds_config", f"ds_configs/zero{stage}.json"]


ONE_RANK = {
    "packed_split": [*PACKED, *SPLIT],
    "padded": PADDED,
    "padded_split": [*PADDED, *SPLIT],
    "packed_checkpointing": [*PACKED, *CHECKPOINTING],
    "shared": SHARED,
    "shared_split": [*SHARED, *SPLIT],
    "shared_checkpointing": [*SHARED, *SPLIT, *CHECKPOINTING],
    "shared_selective": [*SHARED, *SPLIT, *SELECTIVE],
    "shared_compiled": [*SHARED, *SPLIT, *COMPILED],
    "padded_compiled_checkpointing": [*PADDED, *COMPILED, *CHECKPOINTING],
    "shared_offloaded": [*SHARED, *SPLIT, *OFFLOADED],
    "fsdp2_alone": [*PACKED, *FSDP2],
    "auto": [],
}
TWO_RANKS = {
    "fsdp2": [*PACKED, *FSDP2],
    "fsdp2_split": [*PACKED, *FSDP2, *SPLIT],
    "fsdp2_replicated": [*PACKED, *FSDP2, *SPLIT, "--parallel.shard_size", "1"],
    "fsdp2_checkpointing": [*PADDED, *FSDP2, *CHECKPOINTING],
    "fsdp2_shared": [*SHARED, *FSDP2],
    "fsdp2_shared_checkpointing": [*SHARED, *FSDP2, *SPLIT, *CHECKPOINTING],
    "fsdp2_shared_selective": [*SHARED, *FSDP2, *SPLIT, *SELECTIVE],
    "fsdp2_shared_compiled": [*SHARED, *FSDP2, *SPLIT, *COMPILED, *CHECKPOINTING],
    "zero2_shared_compiled": [*SHARED, *deepspeed(2), *SPLIT, *COMPILED],
    "fsdp2_shared_offloaded": [*SHARED, *FSDP2, *SPLIT, *OFFLOADED],
    "fsdp2_offloaded_compiled": [*PACKED, *FSDP2, *OFFLOADED, *COMPILED, *CHECKPOINTING],
    "zero3_offloaded": [*SHARED, *deepspeed(3), *SPLIT, *OFFLOADED, *CHECKPOINTING],
    "zero2_selective": [*PACKED, *deepspeed(2), *SELECTIVE],
    "zero1": [*PACKED, *deepspeed(1)],
    "zero1_shared_split": [*SHARED, *deepspeed(1), *SPLIT],
    "zero2": [*PACKED, *deepspeed(2)],
    "zero2_split": [*PACKED, *deepspeed(2), *SPLIT],
    "zero2_shared": [*SHARED, *deepspeed(2)],
    "zero3": [*PACKED, *deepspeed(3)],
    "zero3_split": [*PACKED, *deepspeed(3), *SPLIT],
    "zero3_shared": [*SHARED, *deepspeed(3)],
    "zero3_shared_checkpointing": [*SHARED, *deepspeed(3), *SPLIT, *CHECKPOINTING],
}
STORED_ONE_RANK = {"stored": [], "stored_padded": ["--batch.layout", "padded", *SPLIT]}
STORED_TWO_RANKS = {"stored_fsdp2": [*FSDP2, *SPLIT], "stored_zero2": deepspeed(2), "stored_zero3": deepspeed(3)}
STATES = ("cold", "warm", "gap")
STORED = [f"{name}_{state}" for name in [*STORED_ONE_RANK, *STORED_TWO_RANKS] for state in STATES]
MEMBERS = [*ONE_RANK, *TWO_RANKS, *STORED]


def stored(lab: Lab, kind: str, name: str, *flags: str) -> list[list[str]]:
    """Members that find their store empty, and full; and one whose store lacks two pairs, so that in the middle of
    training one rank or both need the reference for the first time."""
    stores = {"cold": "whole", "warm": "whole", "less": "gap", "gap": "gap"}
    commands = {
        state: lab.command(
            *(f"{kind}-{name}_{state}", *flags, "--reference.mode", "stored"),
            *("--reference.store", str(lab.folder / f"store-{kind}-{name}-{store}")),
        )
        for state, store in stores.items()
    }
    less = commands["less"]
    less[less.index("--data.train") + 1] = str(lab.folder / "less.jsonl")
    return list(commands.values())


@pytest.fixture(scope="module")
def trained(lab: Lab) -> Lab:
    """All members of both classes, trained."""
    lines = (lab.folder / "train.jsonl").read_text().splitlines(keepends=True)
    (lab.folder / "less.jsonl").write_text("".join(lines[:-2]))
    for num_ranks, members, with_store in (
        (1, {"single": PACKED} | ONE_RANK, STORED_ONE_RANK),
        (2, TWO_RANKS, STORED_TWO_RANKS),
    ):
        commands = []
        for kind, common in KINDS.items():
            commands += [lab.command(f"{kind}-{name}", *common, *flags) for name, flags in members.items()]
            for name, flags in with_store.items():
                commands += stored(lab, kind, name, *common, *flags)
        lab.train(num_ranks, *commands)
    return lab


@pytest.mark.parametrize("kind", KINDS)
def test_the_yardstick_learns_and_starts_at_ln_2(trained: Lab, kind: str) -> None:
    rows = trained.training_rows(f"{kind}-single")
    assert [row["step"] for row in rows] == list(range(1, 9))
    evaluated = [row["eval_loss"] for row in trained.rows(f"{kind}-single") if "eval_loss" in row]
    assert evaluated[0] == pytest.approx(0.693147, abs=1e-5)
    assert evaluated[-1] < 0.66
    assert rows[-1]["pairs_seen"] == 80


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("member", MEMBERS)
def test_every_member_follows_one_trajectory(trained: Lab, kind: str, member: str) -> None:
    expected, rows = trained.training_rows(f"{kind}-single"), trained.training_rows(f"{kind}-{member}")
    assert len(rows) == len(expected) == 8
    for ours, theirs in zip(rows, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        for key in ("rewards/margins", "rewards/accuracies", "logps/chosen", "learning_rate", "pairs_seen"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("member", ["single", *MEMBERS])
def test_every_evaluation_is_the_mean_over_every_pair_once(trained: Lab, kind: str, member: str) -> None:
    pairs = read_rows(trained.folder / f"{kind}-{member}" / "eval_pairs.jsonl")
    assert [row["where"] for row in pairs] == [f"{trained.folder}/eval.jsonl:{number}" for number in range(1, 10)]
    first, last = (trained.rows(f"{kind}-{member}")[place] for place in (0, -1))
    yardstick = trained.rows(f"{kind}-single")[0]
    for key in ("loss", "rewards/chosen", "rewards/margins", "logps/chosen", "logps/rejected"):
        for row, when in ((first, "before"), (last, "after")):
            mean = math.fsum(pair[when][key] for pair in pairs) / 9
            assert row[f"eval_{key}"] == pytest.approx(mean, rel=1e-6, abs=1e-6)
        assert first[f"eval_{key}"] == pytest.approx(yardstick[f"eval_{key}"], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("member", ["single", *ONE_RANK, *TWO_RANKS])
def test_every_evaluation_has_the_kl_to_the_reference(trained: Lab, kind: str, member: str) -> None:
    before, *_, after = (row for row in trained.rows(f"{kind}-{member}") if "eval_loss" in row)
    yardstick = trained.rows(f"{kind}-single")[-1]
    for side in ("chosen", "rejected"):
        key = f"eval_kl_per_token/{side}"
        assert abs(before[key]) < 1e-6
        assert after[key] > 1e-4 and after[key] == pytest.approx(yardstick[key], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*STORED_ONE_RANK, *STORED_TWO_RANKS])
def test_a_warm_store_asks_no_reference(trained: Lab, kind: str, name: str) -> None:
    """Cold, only the first epoch's pairs and the held-out ones are computed; with a gap, only what is missing."""
    cold, warm, gap = (
        [row["reference_forwards"] for row in trained.training_rows(f"{kind}-{name}_{state}")] for state in STATES
    )
    assert cold[0] > 0 and sum(cold[4:]) == 0
    assert sum(warm) == 0
    assert 0 < sum(gap) < sum(cold) and sum(gap[4:]) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("member", ["single", *MEMBERS])
def test_the_export_gives_the_evaluated_logps_in_plain_transformers(trained: Lab, kind: str, member: str) -> None:
    name = f"{kind}-{member}"
    evaluated = trained.rows(name)[-1]
    chosen, rejected = mean_logps(trained, load_final(trained, name))
    assert chosen == pytest.approx(evaluated["eval_logps/chosen"], abs=2e-4)
    assert rejected == pytest.approx(evaluated["eval_logps/rejected"], abs=2e-4)


def load_final(lab: Lab, name: str) -> torch.nn.Module:
    final = lab.folder / name / "final"
    if not (final / "adapter_config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(final)
    base = AutoModelForCausalLM.from_pretrained(lab.folder / "model")
    return PeftModel.from_pretrained(base, str(final))


@torch.no_grad()
def mean_logps(lab: Lab, model: torch.nn.Module) -> tuple[float, float]:
    """Mean log-probs of the held-out responses under a stock model, one sequence at a time."""
    shards = ShardSet.open([str(lab.folder / "eval.jsonl")])
    tokenize = PairTokenizer(AutoTokenizer.from_pretrained(lab.folder / "model"), max_length=256)
    sums = [0.0, 0.0]
    for index in range(len(shards)):
        pair = tokenize(shards.pair(index), index)
        for side, response in enumerate((pair.chosen_ids, pair.rejected_ids)):
            ids = torch.tensor([pair.prompt_ids + response])
            log_softmax = model(ids).logits[0, :-1].double().log_softmax(-1)
            sums[side] += log_softmax.gather(1, ids[0, 1:, None])[len(pair.prompt_ids) - 1 :].sum().item()
    return sums[0] / len(shards), sums[1] / len(shards)


ROUTED = ["--loss.router_aux_loss_coef", "0.5"]
ROUTED_ONE_RANK = {"packed": PACKED, "padded": PADDED, "shared": [*SHARED, *SPLIT, *CHECKPOINTING]}
ROUTED_TWO_RANKS = {"fsdp2": [*SHARED, *FSDP2, *SPLIT, *CHECKPOINTING], "zero2": deepspeed(2), "zero3": deepspeed(3)}


def test_the_load_balancing_loss_is_the_same_everywhere(lab: Lab) -> None:
    """Mixtures of experts, with so large a share of it that it would show."""
    tiny_model(lab.folder / "experts", experts=4)

    def command(name: str, *flags: str) -> list[str]:
        line = lab.command(f"routed-{name}", *flags, *ROUTED, "--train.epochs", "1")
        line[line.index("--model.path") + 1] = str(lab.folder / "experts")
        return line

    for num_ranks, members in ((1, ROUTED_ONE_RANK), (2, ROUTED_TWO_RANKS)):
        lab.train(num_ranks, *(command(name, *flags) for name, flags in members.items()))
    expected = lab.training_rows("routed-packed")
    assert expected[0]["loss"] > 0.6931 + 0.5, "at least 2 of 4 experts, evenly chosen, times the coefficient"
    for name in [*ROUTED_ONE_RANK, *ROUTED_TWO_RANKS]:
        for ours, theirs in zip(lab.training_rows(f"routed-{name}"), expected, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-5)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


def test_bf16_follows_the_same_path_in_every_engine(lab: Lab) -> None:
    """Compute in bf16, fp32 weights under the optimizer: engines differ by the rounding of 8 bits, no more."""
    engines = {"fsdp2": FSDP2, **{f"zero{stage}": deepspeed(stage) for stage in (1, 2, 3)}}
    bf16 = ["--model.dtype", "bfloat16"]
    lab.train(1, lab.command("bf16-single", *bf16))
    lab.train(2, *(lab.command(f"bf16-{name}", *bf16, *flags) for name, flags in engines.items()))
    expected = [row["loss"] for row in lab.training_rows("bf16-single")]
    for name in engines:
        assert [row["loss"] for row in lab.training_rows(f"bf16-{name}")] == pytest.approx(expected, abs=0.01)


def test_a_gradient_that_is_not_finite_is_skipped_by_every_engine(lab: Lab) -> None:
    """The first step's only; the weights stay as they were, so the second starts at ln 2 again."""
    rows = [json.loads(line) for line in (lab.folder / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"weight": 1.0, "beta": 0.1}
    rows[0] |= {"weight": 9e29, "beta": 9e29}
    (lab.folder / "huge.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data.shuffle", "false", "--train.epochs", "1", "--optim.warmup_ratio", "0"]
    commands = []
    for name, engine in {"fsdp2": FSDP2, "zero2": deepspeed(2), "zero3": deepspeed(3)}.items():
        command = lab.command(f"huge-{name}", *flags, *engine)
        command[command.index("--data.train") + 1] = str(lab.folder / "huge.jsonl")
        commands.append(command)
    lab.train(2, *commands)
    for name in ("fsdp2", "zero2", "zero3"):
        first, second, *_ = lab.training_rows(f"huge-{name}")
        assert (first["grad_norm"], first["skipped_steps"], second["skipped_steps"]) == (None, 1, 1)
        assert second["loss"] == pytest.approx(0.693147, abs=1e-4)


def test_merged_export_equals_the_adapter(lab: Lab) -> None:
    lab.train(1, lab.command("merged", *KINDS["lora"], "--export.merge_lora", "true"))
    assert not (lab.folder / "merged" / "final" / "adapter_config.json").exists()
    chosen, _ = mean_logps(lab, load_final(lab, "merged"))
    assert chosen == pytest.approx(lab.rows("merged")[-1]["eval_logps/chosen"], abs=2e-4)


def test_final_holds_safetensors_only(trained: Lab) -> None:
    for name in ("full-zero3", "lora-fsdp2", "full-single"):
        files = {path.suffix for path in Path(trained.folder / name / "final").iterdir()}
        assert ".safetensors" in files and not files & {".bin", ".pt", ".pth", ".pkl"}
