"""Page-locked buffers for weights on a disk: of the model's size, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dpo import nvme
from dpo.config import parse_config
from dpo.nvme import GIB, largest_share, with_buffers
from dpo.refusals import ConfigError
from launch.ds_lint import main as lint
from launch.weights import buffer_problem

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 GiB of memory, all of which may be locked."""
    monkeypatch.setattr(nvme, "host_memory_bytes", lambda: 16.0 * GIB)
    monkeypatch.setattr(nvme, "lockable_bytes", lambda: 16.0 * GIB)


def zero(**offload: Any) -> dict[str, Any]:
    return {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/disk"} | offload}


def test_a_share_is_aligned() -> None:
    assert largest_share(1, 2) == 4096
    assert largest_share(8192, 2) == 4096
    assert largest_share(128256 * 4096, 8) == 128256 * 512


def test_the_trainer_sets_what_the_file_leaves_out() -> None:
    filled = with_buffers(zero(), 4096, dtype_bytes=2, ranks_here=2)
    assert filled["offload_param"] == zero()["offload_param"] | {"buffer_size": 4096}
    asked = zero(buffer_size=8192)
    assert with_buffers(asked, 4096, dtype_bytes=2, ranks_here=2) == asked
    for other in ({"stage": 3}, {"stage": 3, "offload_param": {"device": "cpu"}}):
        assert with_buffers(other, 4096, dtype_bytes=2, ranks_here=2) == other


@pytest.mark.parametrize(
    ("offload", "share", "expected"),
    [
        (
            {"buffer_size": 100},
            4096,
            "buffer_size=100 is less than the largest share of a weight that a rank has",
        ),
        (
            {"buffer_size": 10**9},
            4096,
            "5 page-locked buffers of 1,000,000,000 elements for each rank (2 here)",
        ),
        ({"buffer_count": 9}, 10**9, "16.0: lower buffer_count, or take more nodes"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(offload: dict[str, Any], share: int, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        with_buffers(zero(**offload), share, dtype_bytes=4, ranks_here=2)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_a_user_who_may_not_lock_them_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvme, "lockable_bytes", lambda: 2.0**23)
    with pytest.raises(ConfigError, match=r"lock 0.93 GiB of a rank's memory, and 0.01 may be locked here: ulimit -l"):
        with_buffers(zero(), 10**8, dtype_bytes=2, ranks_here=1)


def test_lint_and_preflight_say_so_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": zero(buffer_size=3 * 10**9)}))
    assert lint([str(path)]) == 2
    assert "page-locked buffers of 3,000,000,000 elements" in capsys.readouterr().err
    path.write_text(json.dumps({"zero_optimization": zero(buffer_size=100)}))
    assert lint([str(path)]) == 0, "which model it is for is not known"
    save_file({"w": torch.zeros(100, 300)}, tmp_path / "model.safetensors")
    flags = ["--model.path", str(tmp_path), "--data.train", "d", "--run.dir", "r", "--parallel.engine", "deepspeed"]
    config = parse_config([*flags, "--parallel.ds_config", str(path)])
    problem = buffer_problem(config, dtype_bytes=2, world_size=2, ranks_here=2)
    assert "less than the largest share of a weight that a rank has (16,384" in problem
    shipped = parse_config([*flags, "--parallel.ds_config", str(ROOT / "ds_configs/zero3_nvme.json")])
    assert buffer_problem(shipped, dtype_bytes=2, world_size=2, ranks_here=2) == ""
