"""Numbers derived from the config once the number of processes and rows is known, and the learning rate by step.

    python -m dpo.plan --config recipe.yaml --gpus 16 --gpu-memory 80

says whether a run will fit, and what it will take (`dpo.planner`).
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dpo.refusals import ConfigError

if TYPE_CHECKING:
    from dpo.sections import Config, OptimSection

Engine = Literal["single", "fsdp2", "deepspeed"]


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        world_size: processes.
        pairs_per_epoch: pairs of one pass over the training data.
        steps_per_epoch: steps of one pass; the last one may be short.
        num_steps: steps of the whole run, over which the learning rate decays.
        warmup_steps: steps over which the learning rate rises from 0.
        engine: the engine that `parallel.engine` stands for.
        shard_size: ranks that share one copy of the weights; 1 for the single engine, the world for DeepSpeed.
    """

    world_size: int
    pairs_per_epoch: int
    steps_per_epoch: int
    num_steps: int
    warmup_steps: int
    engine: Engine
    shard_size: int


def make_plan(config: Config, world_size: int, pairs_per_epoch: int) -> Plan:
    """The plan of a run of `world_size` processes over so many pairs per epoch.

    Raises:
        ConfigError: the engine, `parallel.shard_size` or `batch.pairs_per_step` does not fit; names the numbers.
    """
    pairs_per_step = config.batch.pairs_per_step
    if pairs_per_epoch < pairs_per_step:
        raise ConfigError(
            f"fewer pairs than one global step: data.train has {pairs_per_epoch}, batch.pairs_per_step is "
            f"{pairs_per_step}: set --batch.pairs_per_step to at most {pairs_per_epoch}, or add data"
        )
    engine, shard_size = choose_engine(config, world_size)
    if config.eval.generate and engine != "single":
        raise ConfigError(
            f"eval.generate answers with one process and the single engine, not {world_size} under {engine}: "
            "set --eval.generate false"
        )
    steps_per_epoch = math.ceil(pairs_per_epoch / pairs_per_step)
    num_steps = config.train.epochs * steps_per_epoch
    if config.train.max_steps is not None:
        num_steps = min(num_steps, config.train.max_steps)
    return Plan(
        world_size=world_size,
        pairs_per_epoch=pairs_per_epoch,
        steps_per_epoch=steps_per_epoch,
        num_steps=num_steps,
        warmup_steps=math.ceil(num_steps * config.optim.warmup_ratio),
        engine=engine,
        shard_size=shard_size,
    )


def choose_engine(config: Config, world_size: int) -> tuple[Engine, int]:
    """The engine that `parallel.engine` stands for, and how many ranks share one copy of the weights.

    Raises:
        ConfigError: one of them does not fit the number of processes.
    """
    engine = _choose_engine(config, world_size)
    if config.optim.name == "cpu_adamw":
        if engine != "deepspeed":
            raise ConfigError(f"optim.name=cpu_adamw is DeepSpeed's, not engine {engine}'s: set --optim.name adamw")
    elif config.optim.name != "adamw" and engine != "single":
        raise ConfigError(
            f"optim.name={config.optim.name} keeps its moments for whole tensors, which engine {engine} cuts: set"
            " --optim.name adamw (offload is the other way to save its memory)"
        )
    if config.parallel.offload and engine != "fsdp2":
        raise ConfigError(
            f"parallel.offload does nothing with engine {engine}: set --parallel.engine fsdp2, or drop it"
        )
    return engine, _choose_shard_size(config, engine, world_size)


def learning_rate(step: int, plan: Plan, optim: OptimSection) -> float:
    """The learning rate with which optimizer step `step` (0-based) is taken.

    The values of transformers' `get_scheduler` for "linear", "cosine" and "constant_with_warmup" (and so TRL's): the
    warm-up is step / warmup_steps, so its first step has rate 0; the decay would reach 0 at step `num_steps`, one past
    the last.
    """
    assert optim.learning_rate is not None, "Config fills it in"
    if step < plan.warmup_steps:
        return optim.learning_rate * step / plan.warmup_steps
    if optim.scheduler == "constant":
        return optim.learning_rate
    decay_steps = max(1, plan.num_steps - plan.warmup_steps)
    progress = (step - plan.warmup_steps) / decay_steps
    if optim.scheduler == "cosine":
        return optim.learning_rate * max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
    return optim.learning_rate * max(0.0, 1 - progress)


def _choose_engine(config: Config, world_size: int) -> Engine:
    engine = config.parallel.engine
    if engine == "auto":
        return "single" if world_size == 1 else "fsdp2"
    if engine == "single" and world_size > 1:
        raise ConfigError(
            f"parallel.engine=single runs one process, but {world_size} were started: set --parallel.engine fsdp2"
        )
    return engine


def _choose_shard_size(config: Config, engine: Engine, world_size: int) -> int:
    shard_size = config.parallel.shard_size
    if shard_size is None:
        return world_size
    if world_size % shard_size:
        sizes = ", ".join(str(size) for size in range(1, world_size + 1) if world_size % size == 0)
        raise ConfigError(
            f"parallel.shard_size={shard_size} does not divide the {world_size} processes: "
            f"set --parallel.shard_size to one of {sizes}"
        )
    assert engine != "deepspeed", "ParallelSection refuses it"
    return shard_size


def main(argv: list[str]) -> int:
    """The planner; returns the exit code."""
    from dpo.planner import main as plan

    try:
        plan(argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
