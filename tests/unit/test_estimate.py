"""The planner: sizes of known models, activations against a real forward, proposals that fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import plan_table
from dpo.config import Config, parse_config
from dpo.ds_json import read_ds_json
from dpo.estimate import PARTS, Setup, Shapes, memory, network_bytes_per_step, step_flops
from dpo.plan import main
from dpo.policy import trained_policy
from dpo.pretrained import Pretrained
from dpo.propose import more_devices, proposals
from dpo.shapes import count_shapes, saved_bytes_per_token
from tests.tiny import tiny_model

GIB = 2**30
MOVING = ("--reference.sync_steps", "2")


def config_of(model: Path, *flags: str) -> Config:
    return parse_config(["--model.path", str(model), "--data.train", "d", "--run.dir", "r", *flags])


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plan_table.llama_config(tmp_path_factory.mktemp("8b"), "8B")


@pytest.fixture(scope="module")
def counted(eight: Path) -> dict[str, Shapes]:
    flags = {"full": [], "lora": ["--lora.r", "16"], "qlora": ["--lora.r", "16", "--model.quantization", "nf4"]}
    return {kind: count_shapes(config_of(eight, *more), torch.bfloat16) for kind, more in flags.items()}


def test_parameters_of_a_published_model(counted: dict[str, Shapes]) -> None:
    """Llama 3.1 8B has 8,030,261,248; a LoRA of rank 16 on all linear layers trains 41,943,040 beside them."""
    assert counted["full"].num_all == counted["full"].num_trained == 8_030_261_248
    assert counted["lora"].num_trained == counted["qlora"].num_trained == 41_943_040
    assert counted["lora"].num_all == counted["qlora"].num_all == 8_030_261_248 + 41_943_040


def test_weights_of_the_8b_under_each_kind(eight: Path, counted: dict[str, Shapes]) -> None:
    """One GPU: bf16 copy and fp32 weights; bf16 base; 4.127 bits for 6.98e9 weights and bf16 ends."""

    def weights(kind: str) -> float:
        config = config_of(eight, *(["--lora.r", "16"] if kind != "full" else []))
        parts, _ = memory(Setup.of(config, 1, 2), counted[kind])
        return parts["weights"] / 1e9

    assert weights("full") == pytest.approx(8.03 * 6, rel=0.01)
    assert weights("lora") == pytest.approx(8.03 * 2 + 0.042 * 6, rel=0.01)
    assert weights("qlora") == pytest.approx(6.98 * 4.127 / 8 + 1.05 * 2 + 0.042 * 6, rel=0.01)


def test_stages_divide_what_they_say(eight: Path, counted: dict[str, Shapes]) -> None:
    config, n = config_of(eight, "--parallel.engine", "deepspeed", "--parallel.ds_config", "x"), 8_030_261_248
    for stage, (weights, gradients) in {1: (1, 1.5), 2: (1, 1 / 8), 3: (1 / 8, 1 / 8)}.items():
        setup = Setup.of(config, 8, 2, {"zero_optimization": {"stage": stage}})
        parts, _ = memory(setup, counted["full"])
        assert parts["weights"] == pytest.approx(2 * n * weights + 4 * n / 8)
        assert parts["gradients"] == pytest.approx(4 * n * gradients)
        assert parts["optimizer"] == pytest.approx(8 * n / 8)
        assert list(parts) == list(PARTS)
        moving = config_of(eight, *("--parallel.engine", "deepspeed", "--parallel.ds_config", "x"), *MOVING)
        moved, _ = memory(replace(setup, config=moving), counted["full"])
        assert moved["reference"] - parts["reference"] == pytest.approx(4 * n / 8)


def test_saved_activations_are_those_of_a_real_forward(tmp_path: Path) -> None:
    """CPU attention keeps what a flash kernel does, so every saved byte can be counted."""
    model = tiny_model(tmp_path / "model", hidden_size=64)
    for flags in ([], ["--lora.r", "4"]):
        config = config_of(model, *flags)
        source = Pretrained.open(str(model))
        policy = trained_policy(source, config, "padded", torch.float32)
        own = {tensor.untyped_storage().data_ptr() for tensor in (*policy.parameters(), *policy.buffers())}
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor, own: set[int] = own, kept: dict[int, int] = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = policy.backbone(input_ids=torch.zeros(1, 128, dtype=torch.long), use_cache=False)
        assert hidden is not None
        expected = sum(kept.values()) / 128
        assert saved_bytes_per_token(source, config, torch.float32, 128) == pytest.approx(expected, rel=0.05)


def test_proposals_fit_and_each_of_their_changes_is_needed(eight: Path, counted: dict[str, Shapes]) -> None:
    config = config_of(eight)
    setup = Setup.of(config, 8, 2)
    limit = 40 * GIB
    assert sum(memory(setup, counted["full"])[0].values()) > limit

    def shapes_of(config: Config) -> Shapes:
        return counted["full" if not config.lora.r else "lora" if config.model.quantization == "none" else "qlora"]

    found = proposals(setup, shapes_of, limit)
    assert found[0].flags == ("--train.gradient_checkpointing true",)
    assert len({frozenset(flag.split()[0] for flag in proposal.flags) for proposal in found}) == len(found) >= 2
    for proposal in found:
        assert proposal.total <= limit * 0.95
        flags = [word for flag in proposal.flags for word in flag.split()]
        again = config_of(eight, *flags)
        assert sum(memory(Setup.of(again, 8, 2), shapes_of(again))[0].values()) == proposal.total
    assert proposals(setup, shapes_of, 1 * GIB) == []

    one = Setup.of(config_of(eight, "--batch.tokens_per_micro_batch", "1024"), 1, 2)
    first, second, *_ = proposals(one, shapes_of, 24 * GIB)
    assert first.flags == ("--parallel.engine fsdp2 --parallel.offload true", "--reference.offload true")
    assert first.host > 16 * 8e9, "fp32 weights, gradients and moments"
    assert "--lora.r 16" in second.flags


def test_what_deepspeed_offloads_is_proposed_as_a_file_that_ships(eight: Path, counted: dict[str, Shapes]) -> None:
    """`parallel.offload` is FSDP2's; the fp32 weights go with the optimizer."""
    flags = ["--parallel.engine", "deepspeed", "--parallel.ds_config", "x", "--lora.r", "0"]
    zero = {"zero_optimization": {"stage": 2}}
    setup = Setup.of(config_of(eight, *flags), 4, 2, zero)
    found = proposals(setup, lambda config: counted["lora" if config.lora.r else "full"], 40 * GIB)
    assert any("--parallel.ds_config ds_configs/zero3_offload.json" in proposal.flags for proposal in found)
    assert not any("parallel.offload" in flag for proposal in found for flag in proposal.flags)
    n, offloaded = 8_030_261_248, {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    device, host = memory(Setup.of(config_of(eight, *flags), 4, 2, offloaded), counted["full"])
    assert device["weights"] == pytest.approx(2 * n, abs=1024) and device["optimizer"] == device["gradients"] == 0
    assert sum(host.values()) == pytest.approx(4 * n * 4 / 4)


def test_more_devices_are_proposed_where_they_help(eight: Path, counted: dict[str, Shapes]) -> None:
    setup = Setup.of(config_of(eight, "--batch.tokens_per_micro_batch", "2048"), 2, 2)
    num_devices = more_devices(setup, lambda config: counted["full"], 80 * GIB)
    assert num_devices == 4
    larger = Setup.of(setup.config, num_devices, 2)
    assert sum(memory(larger, counted["full"])[0].values()) <= 80 * GIB * 0.95
    assert more_devices(setup, lambda config: counted["full"], 10 * GIB) is None


def test_weights_on_a_disk_take_buffers_of_the_largest_share(eight: Path, counted: dict[str, Shapes]) -> None:
    flags = ["--parallel.engine", "deepspeed", "--parallel.ds_config", "ds_configs/zero3_nvme.json"]
    setup = Setup.of(config_of(eight, *flags), 8, 2, read_ds_json("ds_configs/zero3_nvme.json"))
    device, host = memory(setup, counted["full"])
    assert device["weights"] == counted["full"].buffer_bytes < 1024
    assert host["buffers"] == pytest.approx(5 * 2 * 128256 * 4096 / 8, rel=1e-3)
    assert host["weights"] == pytest.approx(2 * 1e9 + 4 * 8_030_261_248 / 8), "max_in_cpu in bf16, and all in fp32"


def test_traffic_and_flops(eight: Path, counted: dict[str, Shapes]) -> None:
    n, shapes = 8_030_261_248, counted["full"]
    setup = Setup.of(config_of(eight), 8, 2)
    assert network_bytes_per_step(setup, shapes, 1) == pytest.approx(7 / 8 * n * (3 * 2 + 4), rel=1e-3)
    stored = Setup.of(config_of(eight, "--reference.mode", "stored"), 8, 2)
    assert network_bytes_per_step(stored, shapes, 2) == pytest.approx(2 * 7 / 8 * n * (2 * 2 + 4), rel=1e-3)
    assert step_flops(shapes, 800, 0) == 800 * 6 * shapes.num_body
    assert step_flops(counted["lora"], 0, 500) == 500 * 4 * 128256 * 4096


def test_the_command_prints_and_writes_the_plan(
    eight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model.path", str(eight), "--gpus", "8", "--gpu-memory", "40", "--json", str(tmp_path / "plan.json")]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "does not fit" in out and "what would fit, cheapest first" in out
    assert "host 0 GiB" not in out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"] is False and list(plan["device"]) == list(PARTS)
    assert sum(plan["device"].values()) == pytest.approx(plan["device_total"])
    assert plan["proposals"][0]["flags"] == ["--train.gradient_checkpointing true"]
    assert plan["proposals"][0]["host_per_node"] == 0 and plan["fits_on_gpus"] is None
    assert main(["--model.path", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("error: model.path=")
    assert main(["--model.path", str(eight), "--optim.lr", "1"]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert main(["--model.path", str(eight), "--gpus", "0"]) == 2
    assert "--gpus must be above 0, not 0" in capsys.readouterr().err
    assert main(["--model.path", str(eight), "--gpus", "2", "--optim.name", "adamw_8bit"]) == 2
    assert "optim.name=adamw_8bit keeps its moments for whole tensors" in capsys.readouterr().err


@pytest.mark.slow
def test_the_table_of_the_docs_is_what_the_planner_says(tmp_path: Path) -> None:
    shown = (Path(__file__).resolve().parents[2] / "dpo" / "README.md").read_text(encoding="utf-8")
    for row in plan_table.plans(tmp_path):
        assert plan_table.line(*row) in shown
