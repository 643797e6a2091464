"""Engines: who holds the weights, and how gradients become a step. They know no loss.

Every engine offers the same few verbs (`Engine`) and the same arithmetic: compute in `model.dtype`, trainable weights,
gradients and optimizer state in fp32, gradients *summed* over ranks and micro-steps, clipped by their global norm. A
step whose gradient norm is not finite changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_utils.schema import Layout, PairBatch
from dpo.config import Config, ConfigError, OptimSection
from dpo.layers import require_compiler
from dpo.logps import HeadStatistic, Observer
from dpo.moving import MovingCopy, Part
from dpo.optimizers import fill_state, make_optimizer, restore_step, state_slices
from dpo.plan import Plan
from dpo.policy import Policy, frozen_policy, trained_policy
from dpo.pretrained import Pretrained
from dpo.slices import Slice, SliceReader
from dpo.world import World

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Scorer(Protocol):
    """A frozen model."""

    def __call__(self, batch: PairBatch, observe: Observer | None = None) -> Tensor:
        """(S,) log-probs of the responses, without grad."""
        ...


@dataclass(frozen=True, slots=True)
class StepResult:
    """What became of a step, as device scalars: global gradient norm before clipping, and 1 where it was skipped."""

    grad_norm: Tensor
    skipped: Tensor


class Engine(Protocol):
    """What the loop asks of an engine."""

    policy: Policy

    def forward(
        self,
        batch: PairBatch,
        statistic: HeadStatistic | None = None,
        own_logits: bool = False,
        observe: Observer | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """`Policy.forward` with the weights gathered."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of this rank's part of the step's loss; `last` marks the step's last micro-step."""
        ...

    def step(self, learning_rate: float) -> StepResult:
        """Clip, update, and clear the gradients."""
        ...

    def frozen_scorer(self, source: Pretrained, offload: bool, moves: bool = False) -> Scorer:
        """A second, frozen model, held like the policy; the scorer returns (S,) log-probs without grad.

        Args:
            moves: `move_reference` is going to change it, and its weights are slices as well (key reference).
        """
        ...

    def move_reference(self, share: float) -> None:
        """Move the frozen model's weights towards the policy's by a share in (0, 1] (`dpo.moving`)."""
        ...

    def slices(self) -> Iterator[Slice]:
        """This rank's slices of the trained weights and of AdamW's moments (keys weight, exp_avg, exp_avg_sq), fp32
        and alive: writing into them changes the optimizer's state."""
        ...

    @property
    def is_writer(self) -> bool:
        """Whether this rank's slices go into a checkpoint; those of all writers cover each parameter exactly once."""
        ...

    @property
    def num_updates(self) -> Tensor:
        """() AdamW's count of the steps it has taken, the same for all parameters."""
        ...

    def load(self, reader: SliceReader) -> None:
        """Fill weights and optimizer state from a checkpoint, whatever ranks and engine wrote it.

        Raises:
            CheckpointError: it is of other parameters.
        """
        ...

    def export_weights(self) -> dict[str, Tensor]:
        """On rank 0 the full weights of `policy.model` (of the adapter only, for LoRA) on CPU; elsewhere nothing."""
        ...


@dataclass(frozen=True)
class Build:
    """What an engine is built from; `ds_json` is the checked file of `parallel.ds_config`."""

    config: Config
    plan: Plan
    world: World
    source: Pretrained
    layout: Layout
    dtype: torch.dtype
    ds_json: dict[str, Any] | None = None


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """`model.dtype`, with auto decided by the device."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def build_engine(build: Build) -> Engine:
    """The engine that the plan names.

    Raises:
        ConfigError: an option of `train` does not work here.
    """
    _check_options(build)
    if build.plan.engine == "deepspeed":
        from dpo.engine_deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(build)
    if build.plan.engine == "fsdp2":
        from dpo.engine_fsdp import FSDP2Engine

        return FSDP2Engine(build)
    return SingleEngine(build)


def _check_options(build: Build) -> None:
    """Refuse what this engine or device cannot do, before weights are read."""
    train = build.config.train
    if build.ds_json is not None and build.ds_json["zero_optimization"]["stage"] == 3:
        because = "does not work under ZeRO-3, which gathers weights inside layers"
        if train.compile:
            raise ConfigError(f"train.compile=true {because}: set --parallel.engine fsdp2, or drop it")
        if train.recompute == "selective":
            raise ConfigError(f"train.recompute=selective {because}: set --train.recompute full")
        if train.activation_offload and not train.gradient_checkpointing:
            remedy = "set --train.gradient_checkpointing true, or drop it"
            raise ConfigError(f"train.activation_offload alone {because}: {remedy}")
    if build.config.optim.name == "cpu_adamw":
        assert build.ds_json is not None, "choose_engine refuses other engines"
        offload = build.ds_json["zero_optimization"].get("offload_optimizer") or {}
        if offload.get("device") != "cpu":
            raise ConfigError(
                "optim.name=cpu_adamw updates in main memory, but parallel.ds_config leaves the optimizer on the"
                " device: set --parallel.ds_config ds_configs/zero3_offload.json, or --optim.name adamw"
            )
    if train.compile:
        require_compiler(build.world.device)


def share_buffers(policy: Policy, full: Policy | None, device: torch.device) -> None:
    """Give every rank's policy the buffers of rank 0's `full` one, on `device`."""
    originals = dict(full.named_buffers()) if full is not None else {}
    for path, module in policy.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            filled = originals.get(f"{path}.{name}".lstrip("."), buffer).to(device)
            dist.broadcast(filled, src=0)
            setattr(module, name, filled)


def make_scorer(model: Callable[..., tuple[Tensor, Tensor | None]], visits: torch.device | None = None) -> Scorer:
    """The log-probs of a frozen model, called as `Policy.forward`, without grad. With `visits` it is a module whose
    weights are on that device for the forward only, and on the CPU between."""

    @torch.no_grad()
    def score(batch: PairBatch, observe: Observer | None = None) -> Tensor:
        if visits is not None:
            cast(nn.Module, model).to(visits)
        logps_S, _ = model(batch, observe=observe)
        if visits is not None:
            cast(nn.Module, model).to("cpu")
        return logps_S

    return score


class TorchEngine:
    """What single device and FSDP2 share: fp32 parameters under a fused AdamW, in named tensors.

    Attributes:
        parameters: the fp32 tensors that the optimizer updates, by the policy's names.
    """

    def __init__(
        self, policy: Policy, parameters: dict[str, nn.Parameter], optim: OptimSection, device: torch.device
    ) -> None:
        self.policy, self.device = policy, device
        self.parameters = parameters
        self.max_grad_norm = optim.max_grad_norm
        self.optimizer = make_optimizer(parameters, optim)
        self.moving: MovingCopy | None = None
        fill_state(self.optimizer)

    def forward(
        self,
        batch: PairBatch,
        statistic: HeadStatistic | None = None,
        own_logits: bool = False,
        observe: Observer | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """See `Engine`."""
        return self.policy(batch, statistic, own_logits, observe)

    def step(self, learning_rate: float) -> StepResult:
        """See `Engine`. Nothing here waits for the device: a bad step is skipped by the optimizer's own kernel."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        grad_norm = self._global_norm(gradients)
        if self.max_grad_norm > 0:
            scale = (self.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([self._local(gradient) for gradient in gradients], scale)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        skipped = 1.0 - torch.isfinite(grad_norm).float()
        self._update(skipped)
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(grad_norm.to(self.device), skipped.to(self.device))

    def _update(self, skipped: Tensor) -> None:
        """One optimizer step on this rank's tensors; `found_inf` is the protocol by which fused AdamW leaves
        weights, moments and step counts as they are. Others have none: the host has to look."""
        if isinstance(self.optimizer, torch.optim.AdamW):
            self.optimizer.grad_scale, self.optimizer.found_inf = None, skipped  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not skipped.item():
            self.optimizer.step()

    def _global_norm(self, gradients: list[Tensor]) -> Tensor:
        return torch.nn.utils.get_total_norm(gradients)

    def _local(self, tensor: Tensor) -> Tensor:
        return tensor

    def slices(self) -> Iterator[Slice]:
        """See `Engine`."""
        return self._slices() if self.moving is None else self.moving.beside(self._slices())

    def _slices(self) -> Iterator[Slice]:
        for name, parameter in self.parameters.items():
            yield from state_slices(self.optimizer, name, parameter, self._local, self._first_element(parameter))

    def _weights(self) -> list[Slice]:
        """The slices of weights alone, without such as an optimizer adds."""
        return [piece for piece in self._slices() if piece.name in self.parameters]

    def move_reference(self, share: float) -> None:
        """See `Engine`."""
        assert self.moving is not None
        self.moving.move(self._weights(), share)

    @property
    def is_writer(self) -> bool:
        """See `Engine`."""
        return True

    @property
    def num_updates(self) -> Tensor:
        """See `Engine`."""
        return torch.as_tensor(self.optimizer.state[next(iter(self.parameters.values()))]["step"], dtype=torch.float32)

    def load(self, reader: SliceReader) -> None:
        """See `Engine`."""
        slices = list(self.slices())
        extra = {piece.name: piece.shape for piece in slices if piece.name not in self.parameters}
        reader.require({name: parameter.shape for name, parameter in self.parameters.items()} | extra)
        for piece in slices:
            reader.read(piece)
        for parameter in self.parameters.values():
            restore_step(self.optimizer, parameter, reader.step)
        if self.moving is not None:
            self.moving.refresh(self._weights())

    def _first_element(self, parameter: Tensor) -> int:
        """Where this rank's part of a parameter begins in it, flattened."""
        return 0


class SingleEngine(TorchEngine):
    """One process on one device. In bf16 the model computes with a copy of its fp32 weights."""

    def __init__(self, build: Build) -> None:
        self.device, self.dtype, self.compiles = build.world.device, build.dtype, build.config.train.compile
        policy = trained_policy(build.source, build.config, build.layout, build.dtype, device=self.device)
        policy.to(self.device)
        self.computing = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        masters = self.computing if build.dtype == torch.float32 else self._split_masters()
        super().__init__(policy, masters, build.config.optim, self.device)

    def _split_masters(self) -> dict[str, nn.Parameter]:
        """Move the fp32 weights out of the model, which keeps a copy in the compute dtype; gradients are added up
        in fp32 as they appear."""
        masters = {}
        for name, parameter in self.computing.items():
            master = nn.Parameter(parameter.detach().clone())
            parameter.data = parameter.detach().to(self.dtype)

            def collect(computed: nn.Parameter, master: nn.Parameter = master) -> None:
                assert computed.grad is not None
                gradient = computed.grad.to(master.dtype)
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                computed.grad = None

            parameter.register_post_accumulate_grad_hook(collect)
            masters[name] = master
        return masters

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `Engine`."""
        loss.backward()

    def step(self, learning_rate: float) -> StepResult:
        """See `Engine`."""
        result = super().step(learning_rate)
        self._refresh()
        return result

    def _refresh(self) -> None:
        if self.parameters is not self.computing:
            torch._foreach_copy_([p.detach() for p in self.computing.values()], list(self.parameters.values()))

    def frozen_scorer(self, source: Pretrained, offload: bool, moves: bool = False) -> Scorer:
        """See `Engine`."""
        model = frozen_policy(source, self.policy.layout, self.dtype, compiled=self.compiles)
        model.to("cpu" if offload else self.device)
        parameters = dict(model.named_parameters())

        @contextmanager
        def opened() -> Iterator[Part]:
            yield lambda piece: parameters[piece.name].detach().view(-1)

        if moves:
            self.moving = MovingCopy(self._weights(), opened)
        return make_scorer(model, self.device if offload else None)

    def load(self, reader: SliceReader) -> None:
        """See `Engine`."""
        super().load(reader)
        self._refresh()

    def export_weights(self) -> dict[str, Tensor]:
        """See `Engine`."""
        if self.policy.is_lora:
            return {name.removeprefix("model."): p.detach().cpu() for name, p in self.parameters.items()}
        return {name: tensor.detach().cpu() for name, tensor in self.policy.model.state_dict().items()}
