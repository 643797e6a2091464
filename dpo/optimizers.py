"""AdamW: torch's fused one, bitsandbytes' with moments in 8 bits (arXiv 2110.02861) for plain tensors, or DeepSpeed's
for moments that lie in main memory, which is the same arithmetic in vector instructions.

8 bits: blocks of 256 values share a scale; tensors below 4,096 elements keep fp32 moments. Their trajectory is another
one than AdamW's, by the rounding of the moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dpo.config import ConfigError, OptimSection
from dpo.policy import full_shape
from dpo.slices import Slice


def make_optimizer(parameters: Mapping[str, nn.Parameter], optim: OptimSection) -> torch.optim.Optimizer:
    """What `optim.name` says; weight decay spares vectors (norms and biases), as transformers' Trainer does."""
    matrices = [p for p in parameters.values() if len(full_shape(p)) >= 2]
    vectors = [p for p in parameters.values() if len(full_shape(p)) < 2]
    groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    assert optim.learning_rate is not None
    groups = [group for group in groups if group["params"]]
    betas = (optim.adam_beta1, optim.adam_beta2)
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=optim.learning_rate, betas=betas, eps=optim.adam_epsilon, fused=True)
    if optim.name == "cpu_adamw":
        return _cpu_adamw(groups, lr=optim.learning_rate, betas=betas, eps=optim.adam_epsilon)
    import bitsandbytes.optim

    kind = bitsandbytes.optim.AdamW8bit if optim.name == "adamw_8bit" else bitsandbytes.optim.PagedAdamW8bit
    return kind(groups, lr=optim.learning_rate, betas=betas, eps=optim.adam_epsilon)


def _cpu_adamw(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """DeepSpeed's, whose operator is compiled at its first use.

    Raises:
        ConfigError: it cannot be.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    try:
        return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    except RuntimeError as error:
        cause = str(error.__cause__ or error).strip().split("\n")[0]
        raise ConfigError(
            f"optim.name=cpu_adamw: DeepSpeed's operator cpu_adam cannot be compiled here ({cause}): install a C++"
            " compiler, or set --optim.name adamw"
        ) from error


def fresh_moments(parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a parameter before its first step; made here so that it can be saved and loaded at any time."""
    moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
    return {"step": torch.zeros((), dtype=torch.float32, device=parameter.device), **moments}


def fill_state(optimizer: Any) -> None:
    """Make the state of every parameter before the first step."""
    for number, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if isinstance(optimizer, torch.optim.AdamW):
                optimizer.state[parameter] = fresh_moments(parameter)
            else:
                optimizer.init_state(group, parameter, number, index)


SCALES = ".absmax"
"""What the name of bitsandbytes' scales of a parameter's moments ends in."""


def state_slices(
    optimizer: torch.optim.Optimizer, name: str, parameter: Tensor, local: Callable[[Tensor], Tensor], start: int
) -> Iterator[Slice]:
    """A parameter with its moments as this rank has them, for a checkpoint; views, so that reading into them loads.

    bitsandbytes' scales are fewer than the weights: a slice of their own, NAME.absmax. Its code books are constants.
    """
    state = optimizer.state[parameter]
    held = {"weight": parameter.detach()}
    held |= {key: state[key] for key in ("exp_avg", "exp_avg_sq", "state1", "state2") if key in state}
    tensors = {key: local(tensor).view(-1) for key, tensor in held.items()}
    if tensors["weight"].numel():
        yield Slice(name, tuple(parameter.shape), start, tensors)
    if "absmax1" in state:
        shape = tuple(state["absmax1"].shape)
        yield Slice(f"{name}{SCALES}", shape, 0, {"weight": state["absmax1"], "second": state["absmax2"]})


def restore_step(optimizer: torch.optim.Optimizer, parameter: Tensor, step: Tensor) -> None:
    """Give a parameter's state its count of updates back; bitsandbytes and DeepSpeed count in Python."""
    state = optimizer.state[parameter]
    if isinstance(state["step"], Tensor):
        state["step"].copy_(step)
    else:
        state["step"] = int(step)
