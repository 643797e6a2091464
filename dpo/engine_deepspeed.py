"""DeepSpeed ZeRO-1, -2 and -3. The JSON holds ZeRO knobs; batch size, precision and clipping come from the config."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from data_utils.schema import PairBatch
from dpo.ds_json import complete_ds_json
from dpo.engine import Build, CheckpointError, Scorer, StepResult, make_optimizer, make_scorer
from dpo.logps import HeadStatistic
from dpo.policy import Policy, Pretrained, frozen_policy, trained_policy

_TAG = "deepspeed"


def _join(build: Build) -> None:
    """Let DeepSpeed use the process group that is there."""
    # On CPU DeepSpeed would compile a shared-memory all-reduce (half a minute, needs a compiler, and a killed build
    # leaves a lock that blocks every later run); gloo does its work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", str(build.world.local_rank))
    deepspeed.init_distributed(dist_init_required=False)


class DeepSpeedEngine:
    """The policy under a DeepSpeed engine; see `dpo.engine.Engine` for the verbs."""

    def __init__(self, build: Build) -> None:
        assert build.ds_json is not None
        _join(build)
        self.world, self.dtype = build.world, build.dtype
        self.settings = complete_ds_json(
            build.ds_json,
            dtype="bfloat16" if build.dtype == torch.bfloat16 else "float32",
            world_size=build.world.size,
            max_grad_norm=build.config.optim.max_grad_norm,
        )
        self.stage: int = self.settings["zero_optimization"]["stage"]
        self.max_grad_norm = build.config.optim.max_grad_norm
        with self._partitioned_load():
            policy = trained_policy(build.source, build.config, build.layout, build.dtype, keep_dtype=True)
        trainable = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        self.engine: Any
        self.engine, *_ = deepspeed.initialize(
            model=policy, optimizer=make_optimizer(trainable, build.config.optim), config=self.settings
        )
        self.policy: Policy = policy

    def forward(
        self, batch: PairBatch, statistic: HeadStatistic | None = None, own_logits: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """See `Engine`."""
        return self.engine(batch, statistic, own_logits)

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `Engine`. DeepSpeed averages over ranks, so the loss is scaled back."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.world.size)
        if not last:
            self.engine.step()

    def step(self, learning_rate: float) -> StepResult:
        """See `Engine`."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=self.world.device)
        skipped = torch.tensor(float(not self.engine.was_step_applied()), device=self.world.device)
        return StepResult(norm, skipped)

    def frozen_scorer(self, source: Pretrained, offload: bool) -> Scorer:
        """See `Engine`. Stages 1 and 2 replicate the policy's weights, so the copy is replicated as well."""
        with self._partitioned_load():
            model: Any = frozen_policy(source, self.policy.layout, self.dtype)
        if self.stage == 3:
            zero = {"stage": 3} | ({"offload_param": {"device": "cpu"}} if offload else {})
            model, *_ = deepspeed.initialize(model=model, config=self.settings | {"zero_optimization": zero})
        else:
            model.to("cpu" if offload else self.world.device)
        return make_scorer(model, self.world.device if offload and self.stage != 3 else None)

    def save(self, directory: Path) -> None:
        """See `Engine`. DeepSpeed writes pickles, one per rank."""
        self.engine.save_checkpoint(str(directory), tag=_TAG, save_latest=False, exclude_frozen_parameters=True)

    def load(self, directory: Path) -> None:
        """See `Engine`."""
        with contextlib.redirect_stdout(io.StringIO()):  # it prints names of its own functions
            path, _ = self.engine.load_checkpoint(str(directory), tag=_TAG, load_module_strict=False)
        if path is None:
            raise CheckpointError(f"{directory}: DeepSpeed found nothing to load")

    def export_weights(self) -> dict[str, Tensor]:
        """See `Engine`. A parameter is gathered at a time; adapters come from the fp32 weights of the optimizer."""
        parameters = dict(self.policy.model.named_parameters(remove_duplicate=False))
        if self.policy.is_lora:
            trained = {name: p for name, p in parameters.items() if p.requires_grad}
            full = {name: safe_get_full_fp32_param(p) for name, p in trained.items()}
            return {name: t.detach().cpu() for name, t in full.items() if t is not None} if self.world.is_main else {}
        weights = {}
        for name, parameter in parameters.items():
            with self._gathered([parameter]):
                if self.world.is_main:
                    weights[name] = parameter.detach().cpu().clone()
        buffers = dict(self.policy.model.named_buffers())
        persistent = self.policy.model.state_dict().keys() & buffers.keys()
        return weights | {name: buffers[name].detach().cpu() for name in persistent} if self.world.is_main else {}

    @contextlib.contextmanager
    def _partitioned_load(self) -> Iterator[None]:
        """Under stage 3 transformers loads each weight straight into its partition (zero.Init), on all ranks."""
        settings = HfDeepSpeedConfig(self.settings) if self.stage == 3 else None
        yield
        if settings is not None:
            unset_hf_deepspeed_config()

    def _gathered(self, parameters: Iterable[nn.Parameter]) -> Any:
        return deepspeed.zero.GatheredParameters(parameters) if self.stage == 3 else contextlib.nullcontext()
