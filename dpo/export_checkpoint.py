"""A checkpoint -> what `final/` would hold, had the run ended there; whatever engine and ranks have written it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import AutoTokenizer

from dpo.checkpoint import TrainerState, read_state
from dpo.config import Config, build
from dpo.config_text import yaml_values
from dpo.engine import DTYPES, Engine
from dpo.final import export
from dpo.optimizers import SCALES
from dpo.parity import Trained
from dpo.policy import Policy, trained_policy
from dpo.pretrained import Pretrained
from dpo.refusals import CheckpointError
from dpo.shelf import MANIFEST, DamageError, Shelf
from dpo.slices import Slice, SliceReader
from dpo.world import World

TRUSTING = "--trust"
"""The flag for checkpoints of others."""


@dataclass(frozen=True)
class _Loaded:
    """The part of an engine that `export` asks for: a policy on the CPU and its trained weights, fp32."""

    policy: Policy
    weights: dict[str, Tensor]

    def export_weights(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return self.weights


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint, not a run directory."""
    return (path / MANIFEST).is_file() and not (path / "config.yaml").is_file()


def newest(run: Path, trust: bool) -> Path | None:
    """The newest sound checkpoint of a run, which may be running: nothing is moved. None: there is none at all.

    Raises:
        CheckpointError: all are damaged, or one is not trusted.
    """
    shelf, problems = Shelf(run / "checkpoints", trust, TRUSTING), []
    for path in reversed(shelf.listed()):
        try:
            shelf.verify(path)
        except DamageError as error:
            problems.append(str(error))
            continue
        return path
    if problems:
        raise CheckpointError(f"{'; '.join(problems)}; no sound checkpoint is left")
    return None


def config_and_state(path: Path, trust: bool) -> tuple[Config, TrainerState]:
    """Of a checkpoint, which is verified.

    Raises:
        CheckpointError: it is damaged, not trusted, or of another version.
    """
    Shelf(path.parent, trust, TRUSTING).verify(path)
    state = read_state(path, (path / "trainer.json").read_text(errors="replace"))
    return build(yaml_values(dict(state.config), str(path / "trainer.json"))), state


def write_final(path: Path, config: Config, state: TrainerState, folder: Path) -> Trained:
    """Write a checkpoint's weights into `folder` as the end of the run would.

    Raises:
        ConfigError: the base model or its tokenizer cannot be read.
        CheckpointError: the checkpoint is of other weights.
    """
    dtype, source = DTYPES[state.dtype], Pretrained.of(config.model)
    loaded = _load(path, config, source, dtype)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path, trust_remote_code=config.model.trust_remote_code)
    alone = World(0, 1, 0, torch.device("cpu"), None)
    export(folder, cast(Engine, loaded), source, tokenizer, config, dtype, alone)
    name = f"the checkpoint of step {state.step}"
    return Trained(folder, state.step, name, f"the run's evaluation at step {state.step}", lambda: loaded.policy.model)


def _load(path: Path, config: Config, source: Pretrained, dtype: torch.dtype) -> _Loaded:
    """The policy with the checkpoint's weights; it computes in `dtype` as the run did."""
    plain = replace(
        config.train, compile=False, gradient_checkpointing=False, recompute="full", activation_offload=False
    )
    policy = trained_policy(source, replace(config, train=plain), "padded", dtype).eval()
    trained = {name: parameter.detach() for name, parameter in policy.named_parameters() if parameter.requires_grad}
    reader = SliceReader(path, [file.name for file in path.iterdir()])
    scales = {name: shape for name, shape in reader.shapes.items() if name.endswith(SCALES)}
    reader.require({name: weight.shape for name, weight in trained.items()} | scales)
    for name, weight in trained.items():
        reader.read(Slice(name, tuple(weight.shape), 0, {"weight": weight.view(-1)}))
    if policy.is_lora:
        weights = {name.removeprefix("model."): weight for name, weight in trained.items()}
    else:
        weights = {name: weight.detach() for name, weight in policy.model.state_dict().items()}
    policy.requires_grad_(False)
    for parameter in policy.parameters():
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(dtype)
    return _Loaded(policy, weights)
