"""What the trainer says of memory: at its start, from the plan, and when it has run out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import plan_table
from dpo import advice
from dpo.config import Config, parse_config
from tests.tiny import tiny_model

GIB = 2**30
ONE: Any = SimpleNamespace(size=1, device=torch.device("cpu"))
FSDP2_OFFLOAD = ["--parallel.engine", "fsdp2", "--parallel.offload", "true", "--reference.offload", "true"]


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plan_table.llama_config(tmp_path_factory.mktemp("8b"), "8B")


def config_of(model: Path, *flags: str) -> Config:
    return parse_config(["--model.path", str(model), "--data.train", "d", "--run.dir", "r", *flags])


@pytest.fixture
def memory_gib(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Main memory, and where a device has its own, that."""
    sizes = {"host": 24.0, "device": 24.0}
    monkeypatch.setattr(advice, "host_memory_bytes", lambda: sizes["host"] * GIB)
    monkeypatch.setattr(advice, "_limit", lambda world: sizes["device"] * GIB)
    return sizes


def test_a_run_that_will_not_fit_is_warned_of_what_would(eight: Path, memory_gib: dict[str, float]) -> None:
    warning = advice.will_it_fit(config_of(eight, "--model.dtype", "bfloat16"), ONE)
    assert warning.startswith("warning: the plan takes 211.0 GiB per device, of which optimizer 59.8, and there are")
    assert ": set --" in warning and "\n" not in warning
    assert advice.will_it_fit(config_of(tiny_model(eight / "tiny")), ONE) == ""
    memory_gib["device"] = 1000
    assert advice.will_it_fit(config_of(eight), ONE) == ""


def test_offload_beyond_main_memory_is_warned_of(eight: Path, memory_gib: dict[str, float]) -> None:
    memory_gib["device"] = 200
    warning = advice.will_it_fit(config_of(eight, *FSDP2_OFFLOAD), ONE)
    assert warning.startswith("warning: the plan keeps 153.5 GiB of each rank in main memory, of which a rank")
    assert warning.endswith("24.0: take more nodes, or set --lora.r 16")
    memory_gib["host"] = 160
    assert advice.will_it_fit(config_of(eight, *FSDP2_OFFLOAD), ONE) == ""


def test_what_ran_out_of_memory_is_told_what_to_change(eight: Path, memory_gib: dict[str, float]) -> None:
    config = config_of(eight, "--lora.r", "16", "--model.quantization", "nf4", "--model.dtype", "bfloat16")
    memory_gib["device"] = 12
    said = str(advice.explain(config, ONE))
    assert said.startswith("out of memory on cpu: weights, gradients, optimizer and reference take 6.0 GiB by plan")
    assert said.endswith("activations is the largest part with 45.1: set --train.gradient_checkpointing true")
    assert "\n" not in said
