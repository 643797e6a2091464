"""`python -m dpo.plan`: whether a config fits before it is queued, and what it costs; needs no GPU and no weights."""

from __future__ import annotations

import argparse
import json
import logging
import math
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo.config import build, flag_values, read_yaml, split_flags, yaml_values
from dpo.ds_json import read_ds_json
from dpo.estimate import (
    Setup,
    checkpoint_bytes,
    extra_forwards,
    host_load_bytes,
    memory,
    network_bytes_per_step,
    step_flops,
)
from dpo.propose import Proposal, more_devices, proposals
from dpo.refusals import require
from dpo.sections import Config

if TYPE_CHECKING:
    from dpo.estimate import Shapes

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """What to plan for, beside the config."""

    gpus: int
    gpu_memory_gib: float
    gpus_per_node: int
    peak_tflops: float
    mfu: float
    tokens_per_pair: float
    scored_per_pair: float
    pairs: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require(value > 0, f"--{name.removesuffix('_gib').replace('_', '-')} must be above 0, not {value}")
        require(self.mfu <= 1, f"--mfu is a fraction of the peak and must be at most 1, not {self.mfu}")


def report(config: Config, machine: Machine) -> dict[str, Any]:
    """The plan as a dictionary of numbers, sizes in bytes.

    Raises:
        ConfigError: config, engine or model cannot be used.
    """
    dtype_bytes = 4 if config.model.dtype == "float32" else 2
    ds_json = None if config.parallel.ds_config is None else read_ds_json(config.parallel.ds_config)
    setup = Setup.of(config, machine.gpus, dtype_bytes, ds_json)
    shapes_of = counter(dtype_bytes)
    shapes = shapes_of(config)
    device, host = memory(setup, shapes)
    limit = machine.gpu_memory_gib * GIB
    total = sum(device.values())
    found = proposals(setup, shapes_of, limit) if total > limit else []
    local = min(machine.gpus, machine.gpus_per_node)
    return {
        "model": config.model.path,
        "parameters": shapes.num_all,
        "trained": shapes.num_trained,
        "engine": setup.engine,
        "stage": setup.stage,
        "gpus": machine.gpus,
        "shard_size": setup.shard_size,
        "device": device,
        "device_total": total,
        "device_limit": limit,
        "fits": total <= limit,
        "host_per_node": {"loading": host_load_bytes(setup, shapes), **{k: v * local for k, v in host.items()}},
        "checkpoint": checkpoint_bytes(setup, shapes),
        **_speed(setup, shapes, machine),
        "proposals": [
            {"flags": list(p.flags), "device_total": p.total, "host_per_node": p.host * local} for p in found
        ],
        "fits_on_gpus": machine.gpus if total <= limit else more_devices(setup, shapes_of, limit),
    }


@cache
def counter(dtype_bytes: int) -> Any:
    """A function from a config to its shapes that counts each model and adapter once."""
    import torch

    from dpo.shapes import count_shapes

    counted: dict[tuple[object, ...], Shapes] = {}

    def shapes_of(config: Config) -> Shapes:
        key = (config.model, config.lora)
        if key not in counted:
            counted[key] = count_shapes(config, torch.float32 if dtype_bytes == 4 else torch.bfloat16)
        return counted[key]

    return shapes_of


def _speed(setup: Setup, shapes: Shapes, machine: Machine) -> dict[str, float]:
    """At the stated MFU, which counts neither the reference's forwards nor recomputation: they take time beside."""
    config = setup.config
    flops = step_flops(shapes, machine.tokens_per_pair, machine.scored_per_pair)
    forward = 2 * (machine.tokens_per_pair * shapes.num_body + machine.scored_per_pair * shapes.num_head)
    taken = flops + extra_forwards(config) * forward
    rate = machine.gpus * machine.peak_tflops * 1e12 * machine.mfu / taken
    tokens = config.batch.pairs_per_step * machine.tokens_per_pair / machine.gpus
    micro_steps = math.ceil(tokens / config.batch.tokens_per_micro_batch)
    return {
        "flops_per_pair": flops,
        "flops_per_pair_with_reference_and_recomputation": taken,
        "pairs_per_second": rate,
        "hours": machine.pairs * config.train.epochs / rate / 3600,
        "micro_steps_per_step": micro_steps,
        "network_bytes_per_step_and_rank": network_bytes_per_step(setup, shapes, micro_steps),
    }


def text(plan: dict[str, Any], machine: Machine) -> str:
    """The plan for people, sizes in GiB."""
    sharded = f"ZeRO-{plan['stage']}" if plan["stage"] else f"{plan['engine']}, shards of {plan['shard_size']}"
    lines = [f"{plan['model']}: {plan['parameters'] / 1e9:.3g} B parameters, {plan['trained'] / 1e6:.4g} M trained"]
    lines += [f"{plan['gpus']} x {machine.gpu_memory_gib:g} GiB, {sharded}", "", "GiB per device"]
    lines += [f"  {part:<12} {size / GIB:8.2f}" for part, size in plan["device"].items()]
    over = plan["device_total"] - plan["device_limit"]
    verdict = "fits" if over <= 0 else f"does not fit: {over / GIB:.1f} GiB too much"
    lines += [f"  {'total':<12} {plan['device_total'] / GIB:8.2f}   {verdict}", ""]
    host = ", ".join(f"{part} {size / GIB:.1f}" for part, size in plan["host_per_node"].items())
    lines += [f"host memory per node    {host} GiB"]
    lines += [f"checkpoint              {plan['checkpoint'] / GIB:.1f} GiB"]
    pair = f"{plan['flops_per_pair'] / 1e12:.3g} TFLOP"
    lines += [f"a pair                  {pair} of {machine.tokens_per_pair:g} tokens"]
    speed = f"{plan['pairs_per_second']:.1f} pairs/s at an MFU of {machine.mfu:g}"
    lines += [f"speed                   {speed}; {plan['hours']:.1f} h for {machine.pairs:,} pairs"]
    network = plan["network_bytes_per_step_and_rank"] / GIB
    lines += [
        f"network                 {network:.1f} GiB per step and rank, {plan['micro_steps_per_step']} micro-steps"
    ]
    if not plan["fits"]:
        lines += ["", *_remedies(plan)]
    return "\n".join(lines)


def _remedies(plan: dict[str, Any]) -> list[str]:
    """What would make it fit, for people."""
    lines = ["what would fit, cheapest first"] if plan["proposals"] else ["no settings that we know would fit"]
    for proposal in plan["proposals"]:
        size, host = proposal["device_total"] / GIB, proposal["host_per_node"] / GIB
        held = f"{size:.1f} GiB" + (f", host {host:.0f} GiB per node" if host >= 1 else "")
        lines += [f"  {' '.join(proposal['flags'])}   ({held})"]
    if plan["fits_on_gpus"] is not None:
        lines += [f"  as it is, on {plan['fits_on_gpus']} devices"]
    return lines


def start_warning(config: Config, setup: Setup, limit: float, host_limit: float) -> str:
    """A line for the start of a run that will hardly fit into `limit` bytes per device, or `host_limit` of main memory
    per rank; else nothing."""
    shapes_of = counter(setup.dtype_bytes)
    device, host = memory(setup, shapes_of(config))
    total, offloaded = sum(device.values()), sum(host.values())
    if total <= limit and offloaded > host_limit:
        lora = "" if config.lora.r else ", or set --lora.r 16"
        return (
            f"warning: the plan keeps {offloaded / GIB:.1f} GiB of each rank in main memory, of which a rank's part is"
            f" {host_limit / GIB:.1f}: take more nodes{lora}"
        )
    if total <= limit:
        return ""
    part = max(device, key=device.__getitem__)
    found = proposals(setup, shapes_of, limit, wanted=1)
    return (
        f"warning: the plan takes {total / GIB:.1f} GiB per device, of which {part} {device[part] / GIB:.1f}, and there"
        f" are {limit / GIB:.1f}: {remedy(found)}"
    )


def remedy(found: list[Proposal]) -> str:
    """What to set, in words."""
    return f"set {' '.join(found[0].flags)}" if found else "take more or larger devices (python -m dpo.plan)"


def main(argv: list[str]) -> None:
    """Plan, print, and write JSON where asked.

    Raises:
        ConfigError: something cannot be used.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    flags = split_flags(rest)
    path = flags.pop("--config", [None])[0]
    values: dict[str, Any] = {"data.train": ("-",), "run.dir": "-"}
    values |= yaml_values(read_yaml(path), path) if path else {}
    config = build(values | flag_values(flags))
    machine = Machine(
        options.gpus,
        options.gpu_memory,
        options.gpus_per_node,
        options.peak_tflops,
        options.mfu,
        options.tokens_per_pair,
        options.scored_per_pair,
        options.pairs,
    )
    plan = report(config, machine)
    print(text(plan, machine))
    if options.json:
        Path(options.json).write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dpo.plan",
        description="Memory per device by part, host memory, FLOPs, hours and traffic of a config, from the model's "
        "config.json alone; and the cheapest settings that fit. Takes --config FILE and the flags of train_dpo.py.",
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=int, default=1, help="devices in all (default 1)")
    parser.add_argument("--gpu-memory", type=float, default=80, help="GiB of each (default 80)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="for the memory of a host (default 8)")
    parser.add_argument(
        "--peak-tflops", type=float, default=989, help="dense bf16 peak of a device (default 989: H100)"
    )
    parser.add_argument("--mfu", type=float, default=0.4, help="fraction of the peak (default 0.4, a guess)")
    parser.add_argument("--tokens-per-pair", type=float, default=800, help="in the batch's layout (default 800)")
    parser.add_argument("--scored-per-pair", type=float, default=500, help="response tokens of a pair (default 500)")
    parser.add_argument("--pairs", type=int, default=60_000, help="pairs of an epoch (default 60000)")
    parser.add_argument("--json", metavar="FILE", help="write the plan there as JSON, sizes in bytes")
    return parser
