"""Big models on few devices: quantized bases follow one trajectory under every engine, as do offloaded weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.distributed.conftest import ROOT, Lab
from tests.distributed.test_equivalence import CHECKPOINTING, FSDP2, PACKED, SPLIT, deepspeed, mean_logps
from tests.distributed.test_resume import same_weights, steady
from tests.tiny import tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

LORA = ["--lora.r", "4", "--optim.learning_rate", "1e-2"]
KINDS = {
    "nf4": [*LORA, "--model.quantization", "nf4"],
    "int8": [*LORA, "--model.quantization", "int8"],
    "full": [],
}
FSDP2_OFFLOAD = [*FSDP2, "--parallel.offload", "true"]


def zero_offload(stage: int) -> list[str]:
    return ["--parallel.engine", "deepspeed", "--parallel.ds_config", f"tests/distributed/zero{stage}_offload.json"]


ONE_RANK = {"padded_split": ["--batch.layout", "padded", *SPLIT], "fsdp2_alone": FSDP2}
TWO_RANKS = {
    "fsdp2_checkpointing": [*PACKED, *FSDP2, *SPLIT, *CHECKPOINTING],
    "fsdp2_replicated": [*FSDP2, "--parallel.shard_size", "1"],
    "fsdp2_offload": FSDP2_OFFLOAD,
    "zero2": deepspeed(2),
    "zero3": deepspeed(3),
    "zero3_offload": zero_offload(3),
    "zero3_checkpointing": [*PACKED, *deepspeed(3), *SPLIT, *CHECKPOINTING],
    "zero3_frozen_copy": [*deepspeed(3), "--reference.mode", "frozen_copy"],
}
OFFLOAD = {
    "fsdp2_offload": [*FSDP2_OFFLOAD, *SPLIT],
    "fsdp2_offload_all": [*FSDP2_OFFLOAD, "--reference.offload", "true"],
    "zero2_offload": zero_offload(2),
    "zero3_offload": [*zero_offload(3), *SPLIT],
    "zero3_offload_all": [*zero_offload(3), "--reference.offload", "true"],
}
FEW = ("zero2", "zero3", "fsdp2_replicated")
MEMBERS = {
    "nf4": ONE_RANK | TWO_RANKS,
    "int8": {name: TWO_RANKS[name] for name in FEW},
    "full": OFFLOAD,
}
RESUMED = {
    "nf4-fsdp2": (2, [*KINDS["nf4"], "--lora.dropout", "0.2", *FSDP2]),
    "nf4-zero3": (2, [*KINDS["nf4"], "--lora.dropout", "0.2", *deepspeed(3)]),
    "full-fsdp2-offload": (2, FSDP2_OFFLOAD),
    "full-8bit": (1, ["--optim.name", "adamw_8bit", "--optim.weight_decay", "0.01"]),
    "full-paged": (1, ["--optim.name", "paged_adamw_8bit"]),
}


@pytest.fixture(scope="module")
def trained(lab: Lab) -> Lab:
    """Every member; and those that are stopped after three steps and resumed."""
    for num_ranks in (1, 2):
        commands = []
        for kind, common in KINDS.items():
            members = {name: flags for name, flags in MEMBERS[kind].items() if (name in ONE_RANK) == (num_ranks == 1)}
            if num_ranks == 1:
                members["single"] = ["--export.merge_lora", "true"] if kind != "full" else []
            commands += [lab.command(f"{kind}-{name}", *common, *flags) for name, flags in members.items()]
        for name, (ranks, flags) in RESUMED.items():
            if ranks == num_ranks:
                stopped = lab.command(f"stopped-{name}", *flags)
                commands += [lab.command(f"undisturbed-{name}", *flags)]
                commands += [[*stopped, "--train.stop_after_steps", "3"], stopped]
        lab.train(num_ranks, *commands)
    return lab


@pytest.mark.parametrize(("kind", "member"), [(kind, name) for kind in KINDS for name in MEMBERS[kind]])
def test_quantized_and_offloaded_runs_follow_one_trajectory(trained: Lab, kind: str, member: str) -> None:
    expected, rows = trained.training_rows(f"{kind}-single"), trained.training_rows(f"{kind}-{member}")
    assert len(rows) == len(expected) == 8
    for ours, theirs in zip(rows, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


def test_moments_in_8_bits_stay_near_those_in_fp32(trained: Lab) -> None:
    """Paged or not is one trajectory; against fp32 moments it is the rounding of 8 bits apart."""
    fp32, paged = trained.training_rows("full-single"), trained.training_rows("undisturbed-full-paged")
    gaps = [abs(ours["loss"] - theirs["loss"]) for ours, theirs in zip(paged, fp32, strict=True)]
    assert max(gaps[:2]) < 1e-6 and 1e-6 < max(gaps) < 0.02
    (file,) = (trained.folder / "stopped-full-8bit" / "checkpoints").glob("step-*/training-*.safetensors")
    saved = load_file(file)
    kept = {key.split(".")[0] for key in saved if "embed_tokens.weight" in key}
    assert kept == {"weight", "state1", "state2", "second"}
    assert saved["state1.model.model.embed_tokens.weight"].dtype == torch.uint8


@pytest.mark.parametrize("name", RESUMED)
def test_runs_resume_bitwise(trained: Lab, name: str) -> None:
    left, right = f"undisturbed-{name}", f"stopped-{name}"
    assert steady(trained, left) == steady(trained, right)
    assert same_weights(trained.folder / left / "final", trained.folder / right / "final")


def test_the_adapter_gives_the_evaluated_logps_on_the_stock_quantized_model(trained: Lab) -> None:
    """As people load it: transformers and peft with a BitsAndBytesConfig."""
    evaluated = trained.rows("nf4-zero3")[-1]
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(trained.folder / "model", quantization_config=settings)
    model = PeftModel.from_pretrained(base, str(trained.folder / "nf4-zero3" / "final"))
    chosen, rejected = mean_logps(trained, model.train())  # in eval mode bitsandbytes' CPU kernel computes in bf16
    assert chosen == pytest.approx(evaluated["eval_logps/chosen"], abs=2e-4)
    assert rejected == pytest.approx(evaluated["eval_logps/rejected"], abs=2e-4)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_merged_model_is_what_was_trained(trained: Lab, kind: str) -> None:
    """Merged into the dequantized base, not into the one before quantization."""
    evaluated = trained.rows(f"{kind}-single")[-1]
    final = trained.folder / f"{kind}-single" / "final"
    assert "quantization_config" not in json.loads((final / "config.json").read_text())
    chosen, rejected = mean_logps(trained, AutoModelForCausalLM.from_pretrained(final))
    assert chosen == pytest.approx(evaluated["eval_logps/chosen"], abs=2e-4)
    assert rejected == pytest.approx(evaluated["eval_logps/rejected"], abs=2e-4)


def test_a_checkpoint_of_another_quantization_is_refused(trained: Lab) -> None:
    command = trained.command("other", *KINDS["int8"], *FSDP2)
    path = next((trained.folder / "stopped-nf4-fsdp2" / "checkpoints").iterdir())
    done = trained.refused(1, [*command, "--checkpoint.resume", str(path)])
    assert "holds lora on nf4 training, not lora on int8: keep lora.r and model.quantization" in done


def test_a_store_knows_whether_the_reference_was_quantized(lab: Lab) -> None:
    """Numbers of the plain base are not found for a quantized one, and the other way round."""
    store = ["--reference.mode", "stored", "--reference.store", str(lab.folder / "store-big"), *LORA]
    names = {"plain": [], "quantized": ["--model.quantization", "nf4"], "again": ["--model.quantization", "nf4"]}
    lab.train(1, *(lab.command(f"store-{name}", *store, *flags) for name, flags in names.items()))
    forwards = {name: sum(row["reference_forwards"] for row in lab.training_rows(f"store-{name}")) for name in names}
    assert forwards["plain"] == forwards["quantized"] > 0 == forwards["again"]


COUNTED = {
    "fsdp2": FSDP2,
    "fsdp2_bf16": [*FSDP2, "--model.dtype", "bfloat16"],
    "fsdp2_replicated": [*FSDP2, "--parallel.shard_size", "1"],
    "fsdp2_lora_bf16": [*FSDP2, "--lora.r", "16", "--model.dtype", "bfloat16"],
    "fsdp2_nf4": [*FSDP2, *KINDS["nf4"]],
    **{f"zero{stage}": deepspeed(stage) for stage in (1, 2, 3)},
    **{f"zero{stage}_bf16": [*deepspeed(stage), "--model.dtype", "bfloat16"] for stage in (1, 2, 3)},
    "zero3_nf4": [*deepspeed(3), *KINDS["nf4"]],
}


@pytest.fixture(scope="module")
def counted(lab: Lab) -> Lab:
    """A larger tiny model under every engine, one step without its update."""
    tiny_model(lab.folder / "wide", hidden_size=256)
    commands = []
    for name, flags in COUNTED.items():
        command = lab.command(f"count-{name}", *[small_buckets(lab, flag) for flag in flags])
        command[command.index("--model.path") + 1] = str(lab.folder / "wide")
        commands.append(command)
    lab.run_script(2, "count_memory.py", commands)
    return lab


def small_buckets(lab: Lab, flag: str) -> str:
    """The settings that ship, with buckets that this model can fill."""
    if not flag.startswith("ds_configs/"):
        return flag
    settings = json.loads((ROOT / flag).read_text())
    settings["zero_optimization"] |= {"reduce_bucket_size": 1000, "overlap_comm": False}
    if settings["zero_optimization"]["stage"] == 3:
        settings["zero_optimization"] |= {"stage3_max_live_parameters": 0, "stage3_param_persistence_threshold": 0}
    path = lab.folder / Path(flag).name
    path.write_text(json.dumps(settings))
    return str(path)


@pytest.mark.parametrize("name", COUNTED)
def test_the_plan_is_within_5_percent_of_the_tensors_that_are_there(counted: Lab, name: str) -> None:
    """What lies there for the whole run: weights, gradients, optimizer, reference."""
    for rank in (0, 1):
        facts = json.loads((counted.folder / f"count-{name}" / f"bytes-{rank}.json").read_text())
        parts = ("weights", "gradients", "optimizer", "reference")
        assert sum(facts["device"][part] for part in parts) == pytest.approx(facts["counted"], rel=0.05)
