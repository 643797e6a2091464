from __future__ import annotations

import math
from dataclasses import replace

import pytest

from dpo.config import Config, ConfigError, parse_config
from dpo.plan import Plan, learning_rate, make_plan


def config(*flags: str) -> Config:
    return parse_config(["--model.path", "m", "--data.train", "d", "--run.dir", "r", *flags])


def refusal(config: Config, world_size: int, num_rows: int) -> str:
    with pytest.raises(ConfigError) as caught:
        make_plan(config, world_size, num_rows)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_steps_count_the_short_window_of_every_epoch() -> None:
    plan = make_plan(config("--batch.pairs_per_step", "8", "--train.epochs", "3"), 1, 20)
    assert (plan.steps_per_epoch, plan.num_steps) == (3, 9)


def test_max_steps_cuts_the_run_and_its_schedule() -> None:
    flags = ("--batch.pairs_per_step", "8", "--train.max_steps", "7", "--train.epochs", "3")
    plan = make_plan(config(*flags), 1, 20)
    assert (plan.num_steps, plan.warmup_steps) == (7, 1)
    assert make_plan(config(*flags, "--train.max_steps", "70"), 1, 20).num_steps == 9


@pytest.mark.parametrize(
    ("world_size", "flags", "engine", "shard_size"),
    [
        (1, (), "single", 1),
        (4, (), "fsdp2", 4),
        (4, ("--parallel.shard_size", "2"), "fsdp2", 2),
        (1, ("--parallel.engine", "fsdp2"), "fsdp2", 1),
        (4, ("--parallel.engine", "deepspeed", "--parallel.ds_config", "ds.json"), "deepspeed", 4),
    ],
)
def test_engine_and_shard_size_follow_from_the_world(
    world_size: int, flags: tuple[str, ...], engine: str, shard_size: int
) -> None:
    plan = make_plan(config(*flags), world_size, 100)
    assert (plan.engine, plan.shard_size) == (engine, shard_size)


def test_numbers_that_do_not_fit_are_refused_with_the_numbers() -> None:
    message = refusal(config("--parallel.shard_size", "4"), 6, 100)
    assert "parallel.shard_size=4 does not divide the 6 processes" in message
    assert "one of 1, 2, 3, 6" in message
    assert "but 2 were started: set --parallel.engine fsdp2" in refusal(config("--parallel.engine", "single"), 2, 100)
    message = refusal(config(), 1, 63)
    assert "data.train has 63, batch.pairs_per_step is 64: set --batch.pairs_per_step to at most 63" in message


@pytest.mark.parametrize("num_steps", [1, 2, 7, 40])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.25, 0.9])
@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant"])
def test_learning_rate_is_that_of_transformers(scheduler: str, ratio: float, num_steps: int) -> None:
    torch = pytest.importorskip("torch")
    from transformers import get_scheduler

    flags = ("--optim.scheduler", scheduler, "--optim.warmup_ratio", str(ratio), "--optim.learning_rate", "3e-5")
    settings = config(*flags, "--batch.pairs_per_step", "1", "--train.max_steps", str(num_steps))
    plan = make_plan(settings, 1, 100)
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=3e-5)
    name = "constant_with_warmup" if scheduler == "constant" else scheduler
    schedule = get_scheduler(name, optimizer, math.ceil(num_steps * ratio), num_steps)
    for step in range(num_steps):
        assert learning_rate(step, plan, settings.optim) == pytest.approx(schedule.get_last_lr()[0], rel=1e-15, abs=0)
        optimizer.step()
        schedule.step()


def test_warm_up_starts_at_zero_and_decay_ends_above_it() -> None:
    settings = config("--optim.learning_rate", "1")
    plan = Plan(1, 100, 10, 10, 2, "single", 1)
    rates = [learning_rate(step, plan, settings.optim) for step in range(10)]
    assert rates[:4] == [0, 0.5, 1, 0.875]
    assert rates[-1] == 0.125
    constant = replace(settings.optim, scheduler="constant")
    assert {learning_rate(step, replace(plan, warmup_steps=0), constant) for step in range(10)} == {1.0}
