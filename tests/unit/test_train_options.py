"""Options of memory and compiling: what does not go together is refused in one line with a remedy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from dpo import layers
from dpo.config import ConfigError, parse_config
from dpo.engine import Build, _check_options

REQUIRED = ["--model.path", "m", "--data.train", "a.jsonl", "--run.dir", "r"]
CHECKPOINTING, SELECTIVE = ["--train.gradient_checkpointing", "true"], ["--train.recompute", "selective"]
OFFLOAD, COMPILE = ["--train.activation_offload", "true"], ["--train.compile", "true"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            SELECTIVE,
            "train.recompute does nothing with train.gradient_checkpointing=false: set --train",
        ),
        (
            [*CHECKPOINTING, *SELECTIVE, *OFFLOAD],
            "train.activation_offload moves nothing that recompute=selective",
        ),
        ([*CHECKPOINTING, *SELECTIVE, *COMPILE], "train.recompute=selective does not see into compiled layers: set"),
    ],
)
def test_options_that_exclude_each_other(flags: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        parse_config([*REQUIRED, *flags])


def build(flags: list[str], stage: int | None) -> Build:
    ds_json: dict[str, Any] | None = None if stage is None else {"zero_optimization": {"stage": stage}}
    world = SimpleNamespace(device=torch.device("cpu"))
    return cast(Build, SimpleNamespace(config=parse_config([*REQUIRED, *flags]), ds_json=ds_json, world=world))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (COMPILE, "train.compile=true does not work under ZeRO-3"),
        ([*CHECKPOINTING, *SELECTIVE], "train.recompute=selective does not work under ZeRO-3"),
        (OFFLOAD, "train.activation_offload alone does not work under ZeRO-3"),
    ],
)
def test_zero_3_gathers_inside_layers(flags: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "BACKEND", "eager")
    with pytest.raises(ConfigError, match=words):
        _check_options(build(flags, 3))
    for stage in (None, 1, 2):
        _check_options(build(flags, stage))
    _check_options(build([*CHECKPOINTING, *OFFLOAD], 3))
