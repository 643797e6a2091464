"""launch/preflight: each check finds its fault and names the node; two real ranks pass and write their report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dpo.config import parse_config
from launch.preflight_checks import GIB, judge
from launch.weights import checkpoint_bytes, num_trained, weight_shapes

ROOT = Path(__file__).resolve().parents[2]


def fact(rank: int, **changes: Any) -> dict[str, Any]:
    """What a healthy rank finds; two ranks per node."""
    return {
        "rank": rank,
        "host": f"n{rank // 2}",
        "device": "H100, 80 GiB",
        "driver": "driver 570",
        "code": "c0de",
        "config": "c0f",
        "packages": "torch 2.13.0",
        "sum_is_right": True,
        "bytes_per_s": 4e10,
        "busy_port": None,
        "run_dir": "/shared/run",
        "sees_run_dir": True,
        "write_problem": None,
        "free_bytes": 100 * GIB,
        "clock": 0.001 * rank,
        "buffers": "",
        "open_files": 65536,
        "locked_memory_bytes": -1,
        "shared_memory_bytes": 64 * GIB,
        "needs_shared_memory": True,
        "has_infiniband": True,
    } | changes


def failures(facts: list[dict[str, Any]], needed_bytes: int | None = GIB) -> dict[str, str]:
    return {check.name: check.found for check in judge(facts, needed_bytes) if check.failed}


def test_healthy_nodes_pass_every_check() -> None:
    assert failures([fact(rank) for rank in range(8)]) == {}


@pytest.mark.parametrize(
    ("changes", "name", "found"),
    [
        ({"device": "A100, 40 GiB"}, "devices", "n2: A100, 40 GiB, others H100, 80 GiB"),
        ({"driver": "driver 550"}, "drivers", "n2: driver 550, others driver 570"),
        ({"code": "01d"}, "code", "n2: 01d, others c0de"),
        ({"config": "x"}, "config", "n2: x, others c0f"),
        ({"packages": "torch 2.11.0"}, "packages", "n2: torch 2.11.0, others torch 2.13.0"),
        ({"sum_is_right": False}, "all-reduce", "n2: rank 5 got a wrong sum"),
        ({"sees_run_dir": False}, "run.dir", "n2: does not see /shared/run"),
        ({"write_problem": "run.dir=/x: Read-only file system"}, "run.dir", "n2: run.dir=/x: Read-only"),
        ({"busy_port": 29500}, "port", "n2: port 29500 is in use by another process, set --master n2:PORT"),
        ({"clock": -30.0}, "clocks", "n2: -30.0 s off"),
        ({"open_files": 256}, "limits", "n2: 256 open files"),
        ({"buffers": "buffer_size: too large"}, "limits", "n2: buffer_size: too large"),
        ({"shared_memory_bytes": GIB // 16}, "limits", "n2: 0.06 GiB of shared memory"),
        ({"locked_memory_bytes": 65536}, "limits", "n2: locked memory is limited"),
    ],
)
def test_a_fault_on_one_rank_is_found_and_its_node_named(changes: dict[str, Any], name: str, found: str) -> None:
    facts = [fact(rank, **(changes if rank == 5 else {})) for rank in range(8)]
    (row,) = failures(facts).items()
    assert row[0] == name
    assert row[1].startswith(found)


def test_uneven_nodes_and_a_small_disk_are_found() -> None:
    assert failures([fact(rank) for rank in range(5)]) == {"nodes": "n2: 1 ranks, others 2"}
    assert failures([fact(0)], 200 * GIB) == {"disk": "200.0 GiB needed for checkpoints and export, 100.0 GiB free"}
    assert failures([fact(0)], None) == {}


def config(*flags: str) -> Any:
    return parse_config(["--model.path", "m", "--data.train", "d", "--run.dir", "r", *flags])


def test_checkpoint_size_follows_from_the_headers_of_the_weights(tmp_path: Path) -> None:
    weights = {
        "model.embed_tokens.weight": torch.zeros(100, 8),
        "model.layers.0.self_attn.q_proj.weight": torch.zeros(8, 8),
        "model.layers.0.mlp.up_proj.weight": torch.zeros(16, 8),
        "model.norm.weight": torch.zeros(8),
    }
    save_file(weights, tmp_path / "model.safetensors")
    shapes = weight_shapes(tmp_path)
    assert shapes is not None
    total = 800 + 64 + 128 + 8
    assert num_trained(shapes, config()) == total
    assert checkpoint_bytes(shapes, config()) == 12 * total * 3 + 4 * total
    adapter = 4 * (8 + 8) + 4 * (16 + 8)
    assert num_trained(shapes, config("--lora.r", "4")) == adapter
    assert num_trained(shapes, config("--lora.r", "4", "--lora.target_modules", "q_proj")) == 4 * (8 + 8)
    assert checkpoint_bytes(shapes, config("--lora.r", "4", "--checkpoint.keep", "1")) == 12 * adapter * 2 + 4 * adapter
    assert weight_shapes(tmp_path / "none") is None
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    assert weight_shapes(tmp_path) is None


@pytest.mark.distributed
def test_two_ranks_pass_and_write_their_report(tmp_path: Path) -> None:
    flags = ["--model.path", "m", "--data.train", "d", "--run.dir", str(tmp_path / "run")]
    command = [sys.executable, "launch/local.py", "-n", "2", "-m", "launch.preflight", "--json", str(tmp_path / "j")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, "FAIL" in done.stdout) == (0, False), done.stdout + done.stderr
    report = json.loads((tmp_path / "j").read_text())
    assert [row["name"] for row in report["checks"]][:3] == ["nodes", "devices", "drivers"]
    assert report["ranks"][0]["bytes_per_s"] > 0
    assert not (tmp_path / "run").exists()  # no trace
