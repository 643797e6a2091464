from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dpo.ds_json import (
    DEEPSPEED_VERSION,
    KNOWN_KEYS,
    OFFLOAD_KEYS,
    ZERO_KEYS,
    complete_ds_json,
    read_ds_json,
)
from dpo.refusals import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))


def refusal(tmp_path: Path, content: Any) -> str:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigError) as caught:
        read_ds_json(str(path))
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(path), "ds.json")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files_are_accepted(path: Path) -> None:
    stage = int(path.stem.removeprefix("zero")[0])
    assert read_ds_json(str(path))["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_readme_explains_every_shipped_key(path: Path) -> None:
    readme = (path.parent / "README.md").read_text()
    raw = json.loads(path.read_text())
    offloads = [value for value in raw["zero_optimization"].values() if isinstance(value, dict)]
    keys = {key for group in (raw, raw["zero_optimization"], raw.get("aio", {}), *offloads) for key in group}
    assert sorted(key for key in keys if f"`{key}`" not in readme) == []
    assert f"`{path.name}`" in readme


ZERO2 = {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"zero_optimisation": {"stage": 3}}, "unknown key 'zero_optimisation': did you mean 'zero_optimization'?"),
        ({"zero_optimization": {"stge": 3}}, "did you mean 'zero_optimization.stage'?"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"devise": "cpu"}}},
            "did you mean 'zero_optimization.offload_optimizer.device'?",
        ),
        ({**ZERO2, "train_batch_size": 8}, "'train_batch_size' belongs to the config, not to the DeepSpeed JSON: "),
        ({**ZERO2, "train_micro_batch_size_per_gpu": 8}, "set --batch.tokens_per_micro_batch instead"),
        ({**ZERO2, "gradient_clipping": 1.0}, "set --optim.max_grad_norm instead"),
        ({**ZERO2, "bf16": {"enabled": True}}, "set --model.dtype instead"),
        ({**ZERO2, "optimizer": {"type": "AdamW"}}, "set --optim.name"),
        ({**ZERO2, "elasticity": {}}, "'elasticity' was removed from DeepSpeed: drop it"),
        ({**ZERO2, "tensor_parallel": {}}, "'tensor_parallel' is a DeepSpeed feature that this trainer does not use"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "mics_shard_size: removed from DeepSpeed"),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage must be 1, 2 or 3, not 0"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage must be 1, 2 or 3, not true"),
        ({"zero_optimization": {}}, "zero_optimization.stage must be 1, 2 or 3, not null"),
        ({}, 'zero_optimization is missing: add "zero_optimization": {"stage": 2}'),
        ({"zero_optimization": True}, "zero_optimization is missing"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param needs stage 3, not 2"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}},
            'offload_optimizer.device: checkpoints cannot be read from "nvme": use "cpu"',
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "offload_param.nvme_path is missing: name a folder on the local disk",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}},
            'offload_param.device must be "cpu", "nvme" or "none", not "disk"',
        ),
        (
            {"zero_optimization": {"stage": 2, "stage3_max_live_parameters": 5}},
            "zero_optimization.stage3_max_live_parameters needs stage 3, not 2",
        ),
        (
            {"zero_optimization": {"stage": 1, "zero_hpz_partition_size": 8}},
            "zero_optimization.zero_hpz_partition_size needs stage 3, not 1",
        ),
        ({"zero_optimization": {"stage": 2, "elastic_checkpoint": True}}, "the trainer writes checkpoints of its own"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "takes other weights for a parameter's"),
        (
            {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}},
            'zero_optimization.reduce_bucket_size is "auto", which only the Hugging Face Trainer fills in',
        ),
        ('{"zero_optimization": {\n"stage": 2,\n}}', "ds.json:3: malformed JSON"),
        ('{"steps_per_print": 1, "steps_per_print": 2}', "key 'steps_per_print' is given twice"),
        ("[]", "expected a JSON object"),
    ],
)
def test_refusals_are_one_line_with_a_remedy(tmp_path: Path, content: Any, expected: str) -> None:
    assert expected in refusal(tmp_path, content)


def test_missing_file_names_the_flag_and_the_shipped_files() -> None:
    with pytest.raises(ConfigError, match=r"--parallel\.ds_config nope\.json: No such file.*ds_configs/zero1\.json"):
        read_ds_json("nope.json")


def test_completed_json_keeps_zero_and_sums_gradients_in_float32() -> None:
    completed = complete_ds_json(ZERO2, dtype="bfloat16", world_size=4, max_grad_norm=0.5)
    assert completed["zero_optimization"] == {"stage": 2}
    assert completed["train_batch_size"] == 4
    assert completed["gradient_clipping"] == 0.5
    assert completed["bf16"] == {"enabled": True}
    assert completed["data_types"] == {"grad_accum_dtype": "fp32"}
    assert complete_ds_json(ZERO2, dtype="float32", world_size=4, max_grad_norm=0)["bf16"] == {"enabled": False}


class Recorder(dict[str, Any]):
    """A dictionary that notes which keys are asked for, however they are."""

    def __init__(self, asked: set[str], **values: Any) -> None:
        super().__init__(values)
        self.asked = asked

    def __copy__(self) -> Recorder:
        return self

    def get(self, key: str, default: Any = None) -> Any:  # type: ignore[override]
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Recorder:  # type: ignore[override]
        return self


@pytest.mark.slow
def test_known_names_are_those_that_the_installed_deepspeed_reads() -> None:
    deepspeed = pytest.importorskip("deepspeed")
    if deepspeed.__version__ != DEEPSPEED_VERSION:
        pytest.skip(f"names are those of deepspeed {DEEPSPEED_VERSION}, installed is {deepspeed.__version__}")
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    asked: set[str] = set()
    DeepSpeedConfig(Recorder(asked, train_micro_batch_size_per_gpu=1))
    assert asked - KNOWN_KEYS == set()
    assert KNOWN_KEYS - asked <= {"sequence_parallel_size"}
    fields = DeepSpeedZeroConfig.model_fields
    names = set(fields) | {field.alias for field in fields.values() if field.alias}
    assert names >= ZERO_KEYS
    assert set(DeepSpeedZeroOffloadParamConfig.model_fields) == OFFLOAD_KEYS["offload_param"]
    assert set(DeepSpeedZeroOffloadOptimizerConfig.model_fields) == OFFLOAD_KEYS["offload_optimizer"]


def test_the_linter_lists_every_problem_of_every_file(tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"zero_optimisation": {}, "fp16": {}, "zero_optimization": {"stage": 2, "offload_param": {}}}')
    report = tmp_path / "report.json"
    good = str(ROOT / "ds_configs/zero3.json")
    command = [sys.executable, "-m", "launch.ds_lint", "--json", str(report), str(bad), good, str(tmp_path / "none")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, f"{good}: ok\n")
    found = json.loads(report.read_text())
    assert [len(lines) for lines in found.values()] == [4, 0, 1]
    assert done.stderr.splitlines() == [line for lines in found.values() for line in lines]
    assert "did you mean 'zero_optimization'?" in found[str(bad)][0]


@pytest.mark.slow
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_deepspeed_parses_every_shipped_file(path: Path) -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.config import DeepSpeedConfig

    raw = read_ds_json(str(path))
    completed = complete_ds_json(raw, dtype="bfloat16", world_size=1, max_grad_norm=1.0)
    parsed = DeepSpeedConfig(completed)
    assert parsed.zero_optimization_stage == raw["zero_optimization"]["stage"]
    zero = parsed.zero_config.model_dump(mode="json")
    for key, value in raw["zero_optimization"].items():
        if not isinstance(value, dict):
            assert zero[key.removeprefix("stage3_") if key not in zero else key] == value
