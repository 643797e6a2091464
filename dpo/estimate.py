"""From shapes and settings to bytes per device, host memory, FLOPs, traffic and hours: arithmetic only, no torch.

What each part stands for, per device (T tokens of a micro-batch, b bytes of the compute dtype, W ranks, S of them
sharing one copy of the weights):

    weights      frozen ones in b; trained ones in fp32 (and a copy in b, where the engine computes with one); the
                 model's buffers, quantization's statistics among them, which every rank holds
    gradients    of the trained weights, in fp32
    optimizer    AdamW's two moments of each trained weight
    reference    the frozen copy, where there is one; its weights in fp32 as well, where it moves
    activations  T * bytes kept per token; with checkpointing the input of each layer, and one layer's own; offloaded,
                 two layers' part of it
    head         the chunk of logits (128 MiB), hidden states of scored positions and their gradient
    buffers      weights that an engine gathers, gradients that it is about to reduce
    allowance    CUDA context, NCCL, the allocator's fragments
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dpo.nvme import largest_share, pinned_bytes
from dpo.plan import Engine, choose_engine
from dpo.sections import Config

CONTEXT_BYTES = 2**30
"""CUDA context, cuBLAS and NCCL on one device; not measured by us."""
FRAGMENTS = 0.05
"""Of all else, for the allocator's rounding and fragments; not measured by us."""
HEAD_BYTES = 128 * 2**20
PARTS = ("weights", "gradients", "optimizer", "reference", "activations", "head", "buffers", "allowance")


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter as it is held.

    Attributes:
        layer: number of its decoder layer; None for embedding, norm and head.
        rows: its first dimension, along which FSDP2 shards.
        numel, itemsize: elements (packed, where quantized) and bytes of one in the model that is built.
    """

    layer: int | None
    rows: int
    numel: int
    itemsize: int
    is_trained: bool


@dataclass(frozen=True)
class Shapes:
    """A policy's weights and sizes (see `dpo.policy.Sizes` for the num_ fields of that name).

    Attributes:
        buffer_bytes: of buffers, which every rank holds.
        saved_per_token: bytes that autograd keeps per token without checkpointing, all layers together.
        max_tokens: positions that the model has.
    """

    weights: tuple[Weight, ...]
    buffer_bytes: int
    num_layers: int
    hidden: int
    vocabulary: int
    saved_per_token: float
    max_tokens: int | None
    num_all: int
    num_trained: int
    num_body: int
    num_body_trained: int
    num_head: int
    num_head_trained: int


@dataclass(frozen=True)
class Setup:
    """How a config would run.

    Attributes:
        stage: of ZeRO; 0 for other engines.
        dtype_bytes: of an element of the compute dtype.
        zero: the `zero_optimization` of the DeepSpeed JSON.
    """

    config: Config
    engine: Engine
    world_size: int
    shard_size: int
    dtype_bytes: int
    stage: int = 0
    zero: dict[str, Any] | None = None

    @staticmethod
    def of(config: Config, world_size: int, dtype_bytes: int, ds_json: dict[str, Any] | None = None) -> Setup:
        """The setup of a config on so many ranks; `ds_json` is the checked file of `parallel.ds_config`.

        Raises:
            ConfigError: the engine or the shard size does not fit the ranks.
        """
        engine, shard_size = choose_engine(config, world_size)
        zero = None if ds_json is None else ds_json["zero_optimization"]
        return Setup(config, engine, world_size, shard_size, dtype_bytes, zero["stage"] if zero else 0, zero)

    def offloads(self, what: str) -> bool:
        """Whether "param" or "optimizer" state lies on the host, or on its disk."""
        if self.engine == "fsdp2":
            return self.config.parallel.offload
        return bool(self.zero and (self.zero.get(f"offload_{what}") or {}).get("device", "none") != "none")

    @property
    def on_disk(self) -> dict[str, Any] | None:
        """The `offload_param` of weights that lie on a disk; None where they do not."""
        offload = (self.zero or {}).get("offload_param") or {}
        return offload if offload.get("device") == "nvme" else None


def memory(setup: Setup, shapes: Shapes) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes by part on one device, and on the host of one rank (offloaded state)."""
    held = {"single": _single, "fsdp2": _fsdp2, "deepspeed": _deepspeed}[setup.engine](setup, shapes)
    held["reference"] = _reference(setup, shapes)
    host = dict.fromkeys(held, 0.0)
    moved = {"optimizer": ("optimizer", "gradients", "masters"), "param": ("weights",)}
    for what, parts in moved.items():
        for part in parts if setup.offloads(what) else ():
            host[part], held[part] = held.get(part, 0.0), 0.0
    if setup.on_disk is not None:
        most = setup.on_disk.get("max_in_cpu", 1e9) * setup.dtype_bytes
        host["weights"], host["buffers"] = min(host["weights"], most), _disk_buffers(setup, shapes)
    for side in (held, host):
        side["weights"] += side.pop("masters", 0.0)
    held["weights"] += shapes.buffer_bytes
    if setup.config.reference.offload:
        host["reference"], held["reference"] = held["reference"], 0.0
    held["activations"], host["activations"] = activations(setup, shapes)
    held["head"] = HEAD_BYTES + 2.0 * setup.config.batch.tokens_per_micro_batch * shapes.hidden * setup.dtype_bytes
    held["allowance"] = CONTEXT_BYTES + FRAGMENTS * sum(held.values())
    return {part: held[part] for part in PARTS}, {part: size for part, size in host.items() if size}


def activations(setup: Setup, shapes: Shapes) -> tuple[float, float]:
    """Bytes of activations at the largest micro-batch, on the device and on the host.

    recompute=selective is counted as if all were kept, which is more than it does.
    """
    train, tokens = setup.config.train, setup.config.batch.tokens_per_micro_batch
    kept, working = tokens * shapes.saved_per_token, 0.0
    if train.gradient_checkpointing and train.recompute == "full":
        working = kept / shapes.num_layers
        kept = float(tokens * shapes.num_layers * shapes.hidden * setup.dtype_bytes)
    if not train.activation_offload:
        return working + kept, 0.0
    return working + 2 * kept / shapes.num_layers, kept  # one layer's on their way, the next one's in use


def _trained(shapes: Shapes) -> int:
    return sum(weight.numel for weight in shapes.weights if weight.is_trained)


def _largest(shapes: Shapes) -> int:
    return max((weight.numel for weight in shapes.weights if weight.is_trained), default=0)


def _frozen_bytes(weights: Iterable[Weight]) -> float:
    return float(sum(weight.numel * weight.itemsize for weight in weights if not weight.is_trained))


def _optimizer_bytes(setup: Setup, num_trained: float) -> float:
    return num_trained * (2.0 * (1 + 4 / 256) if "8bit" in setup.config.optim.name else 8.0)


def _single(setup: Setup, shapes: Shapes) -> dict[str, float]:
    num_trained, mixed = _trained(shapes), setup.dtype_bytes < 4
    return {
        "weights": _frozen_bytes(shapes.weights) + num_trained * (4 + setup.dtype_bytes * mixed),
        "gradients": 4.0 * num_trained,
        "optimizer": _optimizer_bytes(setup, num_trained),
        "buffers": _largest(shapes) * setup.dtype_bytes,
    }


def _fsdp2(setup: Setup, shapes: Shapes) -> dict[str, float]:
    """A gathered layer and the next one, the root, which stays gathered, and a layer's gradients before and after
    they are reduced."""

    def share(weight: Weight) -> float:
        return math.ceil(weight.rows / setup.shard_size) * weight.numel / weight.rows

    num_trained = sum(share(weight) for weight in shapes.weights if weight.is_trained)
    frozen = sum(share(weight) * weight.itemsize for weight in shapes.weights if not weight.is_trained)
    root, layer = _gathered(setup, shapes, root=True), _gathered(setup, shapes, root=False)
    return {
        "weights": frozen + 4.0 * num_trained,
        "gradients": 4.0 * num_trained,
        "optimizer": _optimizer_bytes(setup, num_trained),
        "buffers": root[0] + 2 * layer[0] + max(root[1], layer[1]) * (setup.dtype_bytes + 4),
    }


def _gathered(setup: Setup, shapes: Shapes, *, root: bool) -> tuple[float, float]:
    """Bytes of the largest group of weights when it is whole, and how many of them are trained."""
    groups: dict[int | None, list[float]] = {}
    for weight in shapes.weights:
        if (weight.layer is None) == root:
            group = groups.setdefault(weight.layer, [0.0, 0.0])
            group[0] += weight.numel * (setup.dtype_bytes if weight.is_trained else weight.itemsize)
            group[1] += weight.numel * weight.is_trained
    return max((group[0] for group in groups.values()), default=0.0), max((g[1] for g in groups.values()), default=0.0)


def _deepspeed(setup: Setup, shapes: Shapes) -> dict[str, float]:
    """Weights in the compute dtype, and the fp32 ones that are trained, in partitions."""
    assert setup.zero is not None
    num_trained, ranks, b = _trained(shapes), setup.world_size, setup.dtype_bytes
    whole = _frozen_bytes(shapes.weights) + num_trained * b
    bucket = min(setup.zero.get("reduce_bucket_size", 5e8), num_trained) * 4
    buffers = bucket * (2 if setup.zero.get("overlap_comm") else 1)
    if setup.stage == 3:
        buffers += min(setup.zero.get("stage3_max_live_parameters", 1e9) * b, whole)
        weights = whole / ranks
    else:
        weights = whole
    return {
        "weights": weights,
        "masters": 4.0 * num_trained / ranks,
        # Stage 1 keeps a micro-step's gradients in the compute dtype beside their sum in fp32.
        "gradients": num_trained * (4.0 / ranks if setup.stage > 1 else 4 + b * (b < 4)),
        "optimizer": _optimizer_bytes(setup, num_trained / ranks),
        "buffers": buffers,
    }


def _disk_buffers(setup: Setup, shapes: Shapes) -> float:
    """Page-locked buffers of one rank, through which weights on a disk pass."""
    assert setup.on_disk is not None
    largest = max(weight.numel for weight in shapes.weights)
    return float(pinned_bytes(setup.on_disk, largest_share(largest, setup.world_size), setup.dtype_bytes))


def _reference(setup: Setup, shapes: Shapes) -> float:
    """A frozen copy in the compute dtype, sharded as the policy is; a stored one is made from it where pairs lack."""
    if not has_copy(setup.config):
        return 0.0
    frozen = sum(w.numel * (setup.dtype_bytes if w.is_trained else w.itemsize) for w in shapes.weights)
    if setup.config.reference.sync_steps is not None:
        ranks = {"single": 1, "fsdp2": setup.shard_size, "deepspeed": setup.world_size}[setup.engine]
        return _copy(setup, shapes, frozen) + 4.0 * sum(w.numel for w in shapes.weights if w.is_trained) / ranks
    return _copy(setup, shapes, frozen)


def _copy(setup: Setup, shapes: Shapes, frozen: float) -> float:
    """What a model of so many bytes of frozen weights holds on a rank."""
    if setup.engine == "fsdp2":  # after a forward without backward the root stays gathered
        return frozen / setup.shard_size + _gathered(setup, shapes, root=True)[0]
    if setup.stage == 3:  # so do as many elements as DeepSpeed's default for stage3_max_live_parameters allows
        return frozen / setup.world_size + min(1e9 * setup.dtype_bytes, frozen)
    return frozen


def has_copy(config: Config) -> bool:
    """Whether a frozen copy of the model scores beside the policy."""
    return config.loss.needs_reference and config.reference_source == "frozen_copy"


def runs_reference(config: Config) -> bool:
    """Whether the reference computes in every step; a stored one is taken to have everything."""
    return config.loss.needs_reference and config.reference.mode != "stored"


def host_load_bytes(setup: Setup, shapes: Shapes) -> float:
    """Host memory of rank 0 while weights are loaded: the whole model, where it gives the others their shards."""
    whole = sum(weight.numel * weight.itemsize for weight in shapes.weights)
    if setup.stage == 3 and setup.config.model.quantization == "none":
        return whole / setup.world_size
    return float(whole)


def step_flops(shapes: Shapes, tokens: float, scored_tokens: float) -> float:
    """`train_flops` of a policy."""
    body, head = (shapes.num_body, shapes.num_body_trained), (shapes.num_head, shapes.num_head_trained)
    return train_flops(body, head, tokens, scored_tokens)


def train_flops(body: tuple[int, int], head: tuple[int, int], tokens: float, scored_tokens: float) -> float:
    """Floating-point operations of a forward and backward of so many tokens, of which so many reach the head.

    Without recompute and without the reference: 2 per weight and token forward, 2 for the gradient of activations, and
    2 for the gradient of each trained weight. The embedding is a look-up and not counted; attention scores, a few
    percent at these lengths, are left out.

    Args:
        body, head: weights of each, and how many of them are trained.
    """
    return tokens * (4 * body[0] + 2 * body[1]) + scored_tokens * (4 * head[0] + 2 * head[1])


def extra_forwards(config: Config) -> float:
    """Forwards of the body beside the policy's own, in forwards: the live reference and recomputation."""
    return float(runs_reference(config) + config.train.gradient_checkpointing)


def network_bytes_per_step(setup: Setup, shapes: Shapes, num_micro_steps: float) -> float:
    """Bytes that one rank receives in a step: gathered weights, reduced gradients."""
    num_trained = _trained(shapes)
    whole = sum(w.numel * (setup.dtype_bytes if w.is_trained else w.itemsize) for w in shapes.weights)
    gathers = 2 + runs_reference(setup.config)
    size = setup.shard_size if setup.engine == "fsdp2" else setup.world_size
    share = (size - 1) / size
    if setup.engine == "single":
        return 0.0
    if setup.engine == "fsdp2" or setup.stage == 3:
        replicas = setup.world_size // size
        reduced = 8.0 * num_trained / size * (replicas - 1) / replicas
        return num_micro_steps * share * (gathers * whole + 4.0 * num_trained) + reduced
    updated = share * num_trained * setup.dtype_bytes
    return share * num_trained * 4.0 * (2 if setup.stage == 1 else num_micro_steps) + updated


def checkpoint_bytes(setup: Setup, shapes: Shapes) -> float:
    """Trained weights in fp32 and the optimizer's state."""
    num_trained = _trained(shapes)
    return 4.0 * num_trained + _optimizer_bytes(setup, num_trained)
