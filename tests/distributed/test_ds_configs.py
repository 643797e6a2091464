"""The shipped DeepSpeed files: each trains on two ranks and follows the trajectory of plain ZeRO-1."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.conftest import ROOT, Lab

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
# hpZ last: its groups live as long as the process.
TRAINED = ["zero1", "zero2", "zero2_offload", "zero3", "zero3_large", "zero3_offload", "zero3_hpz"]
NOT_TRAINED = {"zero3_plusplus": "its quantization needs a GPU", "zero3_nvme": "needs an operator: see below"}


def settings(name: str, folder: Path) -> str:
    """A shipped file for two ranks of one node, with a disk that is there."""
    raw: dict[str, Any] = json.loads((ROOT / f"ds_configs/{name}.json").read_text())
    zero = raw["zero_optimization"]
    if "zero_hpz_partition_size" in zero:
        zero["zero_hpz_partition_size"] = 2
    if "nvme_path" in zero.get("offload_param", {}):
        zero["offload_param"]["nvme_path"] = str(folder)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(raw))
    return str(path)


def command(lab: Lab, name: str, *flags: str) -> list[str]:
    engine = ["--parallel.engine", "deepspeed", "--parallel.ds_config", settings(name, lab.folder)]
    return lab.command(f"ds-{name}", *engine, "--train.epochs", "1", *flags)


def test_every_shipped_file_is_covered() -> None:
    assert {path.stem for path in (ROOT / "ds_configs").glob("*.json")} == {*TRAINED, *NOT_TRAINED}


def test_all_files_follow_one_trajectory(lab: Lab) -> None:
    lab.train(2, *(command(lab, name) for name in TRAINED))
    expected = lab.training_rows("ds-zero1")
    for name in TRAINED[1:]:
        for ours, theirs in zip(lab.training_rows(f"ds-{name}"), expected, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-5), name
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5), name


@pytest.mark.skipif("DPO_TEST_NVME" not in os.environ, reason="builds async_io for minutes: set DPO_TEST_NVME=1")
def test_weights_on_a_disk_stop_and_resume_on_the_same_trajectory(lab: Lab) -> None:
    if shutil.which("c++") is None or not Path("/usr/include/libaio.h").exists():
        pytest.skip("needs a compiler and libaio-dev")
    lab.train(2, command(lab, "zero3", "--run.dir", str(lab.folder / "plain")))
    lab.train(2, command(lab, "zero3_nvme", "--train.stop_after_steps", "2"))
    lab.train(2, command(lab, "zero3_nvme"))
    for ours, theirs in zip(lab.training_rows("ds-zero3_nvme"), lab.training_rows("plain"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-5)
