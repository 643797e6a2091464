"""The nearest settings that fit: combinations of changes, tried in order of what they cost. Arithmetic, no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from dpo.estimate import Setup, Shapes, has_copy, memory
from dpo.refusals import ConfigError
from dpo.sections import Config

ShapesOf = Callable[[Config], Shapes]


HEADROOM = 0.05
"""Of a device's memory, which proposals leave free: a plan at the limit is one that may fail after an hour."""


@dataclass(frozen=True)
class Change:
    """One setting to change.

    Attributes:
        flag: what to give the trainer.
        cost: rank of what it costs: below 10 hardly any time, below 50 time, from 50 on another training.
        apply: the changed setup; None where it changes nothing here.
    """

    flag: str
    cost: int
    apply: Callable[[Setup], Setup | None]

    @property
    def key(self) -> str:
        """The option that is set, whatever its value."""
        return self.flag.split()[0]


@dataclass(frozen=True)
class Proposal:
    """Flags that make it fit, and bytes per device and per rank's host memory then."""

    flags: tuple[str, ...]
    total: float
    host: float


def proposals(setup: Setup, shapes_of: ShapesOf, limit: float, wanted: int = 3) -> list[Proposal]:
    """The cheapest combinations of at most four changes that take at most `limit` bytes per device, less HEADROOM.

    Each sets other options than those before it: the same with a smaller micro-batch is no news.
    """
    found: list[Proposal] = []
    known: list[set[str]] = []
    for chosen in _by_cost(_changes(setup)):
        keys = {change.key for change in chosen}
        if len(keys) < len(chosen) or any(less <= keys for less in known):
            continue
        changed = _apply(setup, chosen)
        if changed is None:
            continue
        device, host = memory(changed, shapes_of(changed.config))
        total = sum(device.values())
        if total <= limit * (1 - HEADROOM):
            found.append(Proposal(tuple(change.flag for change in chosen), total, sum(host.values())))
            known.append(keys)
            if len(found) == wanted:
                break
    return found


def more_devices(setup: Setup, shapes_of: ShapesOf, limit: float) -> int | None:
    """Devices on which the config fits as it is: twice as many, four times, ... up to 64; None: on none of these."""
    if setup.config.parallel.engine == "single":
        return None
    zero = None if setup.zero is None else {"zero_optimization": setup.zero}
    for factor in (2, 4, 8, 16, 32, 64):
        try:
            larger = Setup.of(setup.config, setup.world_size * factor, setup.dtype_bytes, zero)
        except ConfigError:  # 8-bit moments, which one process alone can keep
            return None
        if sum(memory(larger, shapes_of(setup.config))[0].values()) <= limit * (1 - HEADROOM):
            return larger.world_size
    return None


def _by_cost(changes: list[Change]) -> list[tuple[Change, ...]]:
    every = [chosen for size in range(1, 5) for chosen in combinations(changes, size)]
    return sorted(every, key=lambda chosen: sum(change.cost for change in chosen))


def _apply(setup: Setup, changes: tuple[Change, ...]) -> Setup | None:
    for change in changes:
        try:
            changed = change.apply(setup)
        except ConfigError:  # it does not go with the rest
            return None
        if changed is None:
            return None
        setup = changed
    return setup


def _changes(setup: Setup) -> list[Change]:
    return [*_smaller_batches(setup), *_sharding(setup), *_offloading(setup), *_FIXED]


def _smaller_batches(setup: Setup) -> Iterator[Change]:
    """Halved down to the longest pair; a pair that is larger is a micro-batch of its own anyway.

    Where weights are gathered for every micro-batch, twice as many of them are twice the traffic.
    """
    gathers = setup.stage == 3 or (setup.engine == "fsdp2" and setup.shard_size > 1)
    tokens, cost = setup.config.batch.tokens_per_micro_batch, 0
    while tokens // 2 >= setup.config.data.max_length:
        tokens, cost = tokens // 2, cost + (5 if gathers else 1)
        yield Change(f"--batch.tokens_per_micro_batch {tokens}", cost, _batch(tokens))


def _batch(tokens: int) -> Callable[[Setup], Setup | None]:
    def apply(setup: Setup) -> Setup | None:
        batch = setup.config.batch
        if batch.tokens_per_micro_batch <= tokens:
            return None
        return _with(setup, replace(setup.config, batch=replace(batch, tokens_per_micro_batch=tokens)))

    return apply


def _sharding(setup: Setup) -> Iterator[Change]:
    if setup.engine == "fsdp2" and setup.shard_size < setup.world_size:
        yield Change(f"--parallel.shard_size {setup.world_size}", 4, _whole_world)
    for stage in range(setup.stage + 1, 4) if setup.stage else ():
        yield Change(f"--parallel.ds_config ds_configs/zero{stage}.json", 2 * (stage - setup.stage), _zero(stage))


def _offloading(setup: Setup) -> Iterator[Change]:
    """Of what is sharded, by the engine's own means; one process alone offloads under FSDP2."""
    if setup.engine == "deepspeed":
        for stage in range(max(2, setup.stage), 4):
            cost = 30 + 2 * (stage - setup.stage)
            yield Change(f"--parallel.ds_config ds_configs/zero{stage}_offload.json", cost, _zero_offload(stage))
    elif setup.engine == "fsdp2":
        yield Change("--parallel.offload true", 30, _section("parallel", offload=True))
    else:
        flag = "--parallel.engine fsdp2 --parallel.offload true"
        yield Change(flag, 32, _section("parallel", engine="fsdp2", offload=True))


def _whole_world(setup: Setup) -> Setup:
    parallel = replace(setup.config.parallel, shard_size=setup.world_size)
    return _with(setup, replace(setup.config, parallel=parallel))


def _zero(stage: int) -> Callable[[Setup], Setup | None]:
    def apply(setup: Setup) -> Setup | None:
        assert setup.zero is not None
        return replace(setup, stage=stage, zero=setup.zero | {"stage": stage}) if stage > setup.stage else None

    return apply


def _zero_offload(stage: int) -> Callable[[Setup], Setup | None]:
    """As the shipped file of that stage moves it."""
    devices: dict[str, Any] = {"offload_optimizer": {"device": "cpu"}}
    if stage == 3:
        devices["offload_param"] = {"device": "cpu"}

    def apply(setup: Setup) -> Setup | None:
        assert setup.zero is not None
        if setup.offloads("param" if stage == 3 else "optimizer"):
            return None
        return replace(setup, stage=stage, zero=setup.zero | {"stage": stage} | devices)

    return apply


def _section(section_name: str, /, **values: object) -> Callable[[Setup], Setup | None]:
    """A change of keys of one section."""

    def apply(setup: Setup) -> Setup | None:
        section = getattr(setup.config, section_name)
        if all(getattr(section, key) == value for key, value in values.items()):
            return None
        return _with(setup, replace(setup.config, **{section_name: replace(section, **values)}))

    return apply


def _lora(setup: Setup) -> Setup | None:
    return None if setup.config.lora.r else _section("lora", r=16)(setup)


def _offload_activations(setup: Setup) -> Setup | None:
    """Beside recomputation, where every engine can."""
    return _section("train", activation_offload=True)(setup) if setup.config.train.gradient_checkpointing else None


def _offload_reference(setup: Setup) -> Setup | None:
    if not has_copy(setup.config):
        return None
    return _section("reference", offload=True)(setup)


_FIXED = (
    Change("--optim.name adamw_8bit", 6, _section("optim", name="adamw_8bit")),
    Change("--reference.offload true", 8, _offload_reference),
    Change("--train.gradient_checkpointing true", 12, _section("train", gradient_checkpointing=True)),
    Change("--train.activation_offload true", 16, _offload_activations),
    Change("--lora.r 16", 50, _lora),
    Change("--model.quantization nf4", 60, _section("model", quantization="nf4")),
)


def _with(setup: Setup, config: Config) -> Setup:
    changed = Setup.of(config, setup.world_size, setup.dtype_bytes)
    return replace(changed, stage=setup.stage, zero=setup.zero)
